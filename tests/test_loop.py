"""The loop itself, on a tiny model, in one process: reruns, stops, kills, staleness, budgets."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from judges.errors import UserError
from pipeline import job, ledger, loop, stopping, storage
from pipeline.config import Config
from pipeline.learner import RemoteLearner
from pipeline.ledger import Ledger
from pipeline.stopping import Stopped
from tests import tiny
from tests.interruption import Killed, assert_same_run, kill_at_call, weights
from workers.messages import Fate
from workers.verdicts import JudgeFailed


def held_out(folder: Path) -> dict[str, Any]:
    return {"every": 3, "count": 5, "prompts": {"path": str(folder / "prompts.jsonl")}}


def plan(model: Path, folder: Path, **sections: Any) -> Config:
    return tiny.config(model, folder, evaluation=held_out(folder), **sections)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and judge that every run of this file shares: the judge's path is in the records."""
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def whole(tiny_model: Path, folder: Path) -> Callable[[int], Path]:
    """Uninterrupted runs of 6 updates, 2 to a round, by ``rounds_in_flight``; each is run once."""

    @functools.cache
    def run(rounds_in_flight: int) -> Path:
        cfg = two_a_round(tiny_model, folder, f"whole-{rounds_in_flight}", rounds_in_flight)
        return job.run(cfg, quiet=True).run_dir

    return run


@pytest.fixture
def finished(whole: Callable[[int], Path]) -> Path:
    return whole(0)


def two_a_round(
    model: Path, folder: Path, name: str, rounds_in_flight: int = 0, seed: int = 0
) -> Config:
    run = {"name": "tiny", "updates": 6, "seed": seed, "dir": str(folder / name)}
    resampling = {"updates_per_round": 2, "rounds_in_flight": rounds_in_flight}
    return plan(model, folder, run=run, resampling=resampling)


def test_a_rerun_is_the_same_run(
    tiny_model: Path, folder: Path, finished: Path, tmp_path: Path
) -> None:
    again = two_a_round(tiny_model, folder, str(tmp_path / "again"))
    job.run(again, quiet=True)
    assert_same_run(again.run_dir, finished)


def test_another_seed_is_another_run(
    tiny_model: Path, folder: Path, finished: Path, tmp_path: Path
) -> None:
    other = two_a_round(tiny_model, folder, str(tmp_path / "other"), seed=1)
    job.run(other, quiet=True)
    ids = [
        [c.ids.tolist() for c in Ledger(path / "ledger").read(0).completions]
        for path in (finished, other.run_dir)
    ]
    assert ids[0] != ids[1]


@pytest.mark.parametrize("rounds_in_flight", [0, 1, 2])
@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_stopped_and_resumed_equals_uninterrupted(
    tiny_model: Path,
    folder: Path,
    whole: Callable[[int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rounds_in_flight: int,
    after: int,
) -> None:
    uninterrupted = whole(rounds_in_flight)
    update = RemoteLearner.update
    stops: list[stopping.Stop] = []
    monkeypatch.setattr(job, "Stop", lambda where: stops.append(stopping.Stop(where)) or stops[0])

    def update_then_ask(learner: RemoteLearner, batch: Any) -> dict[str, Any]:
        record = update(learner, batch)
        stops[0].requested |= learner.version == after
        return record

    monkeypatch.setattr(RemoteLearner, "update", update_then_ask)
    cut = two_a_round(tiny_model, folder, str(tmp_path / "cut"), rounds_in_flight)
    with pytest.raises(Stopped, match=f"stopped after update {after}"):
        job.run(cut, quiet=True)
    monkeypatch.undo()
    assert len(tiny.records(cut.run_dir)) < len(tiny.records(uninterrupted))
    job.resume(cut.run_dir, quiet=True)
    assert_same_run(cut.run_dir, uninterrupted)


KILLS = [
    pytest.param(Ledger, "append", 1, id="before the first round is written"),
    pytest.param(Ledger, "append", 3, id="before a later round is written"),
    pytest.param(ledger.Ledger, "_write", 2, id="between a round's two files"),
    pytest.param(ledger.Ledger, "_write", 4, id="between a later round's two files"),
    pytest.param(RemoteLearner, "update", 1, id="before the first update"),
    pytest.param(RemoteLearner, "update", 4, id="in the middle of a round"),
    pytest.param(RemoteLearner, "update", 6, id="before the last update"),
    pytest.param(storage.os, "replace", 2, id="before a checkpoint appears"),
    pytest.param(storage, "sync_to_disk", 6, id="while a checkpoint is written"),
    pytest.param(loop.Tracker, "update", 3, id="between an update and its record"),
    pytest.param(loop.Tracker, "round", 2, id="before a round's record"),
    pytest.param(loop.Tracker, "evaluation", 2, id="before an evaluation's record"),
    pytest.param(job, "write_policy", 1, id="before the policy is written"),
    pytest.param(RemoteLearner, "export", 1, id="while the policy is written"),
]


@pytest.mark.parametrize("rounds_in_flight", [0, 1])
@pytest.mark.parametrize(("owner", "name", "call"), KILLS)
def test_killed_and_resumed_equals_uninterrupted(
    tiny_model: Path,
    folder: Path,
    whole: Callable[[int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    rounds_in_flight: int,
) -> None:
    uninterrupted = whole(rounds_in_flight)
    cfg = two_a_round(tiny_model, folder, str(tmp_path / "killed"), rounds_in_flight)
    with monkeypatch.context() as patch:
        kill_at_call(patch, owner, name, call)
        with pytest.raises(Killed):
            job.run(cfg, quiet=True)
    job.resume(cfg.run_dir, quiet=True)
    assert_same_run(cfg.run_dir, uninterrupted)


def test_a_torn_metrics_line_is_cut_on_resume(
    tiny_model: Path, folder: Path, finished: Path, tmp_path: Path
) -> None:
    cfg = two_a_round(tiny_model, folder, str(tmp_path / "torn"))
    with pytest.MonkeyPatch.context() as patch:
        kill_at_call(patch, RemoteLearner, "update", 4)
        with pytest.raises(Killed):
            job.run(cfg, quiet=True)
    with (cfg.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"schema": 1, "kind": "upd')
    job.resume(cfg.run_dir, quiet=True)
    assert_same_run(cfg.run_dir, finished)


def test_a_finished_run_is_neither_resumed_nor_overwritten(finished: Path) -> None:
    with pytest.raises(UserError, match="this run is finished"):
        job.resume(finished, quiet=True)


@pytest.mark.parametrize(
    ("resampling", "lags"),
    [
        ({"updates_per_round": 1}, [0, 0, 0, 0, 0, 0]),
        ({"updates_per_round": 2}, [0, 1, 0, 1, 0, 1]),
        ({"updates_per_round": 4}, [0, 1, 2, 3, 0, 1]),
        ({"updates_per_round": 1, "passes": 2}, [0, 1, 0, 1, 0, 1]),
        # One round ahead: rounds 0 and 1 are both sampled by version 0, round 2 by version 2.
        ({"updates_per_round": 2, "rounds_in_flight": 1}, [0, 1, 2, 3, 2, 3]),
        ({"updates_per_round": 1, "rounds_in_flight": 2}, [0, 1, 2, 2, 2, 2]),
        ({"updates_per_round": math.inf}, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_pairs_are_as_stale_as_the_dial_says(
    tiny_model: Path, tmp_path: Path, resampling: dict[str, Any], lags: list[int]
) -> None:
    cfg = tiny.config(tiny_model, tmp_path, resampling=resampling)
    job.run(cfg, quiet=True)
    updates = [r for r in tiny.records(cfg.run_dir) if r["kind"] == "update"]
    logged = [(r["lag_max"], r["lag_mean"]) for r in updates if r["pairs"]]
    expected = [(lag, lag) for lag, r in zip(lags, updates, strict=True) if r["pairs"]]
    assert logged == expected
    versions = [r.version for r in Ledger(cfg.run_dir / "ledger")]
    assert versions == [r["version"] for r in tiny.records(cfg.run_dir) if r["kind"] == "round"]


@pytest.mark.parametrize("updates_per_round", [1, 2, 3, 5, math.inf])
def test_the_dial_keeps_the_budget(
    tiny_model: Path, tmp_path: Path, updates_per_round: float
) -> None:
    cfg = tiny.config(tiny_model, tmp_path, resampling={"updates_per_round": updates_per_round})
    job.run(cfg, quiet=True)
    rounds = list(Ledger(cfg.run_dir / "ledger"))
    positions = [group.prompt.position for round_ in rounds for group in round_.groups]
    assert positions == list(range(6 * 4))
    records = tiny.records(cfg.run_dir)
    learned = sum(r["pairs"] for r in records if r["kind"] == "update")
    paired = sum(pair.fate is Fate.LEARN for round_ in rounds for pair in round_.pairs)
    assert learned == paired
    assert [r["update"] for r in records if r["kind"] == "update"] == [1, 2, 3, 4, 5, 6]


def test_the_first_update_starts_at_ln_2_and_every_pair_is_scored(finished: Path) -> None:
    first = tiny.records(finished)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["margin"] == 0.0
    for round_ in Ledger(finished / "ledger"):
        for completion in round_.completions:
            assert completion.reference_logprobs is not None
            assert len(completion.reference_logprobs) == len(completion.ids)


def test_invalid_verdicts_never_train(tiny_model: Path, tmp_path: Path) -> None:
    cfg = tiny.config(tiny_model, tmp_path, judge={"max_invalid_share": 1.0})
    (tmp_path / "judge.py").write_text(
        "def score(prompts, completions, **columns):\n"
        "    bad = [None, float('nan')]\n"
        "    return [bad[i % 2] if i % 8 < 2 else len(set(c.split())) + i / 100\n"
        "            for i, c in enumerate(completions)]\n"
    )
    job.run(cfg, quiet=True)
    for round_ in Ledger(cfg.run_dir / "ledger"):
        fates = {pair.position: pair.fate for pair in round_.pairs}
        for number, group in enumerate(round_.groups):
            expected = Fate.INVALID if number == 0 else Fate.LEARN
            identical = group.completions[0].ids.tolist() == group.completions[1].ids.tolist()
            assert fates[group.prompt.position] is (
                Fate.IDENTICAL if identical and number else expected
            )
    for record in tiny.records(cfg.run_dir):
        if record["kind"] == "round":
            assert record["dropped"]["invalid"] == 1
            assert record["pairs"] + record["dropped"]["identical"] == 3


def test_a_failing_judge_stops_the_run_with_its_reason(tiny_model: Path, tmp_path: Path) -> None:
    cfg = tiny.config(tiny_model, tmp_path)
    (tmp_path / "judge.py").write_text(
        "def score(prompts, completions, **columns):\n    raise OSError('no such server')\n"
    )
    with pytest.raises(JudgeFailed, match=r"8 of the round's 8 scores are INVALID.*no such server"):
        job.run(cfg, quiet=True)


def test_an_update_without_pairs_still_counts(tiny_model: Path, tmp_path: Path) -> None:
    cfg = tiny.config(tiny_model, tmp_path)
    (tmp_path / "judge.py").write_text(
        "def score(prompts, completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    job.run(cfg, quiet=True)
    updates = [r for r in tiny.records(cfg.run_dir) if r["kind"] == "update"]
    assert [(r["pairs"], r["loss"]) for r in updates] == [(0, None)] * 6
    start, end = load_file(tiny_model / "model.safetensors"), weights(cfg.run_dir)
    assert all(torch.equal(start[name], end[name]) for name in start)


def test_the_policy_is_the_final_learner_and_loads_anywhere(
    tiny_model: Path, finished: Path
) -> None:
    policy = AutoModelForCausalLM.from_pretrained(finished / "policy")
    saved = torch.load(finished / "checkpoints/update-000006/learner.pt", weights_only=True)
    for name, tensor in saved["policy"].items():
        assert torch.equal(policy.state_dict()[name], tensor)
    tokenizer = AutoTokenizer.from_pretrained(finished / "policy")
    assert tokenizer("a b c")["input_ids"] == [1, 3, 4, 5]
    start = load_file(tiny_model / "model.safetensors")
    assert any(not torch.equal(start[name], tensor) for name, tensor in weights(finished).items())
    card = (finished / "policy" / "README.md").read_text()
    assert "6 updates of 4 prompts × 2 completions" in card
    assert "sampled anew every 2 updates" in card


def test_objective_and_pairing_of_ones_own(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def hinge(logps, slope):\n"
        "    return (1 - slope * (logps.chosen_logratio - logps.rejected_logratio)).clamp_min(0)\n"
        "def first_two(scores):\n"
        "    return [(0, 1)]\n"
    )
    cfg = tiny.config(
        tiny_model,
        tmp_path,
        objective={"name": f"{tmp_path}/mine.py:hinge", "args": {"slope": 0.5}},
        pairing={"strategy": f"{tmp_path}/mine.py:first_two"},
        sampling={"prompts_per_update": 4, "max_new_tokens": 8, "completions_per_prompt": 3},
    )
    job.run(cfg, quiet=True)
    first = tiny.records(cfg.run_dir)[0]
    assert first["loss"] == pytest.approx(1.0, abs=1e-5)
    for round_ in Ledger(cfg.run_dir / "ledger"):
        assert {frozenset((pair.chosen, pair.rejected)) for pair in round_.pairs} == {
            frozenset((0, 1))
        }


def test_evaluate_again_agrees_with_the_run(finished: Path) -> None:
    from pipeline.run_directory import read_run_config

    cfg, _ = read_run_config(finished)
    result = job.evaluate(cfg)
    (again,) = result.evaluations
    last = [r for r in tiny.records(finished) if r["kind"] == "evaluation"][-1]
    for key in ("win", "tie", "loss", "quality", "quality_baseline", "kl_to_reference"):
        assert again[key] == last[key], key
    assert len(result.samples) == 3
