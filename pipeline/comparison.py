"""A comparison: one judge on held-out prompts, the policy against the model it started from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from scipy.stats import bootstrap

from workers.messages import DoubleArray
from workers.seeds import derive_seed

Interval: TypeAlias = tuple[float, float]

CONFIDENCE = 0.95
RESAMPLES = 9999
RESAMPLES_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Comparison:
    """Counts of prompts and means over those with a valid verdict, with 95 % intervals.

    ``win_rate`` splits ties: (win + tie / 2) / (win + tie + loss). ``quality`` and
    ``quality_baseline`` are mean scores of the policy and of the starting model, in the judge's own
    units. Every mean and interval is None where no prompt had a valid verdict. Intervals are
    percentile bootstraps over prompts, a prompt's two scores always drawn together.
    """

    win: int
    tie: int
    loss: int
    invalid: int
    win_rate: float | None
    win_rate_ci: Interval | None
    quality: float | None
    quality_ci: Interval | None
    quality_baseline: float | None
    quality_baseline_ci: Interval | None


def compare_scores(scores: Sequence[float], baseline: Sequence[float], seed: int) -> Comparison:
    """Compare two models by a scoring judge, one score each for every held-out prompt.

    A prompt with a score that is not finite (NaN: INVALID) on either side is left out and counted
    as invalid. Equal scores tie. ``seed`` is the run's.
    """
    if len(scores) != len(baseline):
        raise ValueError(f"{len(scores)} scores against {len(baseline)}: one a prompt on each side")
    both = np.array([scores, baseline], dtype=np.float64)
    valid = both[:, np.isfinite(both).all(axis=0)]
    return _comparison(
        np.sign(valid[0] - valid[1]), valid[0], valid[1], both.shape[1] - valid.shape[1], seed
    )


def compare_probabilities(probabilities: Sequence[float], seed: int) -> Comparison:
    """Compare two models by a comparing judge: P(policy's completion is better) for every prompt.

    Above 0.5 is a win, 0.5 a tie, below a loss, NaN invalid. The win rate counts these outcomes
    and is not the mean probability; that mean is ``quality``, and ``quality_baseline`` its
    complement: the scores a comparing judge gives the two.
    """
    first_better = np.array(probabilities, dtype=np.float64)
    valid = first_better[np.isfinite(first_better)]
    invalid = first_better.size - valid.size
    return _comparison(np.sign(valid - 0.5), valid, 1.0 - valid, invalid, seed)


def _comparison(
    outcomes: DoubleArray, quality: DoubleArray, baseline: DoubleArray, invalid: int, seed: int
) -> Comparison:
    """``outcomes`` [N] are 1 win, 0 tie, −1 loss; ``quality`` and ``baseline`` [N]."""
    points = (outcomes + 1.0) / 2.0
    return Comparison(
        win=int((outcomes > 0).sum()),
        tie=int((outcomes == 0).sum()),
        loss=int((outcomes < 0).sum()),
        invalid=invalid,
        win_rate=_mean(points),
        win_rate_ci=mean_interval(points, seed),
        quality=_mean(quality),
        quality_ci=mean_interval(quality, seed),
        quality_baseline=_mean(baseline),
        quality_baseline_ci=mean_interval(baseline, seed),
    )


def _mean(values: DoubleArray) -> float | None:
    return float(values.mean()) if values.size else None


def mean_interval(values: DoubleArray, seed: int) -> Interval | None:
    """95 % percentile bootstrap interval of the mean of ``values`` [N]; None for N = 0.

    The same seed draws the same prompts whatever is averaged. Where all values are equal (N = 1
    among them) no resample differs: the interval is that value twice, and says nothing about how
    many prompts stand behind it.
    """
    if not values.size:
        return None
    if np.all(values == values[0]):
        return float(values[0]), float(values[0])
    interval = bootstrap(
        (values,),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        batch=RESAMPLES_AT_ONCE,
        method="percentile",
        rng=np.random.default_rng(derive_seed(seed, "comparison")),
    ).confidence_interval
    return float(interval.low), float(interval.high)
