"""How the loop reaches a worker, wherever it runs: a method's name, its arguments, a future."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

T_co = TypeVar("T_co", covariant=True)


class WorkerDied(RuntimeError):  # noqa: N818 (named for what happened)
    """A worker's process ended before it answered."""


class Future(Protocol[T_co]):
    """A result on its way."""

    def result(self) -> T_co:
        """Wait for it; an error of the worker is raised here, or WorkerDied."""
        ...


class Handle(Protocol):
    """One worker. Calls run in the order in which they were submitted."""

    def submit(self, method: str, *args: object) -> Future[Any]:
        """Call a method; futures among the arguments are passed on without passing through here."""
        ...

    def restart(self) -> None:
        """Put a new worker in the place of this one, built alike; its calls under way are lost."""
        ...

    def begin_anew(self) -> None:
        """As ``restart``, without waiting until it is built."""
        ...

    def here(self) -> bool:
        """Whether the worker is built; what its building raised is raised here."""
        ...
