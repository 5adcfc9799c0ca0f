"""The workers as Ray actors on this machine. The only file that imports Ray."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from judges.errors import UserError
from pipeline.handles import Future, WorkerDied
from pipeline.launch.crew import Crew, CrewPlan, WorkerPlan
from workers.threads import thread_environment

CHECKOUT = Path(__file__).resolve().parents[2]

BESIDE = "beside"
"""The concurrency group of the calls that run beside an actor's others."""


class _Actor:
    """Hosts one worker and calls its methods by name."""

    def __init__(self, plan: WorkerPlan) -> None:
        self._plan = plan
        self._worker: Any = None

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self._worker, method)(*args)

    def build(self) -> None:
        """Build the worker: not in the constructor, whose errors Ray tells nobody."""
        from workers.threads import apply_threads

        apply_threads(self._plan.threads)
        self._worker = self._plan.build()


@dataclass(frozen=True, slots=True)
class _RayFuture:
    worker: str
    reference: Any

    def result(self) -> Any:
        import ray

        try:
            return ray.get(self.reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayActorError as error:
            raise WorkerDied(f"the process of {self.worker} ended") from error


class RayHandle:
    """An actor. Its calls run in the order in which they were submitted."""

    def __init__(self, plan: WorkerPlan) -> None:
        self._plan = plan
        self._begin()

    def _begin(self) -> None:
        self._actor = _start(self._plan)
        self._built = _RayFuture(self._plan.name, self._actor.build.remote())

    def ready(self) -> None:
        """Wait until the worker is built; what its building raises is raised here."""
        self._built.result()

    def submit(self, method: str, *args: object) -> Future[Any]:
        """Queue the call; arguments that are futures go from worker to worker."""
        passed = [arg.reference if isinstance(arg, _RayFuture) else arg for arg in args]
        call = self._actor.call
        if method in self._plan.beside:
            call = call.options(concurrency_group=BESIDE)
        return _RayFuture(self._plan.name, call.remote(method, *passed))

    def restart(self) -> None:
        """End the actor, if it still lives, and start another."""
        import ray

        ray.kill(self._actor)
        self._begin()
        self.ready()


@contextmanager
def ray_crew(plan: CrewPlan) -> Iterator[Crew]:
    """Start Ray on this machine, the workers in it, and end both.

    Raises UserError before anything is started when the machine has too few cores.
    """
    refuse_too_few_cores(plan, len(os.sched_getaffinity(0)))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of calls that are made again
    import ray

    # Ray puts the directory it was started from first on its workers' import path. Ours must be
    # it: a user's folder may hold a `judges/` too.
    with contextlib.chdir(CHECKOUT):
        ray.init(
            address="local",
            num_cpus=len(os.sched_getaffinity(0)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    try:
        refuse_missing_gpus(plan, ray.cluster_resources().get("GPU", 0.0))
        handles = {worker.name: RayHandle(worker) for worker in plan.workers}
        for handle in handles.values():
            handle.ready()
        yield Crew(
            generators=tuple(handles[worker.name] for worker in plan.generators),
            judges=tuple(handles[worker.name] for worker in plan.judges),
            learner=handles[plan.learner.name],
        )
    finally:
        ray.shutdown()


def _start(worker: WorkerPlan) -> Any:
    import ray

    options = {
        "num_cpus": worker.cpus,
        "num_gpus": worker.gpus,
        "runtime_env": {"env_vars": thread_environment(worker.threads)},
    }
    groups = {"concurrency_groups": {BESIDE: 1}} if worker.beside else {"num_cpus": worker.cpus}
    return ray.remote(**groups)(_Actor).options(**options).remote(worker)


def refuse_missing_gpus(plan: CrewPlan, gpus: float) -> None:
    """Raises UserError when the workers set aside more GPUs than there are."""
    wanted = sum(worker.gpus for worker in plan.workers)
    if wanted > gpus:
        each, judges = plan.generators[0].gpus, plan.judges[0].gpus * len(plan.judges)
        judging = f", judge.gpus={plan.judges[0].gpus:g}" if judges else ""
        raise UserError(
            f"generator.gpus={each:g}, generator.replicas={len(plan.generators)}, learner.gpus="
            f"{plan.learner.gpus:g}{judging}: they need {wanted:g} GPUs, this machine has "
            f"{gpus:g}; give "
            "them less (fractions of generator.gpus share one), or 0 to run on the CPU"
        )


def refuse_too_few_cores(plan: CrewPlan, cores: int) -> None:
    """Raises UserError when the workers set aside more cores than there are."""
    wanted = sum(worker.cpus for worker in plan.workers)
    if wanted > cores:
        learner = " and the learner" if plan.learner.cpus else ""
        raise UserError(
            f"generator.replicas={len(plan.generators)}: {len(plan.generators)} generators"
            f"{learner} need {wanted} cores, this machine has {cores}; lower generator.replicas, "
            "or run in one process with cluster.address=inline"
        )
