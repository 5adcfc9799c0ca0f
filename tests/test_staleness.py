"""Early resampling, and the dial that turns itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from judges.errors import UserError
from pipeline import job
from pipeline.adaptation import Adaptation
from pipeline.ledger import Ledger
from pipeline.resampling import Dial
from pipeline.resampling_options import AdaptiveOptions, EarlyOptions, ResamplingOptions
from pipeline.staleness import Staleness
from tests import tiny

FRESH = {
    "ess": 0.1,
    "ess_per_token": 0.1,
    "policy_ess": 0.9,
    "policy_ess_per_token": 0.99,
    "kl_from_sampler": 0.01,
}


@pytest.mark.parametrize(
    ("options", "measured", "reason"),
    [
        ({}, {"policy_ess": 0.0}, None),
        ({"ess_below": 0.5}, {"policy_ess": 0.5}, None),
        (
            {"ess_below": 0.5},
            {"policy_ess": 0.49},
            "policy_ess 0.49 is below resampling.early.ess_below=0.5",
        ),
        ({"ess_below": 0.5}, {"policy_ess": None}, None),
        ({"ess_below": 0.5}, {"policy_ess": math.nan}, None),
        (
            {"ess_per_token_below": 0.995},
            {},
            "policy_ess_per_token 0.99 is below resampling.early.ess_per_token_below=0.995",
        ),
        (
            {"kl_above": 0.02},
            {"kl_from_sampler": 0.03},
            "kl_from_sampler 0.03 is above resampling.early.kl_above=0.02",
        ),
        ({"kl_above": 0.02}, {"kl_from_sampler": 0.02}, None),
        ({"kl_above": 0.02}, {"kl_from_sampler": None}, None),
    ],
)
def test_each_threshold(options, measured, reason):
    assert Staleness(EarlyOptions(**options)).reason(FRESH | measured) == reason


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return update['policy_ess'] < least", "resampling.early.rule={} says so"),
        ("return update['policy_ess'] > least", None),
        ("return None", None),
        ("return f\"ess {update['policy_ess']}\"", "ess 0.9"),
        ("import numpy; return numpy.bool_(True)", "resampling.early.rule={} says so"),
    ],
)
def test_a_rule_of_ones_own(tmp_path, body, reason):
    path = tmp_path / "mine.py"
    path.write_text(f"def stale(update, least=0.95):\n    {body}\n")
    spec = f"{path}:stale"
    found = Staleness(EarlyOptions(rule=spec)).reason(FRESH)
    assert found == (None if reason is None else reason.format(spec))


@pytest.mark.parametrize(
    ("rule", "args", "said"),
    [
        ("often", {}, "resampling.early.rule=often: no such rule: write path/to/file.py:name"),
        ("{}:stale", {"most": 1}, "resampling.early.args.most: "),
        ("{}:needy", {}, "resampling.early.args: {}:needy needs least: give it there"),
        ("{}:odd", {}, "resampling.early.rule={}:odd: returned 7: return True to resample"),
        ("{}:broken", {}, "resampling.early.rule={}:broken: raised KeyError: 'no': mend the rule"),
    ],
)
def test_a_rule_that_will_not_do(tmp_path, rule, args, said):
    path = tmp_path / "mine.py"
    path.write_text(
        "def stale(update, least=1): ...\ndef needy(update, least): ...\n"
        "def odd(update): return 7\ndef broken(update): return update['no']\n"
    )
    with pytest.raises(UserError) as caught:
        Staleness(EarlyOptions(rule=rule.format(path), args=args)).reason(FRESH)
    assert str(caught.value).startswith(said.format(path))


# --- the dial that turns itself ---------------------------------------------------------------


def test_it_finds_the_number_that_holds_the_target():
    """A policy with ESS = exp(−c·lag), c = ln 2 / 7: at ESS 0.5 the lag is 7, so K = 8."""
    adaptation = Adaptation(AdaptiveOptions(target=0.5), 1, ages=1)
    chosen = []
    for _ in range(12):
        lag = adaptation.updates_per_round - 1
        ess = 2.0 ** -(lag / 7)
        chosen.append(adaptation.updates_per_round)
        adaptation.observe({"lag_max": lag, "policy_ess": ess, "policy_ess_per_token": 1.0})
    assert chosen[:4] == [1, 2, 4, 8]
    assert set(chosen[3:]) == {8}


def test_with_rounds_in_flight_the_lag_is_that_of_all_of_them():
    """Two rounds of K updates: the largest lag is 2K − 1 = 7 at K = 4."""
    adaptation = Adaptation(AdaptiveOptions(target=0.5), 4, ages=2)
    for _ in range(5):
        lag = 2 * adaptation.updates_per_round - 1
        adaptation.observe(
            {"lag_max": lag, "policy_ess": 2.0 ** -(lag / 7), "policy_ess_per_token": 1}
        )
    assert adaptation.updates_per_round == 4


@pytest.mark.parametrize(("ess", "expected"), [(1e-30, 2), (0.9999, 6)])
def test_it_stays_within_its_bounds(ess, expected):
    adaptation = Adaptation(AdaptiveOptions(min=2, max=6), 4, ages=1)
    for _ in range(6):
        adaptation.observe({"lag_max": 3, "policy_ess": ess, "policy_ess_per_token": 1.0})
    assert adaptation.updates_per_round == expected


def test_what_shows_nothing_is_forgotten_slowly():
    """A policy that is at lag 0 only tells nothing: after a while two updates are tried again."""
    adaptation = Adaptation(AdaptiveOptions(target=0.5), 2, ages=1)
    adaptation.observe({"lag_max": 1, "policy_ess": 0.2, "policy_ess_per_token": 1.0})
    tried = []
    for _ in range(6):
        tried.append(adaptation.updates_per_round)
        adaptation.observe({"lag_max": 0, "policy_ess": 1.0, "policy_ess_per_token": 1.0})
    assert tried[0] == 1
    assert 2 in tried


def test_its_state_is_json():
    one = Adaptation(AdaptiveOptions(), 4, ages=1)
    one.observe({"lag_max": 3, "policy_ess": 0.7, "policy_ess_per_token": 1.0})
    other = Adaptation(AdaptiveOptions(), 4, ages=1)
    other.load(json.loads(json.dumps(one.state())))
    for adaptation in (one, other):
        adaptation.observe({"lag_max": 3, "policy_ess": 0.4, "policy_ess_per_token": 1.0})
    assert one.state() == other.state()


def test_the_whole_run_is_fed_however_early_its_rounds_end():
    dial = Dial(ResamplingOptions(updates_per_round=4), 10, 3)
    fed = []
    while (plan := dial.admit()) is not None:
        used = min(plan.updates, 3 if plan.index % 2 else 1)
        fed.append((plan.start, used))
        dial.ended(plan, used, {"lag_max": None, "policy_ess": None, "policy_ess_per_token": None})
    assert sum(used for _, used in fed) == 10
    # The fifth round is cut to the 2 updates left, ends after one, and a sixth makes the last.
    assert [start for start, _ in fed] == [0, 12, 24, 36, 48, 54]


# --- in runs ----------------------------------------------------------------------------------


def config(tiny_model: Path, folder: Path, name: str, **resampling: Any) -> Any:
    return tiny.config(
        tiny_model,
        folder,
        run={"name": "tiny", "updates": 8, "dir": str(folder / name)},
        resampling=resampling,
        learner={"learning_rate": 0.05},
        checkpoint={"every": 3},
    )


EARLY = {"updates_per_round": 4, "early": {"kl_above": 1e-6}}
ADAPTIVE = {"updates_per_round": 2, "adaptive": {"target": 0.999, "measure": "ess_per_token"}}


def test_a_stale_round_ends_and_its_leftovers_are_counted(tiny_model, tmp_path):
    cfg = config(tiny_model, tmp_path, "early", **EARLY)
    job.run(cfg, quiet=True)
    records = tiny.records(cfg.run_dir)
    rounds = [r for r in records if r["kind"] == "round"]
    updates = [r for r in records if r["kind"] == "update"]
    assert [r["update"] for r in updates] == list(range(1, 9))
    # At lag 0 the KL is 0; at lag 1 it has moved: two updates a round.
    assert [r["resampling"]["updates"] for r in rounds] == [2, 2, 2, 2]
    assert [r["lag_max"] for r in updates] == [0, 1] * 4
    for at, (record, round_) in enumerate(zip(rounds, Ledger(cfg.run_dir / "ledger"), strict=True)):
        told = record["resampling"]
        assert told["planned_updates"] == (4 if at < 3 else 2)
        fed = sum(r["pairs"] for r in updates[2 * at : 2 * at + 2])
        assert told["unused_pairs"] == record["pairs"] - fed
        assert len(round_.groups) == 4 * told["planned_updates"]
    assert "kl_from_sampler" in rounds[0]["resampling"]["ended_by"]
    assert rounds[3]["resampling"]["ended_by"] is None
    assert updates[0]["kl_from_sampler"] == 0.0
    assert updates[1]["kl_from_sampler"] > 1e-6


def test_the_run_turns_the_dial_and_says_so(tiny_model, tmp_path):
    cfg = config(tiny_model, tmp_path, "adaptive", **ADAPTIVE)
    job.run(cfg, quiet=True)
    rounds = [r for r in tiny.records(cfg.run_dir) if r["kind"] == "round"]
    planned = [r["resampling"]["planned_updates"] for r in rounds]
    assert sum(planned) == 8
    assert len(set(planned)) > 1


@pytest.mark.parametrize("in_flight", [0, 1])
@pytest.mark.parametrize("resampling", [EARLY, ADAPTIVE], ids=["early", "adaptive"])
def test_killed_anywhere_it_resumes_as_it_was(
    tiny_model, tmp_path, monkeypatch, resampling, in_flight
):
    from pipeline.learner import RemoteLearner
    from tests.interruption import Killed, assert_same_run, kill_at_call

    resampling = resampling | {"rounds_in_flight": in_flight}
    whole = config(tiny_model, tmp_path, "whole", **resampling)
    job.run(whole, quiet=True)
    for call in (4, 7):
        cut = config(tiny_model, tmp_path, f"cut-{call}", **resampling)
        with monkeypatch.context() as patch:
            kill_at_call(patch, RemoteLearner, "update", call)
            with pytest.raises(Killed):
                job.run(cut, quiet=True)
        job.resume(cut.run_dir, quiet=True)
        assert_same_run(cut.run_dir, whole.run_dir)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"resampling": {"early": {"ess_below": 0.2}}},
            "resampling.early.ess_below=0.2: of 4 pairs the effective share is at least 0.25",
        ),
        (
            {"resampling": {"adaptive": {"target": 0.25}}},
            "resampling.adaptive.target=0.25: of 4 pairs the effective share is at least 0.25",
        ),
        (
            {
                "resampling": {"adaptive": True},
                "judge": {"select": "random", "budget": {"labels": 40}},
            },
            "judge.select=random: spreads the labels over the run's prompts, and rounds that end ",
        ),
        (
            {
                "resampling": {"correction": "raw"},
                "judge": {"select": "uncertainty", "budget": {"labels": 40}},
            },
            "judge.select=uncertainty: resampling.correction=raw takes pairs to be drawn at random",
        ),
        (
            {
                "drift": {"reset": {"kl_to_reference": 1}},
                "reference": {"update": {"every_rounds": 1}},
            },
            "drift.reset: with reference.update={every_rounds: 1} the reference is the policy that",
        ),
    ],
)
def test_what_could_never_work_is_refused(tiny_model, tmp_path, sections, said):
    with pytest.raises(UserError) as caught:
        tiny.config(tiny_model, tmp_path, **sections)
    assert said in str(caught.value)


def test_a_reference_may_move_where_rounds_end_early(tiny_model, tmp_path):
    """Planned as one round, the run has as many as its pairs go stale."""
    cfg = tiny.config(
        tiny_model,
        tmp_path,
        resampling={"updates_per_round": math.inf, "early": {"kl_above": 1e-6}},
        reference={"update": {"every_rounds": 1}},
        learner={"learning_rate": 0.05},
    )
    job.run(cfg, quiet=True)
    rounds = [r for r in tiny.records(cfg.run_dir) if r["kind"] == "round"]
    assert len(rounds) > 1
    assert all(r["reference_version"] == r["version"] for r in rounds)


def test_tempered_samples_are_not_stale_at_once(tiny_model, tmp_path):
    """At lag 0 their importance weights differ from 1, the policy that drew them does not."""
    cfg = tiny.config(
        tiny_model,
        tmp_path,
        sampling={"prompts_per_update": 4, "max_new_tokens": 8, "temperature": 0.5},
        resampling={"updates_per_round": 3, "early": {"ess_below": 0.9}},
        learner={"learning_rate": 1e-9},
    )
    job.run(cfg, quiet=True)
    updates = [r for r in tiny.records(cfg.run_dir) if r["kind"] == "update"]
    assert min(r["ess"] for r in updates) < 0.9  # which would have ended the round
    assert [r["policy_ess"] for r in updates[::3]] == [1.0, 1.0]
    assert all(r["policy_ess"] > 0.999 for r in updates)
    rounds = [r for r in tiny.records(cfg.run_dir) if r["kind"] == "round"]
    assert [r["resampling"]["updates"] for r in rounds] == [3, 3]
