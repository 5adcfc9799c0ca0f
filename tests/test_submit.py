"""What is sent to a cluster, and how its jobs are followed: packages, errors, real Ray jobs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from judges.errors import UserError
from pipeline import cli_cluster, shipped_files, submission
from pipeline.cli_cluster import dashboard
from pipeline.config import load_config
from pipeline.launch.jobs import Job, Jobs, _hidden
from pipeline.submission import pack, pack_resume, runtime_environment, submission_id
from tests import ray_cluster, tiny
from tests.ray_cluster import Cluster

CHECKOUT = Path(__file__).resolve().parent.parent
OURS = {"pipeline", "workers", "judges", "pyproject.toml", "config.yaml", "revision.txt"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with a config of prompts and a run directory, which is the cwd."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (folder / "mine.yaml").write_text(
        "run: {name: mine, dir: /shared/runs/mine}\nprompts: {path: prompts.jsonl}\n"
    )
    monkeypatch.chdir(folder)
    return folder


def packed(here: Path, *overrides: str, there: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The config in the package that is made of ``here``/mine.yaml."""
    folder = here.parent / "package"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    pack(here / "mine.yaml", overrides, folder, there)
    raw: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    return raw


def refused(here: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        packed(here, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert not list((here.parent / "package").iterdir())
    return message


def files(here: Path) -> set[str]:
    folder = here.parent / "package" / "files"
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# --- packages --------------------------------------------------------------------------------

NAMED = {
    "judge.name": ("score.py:f", "files/score.py:f"),
    "judge.args.template": ("ask.txt", "files/ask.txt"),
    "judge.args.deep": ("[{schema: s.json}, [r.py:rule]]", [
        {"schema": "files/s.json"}, ["files/r.py:rule"]]),
    "judge.args.plain": ("[a/b, 'text.', 1e-3]", ["a/b", "text.", 1e-3]),
    "judge.second": ("{name: second.py:f}", "files/second.py:f"),
    "judge.select": ("uncertainty", "uncertainty"),
    "judge.budget.labels": ("9", 9),
    "judge.select_by": ("[one.py:f, two.py:f]", ["files/one.py:f", "files/two.py:f"]),
    "evaluation.judges": ("[polarity, other.py:f]", ["polarity", "files/other.py:f"]),
    "evaluation.prompts.path": ("held.jsonl", "files/held.jsonl"),
    "drift.bad": ("bad.jsonl", "files/bad.jsonl"),
    "drift.held_out.path": ("text.jsonl", "files/text.jsonl"),
    "resampling.early.rule": ("early.py:f", "files/early.py:f"),
    "resampling.early.args.table": ("early.csv", "files/early.csv"),
    "pairing.strategy": ("pair.py:f", "files/pair.py:f"),
    "pairing.args.words": ("words.txt", "files/words.txt"),
    "objective": ("{name: loss.py:f, args: {table: loss.csv}}", {
        "name": "files/loss.py:f", "beta": 0.1, "args": {"table": "files/loss.csv"}}),
}  # fmt: skip
"""Every key that names files: as written, and as it stands in the package."""

SENT = {
    *("score.py", "ask.txt", "s.json", "r.py", "second.py", "one.py", "two.py", "other.py"),
    *("held.jsonl", "bad.jsonl", "text.jsonl", "early.py", "early.csv", "pair.py", "words.txt"),
    *("loss.py", "loss.csv", "prompts.jsonl"),
}


def value(raw: dict[str, Any], key: str) -> Any:
    found: Any = raw
    for name in key.split("."):
        found = found[name]
    match found:
        case {"name": name, "cache": _}:
            return name
        case [{"cache": _}, *_]:
            return [judge["name"] for judge in found]
    return found


def test_every_file_that_a_config_names_is_sent_and_named_within_the_package(here):
    for name in SENT - {"prompts.jsonl"}:
        (here / name).write_text(f"# {name}\n")
    raw = packed(here, *(f"{key}={written}" for key, (written, _) in NAMED.items()))
    assert {key: value(raw, key) for key in NAMED} == {
        key: within for key, (_, within) in NAMED.items()
    }
    assert raw["prompts"]["path"] == "files/prompts.jsonl"
    assert files(here) == SENT
    assert (here.parent / "package/files/score.py").read_text() == "# score.py\n"
    assert raw["cluster"]["address"] == "auto"
    assert raw["run"]["dir"] == "/shared/runs/mine"


def test_mixtures_pairs_and_directories_of_rows_are_sent(here):
    (here / "rows").mkdir()
    (here / "rows" / "a.jsonl").write_text("{}\n")
    (here / "rows" / ".gitignore").write_text("*\n")
    mixture = "prompts={mixture: [{path: rows}, {path: openai/gsm8k}, {path: prompts.jsonl}]}"
    raw = packed(here, mixture)
    paths = [source["path"] for source in raw["prompts"]["mixture"]]
    assert paths == ["files/rows", "openai/gsm8k", "files/prompts.jsonl"]
    assert files(here) == {"rows/a.jsonl", "prompts.jsonl"}
    assert packed(here, "prompts={pairs: prompts.jsonl}")["prompts"]["pairs"] == (
        "files/prompts.jsonl"
    )


def test_a_package_holds_our_packages_and_nothing_else_of_the_checkout(here, monkeypatch):
    checkout = here.parent / "checkout"
    for name in ("pipeline", "workers", "judges", "judges/templates", "tests", "runs/x", ".venv"):
        (checkout / name / "__pycache__").mkdir(parents=True)
        (checkout / name / "a.py").write_text("")
        (checkout / name / "__pycache__" / "a.pyc").write_text("")
    (checkout / "pyproject.toml").write_text("")
    monkeypatch.setattr(submission, "CHECKOUT", checkout)
    packed(here)
    folder = here.parent / "package"
    assert {path.name for path in folder.iterdir()} == OURS | {"files"}
    assert (folder / "judges/templates").is_dir()
    left = [p for p in folder.rglob("*") if p.name == "__pycache__" or p.suffix == ".pyc"]
    assert left == []


def test_a_packages_config_loads_from_its_folder_alone(here):
    (here / "score.py").write_text("def f(completions): return [0.0] * len(completions)\n")
    packed(here, "judge.name=score.py:f")
    here.rename(here.parent / "hidden")
    folder = here.parent / "package"
    script = (
        "import pipeline.config as c; cfg = c.load_config('config.yaml'); "
        "print(c.__file__, cfg.judge.name, cfg.prompts.path, sep='\\n')"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.split()
    names = ("pipeline/config.py", "files/score.py:f", "files/prompts.jsonl")
    assert printed == [f"{folder}/{name}" for name in names]


def test_two_files_of_one_name_are_both_sent(here):
    for folder in ("a", "b"):
        (here / folder).mkdir()
        (here / folder / "judge.py").write_text(folder)
    raw = packed(here, "judge.name=a/judge.py:f", "evaluation.judges=[b/judge.py:f, a/judge.py:g]")
    first, (second, again) = raw["judge"]["name"], value(raw, "evaluation.judges")
    assert {first, second} == {"files/judge.py:f", "files/2/judge.py:f"}
    assert again == first.replace(":f", ":g")
    folder = here.parent / "package"
    assert (folder / first.removesuffix(":f")).read_text() == "a"
    assert (folder / second.removesuffix(":f")).read_text() == "b"


def test_a_judge_is_called_in_the_records_what_a_run_here_would_call_it(here):
    (here / "score.py").write_text("")
    members = "{name: mean, args: {members: [score.py:f, sentiment, {name: score.py:g, alias: g}]}}"
    raw = packed(
        here,
        "judge.name=score.py:f",
        f"evaluation.judges=[{{name: score.py:g, alias: mine}}, polarity, {members}]",
    )
    assert raw["judge"]["alias"] == load_config("mine.yaml", ["judge.name=score.py:f"]).judge.name
    mine, polarity, mean = raw["evaluation"]["judges"]
    assert (mine["alias"], polarity["alias"], mean["alias"]) == ("mine", None, None)
    assert mean["args"]["members"] == [
        {"alias": f"{here}/score.py:f", "name": "files/score.py:f"},
        "sentiment",
        {"name": "files/score.py:g", "alias": "g"},
    ]


def test_what_lies_where_every_node_sees_it_is_not_sent(here, monkeypatch):
    share = here.parent / "share"
    share.mkdir()
    (share / "rows.jsonl").write_text("{}\n")
    (share / "score.py").write_text("")
    overrides = (f"prompts.path={share}/rows.jsonl", f"judge.name={share}/score.py:f")
    raw = packed(here, *overrides, there=(share,))
    assert (raw["prompts"]["path"], raw["judge"]["name"]) == (
        f"{share}/rows.jsonl",
        f"{share}/score.py:f",
    )
    assert files(here) == set()
    assert packed(here, *overrides)["prompts"]["path"] == "files/rows.jsonl"
    there = packed(here, "prompts.path=/only/there.jsonl")
    assert there["prompts"]["path"] == "/only/there.jsonl"
    monkeypatch.chdir(share)
    found = packed(here, "prompts.path=rows.jsonl", there=(share,))
    assert found["prompts"]["path"] == f"{share}/rows.jsonl"


def test_an_inline_run_stays_inline(here):
    assert packed(here, "cluster.address=inline")["cluster"]["address"] == "inline"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.dir=", "run.dir: not set, and a job's own folder is gone when the job ends: set r"),
        ("run.dir=runs/x", "run.dir=runs/x: a relative path, and a job's own folder is gone wh"),
        ("run.updates=0", "mine.yaml: run.updates=0: must be greater than or equal to 1 — Opt"),
        ("policy.model=model", "policy.model=model: a directory here, and models are not sent wi"),
        (
            "judge={name: llm_pairwise, client: {kind: transformers, model: ./model}}",
            "judge.client.model=./model: a directory here, and models are not sent with a job: gi",
        ),
        (
            "judge={name: reward_model, args: {model: ../here/model}}",
            "judge.args.model=../here/model: a directory here, and models are not sent with a jo",
        ),
        (
            "objective={name: bco, embedding_model: model}",
            "objective.embedding_model=model: a directory here, and models are not sent with a jo",
        ),
        ("judge.cache=kept.sqlite", "judge.cache=kept.sqlite: a job's own folder is gone when t"),
        ("judge.name=none.py:f", "judge.name=none.py:f: no file none.py in "),
        ("prompts.path=none.jsonl", "prompts.path=none.jsonl: no such file here: mend the path"),
    ],
)
def test_what_cannot_be_sent_is_told_before_anything_is_written(here, override, said):
    (here / "model").mkdir()
    message = refused(here, override)
    assert message.removeprefix(f"{here}/").startswith(said)


def test_models_are_named_as_the_cluster_knows_them(here):
    (here / "model").mkdir()
    for model in (f"{here}/model", "stories15M", "org/name"):
        assert packed(here, f"policy.model={model}")["policy"]["model"] == model
    judge = f"judge={{name: reward_model, args: {{model: {here}/model}}}}"
    assert packed(here, judge)["judge"]["args"]["model"] == f"{here}/model"


def test_too_large_a_package_names_its_largest_files(here, monkeypatch):
    with (here / "prompts.jsonl").open("wb") as rows:
        rows.truncate(300_000_000)
    assert refused(here) == (
        "the job's package would be "
        f"{submission.told_size(300_000_000 + submission._copy(here.parent / 'own', {}))}, and a "
        f"cluster takes 104.9 MB; the largest files: {here}/prompts.jsonl (300 MB): put them in a "
        "folder that every node has and name it by --there FOLDER, or let the config name a "
        "hub's data set"
    )


def test_going_on_needs_a_place_that_the_cluster_knows(tmp_path):
    with pytest.raises(UserError, match=r"^runs/x: with --address, give the run's absolute path"):
        pack_resume("runs/x", [], tmp_path)
    with pytest.raises(UserError, match=r"an override has the form key\.path=value"):
        pack_resume("/runs/x", ["judge.budget.usd"], tmp_path)
    sent = pack_resume("s3://bucket/my run", ["judge.budget={usd: 2}"], tmp_path)
    assert sent.entrypoint == (
        "python -m pipeline.cli resume 's3://bucket/my run' cluster.address=auto "
        "'judge.budget={usd: 2}'"
    )
    assert (sent.name, sent.run_dir) == ("my run", "s3://bucket/my run")
    assert {path.name for path in tmp_path.iterdir()} == OURS - {"config.yaml"}


@pytest.mark.parametrize("resumed", [True, False])
def test_a_run_that_a_job_is_at_is_left_to_it(here, monkeypatch, resumed):
    """Nothing is sent; jobs that have ended, and those of other runs, stand in nobody's way."""

    class Listed:
        address = "http://head:8265"
        jobs: ClassVar[list[Job]] = []

        def all(self) -> list[Job]:
            return self.jobs

        def submit(self, *_: object) -> None:
            raise AssertionError("sent")

    monkeypatch.setattr(cli_cluster, "_connected", lambda _: nullcontext(Listed()))

    def send() -> None:
        def package(folder: Path) -> submission.Submission:
            if resumed:
                return pack_resume("/shared/runs//mine/", [], folder)
            return pack(here / "mine.yaml", ["run.dir=/shared/runs/mine/"], folder)

        cli_cluster.send(package, "http://head:8265", True, None, None)

    at_it = {"freshpairs": "1", "run_dir": "/shared/runs/mine"}
    done, other = (Job(n, "FAILED", 3, "", None, at_it) for n in ("mine-1", "mine-2"))
    other = replace(other, status="RUNNING", metadata=at_it | {"run_dir": "/shared/runs/more"})
    Listed.jobs = [done, other]
    with pytest.raises(AssertionError, match="sent"):
        send()
    for status in ("PENDING", "RUNNING"):
        Listed.jobs = [done, other, replace(done, name="mine-3", status=status)]
        with pytest.raises(UserError) as caught:
            send()
        assert str(caught.value) == (
            "/shared/runs/mine: mine-3 is at it: `freshpairs stop mine-3 --address "
            "http://head:8265` first"
        )


def test_a_run_keeps_the_files_it_was_sent_with(here, monkeypatch):
    (here / "score.py").write_text("# mine\n")
    packed(here, "judge.name=score.py:f")
    folder = here.parent / "package"
    monkeypatch.setattr(shipped_files, "CHECKOUT", folder)
    monkeypatch.chdir(folder)
    run = here.parent / "run"
    cfg = load_config("config.yaml", [f"run.dir={run}"])
    assert cfg.judge.name == f"{folder}/files/score.py:f"
    assert shipped_files.keep_files(run) == run / "files"
    assert (run / "files/score.py").read_text() == "# mine\n"
    written = shipped_files.named_within(cfg)
    assert (written.judge.name, written.prompts.path) == (
        "files/score.py:f",
        "files/prompts.jsonl",
    )
    (run / "config.yaml").write_text(yaml.safe_dump(written.model_dump()))
    monkeypatch.chdir("/")
    again = load_config(run / "config.yaml")
    assert again.judge.name == f"{run}/files/score.py:f"
    assert shipped_files.named_within(again) == written


def test_in_a_checkout_a_run_keeps_no_files(tmp_path):
    assert shipped_files.keep_files(tmp_path) is None
    assert shipped_files.shipped_revision() is None


# --- what goes with a package ----------------------------------------------------------------


def test_a_runtime_environment_is_ours_with_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    own = tmp_path / "own.yaml"
    own.write_text("pip: [textstat]\nenv_vars: {LEVEL: 3, RAY_JOB_STOP_WAIT_TIME_S: 60}\n")
    assert runtime_environment(tmp_path, own, ["A_KEY"]) == {
        "pip": ["textstat"],
        "working_dir": str(tmp_path),
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60", "LEVEL": "3", "A_KEY": "secret"},
    }
    assert runtime_environment(tmp_path)["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "1800"}
    monkeypatch.delenv("A_KEY")
    with pytest.raises(UserError, match=r"^--env=A_KEY: not set here: set it, or leave"):
        runtime_environment(tmp_path, None, ["A_KEY"])
    for text in ("[pip]", "working_dir: x", "env_vars: [a]", "a: ["):
        own.write_text(text)
        with pytest.raises(UserError, match=f"^--runtime-env={own}: "):
            runtime_environment(tmp_path, own)
    with pytest.raises(UserError, match=r"cannot be read: .*No such file"):
        runtime_environment(tmp_path, tmp_path / "none.yaml")


def test_a_submissions_name_is_fit_for_a_url():
    now = datetime(2026, 1, 2, 3, 4, 5)
    assert submission_id("first", now) == "first-20260102-030405"
    assert submission_id("../my run's/π", now) == "..-my-run-s-20260102-030405"
    assert submission_id("π", now) == "run-20260102-030405"


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("http://head:8265", "http://head:8265"),
        ("https://ray.example.org/cluster/", "https://ray.example.org/cluster"),
        ("head:8265", "http://head:8265"),
        ("10.0.0.1:8265", "http://10.0.0.1:8265"),
    ],
)
def test_addresses(given, address):
    assert dashboard(given) == address


@pytest.mark.parametrize("given", ["auto", "ray://head:10001", "head", "http://", "head:port"])
def test_what_is_no_address_is_told(given):
    with pytest.raises(UserError, match=f"^--address={given}: .* give the address of the clus"):
        dashboard(given)


def test_an_address_may_come_from_the_environment(monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(UserError, match=r"^--address: missing: give the address of the cluster's"):
        dashboard(None)
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    assert dashboard(None) == "http://head:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://other")
    assert dashboard(None) == "https://other"
    assert dashboard("given:1") == "http://given:1"


# --- following -------------------------------------------------------------------------------


def job(status: str, exit_code: int | None = None) -> Job:
    return Job("j", status, exit_code, "", None, {})


@pytest.mark.parametrize(
    ("ended", "state", "code"),
    [
        (job("SUCCEEDED", 0), "finished", 0),
        (job("FAILED", 1), "failed", 1),
        (job("FAILED", 2), "failed", 2),
        (job("FAILED", 3), "stopped", 3),
        (job("STOPPED"), "stopped", 3),
        (job("FAILED", -9), "failed", 1),
        (job("FAILED"), "failed", 1),
    ],
)
def test_how_a_job_ended(ended, state, code):
    assert (ended.ended, ended.state, ended.code) == (True, state, code)


def test_values_of_variables_are_not_shown():
    environment = {"env_vars": {"A_KEY": "sk-12345678", "SHORT": "1"}}
    shown = _hidden("failed with {'A_KEY': 'sk-12345678'} at 1", environment)
    assert shown == "failed with {'A_KEY': '***'} at 1"


class BreakingJobs(Jobs):
    """A job whose log stream breaks after each chunk of a script; its status follows."""

    def __init__(self, streams: list[list[str]], log: str) -> None:
        self.address = "http://head:8265"
        self._streams = streams
        self._log = log

    def job(self, name: str) -> Job:
        return job("RUNNING") if self._streams else job("SUCCEEDED", 0)

    def logs(self, name: str) -> str:
        return self._log

    async def lines(self, name: str) -> Any:
        stream = self._streams.pop(0)
        for text in stream:
            if text == "broken":
                raise RuntimeError("WebSocket connection closed unexpectedly")
            yield text


def test_a_stream_that_breaks_is_taken_up_where_it_broke(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    streams = [["one\n", "two\n", "broken"], ["broken"], ["one\ntwo\nth", "ree\n"], ["one\n"]]
    written: list[str] = []
    said: list[str] = []
    jobs = BreakingJobs(streams, "one\ntwo\nthree\nfour\n")
    assert jobs.follow("j", written.append, said.append).code == 0
    assert "".join(written) == "one\ntwo\nthree\nfour\n"
    assert said == ["lost the connection to http://head:8265; the job goes on: trying again …"]


# --- a real cluster --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ray_cluster.head(tmp_path_factory.mktemp("head")) as started:
        yield started


def freshpairs(
    cluster: Cluster, *command: str, cwd: Path, code: int = 0, **environment: str
) -> str:
    """What a command prints, both streams; it must end with that code, within minutes."""
    process = started(cluster, *command, cwd=cwd, **environment)
    try:
        printed, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == code, printed
    return printed


def started(
    cluster: Cluster, *command: str, cwd: Path, **environment: str
) -> subprocess.Popen[str]:
    """A command whose output, both streams, is read as it comes."""
    ours = {"PYTHONPATH": str(CHECKOUT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *command],
        env=ray_cluster.without_ray(os.environ) | ours | cluster.environment | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
    )


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A user's folder: a tiny run's config, judge and prompts; it runs in the job's driver."""
    cfg = tiny.config(tiny_model, tmp_path)
    raw = {
        "run": {"name": "tiny", "updates": 6},
        "policy": {"model": str(tiny_model)},
        "prompts": {"path": "prompts.jsonl"},
        "sampling": {"prompts_per_update": 4, "max_new_tokens": 8},
        "generator": {"backend": "transformers", "threads": 1},
        "judge": {"name": "judge.py:score"},
        "learner": {"learning_rate": 1e-2, "threads": 1},
        "checkpoint": {"every": cfg.checkpoint.every},
        "tracking": {"tensorboard": False},
        "cluster": {"address": "inline"},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path


def ledger_of(run: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq

    timed = {"seconds"}
    found = {}
    for path in sorted((run / "ledger").glob("*.parquet")):
        table = pq.read_table(path)
        found[path.name] = table.drop_columns(sorted(timed & set(table.column_names))).to_pylist()
    return found


RAYS_OWN_STOP_SECONDS = 3
"""What Ray gives a job to end in, unless RAY_JOB_STOP_WAIT_TIME_S is set."""


def weights_of(run: Path) -> bytes:
    return (run / "policy" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_job_writes_the_run_that_a_run_here_writes(cluster: Cluster, folder: Path) -> None:
    seen = folder / "seen.txt"
    judge = folder / "judge.py"
    telling = f"import sys\nopen({str(seen)!r}, 'w').write(sys.modules['pipeline'].__file__)\n"
    judge.write_text(telling + judge.read_text())
    freshpairs(cluster, "train", "mine.yaml", f"run.dir={folder}/here", cwd=folder)
    assert seen.read_text() == str(CHECKOUT / "pipeline/__init__.py")
    at = ("--address", cluster.address)
    printed = freshpairs(cluster, "submit", "mine.yaml", f"run.dir={folder}/there", *at, cwd=folder)
    assert "_ray_pkg_" in seen.read_text()
    ran, here = folder / "there", folder / "here"
    assert len(ledger_of(here)) == 3 * 6
    assert str(ledger_of(ran)) == str(ledger_of(here))  # as text: NaN is NaN
    assert str(tiny.records(ran)) == str(tiny.records(here))
    assert weights_of(ran) == weights_of(here)
    assert printed.count("round update") == 1
    assert printed.index("submitted tiny-") < printed.index("round update")
    assert f"dashboard: {cluster.address}/#/jobs/tiny-" in printed
    assert "INFO dashboard_sdk" not in printed
    recorded = yaml.safe_load((ran / "config.yaml").read_text())
    assert recorded["judge"]["name"] == "files/judge.py:score"
    assert (ran / "files/judge.py").read_text() == judge.read_text()


@pytest.mark.slow
def test_a_job_is_left_looked_at_stopped_and_gone_on_with(cluster: Cluster, folder: Path) -> None:
    run, go = folder / "stopped", folder / "go"
    wait = "    while list(LEDGER.glob('*')) and not GO.exists():\n        time.sleep(0.1)\n"
    slow = tiny.JUDGE.replace("    words", f"{wait}    words")
    paths = f"LEDGER, GO = Path({str(run / 'ledger')!r}), Path({str(go)!r})\n"
    (folder / "slow.py").write_text(f"import time\nfrom pathlib import Path\n{paths}{slow}")
    at = ("--address", cluster.address)
    freshpairs(cluster, "train", "mine.yaml", f"run.dir={folder}/whole", cwd=folder)
    printed = freshpairs(
        cluster, "submit", "mine.yaml", f"run.dir={run}", "judge.name=slow.py:score", "--detach",
        *at, cwd=folder,
    )  # fmt: skip
    (name,) = [line.split()[1].strip(",") for line in printed.splitlines() if "submitted" in line]
    deadline = time.monotonic() + 120
    while not list((run / "ledger").glob("*.parquet")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    row = next(
        line.split()
        for line in freshpairs(cluster, "status", *at, cwd=folder, COLUMNS="300").splitlines()
        if line.startswith(name)
    )
    assert (row[0], row[1], row[2], row[-1]) == (name, "tiny", "running", str(run))
    assert "starting 3 workers" in freshpairs(cluster, "logs", name, *at, cwd=folder)
    stopping = started(cluster, "stop", name, *at, cwd=folder)
    assert stopping.stdout is not None
    assert stopping.stdout.readline().startswith(f"stopping {name}: ")
    time.sleep(2 * RAYS_OWN_STOP_SECONDS)
    go.touch()
    stopped, _ = stopping.communicate(timeout=240)
    assert stopping.returncode == 0
    command = f"freshpairs resume {run} --address {cluster.address}"
    assert stopped.splitlines()[-2:] == [f"{name}: stopped", f"go on with `{command}`"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["update-000001"]
    assert (run / "ledger" / "round-000001.parquet").is_file()  # the round in flight was waited for
    assert not (run / "policy").exists()
    said = freshpairs(cluster, "logs", name, "--follow", *at, cwd=folder, code=3)
    assert "\nstopped after update 1: " in said
    assert "had ended: stopped" in freshpairs(cluster, "stop", name, *at, cwd=folder)
    (folder / "slow.py").unlink()
    resumed = freshpairs(cluster, *command.split()[1:], cwd=folder)
    assert "resumed after update" in resumed
    assert weights_of(run) == weights_of(folder / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "code", "said"),
    [
        ("prompts.path=/no/such.jsonl", 2, "prompts.path=/no/such.jsonl: no such file"),
        ("judge.name=broken.py:score", 1, "the run failed: "),
        ("drift.stop.loss=-1", 3, "go on with `freshpairs resume {run} --address {address}`"),
    ],
)
def test_a_jobs_exit_code_comes_through(
    cluster: Cluster, folder: Path, override: str, code: int, said: str
) -> None:
    (folder / "broken.py").write_text("def score(completions): return [None] * len(completions)\n")
    at = ("--address", cluster.address)
    run = folder / "run"
    printed = freshpairs(
        cluster, "submit", "mine.yaml", f"run.dir={run}", override, *at, cwd=folder, code=code
    )
    assert said.format(run=run, address=cluster.address) in printed


@pytest.mark.slow
def test_a_job_that_never_began_says_why_and_no_secret(cluster: Cluster, folder: Path) -> None:
    (folder / "own.yaml").write_text("conda: there-is-no-such-environment\n")
    printed = freshpairs(
        cluster, "submit", "mine.yaml", f"run.dir={folder}/run", "--address", cluster.address,
        "--runtime-env", "own.yaml", "--env", "A_KEY", cwd=folder, code=1, A_KEY="sk-0123456789",
    )  # fmt: skip
    last = printed.strip().splitlines()[-1]
    assert last.startswith("tiny-")
    assert " failed before its run began: " in last
    assert "sk-0123456789" not in printed


@pytest.mark.slow
def test_mistakes_are_lines(cluster: Cluster, folder: Path) -> None:
    at = ("--address", cluster.address)
    closed = ray_cluster.free_port()
    none: dict[str, str] = {"RAY_AUTH_TOKEN": "", "RAY_AUTH_MODE": "disabled"}
    submit = ("submit", "mine.yaml", f"run.dir={folder}/run")
    other = subprocess.Popen(
        [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(closed + 1)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
    )
    cases: list[tuple[tuple[str, ...], dict[str, str], str]] = [
        ((*submit, *at), none, f"--address={cluster.address}: the cluster wants a token: set RA"),
        (
            (*submit, *at),
            {"RAY_AUTH_TOKEN": "a-wrong-token"},
            f"--address={cluster.address}: the cluster refused the token: set RAY_AUTH_TOKEN to",
        ),
        (
            (*submit, "--address", f"127.0.0.1:{closed}"),
            {},
            f"--address=http://127.0.0.1:{closed}: cannot be reached (Connection refused): give",
        ),
        (
            ("status", "--address", "http://nobody.invalid:8265"),
            {},
            "--address=http://nobody.invalid:8265: cannot be reached (",
        ),
        (
            ("status", "--address", f"http://127.0.0.1:{closed + 1}"),
            {},
            f"--address=http://127.0.0.1:{closed + 1}: not a Ray dashboard (",
        ),
        (submit, {}, "--address: missing: give the address of the cluster's dashboard"),
        ((*submit, "run.updates=0", *at), {}, "mine.yaml: run.updates=0: must be greater than"),
    ]
    for command in ("status", "logs", "stop"):
        said = f"nothing-1: no such job on {cluster.address}: `freshpairs status --address "
        cases.append(((command, "nothing-1", *at), {}, said))
    try:
        for command_line, environment, said in cases:
            began = time.monotonic()
            printed = freshpairs(cluster, *command_line, cwd=folder, code=2, **environment)
            assert time.monotonic() - began < 15
            assert printed.startswith(said), printed
            assert printed.count("\n") == 1
    finally:
        other.kill()
        other.wait()


@pytest.mark.slow
def test_the_largest_package_is_what_ray_takes() -> None:
    from ray._private import ray_constants

    assert ray_constants.DASHBOARD_CLIENT_MAX_SIZE == submission.LARGEST
