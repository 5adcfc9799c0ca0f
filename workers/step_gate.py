"""One thread takes steps; another gets in between two of them for as long as it needs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StepGate:
    """Mutual exclusion of a stepping thread and an updating one, in which updates go first.

    Whoever wants the engine passes the door first; an update keeps the door shut behind it, so the
    stepping thread, which would win any race for a single lock, cannot slip past it.
    """

    def __init__(self) -> None:
        self._door = threading.Lock()
        self._engine = threading.Lock()

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step, after any update that waits or is not over."""
        with self._door:
            self._engine.acquire()
        try:
            yield
        finally:
            self._engine.release()

    def close(self) -> None:
        """Begin an update: returns between two steps; no step is taken until ``open``."""
        self._door.acquire()
        self._engine.acquire()

    def open(self) -> None:
        """The update is over."""
        self._engine.release()
        self._door.release()
