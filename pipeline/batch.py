"""What one update learns from: the examples of some prompts, as the objective needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np

from judges.interface import text_of
from workers.learner.needs import Needs, Records
from workers.messages import (
    BatchCompletion,
    BatchExample,
    BatchLabel,
    BatchPair,
    BatchRanking,
    BatchSample,
    Fate,
    Pair,
    PromptGroup,
    UpdateBatch,
)

Place: TypeAlias = Callable[[int], int]
"""From a completion's sample index to its index in the batch; it joins the batch when asked for."""


def update_batch(
    groups: Sequence[PromptGroup],
    needs: Needs,
    truncated: Literal["train", "mask", "drop"] = "train",
    earlier: frozenset[int] = frozenset(),
    given: bool = False,
) -> UpdateBatch:
    """What is learned from these prompts; a completion in several examples stands there once.

    ``earlier`` positions are those of prompts that are replayed; ``given``: all were.
    """
    completions: list[BatchCompletion] = []
    examples: list[BatchExample] = []
    for group in groups:
        places: dict[int, int] = {}

        def place(sample: int, group: PromptGroup = group, places: dict[int, int] = places) -> int:
            if sample not in places:
                places[sample] = len(completions)
                completion = group.completions[sample]
                learn = completion.finished or truncated != "mask"
                replayed = group.prompt.position in earlier
                completions.append(
                    BatchCompletion(group.prompt.ids, completion, learn, replayed, given)
                )
            return places[sample]

        examples += EXAMPLES[needs.records](group, place)
    mismatched = mismatched_completions(groups) if needs.mismatched else ()
    return UpdateBatch(tuple(completions), tuple(examples), mismatched)


def _learned(group: PromptGroup) -> list[Pair]:
    return [pair for pair in group.pairs if pair.fate is Fate.LEARN]


def pairs_of(group: PromptGroup, place: Place) -> Iterator[BatchPair]:
    """The prompt's learned pairs."""
    for pair in _learned(group):
        yield BatchPair(place(pair.chosen), place(pair.rejected), pair.label_prob)


def labels_of(group: PromptGroup, place: Place) -> Iterator[BatchLabel]:
    """The prompt's learned labels; of each learned pair one desirable and one undesirable."""
    prompt = text_of(group.prompt.content)
    for label in group.labels:
        if label.fate is Fate.LEARN:
            yield BatchLabel(place(label.sample), label.desirable, prompt)
    for pair in _learned(group):
        yield BatchLabel(place(pair.chosen), True, prompt)
        yield BatchLabel(place(pair.rejected), False, prompt)


def rankings_of(group: PromptGroup, place: Place) -> Iterator[BatchRanking]:
    """The prompt's rankings, best first: chains of learned pairs.

    A ranking is cut where a link of it was not to be learned from.
    """
    chain: list[int] = []
    for pair in _learned(group):
        if chain and chain[-1] != pair.chosen:
            yield BatchRanking(tuple(place(sample) for sample in chain))
            chain = []
        chain = [*(chain or [pair.chosen]), pair.rejected]
    if chain:
        yield BatchRanking(tuple(place(sample) for sample in chain))


def samples_of(group: PromptGroup, place: Place) -> Iterator[BatchSample]:
    """The policy's own sample, the first, in each learned pair with its opponent."""
    for pair in _learned(group):
        won = pair.chosen == 0
        yield BatchSample(place(0), pair.label_prob if won else 1.0 - pair.label_prob)


EXAMPLES: Mapping[Records, Callable[[PromptGroup, Place], Iterator[BatchExample]]] = {
    "pairs": pairs_of,
    "unpaired": labels_of,
    "ranked": rankings_of,
    "sampled": samples_of,
}


def mismatched_completions(groups: Sequence[PromptGroup]) -> tuple[BatchCompletion, ...]:
    """Every learned completion under the prompt before its own, in order of prompt positions.

    The first prompt takes the last's place before it, and equal prompts are passed over, so which
    completion meets which prompt does not depend on the order of the batch (KTO,
    arXiv:2402.01306). Empty where all prompts are equal.
    """
    ordered = sorted(groups, key=lambda group: group.prompt.position)
    found: list[BatchCompletion] = []
    for index, group in enumerate(ordered):
        before = (ordered[index - back].prompt for back in range(1, len(ordered)))
        other = next((p for p in before if not np.array_equal(p.ids, group.prompt.ids)), None)
        if other is not None:
            labelled = [label.sample for label in group.labels if label.fate is Fate.LEARN]
            paired = [sample for pair in _learned(group) for sample in (pair.chosen, pair.rejected)]
            for sample in dict.fromkeys(labelled + paired):
                found.append(BatchCompletion(other.ids, group.completions[sample]))
    return tuple(found)
