"""The workers of a run, described once for every way of launching them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from judges.options import AskOptions
from judges.plugins import plugin_files
from pipeline.config import Config
from pipeline.handles import Handle
from pipeline.replica import Replica
from pipeline.run_directory import CONFIG_FILE
from pipeline.tracking import Listener
from workers.places import is_url
from workers.worker_log import LogPlace, log_place

Say: TypeAlias = Callable[[str], object]
"""Told what a person should know of how it goes."""


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """How to build one worker, wherever it will run: called there, with these CPU threads.

    ``build`` imports what it needs (torch, a judge's library) only when it is called. ``cpus``,
    ``gpus`` and ``custom`` resources are what a scheduler sets aside for it. The methods named in
    ``beside`` run in order among themselves but beside the others, on a thread of their own, where
    there are threads. ``log``: where its calls are written down; None: nowhere.
    """

    name: str
    build: Callable[[], Any]
    threads: int
    cpus: int
    gpus: float = 0.0
    custom: Mapping[str, float] = field(default_factory=dict)
    beside: frozenset[str] = frozenset()
    log: LogPlace | None = None

    @property
    def resources(self) -> dict[str, float]:
        """All that is set aside for it, by Ray's names."""
        return {"CPU": float(self.cpus), "GPU": self.gpus, **self.custom}


@dataclass(frozen=True, slots=True)
class CrewPlan:
    """Every worker of a run.

    The first ``required`` generators must be there when it starts. ``learner_processes`` are placed
    alike. ``run`` is its name.
    """

    generators: tuple[WorkerPlan, ...]
    judges: tuple[WorkerPlan, ...]
    learner: WorkerPlan
    required: int
    learner_processes: int = 1
    placement: Literal["apart", "colocated"] = "apart"
    run: str = ""

    @property
    def optional(self) -> tuple[WorkerPlan, ...]:
        """The generators that need not be there."""
        return self.generators[self.required :]

    @property
    def workers(self) -> tuple[WorkerPlan, ...]:
        return (self.learner, *self.generators, *self.judges)


@dataclass(frozen=True, slots=True)
class Crew:
    """The workers of a run, started.

    ``listeners`` are told of each record, beside those that every run has: they show it where the
    workers are. They are built for the run's generators.
    """

    generators: tuple[Handle, ...]
    judges: tuple[Handle, ...]
    learner: Handle
    listeners: Callable[[Sequence[Replica]], Sequence[Listener]] = lambda _: ()


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
    url = cfg.run_place if is_url(cfg.run_place) else None

    def log(worker: str) -> LogPlace:
        return log_place(cfg.run_dir, cfg.run.name, worker, cfg.run_dir / CONFIG_FILE, url)

    def judge() -> Any:
        from judges.plugins import SHIPPED
        from workers.judge_clients import build_panel

        SHIPPED.update(files)  # another machine has not got them
        return build_panel(
            judges_of(cfg),
            folder=cfg.run_dir,
            url=url,
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
                custom=cfg.generator.resources,
                beside=frozenset({"load", "prove"} if cfg.generator.in_flight_updates else ()),
                log=log(f"generator {i}"),
            )
            for i in range(cfg.generator.replicas)
        ),
        judges=tuple(
            WorkerPlan(
                f"judge {i}",
                judge,
                cfg.judge.threads,
                cpus=0,
                gpus=cfg.judge.gpus,
                custom=cfg.judge.resources,
                log=log(f"judge {i}"),
            )
            for i in range(cfg.judge.replicas)
        ),
        learner=WorkerPlan(
            "learner",
            learner,
            learner_threads,
            cpus=int(overlapping),
            gpus=cfg.learner.gpus,
            custom=cfg.learner.resources,
            log=log("learner"),
        ),
        required=cfg.generator.min_replicas or cfg.generator.replicas,
        learner_processes=cfg.learner.workers,
        placement=cfg.cluster.placement,
        run=cfg.run.name,
    )


def unwritten_logs(plan: CrewPlan) -> list[str]:
    """What to say of workers whose log is not in the run directory as it is seen here."""
    there = (plan.learner, *plan.generators[: plan.required], *plan.judges)
    logs = [worker.log for worker in there if worker.log is not None and worker.log.url is None]
    return [
        f"no log of {log.worker} ({log.path}): its machine does not see the run directory, or "
        "could not write there"
        for log in logs
        if not log.path.is_file()
    ]


def judges_of(cfg: Config) -> Mapping[str, AskOptions]:
    """Every judge that is asked, by title: the training judge and those beside it."""
    judge = cfg.judge
    second = [] if judge.second is None else [judge.second]
    others = [*cfg.evaluation.judges, *judge.select_by, *second]
    return {other.title: other for other in others} | {judge.title: judge}
