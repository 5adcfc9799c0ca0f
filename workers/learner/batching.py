"""Micro-batches filled by tokens, sorted by length, that never part an example."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workers.messages import BatchCompletion, BatchExample, UpdateBatch


@dataclass(frozen=True, slots=True, eq=False)
class PaddedRows:
    """Completions as the model reads them: ids [B, T] padded right, each one's start and tokens."""

    ids_BT: Tensor
    starts_B: Tensor
    lengths_B: Tensor


def pad_rows(completions: Sequence[BatchCompletion]) -> PaddedRows:
    """Prompt and completion of each row, padded on the right with token 0."""
    starts = [len(c.prompt_ids) for c in completions]
    lengths = [len(c.completion.ids) for c in completions]
    ids = np.zeros((len(completions), max(map(sum, zip(starts, lengths, strict=True)))), np.int64)
    for row, item in enumerate(completions):
        ids[row, : starts[row]] = item.prompt_ids
        ids[row, starts[row] : starts[row] + lengths[row]] = item.completion.ids
    return PaddedRows(torch.from_numpy(ids), torch.tensor(starts), torch.tensor(lengths))


def micro_batches(
    batch: UpdateBatch, tokens_per_micro_batch: int
) -> list[tuple[list[int], list[BatchExample]]]:
    """The completions of each micro-batch, by index, and the examples over them."""
    split = rows_by_tokens(batch.completions, batch.examples, tokens_per_micro_batch)
    return [(rows, [batch.examples[e] for e in examples]) for rows, examples in split]


def rows_by_tokens(
    completions: Sequence[BatchCompletion],
    examples: Sequence[BatchExample],
    tokens_per_micro_batch: int,
) -> Iterator[tuple[list[int], list[int]]]:
    """Split completions into micro-batches: (indices of completions, of examples) of each.

    Completions that share an example, directly or through others, stay together; a micro-batch
    holds at most ``tokens_per_micro_batch`` tokens, padding included, or one such group. Longest
    first. The split depends on nothing but the arguments, so reference and policy meet the same.
    """
    groups = _connected(len(completions), examples)
    width = [len(c.prompt_ids) + len(c.completion.ids) for c in completions]
    order = sorted(groups, key=lambda rows: (-max(width[r] for r in rows), rows[0]))
    examples_of: dict[int, list[int]] = {}
    for index, example in enumerate(examples):
        examples_of.setdefault(example.rows[0], []).append(index)

    batch: list[int] = []
    longest = 0
    for rows in order:
        candidate = max(longest, *(width[r] for r in rows))
        if batch and candidate * (len(batch) + len(rows)) > tokens_per_micro_batch:
            yield batch, [e for r in batch for e in examples_of.get(r, [])]
            batch, candidate = [], max(width[r] for r in rows)
        batch = batch + rows
        longest = candidate
    if batch:
        yield batch, [e for r in batch for e in examples_of.get(r, [])]


def _connected(count: int, examples: Sequence[BatchExample]) -> list[list[int]]:
    """Groups of completion indices connected through examples, each in ascending order."""
    root = list(range(count))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for example in examples:
        first, *others = example.rows
        for other in others:
            a, b = find(first), find(other)
            root[max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = {}
    for i in range(count):
        groups.setdefault(find(i), []).append(i)
    return list(groups.values())
