"""Replay: which prompts a round samples, which it learns from again, and when they are rescored."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import job
from pipeline.ledger import Ledger
from pipeline.lesson import earlier_groups, positions_of
from pipeline.resampling import Dial, RoundPlan, Share, whole_run
from pipeline.resampling_options import ResamplingOptions
from tests import tiny
from tests.lessons import lesson
from tests.test_resampling import group, positions, round_of
from workers.generator import SamplingOptions
from workers.learner.needs import Needs

SHARES = [0.55, 0.30, 0.15]


def plans_of(updates: int, prompts: int, **options: Any) -> list[RoundPlan]:
    return list(whole_run(Dial(ResamplingOptions(**options), updates, prompts, run_seed=3)))


def test_the_shares_by_hand():
    """20 slots a round: 0.55, 0.30, 0.15 of them are 11, 6 and 3; round 1 has round 0 alone."""
    plans = plans_of(8, 10, replay=SHARES, updates_per_round=2)
    assert plans[0] == RoundPlan(0, 2, 0, 20)
    assert plans[1] == RoundPlan(1, 2, 20, 11, (Share(1, 20, 11, 11), Share(0, 0, 20, 9)))
    assert plans[2].shares == (Share(2, 31, 11, 11), Share(1, 20, 11, 6), Share(0, 0, 20, 3))
    assert plans[3].shares == (Share(3, 42, 11, 11), Share(2, 31, 11, 6), Share(1, 20, 11, 3))


def test_a_last_round_cut_to_fit_is_mixed_alike():
    plans = plans_of(5, 10, replay=[0.5, 0.5], updates_per_round=2)
    assert plans[2] == RoundPlan(2, 1, 30, 5, (Share(2, 30, 5, 5), Share(1, 20, 10, 5)))


@settings(deadline=None, max_examples=200)
@given(
    updates=st.integers(1, 30),
    prompts=st.integers(2, 9),
    per_round=st.one_of(st.integers(1, 8), st.just(math.inf)),
    passes=st.integers(1, 3),
    replay=st.sampled_from([[1.0], [0.5, 0.5], SHARES, [0.4, 0.3, 0.3], [0.1] * 10, "all"]),
)
def test_every_update_gets_its_prompts_and_no_prompt_comes_twice_in_a_pass(
    updates, prompts, per_round, passes, replay
):
    plans = plans_of(updates, prompts, updates_per_round=per_round, passes=passes, replay=replay)
    assert sum(plan.updates for plan in plans) == updates
    sampled = [p for plan in plans for p in range(plan.start, plan.start + plan.prompts)]
    assert sampled == list(range(len(sampled)))
    for plan in plans:
        assert plan.slots == math.ceil(plan.updates / passes) * prompts
        drawn = positions_of(plan, run_seed=3)
        assert len(set(drawn)) == len(drawn) == plan.slots
        assert max(drawn) < plan.start + plan.prompts
        assert drawn == positions_of(plan, run_seed=3)
        by_round = Counter(
            next(p.index for p in plans if p.start <= at < p.start + p.prompts) for at in drawn
        )
        assert by_round == {share.index: share.take for share in plan.shares if share.take} or (
            not plan.shares and by_round == {plan.index: plan.slots}
        )
        assert plan.prompts > 0
        if replay != "all":  # what is sampled is learned from
            own = set(range(plan.start, plan.start + plan.prompts))
            assert own <= set(drawn)


def test_all_draws_every_prompt_sampled_so_far_alike():
    """400 rounds over 40 prompts of round 0 and 40 of round 1: half each, within four sigma."""
    options = ResamplingOptions(updates_per_round=4, replay="all")
    own = []
    for seed in range(400):
        plans = list(whole_run(Dial(options, 8, 10, run_seed=seed)))
        assert plans[1].prompts == 40
        own.append(plans[1].shares[0].take)
    # Hypergeometric: 40 of 80, 40 of them marked: variance 40·½·½·(80−40)/(80−1).
    sigma = math.sqrt(40 * 0.25 * 40 / 79 / 400)
    assert np.mean(own) == pytest.approx(20, abs=4 * sigma)
    assert np.var(own) == pytest.approx(40 * 0.25 * 40 / 79, rel=0.3)


def test_replayed_prompts_are_marked_and_mixed():
    plan = RoundPlan(1, 2, 4, 4, (Share(1, 4, 4, 4), Share(0, 0, 4, 2)))
    drawn = positions_of(plan, run_seed=0)
    earlier = [group(p) for p in drawn if p < 4]
    taught = lesson(
        plan,
        round_of([group(p) for p in range(4, 8)], 1, 2),
        SamplingOptions(prompts_per_update=3),
        Needs(),
        0,
        earlier,
    )
    batches = taught.batches()
    assert [p for batch in batches for p in positions(batch)] == drawn
    for batch in batches:
        for item in batch.completions:
            assert item.replayed == (item.completion.position < 4)
    assert taught.unused(2) == 0
    assert taught.unused(1) == sum(p >= 4 for p in drawn[3:])


# --- real runs --------------------------------------------------------------------------------


def run_of(tiny_model, tmp_path, **sections: Any) -> tuple[list[dict[str, Any]], Ledger]:
    resampling = {"replay": [0.5, 0.25, 0.25], "updates_per_round": 2}
    cfg = tiny.config(tiny_model, tmp_path, **{"resampling": resampling, **sections})
    job.run(cfg, quiet=True)
    return tiny.records(cfg.run_dir), Ledger(cfg.run_dir / "ledger")


def test_replay_is_logged_apart_and_fresh_lag_stays_within_its_bound(tiny_model, tmp_path):
    records, ledger = run_of(tiny_model, tmp_path)
    assert [len(round_.groups) for round_ in ledger] == [8, 4, 4]
    updates = [r for r in records if r["kind"] == "update"]
    rounds = [r for r in records if r["kind"] == "round"]
    assert [r["resampling"]["replayed_prompts"] for r in rounds] == [0, 4, 4]
    assert all(r["replayed"] is None for r in updates[:2])
    for record in updates[2:]:
        if record["lag_max"] is not None:
            assert record["lag_max"] <= 1
        if record["replayed"]:
            assert record["replayed"]["lag_max"] >= 2
            fresh = sum(record["lags"].values())
            assert fresh + record["replayed"]["pairs"] == record["pairs"]
    assert any(r["replayed"] for r in updates)


@pytest.mark.parametrize(
    "reference", [{"update": "frozen"}, {"update": {"every_rounds": 1}}, {"update": {"ema": 0.9}}]
)
def test_replayed_pairs_are_scored_by_the_reference_of_now(
    tiny_model, tmp_path, monkeypatch, reference
):
    from workers.learner.learner import Learner

    update, score = Learner.update, Learner.score_reference
    seen: list[float] = []

    def check(self: Learner, batch: Any) -> dict[str, Any]:
        [now] = score(self, [batch])
        for item, fresh in zip(batch.completions, now, strict=True):
            held = item.completion.reference_logprobs
            if item.replayed:
                seen.append(float(np.abs(held - fresh).max()))
            assert np.allclose(held, fresh, atol=1e-5)
        return update(self, batch)

    monkeypatch.setattr(Learner, "update", check)
    run_of(
        tiny_model,
        tmp_path,
        reference=reference,
        cluster={"address": "inline"},
        learner={"learning_rate": 0.01},
    )
    assert seen


@pytest.mark.parametrize("replay", [[0.5, 0.5], "all"])
@pytest.mark.parametrize("reference", [{"update": "frozen"}, {"update": {"every_rounds": 1}}])
@pytest.mark.parametrize("in_flight", [0, 1])
def test_a_mixed_run_that_was_killed_resumes_as_it_was(
    tiny_model, tmp_path, monkeypatch, replay, reference, in_flight
):
    from pipeline.learner import RemoteLearner
    from tests.interruption import Killed, assert_same_run, kill_at_call

    def config(name: str):
        return tiny.config(
            tiny_model,
            tmp_path,
            run={"name": "tiny", "updates": 6, "dir": str(tmp_path / name)},
            resampling={"replay": replay, "updates_per_round": 2, "rounds_in_flight": in_flight},
            reference=reference,
            checkpoint={"every": 3},
        )

    whole = config("whole")
    job.run(whole, quiet=True)
    for call in (4, 6):
        cut = config(f"cut-{call}")
        with monkeypatch.context() as patch:
            kill_at_call(patch, RemoteLearner, "update", call)
            with pytest.raises(Killed):
                job.run(cut, quiet=True)
        job.resume(cut.run_dir, quiet=True)
        assert_same_run(cut.run_dir, whole.run_dir)


def test_a_round_that_is_gone_is_told(tmp_path):
    plan = RoundPlan(1, 1, 2, 1, (Share(1, 2, 1, 1), Share(0, 0, 2, 1)))
    with pytest.raises(KeyError, match="round 0 is not in"):
        earlier_groups(plan, Ledger(tmp_path), 0, None)
