"""The dial: equal budgets and bounded lag at every setting; which pairs each update gets."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.batch import update_batch
from pipeline.learner import RemoteLearner
from pipeline.resampling import Dial, RoundPlan, whole_run
from pipeline.resampling_options import ResamplingOptions
from tests.lessons import batches, lesson
from workers.generator import SamplingOptions
from workers.learner.needs import Needs
from workers.messages import (
    BatchPair,
    Completion,
    Fate,
    Judgement,
    Pair,
    Prompt,
    PromptGroup,
    Round,
    UpdateBatch,
)

PAIRS = Needs()
updates_per_round = st.one_of(st.integers(1, 12), st.just(math.inf))
dials = given(
    updates=st.integers(1, 40),
    prompts=st.integers(1, 5),
    per_round=updates_per_round,
    passes=st.integers(1, 4),
    in_flight=st.integers(0, 3),
)


def dial_of(per_round: float, passes: int, in_flight: int, updates: int, prompts: int) -> Dial:
    options = ResamplingOptions(
        updates_per_round=per_round, passes=passes, rounds_in_flight=in_flight
    )
    return Dial(options, updates, prompts)


def plans_of(dial: Dial) -> list[RoundPlan]:
    return list(whole_run(dial))


def completion(position: int, sample: int, *, finished: bool = True) -> Completion:
    return Completion(
        position=position,
        sample=sample,
        seed=0,
        version=0,
        ids=np.arange(1 + sample, dtype=np.int64),
        logprobs=np.zeros(1 + sample, np.float32),
        sampling_logprobs=None,
        finished=finished,
        text="",
    )


def group(
    position: int,
    pairs: Sequence[tuple[int, int]] = ((0, 1),),
    samples: int = 2,
    fate: Fate = Fate.LEARN,
    unfinished: Sequence[int] = (),
) -> PromptGroup:
    """A prompt of one token, its position, with pairs (chosen, rejected) of label 0.9."""
    return PromptGroup(
        Prompt(position, np.array([position], np.int64), f"prompt {position}"),
        tuple(completion(position, s, finished=s not in unfinished) for s in range(samples)),
        Judgement(position, np.zeros(samples), (None,) * samples),
        tuple(Pair(position, chosen, rejected, 0.9, fate) for chosen, rejected in pairs),
    )


def round_of(groups: Sequence[PromptGroup], index: int = 0, version: int = 0) -> Round:
    return Round(index, version, tuple(groups), "judge", {})


def positions(batch: UpdateBatch) -> list[int]:
    """The prompts of a batch's pairs, in order."""
    return [batch.completions[pair.chosen].completion.position for pair in batch.examples]


def held(batch: UpdateBatch) -> list[tuple[int, int]]:
    return [(c.completion.position, c.completion.sample) for c in batch.completions]


# --- the dial --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("per_round", "passes", "plans"),
    [
        (1, 1, [(i, 1, 3 * i, 3) for i in range(5)]),
        (2, 1, [(0, 2, 0, 6), (1, 2, 6, 6), (2, 1, 12, 3)]),
        (math.inf, 1, [(0, 5, 0, 15)]),
        (7, 1, [(0, 5, 0, 15)]),
        # Two passes: 2 updates' prompts feed 4 updates, the last round's prompts only one.
        (2, 2, [(0, 4, 0, 6), (1, 1, 6, 3)]),
        (1, 3, [(0, 3, 0, 3), (1, 2, 3, 3)]),
        # 5 updates in 2 passes need 3 updates' prompts; the last of them are passed over once.
        (math.inf, 2, [(0, 5, 0, 9)]),
    ],
)
def test_the_plans_by_hand(per_round, passes, plans):
    dial = dial_of(per_round, passes, 0, updates=5, prompts=3)
    assert plans_of(dial) == [RoundPlan(*plan) for plan in plans]
    assert dial.admit() is None


@settings(deadline=None, max_examples=300)
@dials
def test_rounds_feed_every_update_once_from_prompts_without_gap_or_overlap(
    updates, prompts, per_round, passes, in_flight
):
    plans = plans_of(dial_of(per_round, passes, in_flight, updates, prompts))
    assert sum(plan.updates for plan in plans) == updates
    sampled = [p for plan in plans for p in range(plan.start, plan.start + plan.prompts)]
    assert sampled == list(range(len(sampled)))
    assert [plan.index for plan in plans] == list(range(len(plans)))
    for plan in plans:
        assert plan.prompts == math.ceil(plan.updates / passes) * prompts
    # Equal budget: as many prompts are sampled at every setting of the dial.
    assert len(sampled) == math.ceil(updates / passes) * prompts
    for plan in plans[:-1]:
        assert plan.updates == per_round * passes


@settings(deadline=None, max_examples=300)
@dials
def test_lag_stays_within_its_bound_and_the_bound_is_met_by_admission_alone(
    updates, prompts, per_round, passes, in_flight
):
    """The loop's own rule of admission, with rounds that only remember who sampled them."""
    dial = dial_of(per_round, passes, in_flight, updates, prompts)
    bound = (in_flight + 1) * min(per_round * passes, updates) - 1
    assert dial.lag_bound == bound
    version, lags = 0, []
    waiting: deque[tuple[RoundPlan, Round]] = deque()
    while version < updates:
        while len(waiting) <= in_flight and (plan := dial.admit()):
            waiting.append((plan, round_of([], plan.index, version)))
        plan, round_ = waiting.popleft()
        for _ in range(plan.updates):
            dial.check_lag(version, round_)
            lags.append(version - round_.version)
            version += 1
    assert version == updates
    assert not waiting
    assert max(lags) <= bound
    if updates > (in_flight + 1) * per_round * passes:
        assert max(lags) == bound


@pytest.mark.parametrize(
    ("per_round", "passes", "in_flight", "bound"),
    [(1, 1, 0, 0), (4, 1, 0, 3), (4, 2, 0, 7), (4, 1, 1, 7), (2, 3, 2, 17), (math.inf, 1, 0, 99)],
)
def test_a_lag_beyond_the_bound_is_told_in_numbers(per_round, passes, in_flight, bound):
    dial = dial_of(per_round, passes, in_flight, updates=100, prompts=1)
    round_ = round_of([], index=6, version=50)
    for version in (50, 50 + bound):
        dial.check_lag(version, round_)
    said = "round 6 was sampled by version 50, the learner is at {}: lag {} is outside .0, {}."
    for version, lag in ((50 + bound + 1, bound + 1), (49, -1)):
        with pytest.raises(RuntimeError, match=said.format(version, lag, bound)):
            dial.check_lag(version, round_)


@pytest.mark.parametrize("value", [0, -1, 1.5, -math.inf, math.nan, "often"])
def test_updates_per_round_is_whole_or_infinite(value):
    with pytest.raises(ValidationError, match="updates_per_round"):
        ResamplingOptions(updates_per_round=value)


def test_a_whole_number_written_as_a_float_is_whole():
    found = ResamplingOptions(updates_per_round=4.0).updates_per_round
    assert (found, type(found)) == (4, int)


# --- batches ---------------------------------------------------------------------------------

SAMPLING = SamplingOptions(prompts_per_update=3)


def test_two_passes_over_two_updates_prompts():
    plan = dial_of(2, 2, 0, updates=4, prompts=3).admit()
    round_ = round_of([group(p) for p in range(6)])
    found = batches(plan, round_, SAMPLING, PAIRS, run_seed=0)
    assert [positions(batch) for batch in found[:2]] == [[0, 1, 2], [3, 4, 5]]
    second = positions(found[2]) + positions(found[3])
    assert sorted(second) == [0, 1, 2, 3, 4, 5]
    assert second != [0, 1, 2, 3, 4, 5]
    assert [len(batch.examples) for batch in found] == [3, 3, 3, 3]
    assert [pair.label_prob for batch in found for pair in batch.examples] == [0.9] * 12
    for batch in found:
        for pair in batch.examples:
            chosen, rejected = (batch.completions[i] for i in (pair.chosen, pair.rejected))
            assert (chosen.completion.sample, rejected.completion.sample) == (0, 1)
            assert chosen.completion.position == rejected.completion.position
            assert chosen.prompt_ids.tolist() == [chosen.completion.position]


@settings(deadline=None, max_examples=100)
@given(
    updates=st.integers(1, 15),
    prompts=st.integers(1, 4),
    per_round=updates_per_round,
    passes=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_every_pass_uses_every_prompt_once(updates, prompts, per_round, passes, seed):
    dial = dial_of(per_round, passes, 0, updates, prompts)
    sampling = SamplingOptions(prompts_per_update=prompts)
    for plan in plans_of(dial):
        stream = list(range(plan.start, plan.start + plan.prompts))
        round_ = round_of([group(p) for p in stream], plan.index)
        found = batches(plan, round_, sampling, PAIRS, seed)
        assert len(found) == plan.updates
        assert all(len(batch.examples) == prompts for batch in found)
        in_a_pass = plan.prompts // prompts
        orders = [
            [p for batch in found[first : first + in_a_pass] for p in positions(batch)]
            for first in range(0, len(found), in_a_pass)
        ]
        assert orders[0] == stream
        for order in orders:
            assert len(set(order)) == len(order)
            assert set(order) <= set(stream)
        for order in orders[:-1]:
            assert sorted(order) == stream


def test_later_passes_have_orders_of_their_own_derived_from_the_seed():
    plan = RoundPlan(0, updates=3, start=0, prompts=12)
    sampling = SamplingOptions(prompts_per_update=12)
    round_ = round_of([group(p) for p in range(12)])

    def orders(index: int, seed: int) -> list[list[int]]:
        found = batches(RoundPlan(index, plan.updates, 0, 12), round_, sampling, PAIRS, seed)
        return [positions(batch) for batch in found]

    assert orders(0, seed=0) == orders(0, seed=0)
    first, second, third = orders(0, seed=0)
    assert first == list(range(12))
    assert len({tuple(order) for order in (first, second, third)}) == 3
    assert orders(0, seed=1)[1] != second
    assert orders(1, seed=0)[1] != second


@pytest.mark.parametrize("fate", [fate for fate in Fate if fate is not Fate.LEARN])
def test_dropped_pairs_and_their_completions_are_not_learned_from(fate):
    batch = update_batch([group(0, fate=fate), group(1)], PAIRS)
    assert held(batch) == [(1, 0), (1, 1)]
    assert batch.examples == (BatchPair(0, 1, 0.9),)
    assert update_batch([group(0, fate=fate)], PAIRS).examples == ()


def test_an_update_whose_pairs_were_all_dropped_is_still_an_update():
    plan = dial_of(2, 1, 0, updates=2, prompts=1).admit()
    round_ = round_of([group(0, fate=Fate.TIE), group(1)])
    found = batches(plan, round_, SamplingOptions(prompts_per_update=1), PAIRS, run_seed=0)
    assert [len(batch.examples) for batch in found] == [0, 1]
    assert found[0].completions == ()


def test_a_completion_in_several_pairs_stands_once():
    batch = update_batch([group(4, pairs=[(2, 0), (2, 1), (0, 1)], samples=4), group(5)], PAIRS)
    assert held(batch) == [(4, 2), (4, 0), (4, 1), (5, 0), (5, 1)]
    assert [(pair.chosen, pair.rejected) for pair in batch.examples] == [
        (0, 1),
        (0, 2),
        (1, 2),
        (3, 4),
    ]


@pytest.mark.parametrize(
    ("truncated", "learn"), [("train", [True] * 4), ("mask", [True, False, True, True])]
)
def test_only_mask_keeps_gradients_out_of_unfinished_completions(truncated, learn):
    batch = update_batch([group(0, unfinished=[1]), group(1)], PAIRS, truncated)
    assert held(batch) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [item.learn for item in batch.completions] == learn
    plan = RoundPlan(0, updates=1, start=0, prompts=2)
    sampling = SamplingOptions(prompts_per_update=2, truncated=truncated)
    (again,) = batches(plan, round_of([group(0, unfinished=[1]), group(1)]), sampling, PAIRS, 0)
    assert [item.learn for item in again.completions] == learn


# --- the reference ---------------------------------------------------------------------------


class Scorer:
    """A learner that scores by position and sample, and counts what it was asked for."""

    def __init__(self) -> None:
        self.batches: list[UpdateBatch] = []

    def submit(self, method: str, *args: Any) -> Any:
        assert method == "score_reference"
        self.batches += args[0]
        scores = [[self.score(item.completion) for item in batch.completions] for batch in args[0]]

        class Done:
            def result(self) -> Any:
                return scores

        return Done()

    @staticmethod
    def score(scored: Completion) -> np.ndarray[Any, Any]:
        value = -(scored.position + scored.sample / 8)
        return np.full(len(scored.ids), value, np.float32)


@pytest.mark.parametrize(("updates", "passes"), [(2, 1), (4, 2), (3, 2), (5, 3)])
def test_the_reference_scores_every_completion_exactly_once(updates, passes):
    groups = [
        group(0, pairs=[(2, 0), (2, 1)], samples=4),  # its fourth completion is in no pair
        group(1, fate=Fate.TIE),  # none of these two is
        group(2),
        group(3, unfinished=[0]),
    ]
    round_ = round_of(groups, index=0, version=0)
    plan = RoundPlan(0, updates, 0, 4)
    assert math.ceil(updates / passes) == 2
    sampling = SamplingOptions(prompts_per_update=2, truncated="mask")
    scorer = Scorer()
    taught = lesson(plan, round_, sampling, PAIRS, 0)
    scored = taught.with_reference(RemoteLearner(scorer)).round_

    asked = [place for batch in scorer.batches for place in held(batch)]
    everything = [(c.position, c.sample) for c in round_.completions]
    assert sorted(asked) == sorted(everything)
    # In the batches of the first pass, so that they meet the micro-batches of their update.
    learned = batches(plan, round_, sampling, PAIRS, 0)[:2]
    assert [held(batch) for batch in scorer.batches[:2]] == [held(batch) for batch in learned]
    assert [batch.examples for batch in scorer.batches[:2]] == [batch.examples for batch in learned]
    assert [held(batch) for batch in scorer.batches[2:]] == [[(0, 3), (1, 0), (1, 1)]]

    assert [(c.position, c.sample) for c in scored.completions] == everything
    for found in scored.completions:
        assert found.reference_logprobs is not None
        assert found.reference_logprobs.tolist() == Scorer.score(found).tolist()
    assert scored.pairs == round_.pairs
