"""From the rows of a given set to a prompt's group: what a round holds of it."""

from __future__ import annotations

import json
from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np

from pipeline.pair_rows import PairRow, Side
from workers.messages import Completion, Fate, IntArray, Judgement, Label, Pair, Prompt, PromptGroup


@dataclass(frozen=True, slots=True, eq=False)
class EncodedRow:
    """A row with its ids: of its prompt [P], and of each side [T]."""

    row: PairRow
    prompt_ids: IntArray
    ids: tuple[IntArray, ...]


def group_of(
    position: int, rows: Sequence[EncodedRow], version: int, ends: Set[int]
) -> PromptGroup:
    """A prompt with the completions of its rows, each once, in the order of their samples.

    ``ends`` are the ids that end a completion; ``version`` is said to have written them.
    """
    keys = [_keys(encoded.row) for encoded in rows]
    places = {key: at for at, key in enumerate(sorted({key for row in keys for key in row}))}
    completions: dict[int, Completion] = {}
    pairs, labels = [], []
    for encoded, row_keys in zip(rows, keys, strict=True):
        row, at = encoded.row, [places[key] for key in row_keys]
        for sample, side, ids in zip(at, row.sides, encoded.ids, strict=True):
            completions[sample] = _completion(position, sample, version, side, ids, ends)
        if row.desirable is not None:
            labels.append(Label(position, at[0], row.desirable, Fate.LEARN))
        else:
            pairs.append(Pair(position, at[0], at[1], row.label_prob, _fate(encoded)))
    first = rows[0]
    columns = json.loads(json.dumps(dict(first.row.columns), default=str))
    return PromptGroup(
        Prompt(position, first.prompt_ids, first.row.prompt, columns),
        tuple(completions[sample] for sample in range(len(places))),
        _unasked(position, len(places)),
        tuple(pairs),
        tuple(labels),
    )


def sample_of(side: Side) -> int:
    """The sample index that a run recorded of a side; only of a row that has a place."""
    assert side.sampled is not None
    assert side.sampled.sample is not None
    return side.sampled.sample


def _keys(row: PairRow) -> list[int]:
    """What tells the sides from others of the position: their samples in the run's round."""
    return list(range(len(row.sides))) if row.place is None else [*map(sample_of, row.sides)]


def _completion(
    position: int, sample: int, version: int, side: Side, ids: IntArray, ends: Set[int]
) -> Completion:
    """A side as a sample: without a record, its log-probabilities are all NaN.

    They count as those of another sampler, never of the policy as it stands.
    """
    record = side.sampled
    logprobs = None if record is None else record.logprobs
    behaviour = None if record is None or logprobs is None else record.sampling_logprobs
    if logprobs is None:
        logprobs = np.full(len(ids), np.nan, np.float32)
    finished = True
    if record is not None:
        ended = int(ids[-1]) in ends
        finished = ended if record.finished is None else record.finished
    return Completion(
        position,
        sample,
        seed=0 if record is None else record.seed,
        version=version,
        ids=ids,
        logprobs=logprobs,
        sampling_logprobs=logprobs.copy() if behaviour is None else behaviour,
        finished=finished,
        text=side.text,
        reference_share=0.0 if record is None else record.reference_share,
    )


def _fate(encoded: EncodedRow) -> Fate:
    """What an exporting run learned from stays that, even a tie of identical completions."""
    chosen, rejected = encoded.ids
    same = encoded.row.place is None and np.array_equal(chosen, rejected)
    return Fate.IDENTICAL if same else Fate.LEARN


def _unasked(position: int, completions: int) -> Judgement:
    """No judge was asked: what is known is in the pairs."""
    return Judgement(
        position,
        np.full(completions, np.nan),
        (None,) * completions,
        declined=np.ones(completions, bool),
    )
