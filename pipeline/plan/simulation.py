"""A run of the real loop in virtual time: throughput and lag for any number of generators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from pipeline import loop
from pipeline.brake import Brake
from pipeline.checkpoint import Cursor
from pipeline.config import Config
from pipeline.drift_options import DriftOptions
from pipeline.inputs import pairing_of
from pipeline.judging import Judges
from pipeline.learner import RemoteLearner
from pipeline.parts import reference_shares, rests, unit_size
from pipeline.plan.rates import Rates, keeps_reference
from pipeline.plan.virtual import Pace, VirtualHandle, World
from pipeline.plan.virtual_workers import (
    MemoryLedger,
    NoCheckpoints,
    NoEvaluator,
    VirtualGenerator,
    VirtualJudge,
    VirtualLearner,
)
from pipeline.replica import Replica
from pipeline.resampling_options import EarlyOptions
from pipeline.rollout import Rollout
from pipeline.selection import Selection
from pipeline.staleness import Staleness
from pipeline.stopping import Stop
from pipeline.sync import WeightSync
from pipeline.watch import Watch
from workers.messages import Prompt

NO_IDS = np.zeros(0, np.int64)

MOST_PROMPTS = 20_000
"""That a run in virtual time samples; longer runs go on at the pace they have then."""

ROLES = ("generators", "judges", "learner")


@dataclass(frozen=True, slots=True)
class Simulated:
    """A run in virtual time.

    ``updates`` of it were simulated, in ``seconds``. ``round_seconds``, ``update_seconds`` and the
    shares of time that each role was ``busy`` are those of its second half, as long as rounds are
    still admitted; ``run_seconds`` are all of ``run.updates``. Evaluations and checkpoints are not
    in it.
    """

    generators: int
    rounds_in_flight: int
    updates: int
    seconds: float
    round_seconds: float
    update_seconds: float
    run_seconds: float
    busy: dict[str, float]
    lag_mean: float
    lag_max: int

    @property
    def bottleneck(self) -> str:
        """The role that is busy most."""
        return max(ROLES, key=lambda role: self.busy[role])


def simulate(
    cfg: Config, rates: Rates, generators: int | None = None, in_flight: int | None = None
) -> Simulated:
    """The config's run with so many generators and rounds in flight, its own where None.

    Each generator and judge worker is as fast as ``rates`` say however many there are. Early
    resampling, adaptation and thresholds are off: what they do depends on what is learned.
    """
    cfg = _plain(cfg, generators, in_flight)
    return Simulation(cfg, lambda name: rates.pace()).run()


def _plain(cfg: Config, generators: int | None, in_flight: int | None) -> Config:
    resampling: dict[str, Any] = {"early": EarlyOptions(), "adaptive": None}
    if in_flight is not None:
        resampling["rounds_in_flight"] = in_flight
    replicas = cfg.generator.replicas if generators is None else generators
    asked: dict[str, Any] = {"replicas": replicas, "min_replicas": None, "in_flight_updates": False}
    return cfg.model_copy(
        update={
            "resampling": cfg.resampling.model_copy(update=resampling),
            "generator": cfg.generator.model_copy(update=asked),
            "drift": DriftOptions(),
        }
    )


@dataclass(slots=True)
class _Moments:
    """What the clock and the workers showed when each round ended."""

    world: World
    handles: dict[str, list[VirtualHandle]]
    learner: VirtualLearner
    times: list[float] = field(default_factory=list)
    busy: list[dict[str, float]] = field(default_factory=list)
    updates: list[int] = field(default_factory=list)

    def update(self, record: object) -> None:
        """Nothing is kept of an update."""

    def round(self, record: object) -> None:
        """A round is over."""
        self.times.append(self.world.now)
        self.updates.append(self.learner.version)
        spent = {role: [h.busy for h in of_role] for role, of_role in self.handles.items()}
        self.busy.append({role: sum(s) / len(s) for role, s in spent.items()})

    def position(self) -> int:
        """Of a file that is not written."""
        return 0


class Simulation:
    """The real loop, rollout, replicas, dial and sync around workers in virtual time.

    ``paces``: from a worker's name (generator 0, judge 0, learner, …) to its speed.
    """

    def __init__(self, cfg: Config, paces: Callable[[str], Pace]) -> None:
        updates = min(cfg.run.updates, _enough(cfg))
        run = cfg.run.model_copy(update={"updates": updates})
        self.cfg = cfg.model_copy(update={"run": run})
        self._wanted = cfg.run.updates
        self._world = World()
        self._paces = paces
        self._learner = VirtualLearner(keeps_reference(cfg))

    def run(self) -> Simulated:
        """Go through the run once."""
        cfg, world = self.cfg, self._world
        counts = (cfg.generator.replicas, cfg.judge.replicas)
        generators = [self._handle(VirtualGenerator(), f"generator {i}") for i in range(counts[0])]
        judges = [self._handle(VirtualJudge(), f"judge {i}") for i in range(counts[1])]
        learner = self._handle(self._learner, "learner")
        replicas = [Replica(i, handle, NO_IDS, 1.0) for i, handle in enumerate(generators)]
        handles = {"generators": generators, "judges": judges, "learner": [learner]}
        moments = _Moments(world, handles, self._learner)
        fakes: dict[str, Any] = {
            "tracker": moments,
            "ledger": MemoryLedger(cfg.resampling.replays),
            "checkpoints": NoCheckpoints(),
            "evaluator": NoEvaluator(),
            "drift": _NoDrift(),
        }
        loop.run(
            cfg,
            rollout=self._rollout(replicas, judges, learner),
            learner=RemoteLearner(learner),
            sync=WeightSync(replicas, NO_IDS),
            watch=Watch(Staleness(cfg.resampling.early), Brake(cfg.drift)),
            stop=Stop(cfg.run_dir),
            cursor=Cursor(),
            **fakes,
        )
        return self._found(moments)

    def _handle(self, worker: Any, name: str) -> VirtualHandle:
        return VirtualHandle(self._world, worker, self._paces(name))

    def _rollout(
        self, replicas: list[Replica], judges: list[VirtualHandle], learner: VirtualHandle
    ) -> Rollout:
        cfg = self.cfg
        asked = [Replica(i, handle, NO_IDS, 1.0, kind="judge") for i, handle in enumerate(judges)]
        return Rollout(
            _Stream(),  # type: ignore[arg-type]
            replicas,
            Judges(asked, learner, {cfg.judge.title: cfg.judge}, in_one_process=True),
            Selection(None, 0, 0, (), learner, 0),
            pairing_of(cfg),
            judge_name=cfg.judge.title,
            second_judge=None,
            reference_shares=reference_shares(cfg),
            unit_size=unit_size(cfg, cfg.sampling.prompts_per_update),
            max_invalid_share=1.0,
            in_flight_updates=False,
            rest_between_rounds=rests(cfg),
            run_seed=cfg.run.seed,
        )

    def _found(self, moments: _Moments) -> Simulated:
        rounds, at_once = len(moments.times), self.cfg.resampling.rounds_in_flight + 1
        middle, end = rounds // 2, rounds
        if rounds > 4 * at_once:
            end -= at_once
        times = [0.0, *moments.times]
        updates = [0, *moments.updates]
        busy = [dict.fromkeys(ROLES, 0.0), *moments.busy]
        since = times[end] - times[middle]
        per_update = since / (updates[end] - updates[middle])
        lags = self._learner.lags
        return Simulated(
            generators=self.cfg.generator.replicas,
            rounds_in_flight=self.cfg.resampling.rounds_in_flight,
            updates=updates[-1],
            seconds=self._world.now,
            round_seconds=since / (end - middle),
            update_seconds=per_update,
            run_seconds=self._world.now + per_update * (self._wanted - updates[-1]),
            busy={
                role: (busy[end][role] - busy[middle][role]) / since if since else 0.0
                for role in ROLES
            },
            lag_mean=sum(lag * n for lag, n in lags.items()) / max(1, lags.total()),
            lag_max=max(lags, default=0),
        )


def _enough(cfg: Config) -> int:
    """Updates until a run's pace shows: many times the rounds that are on their way at once."""
    options = cfg.resampling
    per_round, at_once = options.updates_per_round, options.rounds_in_flight + 1
    most = max(1, MOST_PROMPTS // cfg.sampling.prompts_per_update)
    if math.isinf(per_round):
        return max(options.passes, most)
    span = int(per_round) * options.passes
    rounds = min(12 * at_once, max(2 * at_once, most // int(per_round)))
    return max(options.passes, rounds * span)


class _NoDrift:
    """Measures nothing: what is sampled here means nothing."""

    def of(self, round_: object, score_policy: object) -> dict[str, Any]:
        """No panel."""
        return {}

    def state(self) -> dict[str, Any]:
        """None."""
        return {}


class _Stream:
    """Prompts without end."""

    def take(self, start: int, count: int) -> Sequence[Prompt]:
        """Empty prompts of these positions."""
        return [Prompt(at, NO_IDS, "") for at in range(start, start + count)]


WORTH = 0.1
"""The least gain of a number of generators that is worth having, of the time of the one before."""


def recommended(runs: Sequence[Simulated]) -> Simulated:
    """Of runs by number of generators, ascending: the first whose next is less than 10 % faster."""
    for run, more in pairwise(runs):
        if run.update_seconds < more.update_seconds * (1.0 + WORTH):
            return run
    return runs[-1]
