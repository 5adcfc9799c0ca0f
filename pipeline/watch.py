"""Watch: from what is measured of a round to what is done about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pipeline.brake import Alarm, Brake
from pipeline.lesson import Lesson
from pipeline.staleness import Staleness
from workers.messages import Round

AGES = ("lag_max", "policy_ess", "policy_ess_per_token")


class Watch:
    """Says of the round being learned from whether to go on with it.

    A round ``ended`` early because its pairs went stale, or because a measure of drift passed a
    threshold that resamples or resets; ``resets``: the next update puts the policy back to its
    reference; ``stops``: the alarm that stops the run.
    """

    def __init__(self, staleness: Staleness, brake: Brake) -> None:
        self._staleness = staleness
        self._brake = brake
        self._round: int | None = None
        self._reset_at = 0
        self._last: dict[str, Any] = {}
        self.resets: Alarm | None = None
        self._clear()

    def _clear(self) -> None:
        self.ended: str | None = None
        self.stops: Alarm | None = None
        self._was_reset = False
        self._sampled_at = 0
        self._resamples: Alarm | None = None
        self._alarms: dict[str, str] = {}
        self._ages: dict[str, Any] = dict.fromkeys(AGES)

    def begin(self, round_: Round, panel: Mapping[str, Any]) -> None:
        """A round begins to be learned from, with these measures; or goes on in a resumed run."""
        if round_.index != self._round:
            self._clear()
            self._round = round_.index
        self._sampled_at = round_.version
        self._take(panel)
        stops = (a for a in self._brake.tripped(self._last) if a.action == "stop")
        self.stops = self.stops or next(stops, None)  # of a resumed run's last update
        self._last = {}

    def update(self, record: Mapping[str, Any], version: int) -> None:
        """An update was made of the round, and the policy is at this version."""
        if self.resets is not None:
            self.ended, self.resets = str(self.resets), None
            self._was_reset, self._reset_at = True, version
            return
        self._last = dict(record)
        if record["pairs"]:
            self._ages = {name: record[name] for name in AGES}
        self._take(record)
        self.ended = self._end(record)

    def _end(self, record: Mapping[str, Any]) -> str | None:
        """Why the round ends now; not where a reset is due, which the next update is anyway."""
        if self.resets is not None:
            return None
        if self._resamples is not None:
            return str(self._resamples)
        return self._staleness.reason(record)

    @property
    def ages(self) -> Mapping[str, Any]:
        """Lag and ESS of the round's own pairs in its last update that had any."""
        return self._ages

    def record(self, lesson: Lesson, updates: int) -> dict[str, Any]:
        """The round record's ``alarms`` and ``resampling``, after so many updates."""
        replayed = sum(share.take for share in lesson.plan.shares[1:])
        early = updates < lesson.plan.updates or self._was_reset
        learned = updates - self._was_reset
        return {
            "alarms": list(self._alarms.values()),
            "resampling": {
                "planned_updates": lesson.plan.updates,
                "updates": updates,
                "replayed_prompts": replayed,
                "unused_pairs": lesson.unused(learned) if early else 0,
                "ended_by": self.ended if early else None,
            },
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {
            "round": self._round,
            "reset_at": self._reset_at,
            "ended": self.ended,
            "resets": None if self.resets is None else asdict(self.resets),
            "was_reset": self._was_reset,
            "last": self._last,
            "alarms": dict(self._alarms),
            "ages": dict(self._ages),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state`` gave."""
        self._round = state["round"]
        self._reset_at = state["reset_at"]
        self.ended = state["ended"]
        self.resets = None if state["resets"] is None else Alarm(**state["resets"])
        self._was_reset = state["was_reset"]
        self._last = dict(state["last"])
        self._alarms = dict(state["alarms"])
        self._ages = dict(state["ages"])

    def _take(self, measures: Mapping[str, Any]) -> None:
        for alarm in self._brake.tripped(measures):
            self._alarms.setdefault(f"{alarm.action}.{alarm.measure}", str(alarm))
            match alarm.action:
                case "stop":
                    self.stops = self.stops or alarm
                case "reset" if self._sampled_at >= self._reset_at:
                    self.resets = self.resets or alarm
                case "resample":
                    self._resamples = self._resamples or alarm
                case _:  # it is told, and where the policy was reset since, no more than that
                    pass
