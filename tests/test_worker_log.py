"""A worker's log: every call of a run in its round and version, also the one that it died of."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import job
from pipeline.launch.crew import plan_crew, unwritten_logs
from tests import tiny
from tests.object_storage import in_memory
from tests.test_ray import mortal
from workers import worker_log
from workers.generator import SampledUnit, SampleRequest
from workers.judge_worker import JudgedUnit
from workers.messages import Completion, Prompt
from workers.places import ObjectStore, StorageFailed
from workers.weight_sync.buckets import Carried, Receipt, WeightPush
from workers.worker_log import LogPlace, WorkerLog, log_place


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def completion(version: int, tokens: int, last_version: int | None = None) -> Completion:
    ids = np.arange(tokens, dtype=np.int64)
    logprobs = np.zeros(tokens, np.float32)
    return Completion(0, 0, 0, version, ids, logprobs, None, True, "", last_version=last_version)


PROMPTS = (Prompt(0, np.array([1]), "p"), Prompt(1, np.array([1]), "q"))


class Generator:
    version = -1

    def load(self, push: WeightPush) -> Receipt:
        self.version = push.version
        return Receipt(push.version, push.checksum)

    def sample(self, request: SampleRequest) -> SampledUnit:
        if request.purpose == "bad":
            raise ValueError("no\nsuch purpose")
        done = [completion(self.version, tokens, last) for tokens, last in TOKENS]
        return request.answer(done, 0.0)


TOKENS = [(1, None), (2, None), (3, None), (4, 5)]
"""Of each completion: how many, and the version of the last where it is another."""


class Judge:
    def judge(self, name: str, prompts: Any, sampled: SampledUnit) -> JudgedUnit:
        return JudgedUnit((), 0.5, {"tokens": 7.0, "agreement": float("nan")}, stuck=True)


class Learner:
    version = 0

    def begin_round(self, index: int) -> int:
        return 0

    def update(self, batch: Any) -> dict[str, Any]:
        self.version += 1
        return {}


def log_in(folder: Path, worker: str = "generator 0") -> tuple[WorkerLog, Path]:
    (folder / "config.yaml").touch()
    place = log_place(folder, "mine", worker, folder / "config.yaml")
    return WorkerLog(place), place.path


def request(round_: int | None, purpose: str = "sampling") -> SampleRequest:
    return SampleRequest(PROMPTS, 2, 0, purpose, round=round_)


def test_a_generator(tmp_path: Path) -> None:
    log, path = log_in(tmp_path)
    assert path == tmp_path / "logs" / "generator-0.jsonl"
    before = datetime.now(UTC)
    worker = log.build(Generator, threads=3, gpus=0.0)
    log.call(worker, "load", (WeightPush(4, (), "sum", Carried(())),))
    sampled = log.call(worker, "sample", (request(2),))
    assert sampled.round == 2
    with pytest.raises(ValueError, match="such purpose"):
        log.call(worker, "sample", (request(None, "bad"),))
    lines = lines_of(path)
    for line in lines:
        assert (line["run"], line["worker"]) == ("mine", "generator 0")
        assert (line["host"], line["pid"]) == (socket.gethostname(), os.getpid())
        written = datetime.fromisoformat(line["time"])
        assert written.utcoffset() is not None
        assert (written - before).total_seconds() > -0.002
    names = ("event", "method", "round", "version")
    assert [tuple(line[name] for name in names) for line in lines] == [
        ("begin", "build", None, None),
        ("done", "build", None, None),
        ("begin", "load", None, None),
        ("done", "load", None, 4),
        ("begin", "sample", 2, 4),
        ("done", "sample", 2, 4),
        ("begin", "sample", None, 4),
        ("failed", "sample", None, 4),
    ]
    assert {k: lines[0][k] for k in ("threads", "device", "life")} == {
        "threads": 3,
        "device": "cpu",
        "life": 1,
    }
    assert lines[2]["pushed"] == 4
    facts = ("purpose", "prompts", "completions", "tokens", "last_version")
    assert [lines[5][fact] for fact in facts] == ["sampling", 2, 4, 1 + 2 + 3 + 4, 5]
    assert (lines[7]["error"], lines[7]["text"]) == ("ValueError", "no such purpose")


def test_a_judge_has_the_round_of_the_samples(tmp_path: Path) -> None:
    log, path = log_in(tmp_path, "judge 0")
    sampled = request(3).answer([completion(7, 2)] * 4, 0.0)
    log.call(Judge(), "judge", ("kind", PROMPTS, sampled))
    done = lines_of(path)[-1]
    found = {name: done[name] for name in ("judge", "round", "version", "completions", "tokens")}
    assert found == {"judge": "kind", "round": 3, "version": 7, "completions": 4, "tokens": 8}
    assert (done["counts"], done["stuck"]) == ({"tokens": 7.0}, True)


def test_a_learner_has_the_round_it_began(tmp_path: Path) -> None:
    log, path = log_in(tmp_path, "learner")
    worker = Learner()
    for method, argument in (("begin_round", 0), ("update", None), ("begin_round", 1)):
        log.call(worker, method, (argument,))
    done = [line for line in lines_of(path) if line["event"] == "done"]
    assert [(d["method"], d["round"], d["version"]) for d in done] == [
        ("begin_round", 0, 0),
        ("update", 0, 1),
        ("begin_round", 1, 1),
    ]


def test_only_work_has_a_line_as_it_begins(tmp_path: Path) -> None:
    log, path = log_in(tmp_path, "learner")
    for method, argument in (("update", None), ("begin_round", 0)):
        log.call(Learner(), method, (argument,))
    events = [(line["event"], line["method"]) for line in lines_of(path)]
    assert events == [("begin", "update"), ("done", "update"), ("done", "begin_round")]


def test_nothing_is_written_before_the_run_is_born(tmp_path: Path) -> None:
    place = log_place(tmp_path, "mine", "learner", tmp_path / "config.yaml")
    log = WorkerLog(place)
    worker = log.build(Learner, 1, 0.0)
    log.call(worker, "begin_round", (0,))
    assert list(tmp_path.iterdir()) == []
    place.born.touch()  # type: ignore[union-attr]
    log.call(worker, "begin_round", (1,))
    assert [line["round"] for line in lines_of(place.path)] == [None, None, 0, 1]


def test_another_life_goes_on_in_the_same_file(tmp_path: Path) -> None:
    for life in (1, 2):
        log, path = log_in(tmp_path)
        log.build(Learner, 1, 0.5)
        assert lines_of(path)[-2]["life"] == life
        assert lines_of(path)[-2]["device"].startswith("cuda")


def test_what_cannot_be_written_waits_and_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_log, "KEPT", 3)
    log, path = log_in(tmp_path)
    (tmp_path / "logs").write_text("in the way")
    worker = Learner()
    for index in range(6):  # of six lines the first three are lost
        log.call(worker, "begin_round", (index,))
    said = capsys.readouterr().err
    assert said.startswith(f"{path}: no log is written (")
    assert said.endswith("); the run goes on\n")
    assert said.count("\n") == 1
    (tmp_path / "logs").unlink()
    log.call(worker, "begin_round", (6,))
    lines = lines_of(path)
    assert [line["event"] for line in lines] == ["lost", "done", "done", "done", "done"]
    assert [line["round"] for line in lines[1:]] == [3, 4, 5, 6]
    assert lines[0]["lines"] == 3


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, path = log_in(tmp_path)
    opened: Callable[..., Any] = Path.open

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            self.file.write(data[:10])
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(Path, "open", lambda *args: Full(opened(*args)))
        log.call(Learner(), "begin_round", (0,))
    log.call(Learner(), "begin_round", (1,))
    *torn, _, _ = lines = path.read_text().splitlines()
    assert torn == ['{"time": "']
    assert [json.loads(line)["round"] for line in lines[1:]] == [0, 1]


@pytest.mark.parametrize("address", ["inline", pytest.param("local", marks=pytest.mark.slow)])
def test_every_call_of_a_run_is_in_its_round(
    tiny_model: Path, tmp_path: Path, address: str
) -> None:
    cfg = tiny.config(tiny_model, tmp_path, cluster={"address": address}, run={"updates": 3})
    run = job.run(cfg, quiet=True).run_dir
    names = {path.name for path in (run / "logs").iterdir()}
    assert names == {"learner.jsonl", "generator-0.jsonl", "judge-0.jsonl"}
    logs = {name.split(".")[0]: lines_of(run / "logs" / name) for name in names}
    for lines in logs.values():
        assert {"time", "run", "worker", "host", "pid", "round", "version"} <= set(lines[0])
        assert len({line["pid"] for line in lines}) == 1
        assert (lines[0]["event"], lines[0]["method"]) == ("begin", "build")

    def done(worker: str, method: str) -> list[tuple[int, int]]:
        found = (line for line in logs[worker] if line["event"] == "done")
        return [(line["round"], line["version"]) for line in found if line["method"] == method]

    in_turn = [(0, 0), (1, 1), (2, 2)]  # a round an update: round i is sampled by version i
    assert done("generator-0", "sample") == in_turn
    assert done("judge-0", "judge") == in_turn
    assert done("learner", "begin_round") == in_turn
    assert done("learner", "update") == [(0, 1), (1, 2), (2, 3)]
    if address != "inline":
        assert len({lines[0]["pid"] for lines in logs.values()}) == 3


def test_a_log_that_is_not_there_is_told(tiny_model: Path, tmp_path: Path) -> None:
    raw = {"generator": {"replicas": 2, "min_replicas": 1}, "cluster": {"address": "local"}}
    plan = plan_crew(tiny.config(tiny_model, tmp_path, **raw), 1, 1)
    logs = tmp_path / "run" / "logs"
    logs.mkdir(parents=True)
    (logs / "learner.jsonl").touch()
    told = unwritten_logs(plan)  # the second generator may never have come
    assert [note.split(": its")[0] for note in told] == [
        f"no log of generator 0 ({logs / 'generator-0.jsonl'})",
        f"no log of judge 0 ({logs / 'judge-0.jsonl'})",
    ]
    in_storage = tiny.config(tiny_model, tmp_path, run={"dir": "s3://bucket/run"})
    assert unwritten_logs(plan_crew(in_storage, 1, 1)) == []  # it is on the workers' machines


def test_where_it_goes(tmp_path: Path) -> None:
    born = tmp_path / "config.yaml"
    assert log_place(tmp_path, "r", "judge 1", born) == LogPlace(
        tmp_path / "logs" / "judge-1.jsonl", "r", "judge 1", born
    )


def test_a_log_in_object_storage_goes_on_where_another_machine_left_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{in_memory(monkeypatch)}/run"
    for machine in ("one", "other"):
        place = log_place(tmp_path / machine, "r", "learner", Path("config.yaml"), url)
        log = WorkerLog(place)
        log.build(Learner, 1, 0.0)
        assert log._upload is not None
        log._upload.put()
        if machine == "one":  # before the run began
            assert ObjectStore(url).read("logs/learner.jsonl") is None
            (tmp_path / "config.yaml").touch()
            ObjectStore(url).put(tmp_path / "config.yaml", "config.yaml")
            log._upload.put()
    there = ObjectStore(url).read("logs/learner.jsonl")
    assert there == place.path.read_bytes()
    assert [line["life"] for line in lines_of(place.path) if line["event"] == "begin"] == [1, 2]


def test_a_log_that_storage_refuses_is_said_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{in_memory(monkeypatch)}/run"
    log = WorkerLog(log_place(tmp_path, "r", "learner", Path("config.yaml"), url))
    monkeypatch.setattr(ObjectStore, "read", refusing)
    log.build(Learner, 1, 0.0)
    assert log._upload is not None
    for _ in range(2):
        log._upload.put()
    assert (
        capsys.readouterr().err
        == "logs/learner.jsonl: not kept (no such bucket); the run goes on\n"
    )


def refusing(*args: object) -> None:
    raise StorageFailed("no such bucket")


@pytest.mark.slow
def test_the_call_that_a_process_died_of(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its generator is killed while it samples round 2, and restarted."""
    marker = tmp_path / "happened"
    monkeypatch.setattr(job, "plan_crew", lambda *args: mortal(plan_crew(*args), marker, "dies"))
    cfg = tiny.config(tiny_model, tmp_path, run={"updates": 3}, cluster={"address": "local"})
    run = job.run(cfg, quiet=True).run_dir
    lines = lines_of(run / "logs" / "generator-0.jsonl")
    pids = list(dict.fromkeys(line["pid"] for line in lines))
    lives = [[line for line in lines if line["pid"] == pid] for pid in pids]
    assert [life[0]["life"] for life in lives] == [1, 2]
    names = ("event", "method", "round", "version")
    assert tuple(lives[0][-1][name] for name in names) == ("begin", "sample", 2, 2)
    assert tuple(lives[1][-1][name] for name in names) == ("done", "sample", 2, 2)
