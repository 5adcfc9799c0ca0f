"""A short calibration: the real loop and the real workers of a config, each of their calls timed.

One generator, one judge worker and the learner go through three rounds of the work units that the
run will have; the first warms up. Nothing is written but in a directory that is gone afterwards.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from judges.errors import UserError
from judges.options import AUTO, is_implicit, served_clients
from pipeline import loop
from pipeline.brake import Brake
from pipeline.checkpoint import Cursor
from pipeline.config import Config, EvaluationOptions, threads_of
from pipeline.drift import Drift
from pipeline.drift_options import DriftOptions
from pipeline.handles import Future, Handle
from pipeline.inputs import Inputs, check_inputs
from pipeline.job import cores, settled
from pipeline.launch.crew import Crew, Say, plan_crew
from pipeline.learner import RemoteLearner
from pipeline.ledger import Ledger
from pipeline.parts import (
    judges_with,
    reference_shares,
    replicas_of,
    rounds_of,
    start_crew,
    unit_size,
)
from pipeline.plan.rates import STAGES, Law, Lengths, Rates
from pipeline.plan.virtual import positions_of
from pipeline.plan.virtual_workers import NoCheckpoints, NoEvaluator
from pipeline.prompts import PromptStream
from pipeline.replica import Replica
from pipeline.resampling_options import EarlyOptions
from pipeline.rollout import work_units
from pipeline.selection import Selection
from pipeline.staleness import Staleness
from pipeline.stopping import Stop
from pipeline.sync import WeightSync
from pipeline.tracking import TrackingOptions
from pipeline.watch import Watch
from workers.learner.options import is_averaged

ROUNDS = 3
"""Of the calibration; the first is not counted."""

MOST_UPDATES = 4
"""That a round of the calibration feeds, where a work unit has the prompts of many."""


@dataclass(slots=True)
class Stopwatch:
    """Seconds and prompts of each call, by method, of each round; the first is number 0."""

    round_: int = 0
    calls: defaultdict[str, list[tuple[int, int, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    ends: list[float] = field(default_factory=list)

    def note(self, method: str, prompts: int, seconds: float) -> None:
        """A call is over."""
        self.calls[method].append((self.round_, prompts, seconds))

    def law(self, method: str) -> Law:
        """Seconds a prompt of a call, and where its calls were of two sizes what each call takes
        besides."""
        counted = [call for call in self.calls[method] if call[0] > 0]
        points = [(prompts, seconds) for _, prompts, seconds in counted if prompts]
        if not points:
            return Law()
        large = max(prompts for prompts, _ in points)
        small = min(prompts for prompts, _ in points)
        at = {
            size: fmean(seconds for prompts, seconds in points if prompts == size)
            for size in (small, large)
        }
        if small == large:
            return Law(at[large] / large)
        each = min(max(0.0, (at[large] - at[small]) / (large - small)), at[large] / large)
        return Law(each, at[large] - each * large)

    def mean(self, *methods: str) -> float:
        """Mean seconds of calls of these methods."""
        spent = [call[2] for method in methods for call in self.calls[method] if call[0] > 0]
        return fmean(spent) if spent else 0.0

    def around(self) -> float:
        """Mean seconds that a round took beside its calls."""
        walls = [end - began for began, end in pairwise(self.ends[1:])]
        spent = sum(call[2] for calls in self.calls.values() for call in calls if call[0] > 0)
        return max(0.0, (sum(walls) - spent) / len(walls))


class TimedHandle:
    """A worker whose calls are waited for, one by one, by a stopwatch.

    Weights stay where they are: that they are packed shows in the learner's next call, ``sent``.
    """

    def __init__(self, handle: Handle, watch: Stopwatch) -> None:
        self._handle = handle
        self._watch = watch

    def submit(self, method: str, *args: object) -> Future[Any]:
        """Call, wait, note what it took; what it raises is raised here."""
        began = time.perf_counter()
        future = self._handle.submit(method, *args)
        if method != "weights":
            future.result()
            seconds = time.perf_counter() - began
            self._watch.note(method, len(positions_of(method, args)), seconds)
        return future

    def restart(self) -> None:
        """Put a new worker in the place of this one."""
        self._handle.restart()

    def begin_anew(self) -> None:
        """The same, without waiting."""
        self._handle.begin_anew()

    def here(self) -> bool:
        """Whether it is built."""
        return self._handle.here()


def calibrate(cfg: Config, say: Say = print) -> Rates:
    """Measure a config's rates on this machine, or on the cluster that its address names.

    Raises UserError where the config cannot be run here, and what its workers raise.
    """
    if cfg.judge.name == "human":
        raise UserError(
            "judge.name=human: people are not timed; say how fast they are with --rates"
        )
    threads = threads_of(cfg, cores())  # of the run, whose rounds may overlap
    with tempfile.TemporaryDirectory(prefix="freshpairs-plan-") as name:
        small = _three_rounds(settled(cfg), Path(name))
        inputs = check_inputs(small)
        if isinstance(inputs.prompts, PromptStream):
            _say_who_is_asked(small, say)
        plan = plan_crew(small, *threads)
        first, judge = plan.generators[:1], plan.judges[:1]
        plan = replace(plan, generators=first, judges=judge, required=1)
        with start_crew(small, plan, say) as crew:
            return _measured(small, crew, inputs, say)


def _say_who_is_asked(cfg: Config, say: Say) -> None:
    """That a judge over HTTP will be asked, which may cost money, and how much."""
    if any(served_clients(cfg.judge.client, cfg.judge.args)):
        sampling, updates = cfg.sampling, cfg.run.updates
        count = updates * sampling.prompts_per_update * sampling.completions_per_prompt
        say(f"asks {cfg.judge.title} about {count:,} completions, over HTTP: that may cost money")


def _three_rounds(cfg: Config, folder: Path) -> Config:
    """The config of a synchronous run of three rounds, each of as many updates as fill a work unit
    (at most ``MOST_UPDATES``), that asks nothing but its training judge and writes to a folder."""
    prompts, samples = cfg.sampling.prompts_per_update, cfg.sampling.completions_per_prompt
    options = cfg.resampling
    per_round = min(options.updates_per_round, cfg.run.updates)
    unit = unit_size(cfg, prompts).of(int(per_round) * prompts, samples)
    span = min(MOST_UPDATES, math.ceil(unit / prompts))
    calls = math.ceil(span * prompts / min(unit, span * prompts))
    judge: dict[str, Any] = {"cache": AUTO, "select": None, "select_by": [], "second": None}
    once = {
        "updates_per_round": span,
        "passes": 1,
        "rounds_in_flight": 0,
        "replay": [1.0],
        "early": EarlyOptions(),
        "adaptive": None,
    }
    asked = {"replicas": calls, "min_replicas": None, "in_flight_updates": False}
    return cfg.model_copy(
        update={
            "run": cfg.run.model_copy(update={"dir": str(folder), "updates": ROUNDS * span}),
            "resampling": options.model_copy(update=once),
            "generator": cfg.generator.model_copy(update=asked),
            "judge": cfg.judge.model_copy(update=judge),
            "evaluation": EvaluationOptions(),
            "drift": DriftOptions(reference=cfg.drift.reference),
            "tracking": TrackingOptions(tensorboard=False),
        }
    )


def _measured(cfg: Config, crew: Crew, inputs: Inputs, say: Say) -> Rates:
    """Three rounds of the real loop; their stopwatch as rates."""
    watch = Stopwatch()
    timed = Crew(
        generators=tuple(TimedHandle(handle, watch) for handle in crew.generators),
        judges=tuple(TimedHandle(handle, watch) for handle in crew.judges),
        learner=TimedHandle(crew.learner, watch),
    )
    replicas = replicas_of(cfg, timed, inputs, say)
    judges = judges_with(cfg, timed, inputs)
    if isinstance(inputs.prompts, PromptStream):
        judges.check(inputs.first_prompts())
    fakes: dict[str, Any] = {
        "tracker": _Rounds(watch),
        "checkpoints": NoCheckpoints(),
        "evaluator": NoEvaluator(),
    }
    ledger = Ledger(cfg.run_dir / "ledger")
    selection = Selection(None, 0, 0, (), timed.learner, 0)
    rollout = rounds_of(cfg, inputs.prompts, replicas, judges, selection)
    learner = RemoteLearner(timed.learner)
    watch.ends = [time.perf_counter()]
    loop.run(
        cfg,
        rollout=rollout,
        learner=learner,
        sync=WeightSync([*replicas, *judges.given_weights], inputs.probe_ids()),
        ledger=ledger,
        drift=Drift(is_averaged(cfg.reference)),
        watch=Watch(Staleness(cfg.resampling.early), Brake(cfg.drift)),
        stop=Stop(cfg.run_dir),
        cursor=Cursor(),
        **fakes,
    )
    around = watch.around()
    if isinstance(inputs.prompts, PromptStream) and cfg.generator.backend == "vllm":
        _sample_fewer(cfg, inputs.prompts, replicas[0])
    return Rates(
        sample=watch.law("sample"),
        judge=watch.law("implicit_reward" if is_implicit(cfg.judge) else "judge"),
        score=watch.law("score_reference"),
        update=watch.law("update"),
        pack=watch.mean("sent"),
        probe=watch.mean("probe"),
        load=watch.mean("load"),
        prove=watch.mean("prove"),
        around=around + watch.mean("begin_round"),
        lengths=_lengths(ledger),
        origin=dict.fromkeys(STAGES, "measured here"),
    )


def _sample_fewer(cfg: Config, prompts: PromptStream, replica: Replica) -> None:
    """A call of a quarter of a work unit: an engine's seconds are not in proportion to prompts."""
    whole = cfg.sampling.prompts_per_update * int(cfg.resampling.updates_per_round)
    quarter = max(1, unit_size(cfg, whole).of(whole, cfg.sampling.completions_per_prompt) // 4)
    few = prompts.take(0, quarter)
    (request,) = work_units(few, quarter, reference_shares(cfg), cfg.run.seed, "calibration")
    replica.sample(request).result()


def _lengths(ledger: Ledger) -> Lengths:
    """Mean tokens of the prompts and completions of the rounds that were counted."""
    groups = [group for index in range(1, ROUNDS) for group in ledger.read(index).groups]
    completions = [completion for group in groups for completion in group.completions]
    return Lengths(
        prompt=fmean(len(group.prompt.ids) for group in groups),
        completion=fmean(len(completion.ids) for completion in completions),
    )


@dataclass(slots=True)
class _Rounds:
    """Tells the stopwatch when a round ends."""

    watch: Stopwatch

    def update(self, record: object) -> None:
        """Nothing is kept of an update."""

    def round(self, record: object) -> None:
        """A round is over."""
        self.watch.ends.append(time.perf_counter())
        self.watch.round_ += 1

    def position(self) -> int:
        """Of a file that is not written."""
        return 0
