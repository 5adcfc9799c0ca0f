"""The workers in this process, one call after another: for a debugger, and without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.handles import Future
from pipeline.launch.crew import Crew, CrewPlan, WorkerPlan
from workers.threads import apply_threads


@dataclass(frozen=True, slots=True)
class _Done:
    """A result that is there already."""

    value: Any

    def result(self) -> Any:
        return self.value


class InlineHandle:
    """A worker that runs each call as it is submitted, with its own thread count.

    Calls reach every worker in the order of submission, as they do with Ray's actors: hence the
    same results.
    """

    def __init__(self, plan: WorkerPlan) -> None:
        self._threads = plan.threads
        apply_threads(self._threads)
        self._worker = plan.build()

    def submit(self, method: str, *args: object) -> Future[Any]:
        """Run the method now."""
        apply_threads(self._threads)
        values = [arg.value if isinstance(arg, _Done) else arg for arg in args]
        return _Done(getattr(self._worker, method)(*values))


@contextmanager
def inline_crew(plan: CrewPlan) -> Iterator[Crew]:
    """Build the workers here."""
    yield Crew(
        generators=tuple(InlineHandle(generator) for generator in plan.generators),
        judge=InlineHandle(plan.judge),
        learner=InlineHandle(plan.learner),
    )
