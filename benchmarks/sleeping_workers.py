"""The real loop, rollout, ledger and judge worker around a generator and a learner that sleep.

They take as long as their work would take, each in a thread of its own, so that nothing competes
for the cores and what is left is the loop's own doing. For the benchmarks beside this file.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

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


def sleeping_config(run_dir: Path, rounds: int, in_flight: int, judge: JudgeOptions) -> Config:
    """Rounds of one update of 32 prompts; a checkpoint at the end alone."""
    raw = {
        "run": {"dir": str(run_dir), "updates": rounds},
        "prompts": {"path": "none.jsonl"},
        "judge": judge.model_dump(),
        "resampling": {"rounds_in_flight": in_flight},
        "checkpoint": {"every": rounds},
    }
    return parse_config(raw, run_dir.parent)


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

    def score_policy(self, batch: UpdateBatch) -> list[Any]:
        return [item.completion.logprobs for item in batch.completions]

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

    def save(self, directory: str) -> None:
        (Path(directory) / "learner.pt").touch()


class Stream:
    """Prompts without end."""

    def take(self, start: int, count: int) -> list[Prompt]:
        return [Prompt(at, np.zeros(1, np.int64), str(at)) for at in range(start, start + count)]


def run_seconds(cfg: Config, generate: float, learn: float) -> float:
    """Wall-clock seconds of a run: ``generate`` to sample a unit, ``learn`` for an update."""
    generators = [ThreadHandle(SleepingGenerator(generate)) for _ in range(cfg.generator.replicas)]
    learner = ThreadHandle(SleepingLearner(learn))
    judge = ThreadHandle(build_panel({cfg.judge.title: cfg.judge}, folder=cfg.run_dir))
    ids = np.zeros(1, np.int64)
    replicas = [Replica(i, generator, ids, 1.0) for i, generator in enumerate(generators)]
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
