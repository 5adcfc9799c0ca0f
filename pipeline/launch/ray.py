"""The workers as Ray actors, on this machine or on a cluster's nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.handles import Future, WorkerDied
from pipeline.launch.crew import Crew, CrewPlan, Say, WorkerPlan
from pipeline.launch.ray_cluster import Seating, ray_session
from pipeline.launch.ray_metrics import RayMetrics
from pipeline.placement import groups_of
from workers.threads import thread_environment

BESIDE = "beside"
"""The concurrency group of the calls that run beside an actor's others."""

PATIENCE = 10.0
"""Seconds between two looks at whether a worker that is not there yet can still come."""


class _Actor:
    """Hosts one worker and calls its methods by name."""

    def __init__(self, plan: WorkerPlan) -> None:
        self._plan = plan
        self._hosted: Any = None

    def call(self, method: str, *args: Any) -> Any:
        return self._hosted.call(method, args)

    def build(self) -> None:
        """Build the worker: not in the constructor, whose errors Ray tells nobody."""
        from workers.threads import apply_threads
        from workers.worker_log import Hosted

        plan = self._plan
        apply_threads(plan.threads)
        self._hosted = Hosted(plan.build, plan.log, plan.threads, plan.gpus)


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
        except ray.exceptions.ObjectLostError as error:
            raise WorkerDied(f"what {self.worker} answered was lost with its node") from error
        except ray.exceptions.RayError as error:
            said = " ".join(str(error).split())
            raise WorkerDied(f"{self.worker} could not be run ({said})") from error


class RayHandle:
    """An actor. Its calls run in the order in which they were submitted."""

    def __init__(self, plan: WorkerPlan, seating: Seating) -> None:
        self._plan = plan
        self._seating = seating
        self._begin()

    def _begin(self) -> None:
        self._actor = _start(self._plan, self._seating.options(self._plan))
        self._built = _RayFuture(self._plan.name, self._actor.build.remote())

    def ready(self) -> None:
        """Wait until the worker is built; what its building raises is raised here.

        Raises WorkerDied where no node that is left has room for it.
        """
        import ray

        while not ray.wait([self._built.reference], timeout=PATIENCE)[0]:
            self._seating.refuse_lost_room(self._plan)
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
        self.begin_anew()
        self.ready()

    def begin_anew(self) -> None:
        """As ``restart``, without waiting for it: ``here`` tells."""
        import ray

        ray.kill(self._actor)
        self._begin()

    def here(self) -> bool:
        """Whether the worker is built. Raises what its building raised, or WorkerDied."""
        import ray

        if not ray.wait([self._built.reference], timeout=0)[0]:
            return False
        self._built.result()
        return True


@contextmanager
def ray_crew(plan: CrewPlan, address: str, wait_minutes: float, say: Say) -> Iterator[Crew]:
    """Start Ray on this machine, or join a cluster; start the workers in it, and end them.

    Raises UserError when the cluster does not answer, or when it has no room for them, with what
    is missing and what there is.
    """
    with ray_session(address) as nodes:
        groups = groups_of(plan)
        nodes.wait_for(groups, wait_minutes, say)
        seating = Seating(plan, groups, nodes)
        seating.reserve(say)
        handles = {worker.name: RayHandle(worker, seating) for worker in plan.workers}
        for worker in plan.workers:
            if worker not in plan.optional:
                handles[worker.name].ready()
        yield Crew(
            generators=tuple(handles[worker.name] for worker in plan.generators),
            judges=tuple(handles[worker.name] for worker in plan.judges),
            learner=handles[plan.learner.name],
            listeners=lambda generators: [RayMetrics(plan.run, generators, len(plan.judges))],
        )


def _start(worker: WorkerPlan, placing: Mapping[str, Any]) -> Any:
    import ray

    options = {
        "num_cpus": worker.cpus,
        "num_gpus": worker.gpus,
        "resources": dict(worker.custom),
        "runtime_env": {"env_vars": thread_environment(worker.threads)},
        **placing,
    }
    groups = {"concurrency_groups": {BESIDE: 1}} if worker.beside else {"num_cpus": worker.cpus}
    return ray.remote(**groups)(_Actor).options(**options).remote(worker)
