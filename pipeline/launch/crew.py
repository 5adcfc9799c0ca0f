"""The workers of a run, described once for every way of launching them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from judges.options import AskOptions
from judges.plugins import plugin_files
from pipeline.config import Config
from pipeline.handles import Handle


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """How to build one worker, wherever it will run: called there, with these CPU threads.

    ``build`` imports what it needs (torch, a judge's library) only when it is called. ``cpus`` and
    ``gpus`` are what a scheduler sets aside for it. The methods named in ``beside`` run in order
    among themselves but beside the others, on a thread of their own, where there are threads.
    """

    name: str
    build: Callable[[], Any]
    threads: int
    cpus: int
    gpus: float = 0.0
    beside: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class CrewPlan:
    """Every worker of a run."""

    generators: tuple[WorkerPlan, ...]
    judges: tuple[WorkerPlan, ...]
    learner: WorkerPlan

    @property
    def workers(self) -> tuple[WorkerPlan, ...]:
        return (self.learner, *self.generators, *self.judges)


@dataclass(frozen=True, slots=True)
class Crew:
    """The workers of a run, started."""

    generators: tuple[Handle, ...]
    judges: tuple[Handle, ...]
    learner: Handle


def plan_crew(cfg: Config, generator_threads: int, learner_threads: int) -> CrewPlan:
    """The workers a config asks for.

    Judges share a core: they work while others wait; so does the learner of a synchronous run.
    """
    overlapping = cfg.resampling.rounds_in_flight > 0

    backend = cfg.generator.backend_for(cfg.needs)

    def generator() -> Any:
        if backend == "vllm":
            from workers.vllm_generator import VllmGenerator

            weighted = cfg.needs.sampling_logprobs
            return VllmGenerator(cfg.policy, cfg.sampling, cfg.generator, weighted)
        from workers.transformers_generator import TransformersGenerator

        opponent = cfg.needs.opponent > 0.0
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
            transport=cfg.generator.moves_by,
            push_dtype=cfg.generator.dtype_for(cfg.policy),
            gap_clip=cfg.generator.gap.weight_clip,
            correction=cfg.resampling.weights,
        )

    files = plugin_files(judge.name for judge in judges_of(cfg).values())

    def judge() -> Any:
        from judges.plugins import SHIPPED
        from workers.judge_clients import build_panel

        SHIPPED.update(files)  # another machine has not got them
        return build_panel(
            judges_of(cfg),
            folder=cfg.run_dir,
            replicas=cfg.judge.replicas,
            policy=cfg.policy,
            generator=cfg.generator.model_copy(update={"backend": backend, "gpus": cfg.judge.gpus}),
        )

    return CrewPlan(
        generators=tuple(
            WorkerPlan(
                f"generator {i}",
                generator,
                generator_threads,
                cpus=1,
                gpus=cfg.generator.gpus,
                beside=frozenset({"load", "prove"} if cfg.generator.in_flight_updates else ()),
            )
            for i in range(cfg.generator.replicas)
        ),
        judges=tuple(
            WorkerPlan(f"judge {i}", judge, cfg.judge.threads, cpus=0, gpus=cfg.judge.gpus)
            for i in range(cfg.judge.replicas)
        ),
        learner=WorkerPlan("learner", learner, learner_threads, int(overlapping), cfg.learner.gpus),
    )


def judges_of(cfg: Config) -> Mapping[str, AskOptions]:
    """Every judge that is asked, by title: the training judge and those beside it."""
    judge = cfg.judge
    second = [] if judge.second is None else [judge.second]
    others = [*cfg.evaluation.judges, *judge.select_by, *second]
    return {other.title: other for other in others} | {judge.title: judge}
