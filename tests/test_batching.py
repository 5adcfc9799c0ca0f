"""Micro-batches hold whole pairs, keep their budget and depend on nothing but what is batched."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.learner_helpers import batch_of, item
from workers.learner.batching import pad_rows, rows_by_tokens
from workers.messages import UpdateBatch


def lengths_batch(
    lengths: list[tuple[int, int]], pairs: list[tuple[int, int]] | None = None
) -> UpdateBatch:
    """Completions of (prompt, completion) lengths."""
    return batch_of([item([1] * p, [3] * c) for p, c in lengths], *(pairs or []))


def micro_batches(batch: UpdateBatch, budget: int) -> list[tuple[list[int], list[int]]]:
    return list(rows_by_tokens(batch.completions, batch.examples, budget))


def widths(batch: UpdateBatch, rows: list[int]) -> list[int]:
    return [len(c.prompt_ids) + len(c.completion.ids) for c in (batch.completions[r] for r in rows)]


def is_one_group(rows: list[int], edges: list[tuple[int, int]]) -> bool:
    reached = {rows[0]}
    for _ in rows:
        reached |= {end for edge in edges if reached & set(edge) for end in edge}
    return reached >= set(rows)


@st.composite
def batches(draw: st.DrawFn) -> UpdateBatch:
    lengths = draw(
        st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=12)
    )
    index = st.integers(0, len(lengths) - 1)
    edge = st.tuples(index, index).filter(lambda pair: pair[0] != pair[1])
    return lengths_batch(lengths, draw(st.lists(edge, max_size=10)))


@settings(max_examples=200, deadline=None)
@given(batch=batches(), budget=st.integers(1, 120))
def test_every_completion_and_pair_once_within_the_budget(batch: UpdateBatch, budget: int):
    found = micro_batches(batch, budget)
    assert sorted(r for rows, _ in found for r in rows) == list(range(len(batch.completions)))
    assert sorted(p for _, pairs in found for p in pairs) == list(range(len(batch.examples)))
    for rows, pairs in found:
        edges = [(batch.examples[p].chosen, batch.examples[p].rejected) for p in pairs]
        assert {end for edge in edges for end in edge} <= set(rows)
        assert max(widths(batch, rows)) * len(rows) <= budget or is_one_group(rows, edges)
    longest = [max(widths(batch, rows)) for rows, _ in found]
    assert longest == sorted(longest, reverse=True)
    assert micro_batches(batch, budget) == found


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        # Widths 4, 10, 6, 6, 7, 3; the groups are {1, 4}, {2, 3} and {0, 5}, in this order.
        (60, [([1, 4, 2, 3, 0, 5], [1, 2, 0])]),
        (59, [([1, 4, 2, 3], [1, 2]), ([0, 5], [0])]),
        (40, [([1, 4, 2, 3], [1, 2]), ([0, 5], [0])]),
        (39, [([1, 4], [1]), ([2, 3, 0, 5], [2, 0])]),
        (24, [([1, 4], [1]), ([2, 3, 0, 5], [2, 0])]),
        (23, [([1, 4], [1]), ([2, 3], [2]), ([0, 5], [0])]),
        (1, [([1, 4], [1]), ([2, 3], [2]), ([0, 5], [0])]),
    ],
)
def test_micro_batches_by_hand(budget: int, expected):
    lengths = [(2, 2), (3, 7), (1, 5), (5, 1), (3, 4), (1, 2)]
    batch = lengths_batch(lengths, [(0, 5), (4, 1), (2, 3)])
    assert micro_batches(batch, budget) == expected


def test_pairs_that_share_a_completion_stay_together():
    batch = lengths_batch([(1, 1)] * 6, [(4, 1), (5, 3), (3, 1)])
    assert micro_batches(batch, 1) == [([0], []), ([1, 3, 4, 5], [2, 0, 1]), ([2], [])]


def test_rows_are_padded_on_the_right():
    padded = pad_rows([item([1, 5], [6]), item([1], [7, 8, 2]), item([1, 9, 9], [4, 4])])
    assert padded.ids_BT.tolist() == [[1, 5, 6, 0, 0], [1, 7, 8, 2, 0], [1, 9, 9, 4, 4]]
    assert padded.starts_B.tolist() == [2, 1, 3]
    assert padded.lengths_B.tolist() == [1, 3, 2]
