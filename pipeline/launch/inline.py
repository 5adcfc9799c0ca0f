"""The workers in this process, one call after another: for a debugger, and without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from pipeline.handles import Future
from pipeline.launch.crew import Crew, CrewPlan, WorkerPlan
from workers.threads import apply_threads
from workers.worker_log import Hosted


@dataclass(frozen=True, slots=True)
class _Done:
    """A result that is there already."""

    value: Any

    def result(self) -> Any:
        return self.value


@dataclass(frozen=True, slots=True)
class _Failed:
    """An error that is there already; calls that are given it fail with it."""

    error: Exception

    def result(self) -> NoReturn:
        raise self.error


class InlineHandle:
    """A worker that runs each call as it is submitted, with its own thread count.

    Calls reach every worker in the order of submission, as they do with Ray's actors: hence the
    same results.
    """

    def __init__(self, plan: WorkerPlan) -> None:
        self._plan = plan
        self.restart()

    def submit(self, method: str, *args: object) -> Future[Any]:
        """Run the method now; what it raises is raised where its result is asked for."""
        apply_threads(self._plan.threads)
        values = []
        for arg in args:
            if isinstance(arg, _Failed):
                return arg
            values.append(arg.value if isinstance(arg, _Done) else arg)
        try:
            return _Done(self._hosted.call(method, tuple(values)))
        except Exception as error:  # noqa: BLE001 (as an actor's: none is swallowed)
            return _Failed(error)

    def begin_anew(self) -> None:
        """Build the worker anew: nothing else runs meanwhile."""
        self.restart()

    def here(self) -> bool:
        """It is built in the constructor."""
        return True

    def restart(self) -> None:
        """Build the worker anew."""
        apply_threads(self._plan.threads)
        plan = self._plan
        self._hosted: Any = None
        self._hosted = Hosted(plan.build, plan.log, plan.threads, plan.gpus)


@contextmanager
def inline_crew(plan: CrewPlan) -> Iterator[Crew]:
    """Build the workers here."""
    yield Crew(
        generators=tuple(InlineHandle(generator) for generator in plan.generators),
        judges=tuple(InlineHandle(judge) for judge in plan.judges),
        learner=InlineHandle(plan.learner),
    )
