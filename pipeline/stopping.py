"""Stopping on purpose: Ctrl-C and SIGTERM end a run at its next checkpoint, resumable."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from judges.budget import BudgetSpent
from pipeline.brake import Alarm


class Stopped(Exception):  # noqa: N818 (not an error: the run was asked to end)
    """A run that ended on purpose and can be resumed (exit code 3) from ``place``: path or URL.

    ``changed`` is what to change for it to go on, as ``key=value``.
    """

    def __init__(self, where: str, place: str | Path, changed: str = "") -> None:
        super().__init__(f"stopped {where}")
        self.place = str(place)
        self.changed = changed


class Stop:
    """A request to stop. Inside ``with``, the first SIGINT or SIGTERM makes it; a second one
    interrupts at once, and the run resumes from its last checkpoint instead; so it does where the
    judge's budget is spent."""

    def __init__(self, place: str | Path) -> None:
        self._place = place
        self.requested = False
        self._alarm: Alarm | None = None
        self._previous: dict[int, Any] = {}

    def brake(self, alarm: Alarm | None) -> bool:
        """Whether the run is to stop: it was asked to, or here is an alarm that stops it."""
        if alarm is not None:
            self.requested, self._alarm = True, alarm
        return self.requested

    def check(self, update: int) -> None:
        """Raise Stopped if a stop was requested."""
        if not self.requested:
            return
        where = f"after update {update}"
        if self._alarm is None:
            raise Stopped(where, self._place)
        raise Stopped(f"{where} ({self._alarm})", self._place, f"{self._alarm.key}=…")

    def __enter__(self) -> Stop:
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may handle signals
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()
        if isinstance(error, BudgetSpent):
            raise Stopped(f"({error})", self._place, f"judge.budget.{error.limit}=…") from error
        if kind is KeyboardInterrupt:
            raise Stopped("at once, to go on from the last checkpoint", self._place) from error

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)
