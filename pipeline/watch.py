"""Watch: from what is measured of a round to what is done about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.brake import Alarm, Brake
from pipeline.lesson import Lesson
from pipeline.staleness import Staleness
from workers.messages import Round

AGES = ("lag_max", "ess", "ess_per_token")


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
        self._clear()

    def _clear(self) -> None:
        self.ended: str | None = None
        self.resets: Alarm | None = None
        self.stops: Alarm | None = None
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

    def update(self, record: Mapping[str, Any], version: int) -> None:
        """An update was made of the round, and the policy is at this version."""
        if self.resets is not None:
            self.ended, self.resets = str(self.resets), None
            self._reset_at = version
            return
        if record["pairs"]:
            self._ages = {name: record[name] for name in AGES}
        self._take(record)
        if self._resamples is not None:
            self.ended = str(self._resamples)
        else:
            self.ended = self._staleness.reason(record)

    @property
    def ages(self) -> Mapping[str, Any]:
        """Lag and ESS of the round's own pairs in its last update that had any."""
        return self._ages

    def record(self, lesson: Lesson, updates: int) -> dict[str, Any]:
        """The round record's ``alarms`` and ``resampling``, after so many updates."""
        replayed = sum(share.take for share in lesson.plan.shares[1:])
        early = updates < lesson.plan.updates
        return {
            "alarms": list(self._alarms.values()),
            "resampling": {
                "planned_updates": lesson.plan.updates,
                "updates": updates,
                "replayed_prompts": replayed,
                "unused_pairs": lesson.unused(updates) if early else 0,
                "ended_by": self.ended if early else None,
            },
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {
            "round": self._round,
            "reset_at": self._reset_at,
            "ended": self.ended,
            "alarms": dict(self._alarms),
            "ages": dict(self._ages),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state`` gave."""
        self._round = state["round"]
        self._reset_at = state["reset_at"]
        self.ended = state["ended"]
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
