"""The brake in whole runs of a tiny model: what each action does, killed and resumed as well."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from judges.errors import UserError
from pipeline import cli, job
from pipeline.config import Config
from pipeline.learner import RemoteLearner
from pipeline.ledger import Ledger
from pipeline.stopping import Stopped
from pipeline.tracking import Tracker
from tests import tiny
from tests.interruption import Killed, assert_same_run, kill_at_call, weights

UPDATES = 8
KL = "kl_to_reference"
BEYOND = 3.0
"""Nats a sequence. A policy that has learned a round is far beyond, the reference at 0."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and judge that every run of this file shares: the judge's path is in the records."""
    return tmp_path_factory.mktemp("brake")


def config(
    model: Path,
    folder: Path,
    run_dir: Path,
    *,
    per_round: int = 2,
    in_flight: int = 0,
    every: int = 3,
    **drift: Any,
) -> Config:
    """A run of 8 updates that leaves its reference at once."""
    return tiny.config(
        model,
        folder,
        run={"name": "tiny", "updates": UPDATES, "dir": str(run_dir)},
        resampling={"updates_per_round": per_round, "rounds_in_flight": in_flight},
        learner={"learning_rate": 0.02, "threads": 1},
        checkpoint={"every": every, "keep": 99},
        drift=drift,
    )


Free = Callable[[int], Path]


@pytest.fixture(scope="module")
def free(tiny_model: Path, folder: Path) -> Free:
    """Runs without a threshold by ``rounds_in_flight``, each run once."""

    @functools.cache
    def run(in_flight: int) -> Path:
        cfg = config(tiny_model, folder, folder / f"free-{in_flight}", in_flight=in_flight)
        return job.run(cfg, quiet=True).run_dir

    return run


def of_kind(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in tiny.records(run_dir) if record["kind"] == kind]


def fed(run_dir: Path, round_index: int) -> list[dict[str, Any]]:
    """The updates that a round fed."""
    return [record for record in of_kind(run_dir, "update") if record["round"] == round_index]


def assert_same_weights(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def checkpoint(run_dir: Path, update: int) -> dict[str, Any]:
    path = run_dir / "checkpoints" / f"update-{update:06d}" / "learner.pt"
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


# --- warn -------------------------------------------------------------------------------------


def test_a_warning_changes_nothing_but_what_is_told(
    tiny_model: Path,
    folder: Path,
    free: Free,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    cfg = config(tiny_model, folder, tmp_path / "run", warn={KL: BEYOND, "loss": 0.7})
    job.run(cfg)
    assert_same_weights(cfg.run_dir, free(0))
    found, without = tiny.records(cfg.run_dir), tiny.records(free(0))
    told = [record.pop("alarms", None) for record in found]
    assert [record.pop("alarms", None) for record in without] == [a and [] for a in told]
    assert found == without

    said = capsys.readouterr().out.splitlines()
    alarms = [alarms for alarms in told if alarms is not None]
    for round_, names in zip(of_kind(free(0), "round"), alarms, strict=True):
        losses = [r["loss"] for r in fed(free(0), round_["round"]) if r["loss"] is not None]
        above = [loss for loss in losses if loss > 0.7]
        expected = [f"drift.warn.{KL}: {round_[KL]:.6g} is above 3"] * (round_[KL] > BEYOND)
        expected += [f"drift.warn.loss: {loss:.6g} is above 0.7" for loss in above[:1]]
        assert names == expected
        for name in names:
            assert any(re.search(rf"\x1b\[33m.*{re.escape(name)}", line) for line in said)
    assert {len(names) for names in alarms} >= {1, 2}  # neither threshold is idle


# --- resample ---------------------------------------------------------------------------------


def test_beyond_the_threshold_a_round_feeds_one_update(
    tiny_model: Path, folder: Path, tmp_path: Path
) -> None:
    cfg = config(tiny_model, folder, tmp_path / "run", per_round=4, resample={KL: BEYOND})
    job.run(cfg, quiet=True)
    rounds = of_kind(cfg.run_dir, "round")
    assert [record["update"] for record in rounds] == [4, 5, 6, 7, 8]
    assert [record["version"] for record in rounds] == [0, 4, 5, 6, 7]
    assert [record[KL] > BEYOND for record in rounds] == [False, True, True, True, True]
    for record in rounds[1:]:
        told, updates = record["resampling"], fed(cfg.run_dir, record["round"])
        alarm = f"drift.resample.{KL}: {record[KL]:.6g} is above 3"
        assert len(updates) == told["updates"] == 1
        assert record["alarms"] == [alarm]
        early = told["planned_updates"] > 1  # the last round is cut to the one update left
        assert told["ended_by"] == (alarm if early else None)
        assert told["unused_pairs"] == record["pairs"] - updates[0]["pairs"]
    assert [record["resampling"]["planned_updates"] for record in rounds] == [4, 4, 3, 2, 1]
    assert sum(record["resampling"]["unused_pairs"] for record in rounds) > 0


# --- reset ------------------------------------------------------------------------------------


def test_a_reset_puts_the_policy_back_and_the_next_round_is_its(
    tiny_model: Path, folder: Path, free: Free, tmp_path: Path
) -> None:
    cfg = config(tiny_model, folder, tmp_path / "run", every=1, reset={KL: BEYOND})
    job.run(cfg, quiet=True)
    updates, rounds = (of_kind(cfg.run_dir, kind) for kind in ("update", "round"))
    assert [record["update"] for record in updates] == list(range(1, UPDATES + 1))
    # Two updates, then beyond: one is the reset, and a round of the reference follows.
    assert [record["version"] for record in rounds] == [0, 2, 3, 5, 6]
    assert [bool(record["alarms"]) for record in rounds] == [False, True, False, True, False]
    assert [record["resampling"]["updates"] for record in rounds] == [2, 1, 2, 1, 2]
    assert rounds[1]["resampling"]["ended_by"] == rounds[1]["alarms"][0]
    assert updates[:2] == of_kind(free(0), "update")[:2]

    start = load_file(tiny_model / "model.safetensors")
    before, after = checkpoint(cfg.run_dir, 2), checkpoint(cfg.run_dir, 3)
    assert any(not torch.equal(before["policy"][name], start[name]) for name in start)
    assert before["optimizer"]["state"]
    assert all(torch.equal(after["policy"][name], start[name]) for name in start)
    assert after["policy"].keys() == after["reference"]["model"].keys()
    for name, tensor in after["policy"].items():
        assert torch.equal(tensor, after["reference"]["model"][name])
    assert after["version"] == 3
    assert after["optimizer"]["state"] == {}  # no moments
    assert (updates[2]["pairs"], updates[2]["loss"], updates[2]["lag_max"]) == (0, None, None)

    # What is sampled next is the reference's own, and learned from as in a run's first update.
    fresh = Ledger(cfg.run_dir / "ledger").read(2)
    for completion in fresh.completions:
        assert completion.version == 3
        assert completion.reference_logprobs == pytest.approx(completion.logprobs, abs=1e-4)
    assert updates[3]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert (updates[3]["margin"], updates[3]["lag_max"]) == (0.0, 0)


def test_a_round_in_flight_as_the_policy_is_reset_does_not_reset_it_again(
    tiny_model: Path, folder: Path, tmp_path: Path
) -> None:
    cfg = config(tiny_model, folder, tmp_path / "run", in_flight=1, reset={KL: BEYOND})
    job.run(cfg, quiet=True)
    rounds = of_kind(cfg.run_dir, "round")
    # Rounds 0 and 1 are version 0's. Round 2 trips; round 3 was sampled beside it, by version 4,
    # and is learned from by the reference; round 4 was sampled after.
    assert [record["version"] for record in rounds] == [0, 0, 2, 4, 5]
    assert [record["update"] for record in rounds] == [2, 4, 5, 7, 8]
    assert [record[KL] > BEYOND for record in rounds] == [False, False, True, True, False]
    assert [bool(record["alarms"]) for record in rounds] == [False, False, True, True, False]
    assert [record["resampling"]["updates"] for record in rounds] == [2, 2, 1, 2, 1]
    assert abs(rounds[4][KL]) < 1e-3
    taught = fed(cfg.run_dir, 3)
    assert taught[0]["margin"] == 0.0
    assert [record["lag_max"] for record in taught] == [1, 2]


# What is tripped by an update is not yet carried to where it can be done; see test_watch.
def test_an_update_can_ask_for_a_reset(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    cfg = config(tiny_model, folder, tmp_path / "run", per_round=1, reset={"grad_norm": 1e-3})
    job.run(cfg, quiet=True)
    assert any(record["alarms"] for record in of_kind(cfg.run_dir, "round"))
    assert any(record["learning_rate"] == 0.0 for record in of_kind(cfg.run_dir, "update"))


def test_killed_between_an_update_and_the_reset_it_asked_for(
    tiny_model: Path, folder: Path, tmp_path: Path
) -> None:
    def cfg_of(name: str) -> Config:
        # At a round's first update the policy is its sampler; at the second it has moved.
        bound = {"kl_from_sampler": 1e-6}
        return config(tiny_model, folder, tmp_path / name, per_round=4, every=1, reset=bound)

    whole, killed = cfg_of("whole"), cfg_of("killed")
    job.run(whole, quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        kill_at_call(patch, RemoteLearner, "reset", 1)
        with pytest.raises(Killed):
            job.run(killed, quiet=True)
    job.resume(killed.run_dir, quiet=True)
    assert_same_run(killed.run_dir, whole.run_dir)


def test_the_pairs_of_a_round_that_a_reset_ends_are_unused(
    tiny_model: Path, folder: Path, tmp_path: Path
) -> None:
    cfg = config(tiny_model, folder, tmp_path / "run", reset={KL: BEYOND})
    job.run(cfg, quiet=True)
    for record in of_kind(cfg.run_dir, "round"):
        learned = sum(update["pairs"] for update in fed(cfg.run_dir, record["round"]))
        assert record["resampling"]["unused_pairs"] == record["pairs"] - learned


# --- stop -------------------------------------------------------------------------------------


def exit_code(monkeypatch: pytest.MonkeyPatch, *args: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["freshpairs", *args])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code


def test_stopped_by_drift_it_says_how_to_go_on_and_goes_on(
    tiny_model: Path,
    folder: Path,
    free: Free,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Round 1 is beyond: two updates are made, and no checkpoint was due after them."""
    run_dir = tmp_path / "run"
    cfg = config(tiny_model, folder, run_dir, stop={KL: BEYOND})
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(cfg.model_dump(mode="json")))
    value = of_kind(free(0), "round")[1][KL]
    line = (
        f"stopped after update 2 (drift.stop.{KL}: {value:.6g} is above 3): "
        f"go on with `freshpairs resume {run_dir} drift.stop.{KL}=…`\n"
    )
    assert exit_code(monkeypatch, "train", str(file)) == 3
    assert capsys.readouterr().err == line
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["update-000002"]
    assert not (run_dir / "policy").exists()
    made = tiny.records(run_dir)
    assert made == tiny.records(free(0))[: len(made)]

    # As it is, it stops again at once.
    assert exit_code(monkeypatch, "resume", str(run_dir)) == 3
    assert capsys.readouterr().err == line
    assert tiny.records(run_dir) == made

    assert exit_code(monkeypatch, "resume", str(run_dir), f"drift.stop.{KL}=1000") == 0
    assert_same_weights(run_dir, free(0))
    assert of_kind(run_dir, "update") == of_kind(free(0), "update")
    kept = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert kept["drift"]["stop"] == {KL: {"above": 1000.0, "below": None}}


@pytest.mark.parametrize(
    ("in_flight", "measure", "bound"),
    [
        (0, "ess", {"below": 0.5}),
        (0, "loss", {"above": 0.7}),
        (1, "margin", {"below": -0.3}),
        pytest.param(0, "kl_from_sampler", {"above": 1.0}, marks=pytest.mark.slow),
        pytest.param(1, "grad_norm", {"above": 8.0}, marks=pytest.mark.slow),
    ],
)
def test_a_measure_of_an_update_stops_the_run_after_it(
    tiny_model: Path,
    folder: Path,
    free: Free,
    tmp_path: Path,
    in_flight: int,
    measure: str,
    bound: dict[str, float],
) -> None:
    """Resumed as it is, the run stops again at once: what stopped it has not changed."""
    ((side, number),) = bound.items()
    values = [record[measure] for record in of_kind(free(in_flight), "update")]
    at = next(
        update
        for update, value in enumerate(values, start=1)
        if value is not None and (value > number if side == "above" else value < number)
    )
    run_dir = tmp_path / "run"
    cfg = config(tiny_model, folder, run_dir, in_flight=in_flight, stop={measure: bound})
    for step in (functools.partial(job.run, cfg), functools.partial(job.resume, run_dir)):
        with pytest.raises(Stopped, match=rf"after update {at} \(drift\.stop\.{measure}") as stop:
            step(quiet=True)
        assert stop.value.changed == f"drift.stop.{measure}=…"
        assert checkpoint(run_dir, at)["version"] == at
        assert of_kind(run_dir, "update") == of_kind(free(in_flight), "update")[:at]
    job.resume(run_dir, ["drift.stop={}"], quiet=True)
    assert_same_weights(run_dir, free(in_flight))


@pytest.mark.parametrize("key", ["drift.reset", "drift.resample", "drift.bad", "drift.reference"])
def test_what_changes_the_run_cannot_be_told_anew(
    tiny_model: Path, folder: Path, free: Free, key: str
) -> None:
    with pytest.raises(UserError, match=r"only judge\.budget, drift\.stop, drift"):
        job.resume(free(0), [f"{key}.entropy=1"], quiet=True)


# --- killed and resumed -----------------------------------------------------------------------

BRAKES: dict[str, dict[str, Any]] = {
    "warn": {"warn": {KL: BEYOND, "loss": 0.7}},
    "resample": {"resample": {KL: BEYOND, "ess": 0.4}},
    "reset": {"reset": {KL: BEYOND}},
    "stop": {"stop": {KL: BEYOND}},
    "all": {
        "warn": {"entropy": 1.3},
        "resample": {"kl_from_sampler": 1.0},
        "reset": {KL: 12.0},
        "stop": {"loss": 1.1},
    },
}
KILLS: dict[str, tuple[Any, str, int]] = {
    "before the third update's record": (Tracker, "update", 3),
    "before the fifth update's record": (Tracker, "update", 5),
    "before the last update's record": (Tracker, "update", UPDATES),
    "before the second round's record": (Tracker, "round", 2),
    "before a reset": (RemoteLearner, "reset", 1),
    "before a later round is written": (Ledger, "append", 3),
}
EVERY_DAY = {
    "resample-0-before the second round's record",
    "reset-0-before a reset",
    "reset-1-before the last update's record",
    "stop-1-before the third update's record",
    "all-0-before a later round is written",
}


def to_its_end(cfg: Config) -> list[str]:
    """See a run through, killed or stopped on the way; what it said as it stopped."""
    said: list[str] = []
    step: Callable[..., object] = functools.partial(job.run, cfg)
    while not (cfg.run_dir / "policy").is_dir():
        try:
            step(quiet=True)
        except Killed:
            step = functools.partial(job.resume, cfg.run_dir)
        except Stopped as stopped:
            said.append(str(stopped))
            step = functools.partial(job.resume, cfg.run_dir, ["drift.stop={}"])
    return said


def grid() -> list[Any]:
    """Everything at night, a few by day."""
    found = {
        f"{brake}-{in_flight}-{when}": (brake, in_flight, kill)
        for brake in BRAKES
        for in_flight in (0, 1)
        for when, kill in KILLS.items()
    }
    assert found.keys() >= EVERY_DAY
    return [
        pytest.param(*values, id=name, marks=() if name in EVERY_DAY else pytest.mark.slow)
        for name, values in found.items()
    ]


@pytest.mark.parametrize(("brake", "in_flight", "kill"), grid())
def test_killed_and_resumed_equals_uninterrupted(
    tiny_model: Path, folder: Path, tmp_path: Path, brake: str, in_flight: int, kill: Any
) -> None:
    def cfg_of(where: str) -> Config:
        run_dir = tmp_path / where
        return config(tiny_model, folder, run_dir, in_flight=in_flight, **BRAKES[brake])

    whole, killed = cfg_of("whole"), cfg_of("killed")
    said = to_its_end(whole)
    with pytest.MonkeyPatch.context() as patch:
        kill_at_call(patch, *kill)
        assert to_its_end(killed) == said
    assert_same_run(killed.run_dir, whole.run_dir)


# --- a judge that can be pleased by length ----------------------------------------------------

LOVES_LENGTH = "[float(len(c.split())) for c in completions]"
# Which of two is better is as good as drawn, whatever they are.
INDIFFERENT = "[float(zlib.crc32(c.encode())) for c in completions]"
LETTERS = tiny.WORDS[:12]


@pytest.fixture(scope="module")
def terse_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of twelve words nearly alike in probability, so that one in twelve tokens ends the text."""
    return tiny.save_model(tmp_path_factory.mktemp("terse"), words=LETTERS, spread=0.1)


def judged(model: Path, folder: Path, score: str, seed: int) -> Config:
    prompts, judge = folder / "letters.jsonl", folder / "own.py"
    letters = LETTERS[3:]
    rows = ({"prompt": " ".join(letters[i % 9 : i % 9 + 1 + i % 3])} for i in range(24))
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge.write_text(
        f"import zlib\ndef score(prompts, completions, **columns):\n    return {score}"
    )
    return tiny.config(
        model,
        folder,
        run={"name": "tiny", "updates": 12, "seed": seed, "dir": str(folder / "run")},
        prompts={"path": str(prompts)},
        judge={"name": f"{judge}:score"},
        sampling={"prompts_per_update": 16, "max_new_tokens": 40},
        learner={"learning_rate": 3e-3, "threads": 1},
        drift={"stop": {"length_ratio": 2.0}},
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_a_judge_that_loves_length_is_found_out(
    terse_model: Path, tmp_path: Path, seed: int
) -> None:
    cfg = judged(terse_model, tmp_path, LOVES_LENGTH, seed)
    with pytest.raises(Stopped, match=r"drift\.stop\.length_ratio: [23]\.\d+ is above 2") as stop:
        job.run(cfg, quiet=True)
    assert stop.value.changed == "drift.stop.length_ratio=…"
    rounds = of_kind(cfg.run_dir, "round")
    assert rounds[-1]["score_mean"] > rounds[0]["score_mean"]  # all that the judge sees is well


@pytest.mark.parametrize("seed", [1, 2])
def test_a_judge_that_does_not_care_for_length_is_not(
    terse_model: Path, tmp_path: Path, seed: int
) -> None:
    cfg = judged(terse_model, tmp_path, INDIFFERENT, seed)
    job.run(cfg, quiet=True)
    rounds = of_kind(cfg.run_dir, "round")
    assert len(rounds) == 12
    assert rounds[-1][KL] > 1.0  # it learned, and something else
