"""How much of a slow judge the loop hides behind sampling and learning.

The real loop, rollout, ledger and judge worker, with a generator and a learner that sleep for as
long as their work would take, each in a thread of its own, so that nothing competes for the cores
and what is left is the loop's own doing. The judge is an asynchronous function that answers every
question after 200 ms, as an API might, 64 at a time. Sides, in turns: the same run with a judge
that answers at once; with the slow one, synchronous (rounds_in_flight 0); with the slow one and
rounds_in_flight 1. Hidden is 1 − (seconds with the slow judge − seconds with the instant one at the
same rounds_in_flight) / (rounds × latency): of a pipeline the first round cannot be hidden. The
first repeat is not counted, medians are quoted. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from judges.options import JudgeOptions
from pipeline import loop
from pipeline.brake import Brake
from pipeline.checkpoint import Checkpoints, Cursor
from pipeline.config import Config, parse_config
from pipeline.drift import Drift
from pipeline.evaluate import Evaluator
from pipeline.inputs import pairing_of
from pipeline.judging import Judges
from pipeline.learner import RemoteLearner
from pipeline.ledger import Ledger
from pipeline.replica import Replica
from pipeline.rollout import Rollout, UnitSize
from pipeline.selection import Selection
from pipeline.staleness import Staleness
from pipeline.stopping import Stop
from pipeline.sync import WeightSync
from pipeline.tracking import UPDATE_KEYS, Tracker, TrackingOptions
from pipeline.watch import Watch
from workers.generator import SampledUnit, SampleRequest
from workers.judge_clients import build_panel
from workers.messages import Completion, Prompt, UpdateBatch, probe_completion
from workers.weight_sync.buckets import Receipt
from workers.weight_sync.proof import Proof

TOKENS = 8
JUDGE = """
import asyncio

async def score(prompts, completions, seconds):
    await asyncio.sleep(seconds)
    return [float(c.split()[0]) for c in completions]
"""


class ThreadHandle:
    """A worker in a thread of its own, its calls one after another."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._calls: queue.SimpleQueue[tuple[Future[Any], str, tuple[Any, ...]]] = (
            queue.SimpleQueue()
        )
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, method: str, *args: object) -> Future[Any]:
        """Queue the call; its arguments may be futures."""
        future: Future[Any] = Future()
        self._calls.put((future, method, args))
        return future

    def restart(self) -> None:
        """Nothing here dies."""

    def _work(self) -> None:
        while True:
            future, method, args = self._calls.get()
            try:
                values = [arg.result() if isinstance(arg, Future) else arg for arg in args]
                future.set_result(getattr(self._worker, method)(*values))
            except BaseException as error:  # noqa: BLE001  raised where the result is asked for
                future.set_exception(error)


class SleepingGenerator:
    """Takes ``seconds`` for a unit; a completion begins with a number, which is its score."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._version = -1

    def load(self, version: int) -> Receipt:
        self._version = version
        return Receipt(version, "")

    def prove(self, ids: Any, sent: Receipt, expected: Completion, limit: float) -> Proof:
        return Proof(sent.version, sent.checksum, 0.0, 0.0)

    def sample(self, request: SampleRequest) -> SampledUnit:
        time.sleep(self._seconds)
        completions = [
            Completion(
                position=prompt.position,
                sample=sample,
                seed=0,
                version=self._version,
                ids=np.full(TOKENS, sample, np.int64),
                logprobs=np.full(TOKENS, -1.0, np.float32),
                sampling_logprobs=None,
                finished=True,
                text=f"{sample} of {prompt.position}",
            )
            for prompt in request.prompts
            for sample in range(request.samples)
        ]
        return request.answer(completions, self._seconds)


class SleepingLearner:
    """Takes ``seconds`` for an update."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._version = 0

    def begin_round(self, index: int) -> int:
        return 0

    def score_reference(self, batches: Sequence[UpdateBatch]) -> list[list[Any]]:
        return [[item.completion.logprobs for item in batch.completions] for batch in batches]

    def weights(self, keep_from: int) -> int:
        return self._version

    def sent(self) -> Receipt:
        return Receipt(self._version, "")

    def probe(self, ids: Any, new_tokens: int) -> Completion:
        return probe_completion(self._version, [], [])

    def update(self, batch: UpdateBatch) -> dict[str, Any]:
        assert batch.examples
        time.sleep(self._seconds)
        self._version += 1
        return dict.fromkeys(UPDATE_KEYS)

    def save(self, directory: Path) -> None:
        (directory / "learner.pt").touch()


class Stream:
    """Prompts without end."""

    def take(self, start: int, count: int) -> list[Prompt]:
        return [Prompt(at, np.zeros(1, np.int64), str(at)) for at in range(start, start + count)]


def run_seconds(cfg: Config, generate: float, learn: float) -> float:
    """Wall-clock seconds of a whole run."""
    generator = ThreadHandle(SleepingGenerator(generate))
    learner = ThreadHandle(SleepingLearner(learn))
    judge = ThreadHandle(build_panel({cfg.judge.title: cfg.judge}, folder=cfg.run_dir))
    ids = np.zeros(1, np.int64)
    replicas = [Replica(0, generator, ids, 1.0)]
    judges = Judges(
        [Replica(0, judge, ids, 1.0, kind="judge")],
        learner,
        {cfg.judge.title: cfg.judge},
        in_one_process=True,
    )
    rollout = Rollout(
        Stream(),  # type: ignore[arg-type]
        replicas,
        judges,
        Selection(None, 0, 0, (), learner, 0),
        pairing_of(cfg),
        judge_name=cfg.judge.title,
        second_judge=None,
        reference_shares=[0.0, 0.0],
        unit_size=UnitSize(cfg.sampling.prompts_per_update),
        max_invalid_share=0.0,
        in_flight_updates=False,
        rest_between_rounds=False,
        run_seed=0,
    )
    cfg.run_dir.mkdir(parents=True)
    tracker = Tracker(cfg.run_dir, TrackingOptions(tensorboard=False))
    evaluator = Evaluator(
        [],
        replicas,
        judges,
        [],
        cfg.run_dir,
        every=None,
        updates=cfg.run.updates,
        unit_size=UnitSize(1),
        run_seed=0,
    )
    began = time.perf_counter()
    loop.run(
        cfg,
        rollout=rollout,
        learner=RemoteLearner(learner),
        sync=WeightSync(replicas, ids),
        ledger=Ledger(cfg.run_dir / "ledger"),
        drift=Drift(),
        watch=Watch(Staleness(cfg.resampling.early), Brake(cfg.drift)),
        tracker=tracker,
        checkpoints=Checkpoints(cfg.run_dir / "checkpoints", cfg.checkpoint.every, 1),
        evaluator=evaluator,
        stop=Stop(cfg.run_dir),
        cursor=Cursor(),
    )
    tracker.close()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds an answer takes")
    parser.add_argument("--generate", type=float, default=0.3, help="seconds a round is sampled")
    parser.add_argument("--learn", type=float, default=0.6, help="seconds an update takes")
    options = parser.parse_args()
    sides = {(name, in_flight): [] for in_flight in (0, 1) for name in ("instant", "slow")}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "judge.py").write_text(JUDGE)
        for repeat in range(options.repeats + 1):
            for (name, in_flight), seconds in sides.items():
                latency = options.latency if name == "slow" else 0.0
                directory = Path(folder) / f"{name}-{in_flight}-{repeat}"
                cfg = config(Path(folder), directory, options.rounds, in_flight, latency)
                took = run_seconds(cfg, options.generate, options.learn)
                if repeat:
                    seconds.append(took)
    report(sides, options)


def config(folder: Path, run_dir: Path, rounds: int, in_flight: int, latency: float) -> Config:
    """Rounds of one update of 32 prompts; each of the judge's calls asks one question."""
    judge = JudgeOptions(
        name=f"{folder}/judge.py:score", args={"seconds": latency}, batch_size=1, concurrency=64
    )
    raw = {
        "run": {"dir": str(run_dir), "updates": rounds},
        "prompts": {"path": "none.jsonl"},
        "judge": judge.model_dump(),
        "resampling": {"rounds_in_flight": in_flight},
        "checkpoint": {"every": rounds},
    }
    return parse_config(raw, folder)


def report(sides: dict[tuple[str, int], list[float]], options: argparse.Namespace) -> None:
    """The table, and the JSON object."""
    medians = {side: statistics.median(seconds) for side, seconds in sides.items()}
    judged = options.rounds * options.latency
    hidden = {
        in_flight: 1.0 - (medians["slow", in_flight] - medians["instant", in_flight]) / judged
        for in_flight in (0, 1)
    }
    table = Table(
        "rounds_in_flight",
        "instant judge, s",
        f"{options.latency * 1e3:g} ms judge, s",
        "hidden",
        title=f"{options.rounds} rounds: sample {options.generate:g} s, learn {options.learn:g} s",
    )
    for in_flight in (0, 1):
        table.add_row(
            str(in_flight),
            f"{medians['instant', in_flight]:.2f}",
            f"{medians['slow', in_flight]:.2f}",
            f"{hidden[in_flight]:.1%}",
        )
    Console(width=100).print(table)
    found = {
        "benchmark": "judge_latency",
        "rounds": options.rounds,
        "repeats": options.repeats,
        "seconds": {f"{name}, {in_flight}": runs for (name, in_flight), runs in sides.items()},
        "hidden": {str(in_flight): share for in_flight, share in hidden.items()},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
