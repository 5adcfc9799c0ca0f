"""Virtual time: workers whose calls take as long as one says, in a world whose clock is a number.

A call runs in Python where it is submitted, but its future is ready only when a worker of that
speed would have done it: after the calls before it, after the futures among its arguments, and so
many seconds later. Waiting moves the world's clock. So what is in flight when is as it would be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

Pace: TypeAlias = Callable[[str, Sequence[int]], float]
"""Seconds of a call, from its method and the positions of the prompts that it is about."""


@dataclass(slots=True)
class World:
    """Virtual seconds since the run began."""

    now: float = 0.0


class VirtualFuture:
    """An answer that is there, but not before ``ready_at``."""

    def __init__(self, world: World, value: Any, ready_at: float) -> None:
        self._world = world
        self.value = value
        self.ready_at = ready_at

    def result(self) -> Any:
        """Wait for it: the world's clock moves on."""
        self._world.now = max(self._world.now, self.ready_at)
        return self.value


class Worker(Protocol):
    """Has methods; ``seconds`` is what the call under way takes."""

    seconds: float


class VirtualHandle:
    """One worker, its calls one after another at its own pace; ``busy`` seconds in all."""

    def __init__(self, world: World, worker: Worker, pace: Pace) -> None:
        self._world = world
        self._worker = worker
        self._pace = pace
        self._free_at = 0.0
        self.busy = 0.0

    def submit(self, method: str, *args: object) -> VirtualFuture:
        """Call now, answer when it would be done."""
        waits_for = [arg for arg in args if isinstance(arg, VirtualFuture)]
        begins = max(self._world.now, self._free_at, *(f.ready_at for f in waits_for))
        values = [arg.value if isinstance(arg, VirtualFuture) else arg for arg in args]
        self._worker.seconds = self._pace(method, positions_of(method, values))
        self._free_at = begins + self._worker.seconds
        self.busy += self._worker.seconds
        return VirtualFuture(self._world, getattr(self._worker, method)(*values), self._free_at)

    def restart(self) -> None:
        """Nothing here dies."""
        raise AssertionError("nothing here dies")

    def begin_anew(self) -> None:
        """Nothing here dies."""
        raise AssertionError("nothing here dies")

    def here(self) -> bool:
        """From the beginning."""
        return True


def positions_of(method: str, values: Sequence[Any]) -> list[int]:
    """The positions of the prompts that a call is about; none where it is about none."""
    match method:
        case "sample":
            return [prompt.position for prompt in values[0].prompts]
        case "judge":
            return [prompt.position for prompt in values[1]]
        case "implicit_reward":
            return [prompt.position for prompt in values[0]]
        case "update":
            return sorted({item.completion.position for item in values[0].completions})
        case "score_reference":
            return sorted({p for batch in values[0] for p in positions_of("update", [batch])})
    return []
