"""What a judge may look like, and what comes of asking it."""

from __future__ import annotations

import enum
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Message: TypeAlias = Mapping[str, Any]
Text: TypeAlias = str | Sequence[Message]
"""Plain text, or a conversation in chat form (a list of ``{"role", "content"}``)."""

PROBABILITY_FLOOR = 1e-6
"""Probabilities are clipped to [floor, 1 - floor]: no label is ever certain."""


@dataclass(frozen=True, slots=True)
class Score:
    """A judge's element with its reason; ``value`` None or NaN is INVALID.

    ``declined``: no verdict, on purpose (a person skipped it, the members of a vote disagreed): it
    is not learned from either, but it is no failure. ``flipped``: a judge that was asked in both
    orders says whether its preference changed with the order.
    """

    value: float | None
    reason: str | None = None
    declined: bool = False
    flipped: bool | None = None

    @classmethod
    def read(cls, element: object) -> Score:
        """What a judge's element says: a finite number, or None (INVALID) with the reason why.

        Python, numpy and torch scalars are numbers, a bool is 0 or 1; None, NaN, an infinity, text
        and anything else are INVALID. A ``Score`` is unwrapped and its own reason kept.
        """
        score = element if isinstance(element, Score) else None
        value: Any = element if score is None else score.value
        if score is not None and score.declined:
            return cls(None, score.reason or "declined", declined=True)
        stated = None if score is None else score.reason
        flipped = None if score is None else score.flipped
        if getattr(value, "ndim", None) == 0:
            value = value.item()
        if not isinstance(value, int | float):
            kind = "text" if isinstance(value, str) else _kind(value)
            return cls(None, stated or f"returned {kind}")
        if abs(value) > sys.float_info.max:
            return cls(None, stated or "returned an infinite number")
        if math.isnan(value):
            return cls(None, stated or "returned NaN")
        return cls(float(value), stated, flipped=flipped)


class Outcome(enum.Enum):
    """What came of comparing two completions."""

    PREFERENCE = "preference"
    TIE = "tie"
    INVALID = "invalid"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One comparison: an outcome and, for a PREFERENCE, P(first is better)."""

    outcome: Outcome
    first_better: float = math.nan

    @classmethod
    def from_probability(cls, first_better: float) -> Verdict:
        """NaN is INVALID, exactly 0.5 is a TIE, anything else a clipped PREFERENCE.

        Raises ValueError for a number outside [0, 1].
        """
        if math.isnan(first_better):
            return cls(Outcome.INVALID)
        if not 0.0 <= first_better <= 1.0:
            raise ValueError(f"P(first better)={first_better}: a probability lies in [0, 1]")
        if first_better == 0.5:
            return cls(Outcome.TIE, 0.5)
        clipped = min(max(first_better, PROBABILITY_FLOOR), 1.0 - PROBABILITY_FLOOR)
        return cls(Outcome.PREFERENCE, clipped)

    def swapped(self) -> Verdict:
        """The same comparison with the two completions exchanged."""
        return Verdict(self.outcome, 1.0 - self.first_better)


def as_probability(score: Score) -> Score:
    """A comparing judge's answer; a number outside [0, 1] is INVALID."""
    if score.value is None or 0.0 <= score.value <= 1.0:
        return score
    return Score(None, f"returned {score.value}: a probability lies in [0, 1]")


def text_of(content: Text) -> str:
    """The words of a prompt or completion: chat messages' contents joined by newlines."""
    if isinstance(content, str):
        return content
    return "\n".join(str(message["content"]) for message in content)


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
