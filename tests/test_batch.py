"""What an update learns from: labels, rankings, samples and mismatched completions of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.batch import mismatched_completions, update_batch
from workers.learner.needs import Needs
from workers.messages import (
    BatchLabel,
    BatchRanking,
    BatchSample,
    Completion,
    Fate,
    Judgement,
    Label,
    Pair,
    Prompt,
    PromptGroup,
    UpdateBatch,
)


def group(
    position: int,
    pairs: Sequence[tuple[int, int, Fate] | tuple[int, int]] = ((0, 1),),
    labels: Sequence[tuple[int, bool, Fate]] = (),
    samples: int = 5,
    prompt_ids: Sequence[int] | None = None,
) -> PromptGroup:
    """A prompt whose completions' single token is their sample index; labels of pairs are 0.9."""
    ids = np.array([position] if prompt_ids is None else prompt_ids, np.int64)
    completions = tuple(
        Completion(
            position=position,
            sample=sample,
            seed=0,
            version=0,
            ids=np.array([sample], np.int64),
            logprobs=np.zeros(1, np.float32),
            sampling_logprobs=None,
            finished=True,
            text="",
        )
        for sample in range(samples)
    )
    return PromptGroup(
        Prompt(position, ids, f"prompt {position}"),
        completions,
        Judgement(position, np.zeros(samples), (None,) * samples),
        tuple(Pair(position, p[0], p[1], 0.9, p[2] if len(p) > 2 else Fate.LEARN) for p in pairs),
        tuple(Label(position, *label) for label in labels),
    )


def held(batch: UpdateBatch) -> list[tuple[int, int]]:
    return [(c.completion.position, c.completion.sample) for c in batch.completions]


def test_a_pair_gives_a_desirable_and_an_undesirable_completion() -> None:
    batch = update_batch([group(3, [(2, 0), (1, 4, Fate.TIE), (2, 1)])], Needs("unpaired"))
    assert held(batch) == [(3, 2), (3, 0), (3, 1)]
    assert batch.examples == (
        BatchLabel(0, True, "prompt 3"),
        BatchLabel(1, False, "prompt 3"),
        BatchLabel(0, True, "prompt 3"),
        BatchLabel(2, False, "prompt 3"),
    )


def test_labels_without_partners() -> None:
    labels = [(0, True, Fate.LEARN), (1, False, Fate.MARGIN), (4, False, Fate.LEARN)]
    batch = update_batch([group(3, (), labels)], Needs("unpaired"))
    assert held(batch) == [(3, 0), (3, 4)]
    assert [(e.completion, e.desirable) for e in batch.examples] == [(0, True), (1, False)]


def test_rankings_are_chains_cut_where_a_link_was_dropped() -> None:
    chain = [(4, 2), (2, 0), (0, 3, Fate.MARGIN), (3, 1), (4, 1, Fate.TIE)]
    batch = update_batch([group(3, chain), group(5, [(1, 0)])], Needs("ranked"))
    assert held(batch) == [(3, 4), (3, 2), (3, 0), (3, 3), (3, 1), (5, 1), (5, 0)]
    assert batch.examples == (
        BatchRanking((0, 1, 2)),
        BatchRanking((3, 4)),
        BatchRanking((5, 6)),
    )


def test_the_first_sample_plays_the_second() -> None:
    groups = [group(3, [(0, 1)]), group(4, [(1, 0)]), group(5, [(1, 0, Fate.INVALID)])]
    batch = update_batch(groups, Needs("sampled"))
    assert held(batch) == [(3, 0), (4, 0)]
    assert batch.examples == (BatchSample(0, 0.9), BatchSample(1, 1.0 - 0.9))


def meetings(groups: Sequence[PromptGroup]) -> list[tuple[list[int], int, int]]:
    return [
        (item.prompt_ids.tolist(), item.completion.position, item.completion.sample)
        for item in mismatched_completions(groups)
    ]


def test_every_learned_completion_meets_the_prompt_before_its_own() -> None:
    groups = [
        group(7, [(0, 1)]),
        group(2, [(3, 1), (3, 0)]),
        group(4, [(0, 1, Fate.TIE)]),  # nothing learned, but its prompt takes part
    ]
    expected = [([7], 2, 3), ([7], 2, 1), ([7], 2, 0), ([4], 7, 0), ([4], 7, 1)]
    assert meetings(groups) == expected
    assert meetings(groups[::-1]) == expected
    labelled = replace(groups[0], pairs=(), labels=(Label(7, 4, False, Fate.LEARN),))
    assert meetings([labelled, groups[2]]) == [([4], 7, 4)]


def test_equal_prompts_are_passed_over() -> None:
    groups = [
        group(1, [(0, 1)], prompt_ids=[9]),
        group(2, [(0, 1)], prompt_ids=[8]),
        group(3, [(0, 1)], prompt_ids=[8]),
    ]
    assert [(ids, position) for ids, position, _ in meetings(groups)[::2]] == [
        ([8], 1),
        ([9], 2),
        ([9], 3),
    ]
    assert meetings([groups[1], groups[2]]) == []
    needs = Needs("unpaired", mismatched=True)
    assert len(update_batch(groups, needs).mismatched) == 6
    assert update_batch(groups, Needs("unpaired")).mismatched == ()
