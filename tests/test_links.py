"""From two scores to a verdict: symmetric in the order, overflow-safe, and as likely as it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from judges.interface import Outcome, Verdict
from judges.links import bradley_terry, hard, sampled

NAN, INF = float("nan"), float("inf")
TIE = Verdict(Outcome.TIE, 0.5)
FIRST, SECOND = Verdict(Outcome.PREFERENCE, 1.0), Verdict(Outcome.PREFERENCE, 0.0)

scores = st.floats(allow_nan=False, allow_infinity=False)
draws = st.integers(0, 2**53 - 1).map(lambda n: n / 2**53)
"""What numpy draws from [0, 1)."""


def test_hard():
    assert hard(2.0, 1.0) == FIRST
    assert hard(1.0, 2.0) == SECOND
    assert hard(1.0, 1.0) == TIE
    assert hard(NAN, 1.0).outcome is hard(1.0, NAN).outcome is Outcome.INVALID


@pytest.mark.parametrize(
    ("first", "second", "temperature", "probability"),
    [
        (1.0, 0.0, 1.0, 0.731058578630005),  # σ(1)
        (0.0, 1.0, 1.0, 0.268941421369995),
        (3.0, 1.0, 2.0, 0.731058578630005),
        (0.0, math.log(3.0), 1.0, 0.25),
        (-5.0, -5.5, 0.25, 0.880797077977882),  # σ(2)
        (1e3, -1e3, 1.0, 1 - 1e-6),
        (-1e3, 1e3, 1.0, 1e-6),
        (1.7e308, -1.7e308, 1e-300, 1 - 1e-6),
        (INF, -INF, 1.0, 1 - 1e-6),
    ],
)
def test_bradley_terry(first, second, temperature, probability):
    verdict = bradley_terry(first, second, temperature)
    assert verdict.outcome is Outcome.PREFERENCE
    assert verdict.first_better == pytest.approx(probability, abs=1e-15, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 50.0])
def test_equal_scores_tie_and_nan_is_invalid(temperature):
    for score in (0.0, -3.5, 1e308, INF):
        assert bradley_terry(score, score, temperature) == TIE
        assert sampled(score, score, temperature, 0.9) == TIE
    for first, second in ((NAN, 1.0), (1.0, NAN), (NAN, NAN)):
        assert bradley_terry(first, second, temperature).outcome is Outcome.INVALID
        assert sampled(first, second, temperature, 0.1).outcome is Outcome.INVALID


@given(scores, scores, st.floats(1e-3, 1e3))
def test_bradley_terry_swapped(first, second, temperature):
    there = bradley_terry(first, second, temperature)
    back = bradley_terry(second, first, temperature).swapped()
    assert there.outcome is back.outcome
    assert there.first_better == pytest.approx(back.first_better, abs=1e-15)
    assert (there.first_better > 0.5) <= (first > second)


@given(scores, scores, st.floats(1e-3, 1e3), draws)
def test_sampled_swapped(first, second, temperature, uniform):
    there = sampled(first, second, temperature, uniform)
    assert there == sampled(second, first, temperature, 1.0 - uniform).swapped()
    assert there in (TIE, FIRST, SECOND)


@given(st.floats(-5, 5), st.floats(0.5, 5), draws)
def test_where_a_draw_turns(difference, temperature, uniform):
    probability = 1.0 / (1.0 + math.exp(-difference / temperature))
    if abs(uniform - probability) > 1e-9 and difference:
        assert sampled(difference, 0.0, temperature, uniform) == (
            FIRST if uniform < probability else SECOND
        )


@pytest.mark.parametrize(("first", "second", "temperature"), [(1.0, 0.2, 0.5), (-2.0, 1.0, 2.0)])
def test_draws_are_as_frequent_as_the_soft_label_says(first, second, temperature):
    probability = bradley_terry(first, second, temperature).first_better
    uniforms = np.random.default_rng(7).random(20_000)
    won = sum(sampled(first, second, temperature, u) == FIRST for u in uniforms)
    expected = np.array([probability, 1 - probability]) * len(uniforms)
    assert chisquare([won, len(uniforms) - won], expected).pvalue > 0.01


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN, INF])
def test_a_temperature_is_finite_and_above_zero(temperature):
    with pytest.raises(ValueError, match="temperature"):
        bradley_terry(1.0, 0.0, temperature)
    with pytest.raises(ValueError, match="temperature"):
        sampled(1.0, 0.0, temperature, 0.5)


@pytest.mark.parametrize("uniform", [-0.1, 1.1, NAN])
def test_a_draw_lies_in_the_unit_interval(uniform):
    with pytest.raises(ValueError, match="uniform"):
        sampled(1.0, 0.0, 1.0, uniform)
