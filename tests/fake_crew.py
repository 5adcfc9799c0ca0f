"""A crew for the real loop that works in virtual time: nothing sleeps, nothing is computed.

A call runs in Python where it is submitted, but its future is ready only when a worker of that
speed would have done it: after the calls before it, after the futures among its arguments, and so
many seconds later. Waiting moves the world's clock. So what is in flight when is as it would be.
"""

from __future__ import annotations

import random
import weakref
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from pipeline.checkpoint import Cursor
from pipeline.learner import RemoteLearner
from pipeline.resampling import RoundPlan
from pipeline.rollout import Pending, Rollout
from pipeline.stopping import Stop
from pipeline.sync import WeightSync
from pipeline.tracking import ROUND_KEYS, UPDATE_KEYS
from workers.generator import SampledUnit, SampleRequest
from workers.judge_worker import JudgedUnit
from workers.messages import (
    Completion,
    FloatArray,
    Judgement,
    Prompt,
    Round,
    UpdateBatch,
    probe_completion,
)
from workers.seeds import derive_seed
from workers.weight_sync.buckets import Receipt
from workers.weight_sync.proof import Proof

Pace: TypeAlias = Callable[[str, Sequence[int]], float]
"""Seconds of a call, from its method and the positions of the prompts that it is about."""

Learned: TypeAlias = tuple[tuple[tuple[Any, ...], ...], tuple[tuple[Any, ...], ...]]
"""A batch as one value: of each completion (position, sample, version, seed, ids, replayed), of
each example (chosen, rejected, P(chosen better))."""


def steady(**seconds: float) -> Pace:
    """So many seconds for a call of a method named, whatever it is about; none for the others."""
    return lambda method, positions: seconds.get(method, 0.0)


def steady_a_prompt(**seconds: float) -> Pace:
    """So many seconds for each prompt of a call of a method named; none for the others."""
    return lambda method, positions: seconds.get(method, 0.0) * len(positions)


def erratic(seed: int, name: str) -> Pace:
    """A worker whose speed is its own, whose calls have heavy tails, and some prompts are slow.

    Slow prompts (one of nine) take fifty times as long, the same ones in every worker.
    """
    rng = random.Random(derive_seed(seed, name))
    own = rng.lognormvariate(0.0, 1.5)
    slow = derive_seed(seed, "slow") % 9

    def seconds(method: str, positions: Sequence[int]) -> float:
        work = sum(50.0 if position % 9 == slow else 1.0 for position in positions) or 0.3
        return own * work * rng.paretovariate(1.3)

    return seconds


@dataclass(slots=True)
class World:
    """Virtual seconds since the run began."""

    now: float = 0.0


class VirtualFuture:
    """An answer that is there, but not before ``ready_at``."""

    def __init__(self, world: World, value: Any, ready_at: float) -> None:
        self._world = world
        self.value = value
        self.ready_at = ready_at

    def result(self) -> Any:
        """Wait for it: the world's clock moves on."""
        self._world.now = max(self._world.now, self.ready_at)
        return self.value


class Worker(Protocol):
    """Has methods; ``seconds`` is what the call under way takes."""

    seconds: float


class VirtualHandle:
    """One worker, its calls one after another at its own pace."""

    def __init__(self, world: World, worker: Worker, pace: Pace) -> None:
        self._world = world
        self._worker = worker
        self._pace = pace
        self._free_at = 0.0

    def submit(self, method: str, *args: object) -> VirtualFuture:
        """Call now, answer when it would be done."""
        waits_for = [arg for arg in args if isinstance(arg, VirtualFuture)]
        begins = max(self._world.now, self._free_at, *(f.ready_at for f in waits_for))
        values = [arg.value if isinstance(arg, VirtualFuture) else arg for arg in args]
        self._worker.seconds = self._pace(method, _positions(method, values))
        self._free_at = begins + self._worker.seconds
        return VirtualFuture(self._world, getattr(self._worker, method)(*values), self._free_at)

    def restart(self) -> None:
        """Nothing here dies."""
        raise AssertionError("nothing here dies")


def _positions(method: str, values: Sequence[Any]) -> list[int]:
    match method:
        case "sample":
            return [prompt.position for prompt in values[0].prompts]
        case "judge":
            return [prompt.position for prompt in values[1]]
    return []


@dataclass(slots=True)
class Diary:
    """What the crew did, in order; a resumed run writes on in it.

    ``sampled``: position and content of each prompt, ``seeds`` of each completion; ``submitted``:
    the learner's version when each round was; ``begun``: rounds that were popped;
    ``waiting``: most rounds submitted and not yet popped; ``alive``: completions in memory,
    ``most_alive`` of them at any update; ``lags`` of the fresh pairs of each update.
    """

    sampled: list[tuple[int, str]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    submitted: dict[int, int] = field(default_factory=dict)
    begun: set[int] = field(default_factory=set)
    waiting: int = 0
    updates: list[Learned] = field(default_factory=list)
    lags: list[set[int]] = field(default_factory=list)
    round_of: list[int] = field(default_factory=list)
    alive: dict[int, weakref.ref[Any]] = field(default_factory=dict)
    most_alive: int = 0

    def wrote(self, completion: Completion) -> None:
        """A completion was sampled."""
        self.seeds.append(completion.seed)
        number = len(self.seeds)

        def gone(_: object) -> None:
            del self.alive[number]

        self.alive[number] = weakref.ref(completion.ids, gone)


class FakeGenerator:
    """Its completions are a function of seed and weights: two tokens, of which the first differs
    from sample to sample."""

    def __init__(self, diary: Diary) -> None:
        self._diary = diary
        self._weights = (-1, 0)
        self._pushes = 0
        self.seconds = 0.0

    def load(self, weights: tuple[int, int]) -> Receipt:
        self._weights = weights
        return Receipt(weights[0], str(weights[1]))

    def prove(self, ids: Any, sent: Receipt, expected: Completion, limit: float) -> Proof:
        assert sent == Receipt(self._weights[0], str(self._weights[1]))
        assert expected.version == sent.version
        self._pushes += 1
        return Proof(sent.version, sent.checksum, 0.0, 0.0)

    def sample(self, request: SampleRequest) -> SampledUnit:
        assert request.after_push == self._pushes
        found = []
        for prompt in request.prompts:
            self._diary.sampled.append((prompt.position, str(prompt.content)))
            for sample in range(request.samples):
                found.append(self._completion(prompt, sample, request.seed(prompt, sample)))
        return request.answer(found, self.seconds)

    def _completion(self, prompt: Prompt, sample: int, seed: int) -> Completion:
        version, state = self._weights
        drawn = _mixed(state, seed) % 1000
        completion = Completion(
            position=prompt.position,
            sample=sample,
            seed=seed,
            version=version,
            ids=np.array([sample, drawn], np.int64),
            logprobs=LOGPROBS,
            sampling_logprobs=None,
            finished=True,
            text=f"{sample} {drawn}",
        )
        self._diary.wrote(completion)
        return completion


LOGPROBS: FloatArray = np.array([-1.0, -1.0], np.float32)


class FakeJudge:
    """Scores by the second token; of equals, the second sample is better."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def judge(
        self, name: str, prompts: Sequence[Prompt], sampled: SampledUnit, selected: Any, second: Any
    ) -> JudgedUnit:
        judgements = []
        for prompt, completions in zip(prompts, sampled.completions, strict=True):
            assert {c.position for c in completions} == {prompt.position}
            scores = [float(c.ids[1]) + 0.5 * c.sample for c in completions]
            judgements.append(Judgement(prompt.position, np.array(scores), (None,) * len(scores)))
        return JudgedUnit(tuple(judgements), self.seconds)


class FakeLearner:
    """Its policy is a hash of every batch that it ever learned from, and so is its loss.

    ``staleness`` c: an update's policy_ess is exp(−c·lag²) of the oldest fresh pair. ``dies_at`` an
    update of that number, counted from 1.
    """

    def __init__(self, diary: Diary, staleness: float = 0.0, dies_at: int | None = None) -> None:
        self._diary = diary
        self._staleness = staleness
        self._dies_at = dies_at
        self._round = -1
        self.version = 0
        self.state = 0
        self.seconds = 0.0

    def begin_round(self, index: int) -> int:
        self._round = index
        self._diary.begun.add(index)
        return 0

    def score_reference(self, batches: Sequence[UpdateBatch]) -> list[list[FloatArray]]:
        return [[item.completion.logprobs for item in batch.completions] for batch in batches]

    def score_policy(self, batch: UpdateBatch) -> list[FloatArray]:
        return [item.completion.logprobs for item in batch.completions]

    def weights(self, keep_from: int) -> tuple[int, int]:
        return self.version, self.state

    def sent(self) -> Receipt:
        return Receipt(self.version, str(self.state))

    def probe(self, ids: Any, new_tokens: int) -> Completion:
        return probe_completion(self.version, [], [])

    def update(self, batch: UpdateBatch) -> dict[str, Any]:
        if self.version + 1 == self._dies_at:
            raise Killed
        diary = self._diary
        diary.most_alive = max(diary.most_alive, len(diary.alive))
        learned = learned_from(batch)
        fresh = [item.completion.version for item in batch.completions if not item.replayed]
        lags = {self.version - version for version in fresh}
        diary.updates.append(learned)
        diary.lags.append(lags)
        diary.round_of.append(self._round)
        self.state = zlib.crc32(repr(learned).encode(), self.state)
        self.version += 1
        oldest = max(lags, default=None)
        ess = None if oldest is None else float(np.exp(-self._staleness * oldest**2))
        return dict.fromkeys(UPDATE_KEYS) | {
            "loss": _mixed(self.state, self.version) / 2**32,
            "pairs": len(batch.examples),
            "lag_max": oldest,
            "policy_ess": ess,
        }

    def save(self, directory: Path) -> None:
        """The fake checkpoints keep version and state themselves."""


def learned_from(batch: UpdateBatch) -> Learned:
    """The batch as one value."""
    return (
        tuple(
            (c.position, c.sample, c.version, c.seed, *c.ids.tolist(), item.replayed)
            for item in batch.completions
            for c in (item.completion,)
        ),
        tuple((*pair.rows, pair.label_prob) for pair in batch.examples),  # type: ignore[union-attr]
    )


def _mixed(state: int, number: int) -> int:
    return zlib.crc32(number.to_bytes(8, "little"), state)


class Killed(Exception):  # noqa: N818 (named for what happened)
    """The process ended in the middle of something."""


class WatchedRollout:
    """The real rollout; what is submitted is written down."""

    def __init__(self, rollout: Rollout, diary: Diary) -> None:
        self._rollout = rollout
        self._diary = diary

    def submit(self, plan: RoundPlan, learner: RemoteLearner, sync: WeightSync) -> Pending:
        self._diary.submitted[plan.index] = learner.version
        waiting = len(self._diary.submitted.keys() - self._diary.begun)
        self._diary.waiting = max(self._diary.waiting, waiting)
        return self._rollout.submit(plan, learner, sync)


class MemoryLedger:
    """Rounds by index, each written once, as the ledger on disk insists; ``keeps`` False: only
    that they were."""

    def __init__(self, keeps: bool = True) -> None:
        self._keeps = keeps
        self._rounds: dict[int, Round | None] = {}

    def append(self, round_: Round) -> None:
        assert round_.index == len(self._rounds), "lost, twice or out of turn"
        self._rounds[round_.index] = round_ if self._keeps else None

    def append_reference(self, round_: Round) -> None:
        if self._keeps:
            assert self.read(round_.index).reference_version is None
            self._rounds[round_.index] = round_

    def read(self, index: int) -> Round:
        found = self._rounds[index]
        assert found is not None
        return found

    def __contains__(self, index: int) -> bool:
        return index in self._rounds


@dataclass(slots=True)
class MemoryCheckpoints:
    """The newest checkpoint, due after ``every`` so many updates: the cursor as JSON, and version
    and state of the learner."""

    learner: FakeLearner
    every: int | None = None
    kept: tuple[str, int, int] = (Cursor().to_json(), 0, 0)

    def due(self, update: int) -> bool:
        return self.every is not None and update % self.every == 0

    def save(self, learner: RemoteLearner, cursor: Cursor) -> None:
        assert cursor.update == self.learner.version == learner.version
        self.kept = (cursor.to_json(), self.learner.version, self.learner.state)


@dataclass(slots=True)
class MemoryTracker:
    """The records of rounds and updates, each with all its keys; the run is asked to stop after
    the updates ``stops_at``."""

    stop: Stop
    learner: FakeLearner
    stops_at: frozenset[int] = frozenset()
    records: list[dict[str, Any]] = field(default_factory=list)

    def update(self, record: dict[str, Any]) -> None:
        assert record.keys() == set(UPDATE_KEYS)
        self.records.append(record)
        self.stop.requested |= self.learner.version in self.stops_at

    def round(self, record: dict[str, Any]) -> None:
        assert record.keys() == set(ROUND_KEYS)
        self.records.append(record)

    def position(self) -> int:
        return len(self.records)


class NoEvaluator:
    """Never due."""

    def baseline(self, learner: RemoteLearner, sync: WeightSync) -> None:
        pass

    def due(self, update: int) -> bool:
        return False
