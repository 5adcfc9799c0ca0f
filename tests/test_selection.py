"""Which prompts are judged: evenly over the stream, exactly so many, and the same after a crash."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.selection import Selection
from workers.judge_worker import Disputed
from workers.messages import Prompt


class Learner:
    """Notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def submit(self, *call: Any) -> Any:
        self.asked.append(call)
        return "a future"

    def restart(self) -> None:
        raise AssertionError


class Sampled:
    def result(self) -> Any:
        raise AssertionError("it is not waited for")


SAMPLED = Sampled()


def selection(
    how: Any, judged: int, prompts: int, by: tuple[str, ...] = (), seed: int = 0
) -> Selection:
    return Selection(how, judged, prompts, by, Learner(), seed)


def unit(start: int, size: int) -> list[Prompt]:
    return [Prompt(position, np.array([1]), "p") for position in range(start, start + size)]


def drawn(chosen: Selection, start: int, size: int) -> frozenset[int]:
    selected = chosen.of(unit(start, size), SAMPLED)
    assert isinstance(selected, frozenset)
    return selected


STREAMS = st.lists(st.integers(1, 20), min_size=1, max_size=30).flatmap(
    lambda sizes: st.tuples(st.just(sizes), st.integers(1, max(1, sum(sizes) - 1)))
)
"""The sizes of the work units of a run, and how many of their prompts are judged."""


@settings(max_examples=200, deadline=None)
@given(STREAMS, st.integers(0, 2**62))
def test_exactly_so_many_are_judged_evenly_spread_whatever_the_units(stream, seed):
    sizes, judged = stream
    prompts = sum(sizes)
    if judged >= prompts:
        return
    starts = [0, *itertools.accumulate(sizes)]
    by_judges = selection("uncertainty", judged, prompts, ("one", "two"))
    by_margin = selection("uncertainty", judged, prompts)
    so_far = 0
    for start, size in zip(starts, sizes, strict=False):
        selected = drawn(selection("random", judged, prompts, seed=seed), start, size)
        assert selected <= set(range(size))
        count = len(selected)
        disputed = by_judges.of(unit(start, size), SAMPLED)
        assert disputed == Disputed(count, ("one", "two"))
        assert by_margin.of(unit(start, size), SAMPLED) == "a future"
        so_far += count
        assert abs(so_far - judged * (start + size) / prompts) < 1
    assert so_far == judged
    asked = by_margin.learner.asked  # type: ignore[attr-defined]
    assert [call[0] for call in asked] == ["least_sure"] * len(sizes)
    assert [len(call[1]) for call in asked] == sizes
    assert all(call[2] is SAMPLED for call in asked)
    assert sum(call[3] for call in asked) == judged


def test_by_hand():
    # 3 of 10 prompts in units of 4, 4 and 2: 3·4//10 = 1, 3·8//10 = 2, 3.
    chosen = selection("random", 3, 10)
    assert [len(drawn(chosen, *at)) for at in ((0, 4), (4, 4), (8, 2))] == [1, 1, 1]
    # What a longer stream has beyond the run is not paid for.
    assert drawn(chosen, 10, 5) == frozenset()
    assert len(drawn(chosen, 8, 50)) == 1


@pytest.mark.parametrize(
    ("how", "judged"), [(None, 3), ("random", 10), ("random", 11), ("uncertainty", 10)]
)
def test_all_are_judged_where_there_is_nothing_to_choose(how, judged):
    assert selection(how, judged, 10).of(unit(0, 4), SAMPLED) is None


def test_draws_depend_on_seed_and_position_only():
    at = [(start, 8) for start in range(0, 80, 8)]
    first = [drawn(selection("random", 40, 80), *each) for each in at]
    np.random.seed(1)
    chosen = selection("random", 40, 80)
    again = {each: drawn(chosen, *each) for each in reversed(at)}
    assert [again[each] for each in at] == first
    assert [drawn(selection("random", 40, 80, seed=1), *each) for each in at] != first
    assert len(set(first)) > 1


def test_every_prompt_of_a_unit_can_be_drawn():
    # 1 of 4, 400 times: each is expected 100 times, with a standard deviation of 8.7.
    chosen = selection("random", 400, 1_600)
    counts = np.zeros(4)
    for start in range(0, 1_600, 4):
        counts[list(drawn(chosen, start, 4))] += 1
    assert counts.sum() == 400
    assert (np.abs(counts - 100) < 50).all()
