"""One structured log a worker: a JSON object a line, written by the worker's own process."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workers.generator import SampledUnit, SampleRequest
from workers.judge_worker import JudgedUnit
from workers.log_upload import LogUpload
from workers.messages import UpdateBatch
from workers.weight_sync.buckets import Receipt, WeightPush
from workers.weight_sync.proof import Proof

LOGS = "logs"
"""The folder of the run directory."""

WORK = {"sample", "judge", "implicit_reward", "update", "reset", "load", "adopt", "save", "export"}
"""Methods that may take long, or memory: a line as they begin shows what a process died of."""

KEPT = 1000
"""Lines that wait where they cannot be written; of more, the oldest are lost, and counted."""


@dataclass(frozen=True, slots=True)
class LogPlace:
    """Where a worker's log goes.

    Nothing lasts before the run's ``born`` is there: a run that could not begin leaves no trace.
    With the ``url`` of a run directory, ``path`` is in a working copy of it on this machine.
    """

    path: Path
    run: str
    worker: str
    born: Path
    url: str | None = None


def log_place(run_dir: Path, run: str, worker: str, born: Path, url: str | None = None) -> LogPlace:
    """``RUN/logs/generator-0.jsonl`` for ``generator 0``, of the run of this directory or URL."""
    file = worker.replace(" ", "-") + ".jsonl"
    return LogPlace(run_dir / LOGS / file, run, worker, born, url)


class WorkerLog:
    """What one worker does, a line a call: who, when, of which round and version, how long.

    Each line has time (UTC), run, worker, host, pid, event, method, round and version (null where
    it belongs to none). ``event`` is "begin" (of the method ``build``, which is the worker's own
    beginning, and of those of ``WORK``), "done", "failed" (with error and text) or "lost" (lines
    that could not be written). A call that hangs, or that its process died of, is a "begin" with
    nothing after it.

    The version is the worker's own, after the call; of samples the one that wrote them, which is
    what a judge has in hand. Calls of the learner belong to the round it began last, the others to
    the round that their request names. What cannot be written is said once on stderr and waits; it
    never stops a run.
    """

    def __init__(self, place: LogPlace) -> None:
        self._place = place
        self._who = {"run": place.run, "worker": place.worker, "host": socket.gethostname()}
        self._lock = threading.Lock()
        self._upload: LogUpload | None = None
        if place.url is not None:
            name = f"{LOGS}/{place.path.name}"
            self._upload = LogUpload(place.path, place.url, name, place.born.name)
        self._waiting: deque[dict[str, Any]] = deque()
        self._lost = 0
        self._torn = self._told = False
        self._round: int | None = None
        self._version: int | None = None

    def build(self, build: Callable[[], Any], threads: int, gpus: float) -> Any:
        """Build the worker, which is written down with its ``life``: it counts those of this log.

        What building raises is raised.
        """
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        device = f"cuda:{visible}".rstrip(":") if gpus else "cpu"
        life = 1 + self._earlier_lives()
        self._write("begin", "build", threads=threads, device=device, life=life)
        began = time.perf_counter()
        try:
            worker = build()
        except BaseException as error:
            self._failed("build", time.perf_counter() - began, error)
            raise
        self._write("done", "build", seconds=time.perf_counter() - began)
        return worker

    def call(self, worker: Any, method: str, args: tuple[Any, ...]) -> Any:
        """Call the worker's method, which is written down; what it raises is raised."""
        if method == "begin_round":
            self._round = args[0]
        place = {"round": self._round, "version": self._version}
        given = place | _facts(method, args) | _own_version(worker)
        if method in WORK:
            self._write("begin", method, **given)
        began = time.perf_counter()
        try:
            result = getattr(worker, method)(*args)
        except BaseException as error:
            self._failed(method, time.perf_counter() - began, error, **given)
            raise
        seconds = time.perf_counter() - began
        if method == "load" and isinstance(args[0], WeightPush):
            self._version = args[0].version
        found = given | _own_version(worker) | _facts(method, (result,))
        self._write("done", method, **found, seconds=seconds)
        return result

    def _failed(self, method: str, seconds: float, error: BaseException, **facts: Any) -> None:
        text = " ".join(str(error).split())
        facts |= {"error": type(error).__name__, "text": text}
        self._write("failed", method, seconds=seconds, **facts)

    def _write(self, event: str, method: str, **facts: Any) -> None:
        if "seconds" in facts:
            facts["seconds"] = round(facts["seconds"], 6)
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **self._who,
            "pid": os.getpid(),
            "event": event,
            "method": method,
            "round": None,
            "version": None,
            **facts,
        }
        with self._lock:
            self._waiting.append(line)
            self._write_out()

    def _write_out(self) -> None:
        """Everything that waits, whole lines at a time, in one opening of the file."""
        path, born = self._place.path, self._place.born
        try:
            here = self._upload is None
            if here and not born.exists():
                self._forget_some()
                return
            path.parent.mkdir(parents=not here, exist_ok=True)
            text = "".join(json.dumps(line) + "\n" for line in self._waiting)
            if self._lost:
                text = json.dumps(self._waiting[0] | _lost(self._lost)) + "\n" + text
            with path.open("ab") as file:
                torn, self._torn = self._torn, True
                file.write(b"\n" * torn + text.encode())
        except OSError as error:
            if not self._told:
                print(f"{path}: no log is written ({error}); the run goes on", file=sys.stderr)
            self._told = True
            self._forget_some()
            return
        self._torn, self._lost = False, 0
        self._waiting.clear()
        if self._upload is not None:
            self._upload.written()

    def _forget_some(self) -> None:
        while len(self._waiting) > KEPT:
            self._waiting.popleft()
            self._lost += 1

    def _earlier_lives(self) -> int:
        try:
            with self._place.path.open() as file:
                return sum('"event": "begin", "method": "build"' in line for line in file)
        except OSError:  # there is none, or it will be said when it is written
            return 0


class Hosted:
    """A worker in this process: built here, called by name, and written down where it has a log."""

    def __init__(
        self, build: Callable[[], Any], place: LogPlace | None, threads: int, gpus: float
    ) -> None:
        """What building the worker raises is raised. It has so many CPU threads, and GPUs."""
        self._log = None if place is None else WorkerLog(place)
        self.worker = build() if self._log is None else self._log.build(build, threads, gpus)

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        """Call the worker's method; what it raises is raised."""
        if self._log is None:
            return getattr(self.worker, method)(*args)
        return self._log.call(self.worker, method, args)


def _own_version(worker: Any) -> dict[str, int]:
    version = getattr(worker, "version", None)  # below 0: it was sent none yet
    return {"version": version} if isinstance(version, int) and version >= 0 else {}


def _lost(lines: int) -> dict[str, Any]:
    return {"event": "lost", "method": None, "lines": lines}


def _facts(method: str, values: tuple[Any, ...]) -> dict[str, Any]:
    """What is worth a line of a call's arguments, or of its result."""
    found: dict[str, Any] = {}
    if method == "judge" and values and isinstance(values[0], str):
        found["judge"] = values[0]
    for value in values:
        match value:
            case SampleRequest():
                found |= {"round": value.round, "purpose": value.purpose}
                found["prompts"] = len(value.prompts)
            case SampledUnit():
                found |= {"round": value.round, "prompts": len(value.completions)}
                found |= _of_completions(value)
            case JudgedUnit():
                counts = {name: count for name, count in value.counts.items() if count == count}
                found |= {"counts": counts} if counts else {}
                found |= {"stuck": True} if value.stuck else {}
            case WeightPush():
                found["pushed"] = value.version
            case Receipt():
                found["version"] = value.version
            case Proof():
                found |= {"version": value.version, "gap": value.gap}
            case UpdateBatch():
                found |= {"examples": len(value.examples), "completions": len(value.completions)}
                found["tokens"] = sum(len(c.completion.ids) for c in value.completions)
    return found


def _of_completions(unit: SampledUnit) -> dict[str, Any]:
    """How much was sampled, and by which version; in-flight updates make it several."""
    completions = [c for group in unit.completions for c in group]
    tokens = sum(len(completion.ids) for completion in completions)
    found: dict[str, Any] = {"completions": len(completions), "tokens": tokens}
    versions = {c.version for c in completions}
    versions |= {c.last_version for c in completions if c.last_version is not None}
    if versions:
        found["version"] = min(versions)
    if len(versions) > 1:
        found["last_version"] = max(versions)
    return found
