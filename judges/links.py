"""Links: from two scores to a verdict on which is better."""

from __future__ import annotations

import math

from judges.interface import Outcome, Verdict


def hard(first: float, second: float) -> Verdict:
    """The higher of two scores is better for certain; equal is a TIE, NaN is INVALID."""
    if math.isnan(first) or math.isnan(second):
        return Verdict(Outcome.INVALID)
    if first == second:
        return Verdict(Outcome.TIE, 0.5)
    return Verdict(Outcome.PREFERENCE, 1.0 if first > second else 0.0)


def bradley_terry(first: float, second: float, temperature: float) -> Verdict:
    """P(first better) = σ((first − second) / temperature); equal is a TIE, NaN is INVALID.

    Bradley and Terry, "Rank analysis of incomplete block designs", Biometrika 39, 1952. Raises
    ValueError for a temperature that is not finite and above 0.
    """
    higher_better = _higher_better(first, second, temperature)
    return Verdict.from_probability(higher_better if first >= second else 1.0 - higher_better)


def sampled(first: float, second: float, temperature: float, uniform: float) -> Verdict:
    """A draw from ``bradley_terry``: one of the two is better for certain; equal is a TIE.

    ``uniform`` is a draw from [0, 1). The pair in the other order with 1 − uniform is the same
    verdict swapped. NaN is INVALID. Raises ValueError for a temperature that is not above 0 or a
    ``uniform`` outside [0, 1].
    """
    if not 0.0 <= uniform <= 1.0:
        raise ValueError(f"uniform={uniform}: a draw lies in [0, 1)")
    higher_better = _higher_better(first, second, temperature)
    verdict = hard(first, second)
    if verdict.outcome is not Outcome.PREFERENCE:
        return verdict
    # From the higher one's side, so that both orders compare the same two numbers.
    drawn = uniform if first > second else 1.0 - uniform
    return verdict if drawn < higher_better else verdict.swapped()


def _higher_better(first: float, second: float, temperature: float) -> float:
    """P(the higher is better), in [0.5, 1]; NaN where a score is."""
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature}: must be a finite number above 0")
    if first == second:
        return 0.5
    return 1.0 / (1.0 + math.exp(-abs(first - second) / temperature))
