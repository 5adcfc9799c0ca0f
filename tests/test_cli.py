"""The commands as a user meets them: exit codes, one clear line, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from judges.errors import UserError
from pipeline import cli
from pipeline.config import Config, parse_config
from pipeline.run_directory import create_run_directory
from tests import tiny


def freshpairs(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *args],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )


def write_config(cfg: Config, path: Path, **sections: dict[str, object]) -> Path:
    raw = cfg.model_dump(mode="json")
    for name, section in sections.items():
        raw[name] |= section
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture
def config_file(tiny_model: Path, tmp_path: Path) -> Path:
    return write_config(tiny.config(tiny_model, tmp_path), tmp_path / "tiny.yaml")


def test_train_evaluate_export(config_file: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    trained = freshpairs(
        "train", str(config_file), f"evaluation.prompts={{path: {prompts}}}", "run.updates=2"
    )
    assert trained.returncode == 0, trained.stderr
    assert "win/tie/loss" in trained.stdout
    assert "Starting model" in trained.stdout
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} >= {"config.yaml", "metrics.jsonl", "ledger", "policy"}

    evaluated = freshpairs("evaluate", str(run), "evaluation.judges=[sentiment]")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "sentiment" in evaluated.stdout

    out = tmp_path / "pairs.jsonl"
    exported = freshpairs("export", str(run), "--out", str(out))
    assert exported.returncode == 0, exported.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    learned = sum(r["pairs"] for r in tiny.records(run) if r["kind"] == "update")
    assert len(rows) == learned > 0
    assert rows[0].keys() >= {"prompt", "chosen", "rejected"}


def broken_model(directory: Path, model: Path, without: str) -> Path:
    directory.mkdir()
    for path in model.iterdir():
        if not path.name.startswith(without):
            (directory / path.name).write_bytes(path.read_bytes())
    return directory


def without_eos(directory: Path, model: Path) -> Path:
    broken_model(directory, model, "nothing")
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("eos_token", None)
    path.write_text(json.dumps(settings))
    return directory


MISTAKES = [
    ("learner.learning_rat=1", "learner.learning_rat: unknown key; did you mean 'learning_rate'?"),
    ("lerner.learning_rate=1", "lerner: unknown key; did you mean 'learner'?"),
    ("run.updates=many", "run.updates=many"),
    ("sampling.completions_per_prompt=1", "completions_per_prompt=1: a pair needs at least 2"),
    ("prompts.path=nowhere.jsonl", "nowhere.jsonl: no such file"),
    ("prompts.path={tmp}/empty.jsonl", "empty.jsonl"),
    ("prompts.path={tmp}/broken.jsonl", "line 2"),
    ("prompts.column=question", "question"),
    ("prompts.path={tmp}/long.jsonl", "the model's context is 64"),
    ("policy.model={tmp}/no-weights", "no weights"),
    ("policy.model={tmp}/no-eos", "no end-of-sequence token"),
    ("policy.model=storys15M", "stories15m"),
    ("judge.name=absent.py:score", "absent.py"),
    ("judge.name={tmp}/broken.py:score", "ZeroDivisionError"),
    ("judge.name=sentimant", "sentiment"),
    ('objective={"name":"{tmp}/judge.py:loss"}', "has no loss"),
    ("objective.name=dpoo", "did you mean 'dpo'?"),
    ("pairing.strategy=bestworst", "best_worst"),
    ("run.dir={tmp}", "already exists"),
    ("generator.replicas=99 cluster.address=local", " CPU missing: "),
]


@pytest.mark.parametrize(("override", "line"), MISTAKES)
def test_a_mistake_is_one_clear_line(
    tiny_model: Path,
    tmp_path: Path,
    config_file: Path,
    override: str,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a " * 60}) + "\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    broken_model(tmp_path / "no-weights", tiny_model, "model")
    without_eos(tmp_path / "no-eos", tiny_model)
    before = sorted(tmp_path.rglob("*"))
    overrides = [part.replace("{tmp}", str(tmp_path)) for part in override.split()]
    monkeypatch.setattr(sys, "argv", ["freshpairs", "train", str(config_file), *overrides])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    said = capsys.readouterr().err.strip()
    assert line in said
    assert "\n" not in said
    assert sorted(p for p in tmp_path.rglob("*") if "__pycache__" not in p.parts) == before


def test_another_judges_path_may_hold_what_yaml_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Config] = []
    monkeypatch.setattr("pipeline.job.evaluate", asked.append)
    monkeypatch.setattr(cli, "_show", lambda result: None)
    mine = tmp_path / "a, {b}: c.py"
    mine.write_text("")
    raw = {"prompts": {"path": "p"}, "run": {"dir": str(tmp_path / "run")}}
    cfg = parse_config(raw, tmp_path)
    create_run_directory(cfg, {})
    cli.evaluate(tmp_path / "run", judge=f"{mine}:fn")
    assert [cfg.judge.name for cfg in asked] == [f"{mine}:fn"]


@pytest.mark.parametrize("option", [["--detach"], ["--env=A"], ["--runtime-env=a.yaml"]])
def test_options_of_a_job_need_a_cluster(option: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        CliRunner().invoke(cli.app, ["resume", "runs/x", *option], catch_exceptions=False)
    name = option[0].partition("=")[0]
    assert str(caught.value) == (
        f"{name}: of a job on a cluster: give its --address, or leave it out"
    )


def test_unknown_commands_and_options_are_mistakes(tmp_path: Path) -> None:
    assert freshpairs("trian").returncode == 2
    assert freshpairs("resume", str(tmp_path)).returncode == 2
    assert freshpairs("export", str(tmp_path), "--out", "x.parquet").returncode == 2
    assert freshpairs("fetch", "llama").returncode == 2


def test_help_has_an_example_for_every_command() -> None:
    top = freshpairs("--help").stdout
    for command in ("train", "resume", "evaluate", "export", "explain", "fetch", "doctor"):
        assert command in top
        assert f"freshpairs {command}" in freshpairs(command, "--help").stdout


def test_doctor_says_what_runs_here() -> None:
    found = freshpairs("doctor")
    assert found.returncode == 0
    for subject in ("cores", "GPU", "ray", "vllm", "models"):
        assert subject in found.stdout


def signal_a_run(config_file: Path, number: signal.Signals, *overrides: str) -> tuple[int, str]:
    """Start a run, signal it once it has written some records; its exit code and what it said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", "train", str(config_file), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = config_file.parent / "run" / "metrics.jsonl"
    give_up = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 8):
        assert process.poll() is None
        assert time.monotonic() < give_up
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    return process.returncode, said


def test_a_run_killed_outright_goes_on_to_the_same_end(config_file: Path, tmp_path: Path) -> None:
    code, _ = signal_a_run(config_file, signal.SIGKILL, "run.updates=60")
    assert code == -signal.SIGKILL
    assert not (tmp_path / "run" / "policy").exists()
    assert freshpairs("resume", str(tmp_path / "run")).returncode == 0
    whole = tmp_path / "whole"
    done = freshpairs("train", str(config_file), "run.updates=60", f"run.dir={whole}")
    assert done.returncode == 0, done.stderr
    assert tiny.records(tmp_path / "run") == tiny.records(whole)
    weights = [(p / "policy" / "model.safetensors").read_bytes() for p in (tmp_path / "run", whole)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_exits_3_and_resumes(
    config_file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    code, said = signal_a_run(config_file, number, "run.updates=4000")
    assert code == 3, said
    assert f"freshpairs resume {tmp_path / 'run'}" in said
    done = tiny.records(tmp_path / "run")[-1]["update"]
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["run"]["updates"] = done + 2
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    resumed = freshpairs("resume", str(tmp_path / "run"))
    assert resumed.returncode == 0, resumed.stderr
    updates = [r["update"] for r in tiny.records(tmp_path / "run") if r["kind"] == "update"]
    assert updates == list(range(1, done + 3))
