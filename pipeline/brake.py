"""The brake: thresholds on what is measured, and what is done where one is passed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.drift_options import ACTIONS, Action, DriftOptions, Side


@dataclass(frozen=True, slots=True)
class Alarm:
    """A threshold that was passed: ``value`` lies on the wrong ``side`` of ``bound``."""

    action: Action
    measure: str
    value: float
    bound: float
    side: Side

    @property
    def severity(self) -> int:
        """0 warns, 1 resamples, 2 puts the policy back to its reference, 3 stops."""
        return ACTIONS.index(self.action)

    @property
    def key(self) -> str:
        """The threshold's place in the config."""
        return f"drift.{self.action}.{self.measure}"

    def __str__(self) -> str:
        value, bound = _told_apart(self.value, self.bound)
        return f"{self.key}: {value} is {self.side} {bound}"


class Brake:
    """The thresholds of a run. It remembers nothing: the same measures trip the same ones."""

    def __init__(self, options: DriftOptions) -> None:
        self._thresholds = tuple(options.thresholds())

    def tripped(self, measures: Mapping[str, Any]) -> list[Alarm]:
        """The thresholds that a record's measures pass, the severest first.

        A number passes a bound that it lies beyond, not one that it equals. Measures that the
        record lacks and those that are None or NaN pass nothing.
        """
        found: list[Alarm] = []
        for action, measure, bound in self._thresholds:
            value = _value(measures, measure)
            if bound.above is not None and value > bound.above:
                found.append(Alarm(action, measure, value, bound.above, "above"))
            if bound.below is not None and value < bound.below:
                found.append(Alarm(action, measure, value, bound.below, "below"))
        return sorted(found, key=lambda alarm: -alarm.severity)


def _value(measures: Mapping[str, Any], name: str) -> float:
    """The measure's number; NaN, which no comparison holds of, where there is none."""
    found: Any = measures
    for step in name.split("."):
        found = found.get(step) if isinstance(found, Mapping) else None
    return math.nan if found is None else float(found)


def _told_apart(value: float, bound: float) -> tuple[str, str]:
    """Both to as few digits as show that they differ."""
    texts = ((f"{value:.{digits}g}", f"{bound:.{digits}g}") for digits in (6, 9, 17))
    return next(pair for pair in texts if pair[0] != pair[1])
