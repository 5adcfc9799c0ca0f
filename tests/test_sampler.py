"""Tokens are drawn from exactly the distribution that the options name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from workers.sampler import (
    Drawn,
    draw,
    geometric_mixture,
    logprobs_of,
    request_uniforms,
    truncate,
)

LARGEST_UNIFORM = 1.0 - 1e-16
"""The largest number below 1 that a float64 holds."""


def random_logits(rows: int, vocabulary: int, *, spread: float = 2.0, seed: int = 0) -> Tensor:
    return spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def softmax(logits: Tensor) -> np.ndarray:
    exact = logits.double().numpy()
    mass = np.exp(exact - exact.max(-1, keepdims=True))
    return mass / mass.sum(-1, keepdims=True)


def draw_each(logits: Tensor, uniforms: np.ndarray, **options) -> Drawn:
    """One token of the same distribution for each uniform number."""
    return draw(logits.expand(len(uniforms), -1), torch.from_numpy(uniforms), **options)


def shares(probabilities: list[float], steps: int, **options) -> list[float]:
    """The share of each token over ``steps`` equally spaced uniforms: its probability, exactly
    where that is a multiple of 1/steps."""
    uniforms = (np.arange(steps) + 0.5) / steps
    drawn = draw_each(torch.tensor([probabilities]).log(), uniforms, **options)
    return (np.bincount(drawn.ids_B, minlength=len(probabilities)) / steps).tolist()


def test_frequencies_follow_the_softmax():
    logits = random_logits(1, 600)
    counts = np.zeros(600)
    for seed in range(5):
        drawn = draw_each(logits, request_uniforms(seed, 10_000))
        counts += np.bincount(drawn.ids_B, minlength=600)
    expected = 50_000 * softmax(logits)[0]
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    assert stats.chisquare(observed, expected, sum_check=False).pvalue > 0.01


@pytest.mark.parametrize("vocabulary", [1, 5, 255, 256, 257, 600, 3000])
def test_token_is_the_inverse_cdf(vocabulary: int):
    logits = random_logits(500, vocabulary)
    uniforms = request_uniforms(7, 500)
    ids = draw(logits, torch.from_numpy(uniforms)).ids_B.numpy()
    above = np.cumsum(softmax(logits), -1)
    expected = np.minimum((above <= uniforms[:, None]).sum(-1), vocabulary - 1)
    at_an_edge = np.abs(above - uniforms[:, None]).min(-1) < 1e-6
    assert np.array_equal(ids[~at_an_edge], expected[~at_an_edge])
    assert np.abs(ids - expected).max() <= 1
    assert at_an_edge.mean() < 0.02


@pytest.mark.parametrize("vocabulary", [4, 256, 700])
def test_extreme_uniforms_draw_the_first_and_the_last_token(vocabulary: int):
    uniforms = np.array([0.0, LARGEST_UNIFORM])
    assert draw_each(torch.zeros(1, vocabulary), uniforms).ids_B.tolist() == [0, vocabulary - 1]


def test_rounding_at_the_end_of_a_block_draws_its_last_possible_token():
    """A block's float32 sum may exceed the sum of its tokens; what lies between is the last's."""
    logits = random_logits(200, 600, spread=1.0)
    logits[:, 200:] = -math.inf
    uniforms = torch.full((200,), LARGEST_UNIFORM, dtype=torch.float64)
    assert draw(logits, uniforms).ids_B.tolist() == [199] * 200


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_impossible_tokens_are_never_drawn(data: st.DataObject):
    vocabulary = data.draw(st.sampled_from([1, 2, 5, 255, 256, 257, 511, 512, 600]))
    possible = data.draw(st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=6))
    level = data.draw(st.sampled_from([0.0, 3.0, 60.0, 200.0]))
    logits = torch.full((1, vocabulary), -math.inf)
    logits[0, possible] = level * torch.linspace(-1, 1, len(possible))
    edges = st.sampled_from([0.0, 5e-324, 1e-17, 0.5, 1 - 1e-15, LARGEST_UNIFORM])
    uniforms = np.array(
        data.draw(st.lists(edges | st.floats(0, LARGEST_UNIFORM), min_size=1, max_size=8))
    )
    for options in ({}, {"temperature": 0.7}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.3}):
        drawn = draw_each(logits, uniforms, **options)
        assert set(drawn.ids_B.tolist()) <= set(possible)
        assert bool(torch.isfinite(drawn.sampling_logprobs_B).all())


@pytest.mark.parametrize(
    ("probabilities", "options", "steps", "expected"),
    [
        ([1 / 2, 1 / 4, 1 / 8, 1 / 8], {}, 8, [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        # Temperature 1/2 squares the odds, 2 takes their root.
        (
            [1 / 2, 1 / 4, 1 / 8, 1 / 8],
            {"temperature": 0.5},
            22,
            [8 / 11, 2 / 11, 0.5 / 11, 0.5 / 11],
        ),
        ([16 / 25, 4 / 25, 4 / 25, 1 / 25], {"temperature": 2.0}, 9, [4 / 9, 2 / 9, 2 / 9, 1 / 9]),
        ([0.1, 0.4, 0.3, 0.2], {"top_k": 1}, 7, [0, 1, 0, 0]),
        ([0.1, 0.4, 0.3, 0.2], {"top_k": 2}, 7, [0, 4 / 7, 3 / 7, 0]),
        ([0.1, 0.4, 0.3, 0.2], {"top_k": 9}, 10, [0.1, 0.4, 0.3, 0.2]),
        # The second and third are equally likely: both stay.
        ([1 / 8, 1 / 4, 1 / 8, 1 / 2], {"top_k": 3}, 8, [1 / 8, 1 / 4, 1 / 8, 1 / 2]),
        ([0.1, 0.4, 0.3, 0.2], {"top_p": 0.01}, 7, [0, 1, 0, 0]),
        ([0.1, 0.4, 0.3, 0.2], {"top_p": 0.65}, 7, [0, 4 / 7, 3 / 7, 0]),
        ([0.1, 0.4, 0.3, 0.2], {"top_p": 0.75}, 9, [0, 4 / 9, 3 / 9, 2 / 9]),
        # The first two reach three quarters exactly: no third.
        ([1 / 8, 1 / 2, 1 / 8, 1 / 4], {"top_p": 0.75}, 6, [0, 2 / 3, 0, 1 / 3]),
        # Top-k comes first: of 4/9, 3/9, 2/9 two reach 0.75, of 0.4, 0.3, 0.2, 0.1 three would.
        ([0.1, 0.4, 0.3, 0.2], {"top_k": 3, "top_p": 0.75}, 7, [0, 4 / 7, 3 / 7, 0]),
        # Temperature comes before top-p: of 16/30, 9/30, 4/30, 1/30 two reach 0.8.
        ([0.1, 0.4, 0.3, 0.2], {"temperature": 0.5, "top_p": 0.8}, 25, [0, 16 / 25, 9 / 25, 0]),
        # 0.24 is asked for.
        ([0.1, 0.4, 0.3, 0.2], {"min_p": 0.6}, 7, [0, 4 / 7, 3 / 7, 0]),
        ([0.1, 0.4, 0.3, 0.2], {"min_p": 0.999}, 7, [0, 1, 0, 0]),
        ([0.1, 0.4, 0.3, 0.2], {"min_p": 1e-300}, 10, [0.1, 0.4, 0.3, 0.2]),
        # A quarter is no less than half of one half.
        ([1 / 8, 1 / 2, 1 / 8, 1 / 4], {"min_p": 0.5}, 6, [0, 2 / 3, 0, 1 / 3]),
        # Temperature comes before min-p: of 16, 9, 4, 1 two reach 0.3 · 16, as odds all but one do.
        ([0.1, 0.4, 0.3, 0.2], {"temperature": 0.5, "min_p": 0.3}, 25, [0, 16 / 25, 9 / 25, 0]),
        # Min-p comes before top-p: of 4/7, 3/7 the first reaches 0.5, of 0.4, 0.3, … two would.
        ([0.1, 0.4, 0.3, 0.2], {"min_p": 0.6, "top_p": 0.5}, 7, [0, 1, 0, 0]),
        # So does top-k, among what min-p left: of 4/7, 3/7 again, not of 4/9, 3/9, 2/9.
        ([0.1, 0.4, 0.3, 0.2], {"min_p": 0.3, "top_k": 2, "top_p": 0.5}, 7, [0, 1, 0, 0]),
    ],
)
def test_shapes_by_hand(probabilities, options, steps, expected):
    assert shares(probabilities, steps, **options) == pytest.approx(expected, abs=1e-12)


def test_top_p_keeps_as_many_of_equally_likely_tokens_as_it_needs():
    kept = torch.isfinite(truncate(torch.tensor([[0.25, 0.5, 0.125, 0.125]]).log(), None, 0.8))
    assert kept[0, :2].all()
    assert kept[0, 2:].sum() == 1


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.65}, {"temperature": 0.5}])
def test_logprobs_are_plain_and_sampling_logprobs_as_drawn(options):
    plain = np.array([0.1, 0.4, 0.3, 0.2])
    reshaped = plain**2 / 0.3 if "temperature" in options else plain * [0, 10 / 7, 10 / 7, 0]
    drawn = draw_each(torch.tensor(plain)[None].log(), request_uniforms(0, 200), **options)
    ids = drawn.ids_B.numpy()
    assert set(ids) == set(np.flatnonzero(reshaped))
    np.testing.assert_allclose(drawn.logprobs_B, np.log(plain[ids]), atol=1e-6)
    np.testing.assert_allclose(drawn.sampling_logprobs_B, np.log(reshaped[ids]), atol=1e-6)


def test_without_shaping_both_logprobs_are_the_plain_softmax():
    logits = random_logits(300, 600)
    drawn = draw(logits, torch.from_numpy(request_uniforms(1, 300)))
    expected = np.log(softmax(logits)[np.arange(300), drawn.ids_B])
    np.testing.assert_allclose(drawn.logprobs_B, expected, atol=2e-6)
    np.testing.assert_allclose(drawn.sampling_logprobs_B, expected, atol=2e-6)
    np.testing.assert_allclose(logprobs_of(logits, drawn.ids_B), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("share", "temperature", "expected"),
    [
        # √(4·4) : √(4·1) : √(1·4), and their squares.
        (0.5, 1.0, [1 / 2, 1 / 4, 1 / 4]),
        (0.5, 0.5, [2 / 3, 1 / 6, 1 / 6]),
        (0.0, 1.0, [4 / 9, 4 / 9, 1 / 9]),
        (1.0, 1.0, [4 / 9, 1 / 9, 4 / 9]),
    ],
)
def test_mixture_by_hand(share: float, temperature: float, expected):
    policy, reference = np.array([4, 4, 1]) / 9, np.array([4, 1, 4]) / 9
    # Logits are log-probabilities up to a constant.
    logits, others = torch.tensor(policy)[None].log() + 3, torch.tensor(reference)[None].log() - 8
    mixed = geometric_mixture(logits, others, share)
    drawn = draw_each(
        logits, request_uniforms(0, 200), temperature=temperature, mixed_BV=mixed.expand(200, -1)
    )
    assert set(drawn.ids_B.tolist()) == {0, 1, 2}
    np.testing.assert_allclose(drawn.logprobs_B, np.log(policy)[drawn.ids_B], atol=1e-6)
    np.testing.assert_allclose(drawn.sampling_logprobs_B, np.log(expected)[drawn.ids_B], atol=1e-6)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.5, [1, 0, 0]), (1.0, [1 / 2, 0, 1 / 2])], ids=["half", "one"]
)
def test_a_mixture_with_impossible_tokens(share: float, expected):
    policy, reference = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.5, 0.0, 0.5]])
    mixed = geometric_mixture(policy.log(), reference.log(), share)
    assert softmax(mixed)[0].tolist() == expected


@pytest.mark.parametrize("min_p", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("top_k", [None, 1, 7, 300, 1000])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 1.0])
def test_truncation_is_that_of_transformers(top_k: int | None, top_p: float, min_p: float):
    logits = random_logits(64, 500)
    expected = logits
    if min_p > 0.0:
        expected = MinPLogitsWarper(min_p)(None, expected)
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1.0:
        expected = TopPLogitsWarper(top_p)(None, expected)
    assert torch.equal(truncate(logits, top_k, top_p, min_p), expected)


def test_sampling_logprobs_are_those_of_transformers():
    logits = random_logits(200, 600)
    drawn = draw(logits, torch.from_numpy(request_uniforms(2, 200)), 0.8, 50, 0.9, min_p=0.1)
    warped = logits
    for warper in (
        TemperatureLogitsWarper(0.8),
        MinPLogitsWarper(0.1),
        TopKLogitsWarper(50),
        TopPLogitsWarper(0.9),
    ):
        warped = warper(None, warped)
    expected = warped.log_softmax(-1)[torch.arange(200), drawn.ids_B]
    torch.testing.assert_close(drawn.sampling_logprobs_B, expected, atol=2e-6, rtol=0)


def test_a_request_consumes_the_same_uniforms_however_many_it_is_given():
    assert np.array_equal(request_uniforms(5, 64)[:8], request_uniforms(5, 8))
    assert not np.array_equal(request_uniforms(5, 8), request_uniforms(6, 8))
    assert stats.kstest(request_uniforms(5, 5000), "uniform").pvalue > 0.01
