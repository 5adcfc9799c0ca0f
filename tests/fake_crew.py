"""A crew for the real loop in virtual time (pipeline/plan/), that writes down what it does."""

from __future__ import annotations

import random
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from pipeline.checkpoint import Cursor
from pipeline.learner import RemoteLearner
from pipeline.plan.virtual import Pace
from pipeline.plan.virtual_workers import VirtualGenerator, VirtualJudge, VirtualLearner, mixed
from pipeline.resampling import RoundPlan
from pipeline.rollout import Pending, Rollout
from pipeline.stopping import Stop
from pipeline.sync import WeightSync
from pipeline.tracking import ROUND_KEYS, UPDATE_KEYS
from workers.generator import SampledUnit, SampleRequest
from workers.judge_worker import JudgedUnit
from workers.messages import Completion, Prompt, UpdateBatch
from workers.seeds import derive_seed
from workers.weight_sync.buckets import Receipt
from workers.weight_sync.proof import Proof

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


class FakeGenerator(VirtualGenerator):
    """Its completions are written down, and what it is asked is checked."""

    def __init__(self, diary: Diary) -> None:
        super().__init__()
        self._diary = diary
        self._pushes = 0

    def prove(self, ids: Any, sent: Receipt, expected: Completion, limit: float) -> Proof:
        assert sent == Receipt(self._weights[0], str(self._weights[1]))
        assert expected.version == sent.version
        self._pushes += 1
        return super().prove(ids, sent, expected, limit)

    def sample(self, request: SampleRequest) -> SampledUnit:
        assert request.after_push == self._pushes
        unit = super().sample(request)
        for prompt, completions in zip(request.prompts, unit.completions, strict=True):
            self._diary.sampled.append((prompt.position, str(prompt.content)))
            for completion in completions:
                self._diary.wrote(completion)
        return unit


class FakeJudge(VirtualJudge):
    """Is given each prompt's own completions."""

    def judge(
        self, name: str, prompts: Sequence[Prompt], sampled: SampledUnit, selected: Any, second: Any
    ) -> JudgedUnit:
        for prompt, completions in zip(prompts, sampled.completions, strict=True):
            assert {c.position for c in completions} == {prompt.position}
        return super().judge(name, prompts, sampled, selected, second)


class FakeLearner(VirtualLearner):
    """Its policy is a hash of every batch that it ever learned from, and so is its loss.

    ``staleness`` c: an update's policy_ess is exp(−c·lag²) of the oldest fresh pair. ``dies_at`` an
    update of that number, counted from 1.
    """

    def __init__(self, diary: Diary, staleness: float = 0.0, dies_at: int | None = None) -> None:
        super().__init__()
        self._diary = diary
        self._staleness = staleness
        self._dies_at = dies_at
        self._round = -1

    def begin_round(self, index: int) -> int | None:
        self._round = index
        self._diary.begun.add(index)
        return super().begin_round(index)

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
        record = super().update(batch)
        oldest = max(lags, default=None)
        ess = None if oldest is None else float(np.exp(-self._staleness * oldest**2))
        return record | {
            "loss": mixed(self.state, self.version) / 2**32,
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
