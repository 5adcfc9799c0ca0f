"""The workers of a run, described once for every way of launching them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config import Config
from pipeline.handles import Handle
from workers.judge_worker import JudgeOptions


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """How to build one worker, wherever it will run: called there, with these CPU threads.

    ``build`` imports what it needs (torch, a judge's library) only when it is called. ``cpus`` are
    what a scheduler sets aside for it.
    """

    name: str
    build: Callable[[], Any]
    threads: int
    cpus: int


@dataclass(frozen=True, slots=True)
class CrewPlan:
    """Every worker of a run."""

    generators: tuple[WorkerPlan, ...]
    judge: WorkerPlan
    learner: WorkerPlan

    @property
    def workers(self) -> tuple[WorkerPlan, ...]:
        return (self.learner, *self.generators, self.judge)


@dataclass(frozen=True, slots=True)
class Crew:
    """The workers of a run, started."""

    generators: tuple[Handle, ...]
    judge: Handle
    learner: Handle


def plan_crew(cfg: Config, generator_threads: int, learner_threads: int) -> CrewPlan:
    """The workers a config asks for. The judge shares a core: it works while others wait."""

    def generator() -> Any:
        from workers.transformers_generator import TransformersGenerator

        opponent = cfg.objective.needs.opponent > 0.0
        return TransformersGenerator(cfg.policy, cfg.sampling, reference=opponent)

    def learner() -> Any:
        from workers.learner.learner import Learner

        return Learner(
            cfg.policy,
            cfg.learner,
            cfg.objective,
            cfg.run.updates,
            cfg.reference,
            keep_reference=cfg.drift.reference,
        )

    def judge() -> Any:
        from workers.judge_worker import JudgePanel

        return JudgePanel(judges_of(cfg))

    return CrewPlan(
        generators=tuple(
            WorkerPlan(f"generator {i}", generator, generator_threads, 1)
            for i in range(cfg.generator.replicas)
        ),
        judge=WorkerPlan("judge", judge, 1, 0),
        learner=WorkerPlan("learner", learner, learner_threads, 1),
    )


def judges_of(cfg: Config) -> Mapping[str, JudgeOptions]:
    """The training judge and the judges of evaluation, by name."""
    others = {name: JudgeOptions(name=name) for name in cfg.evaluation.judges}
    return others | {cfg.judge.name: cfg.judge}
