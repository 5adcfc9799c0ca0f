"""A sample of share μ is drawn from π^(1−μ)·π_ref^μ; it says what π and the mixture gave it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests import tiny
from tests.learner_helpers import (
    EOS,
    make_generator,
    plain_logits,
    plain_logprobs,
    plain_model,
    prompts_of,
    sample_request,
)
from workers.generator import SamplingOptions
from workers.messages import Completion, Prompt
from workers.options import PolicyOptions
from workers.seeds import derive_seed
from workers.transformers_generator import TransformersGenerator
from workers.weight_sync.buckets import pack
from workers.weight_sync.transport import ObjectStore, push_of

PROMPTS = prompts_of([1, 5, 8], [1, 9, 3, 20, 5, 6, 11], [1], [1, 8, 8], [1, 23, 4, 5, 17])
RESHAPED = {"temperature": 0.7, "top_k": 4, "top_p": 0.9}
MIN_P = {"temperature": 0.7, "min_p": 0.3, "top_p": 0.9}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its logits are of order 1, so float32 keeps log-probabilities to 1e-5 whatever the batch."""
    return tiny.save_model(tmp_path_factory.mktemp("mild"), spread=0.25)


def moved_model(model: Path):
    """The model after a long way of learning: π, where the model as it stands is π_ref."""
    policy = plain_model(model)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weights in policy.parameters():
            weights += 0.3 * weights.std() * torch.randn(weights.shape, generator=noise)
    return policy


def mixing_generator(model: Path, **sampling) -> TransformersGenerator:
    """A generator of the moved model that holds the starting one as its reference."""
    options = PolicyOptions(model=str(model)), SamplingOptions(**sampling)
    generator = TransformersGenerator(*options, reference=True)
    generator.load(push_of(1, pack(dict(moved_model(model).named_parameters())), ObjectStore()))
    return generator


def sample(
    generator: TransformersGenerator, prompts: Sequence[Prompt], shares: Sequence[float]
) -> tuple[tuple[Completion, ...], ...]:
    request = sample_request(prompts, len(shares))
    return generator.sample(replace(request, reference_shares=tuple(shares))).completions


def flat(groups: Sequence[Sequence[Completion]]) -> list[Completion]:
    return [completion for group in groups for completion in group]


def mixture_logprobs(policy, reference, prompt_ids, ids, share: float, **sampling) -> Tensor:
    """Log-probabilities [T] as drawn, by its definition: full passes, transformers' warpers."""
    pi, pi_ref = (plain_logits(m, prompt_ids, ids).log_softmax(-1) for m in (policy, reference))
    scores = (1 - share) * pi + share * pi_ref
    scores = TemperatureLogitsWarper(sampling.get("temperature", 1.0))(None, scores)
    if "min_p" in sampling:
        scores = MinPLogitsWarper(sampling["min_p"])(None, scores)
    if "top_k" in sampling:
        scores = TopKLogitsWarper(sampling["top_k"])(None, scores)
    if "top_p" in sampling:
        scores = TopPLogitsWarper(sampling["top_p"])(None, scores)
    return scores.log_softmax(-1)[torch.arange(len(ids)), torch.as_tensor(ids)]


def assert_same(found: Sequence[Completion], expected: Sequence[Completion], gap: float = 0.0):
    """Equal token for token and seed for seed; both log-probabilities within ``gap``."""
    for one, other in zip(found, expected, strict=True):
        assert (one.position, one.sample, one.seed) == (other.position, other.sample, other.seed)
        assert one.ids.tolist() == other.ids.tolist()
        assert one.reference_share == other.reference_share
        assert (one.sampling_logprobs is None) == (other.sampling_logprobs is None)
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=gap)
        np.testing.assert_allclose(
            one.behaviour_logprobs, other.behaviour_logprobs, rtol=0, atol=gap
        )


def pvalue(counts: Counter, probabilities: dict[tuple[int, ...], float]) -> float:
    """χ² of counts against probabilities, the cells expected less than 5 times as one."""
    total = sum(counts.values())
    often = [ids for ids, p in probabilities.items() if total * p >= 5]
    observed = [counts[ids] for ids in often]
    expected = [total * probabilities[ids] for ids in often]
    if total - sum(expected) > 1e-2:
        observed.append(total - sum(observed))
        expected.append(total - sum(expected))
    return float(stats.chisquare(observed, expected, sum_check=False).pvalue)


@pytest.mark.parametrize("sampling", [{}, RESHAPED, MIN_P], ids=["plain", "reshaped", "min_p"])
def test_frequencies_follow_the_mixture(tmp_path: Path, sampling):
    """All completions of at most two tokens, against their exact probabilities."""
    model = tiny.save_model(tmp_path, words=tiny.WORDS[:5], spread=0.25)
    policy, reference = moved_model(model), plain_model(model)
    completions = [(EOS,), *((a, b) for a in range(5) if a != EOS for b in range(5))]
    shares = [0.0, 0.3, 0.7, 1.0]
    generator = mixing_generator(model, max_new_tokens=2, **sampling)
    for number, ids in enumerate(([1], [1, 3, 4, 4])):
        groups = sample(generator, prompts_of(*[ids] * 4000, first=4000 * number), shares)
        counts = [Counter(tuple(g[i].ids.tolist()) for g in groups) for i in range(len(shares))]
        expected = []
        with torch.no_grad():
            for share in shares:
                logps = [
                    mixture_logprobs(policy, reference, ids, y, share, **sampling).double().sum()
                    for y in completions
                ]
                mass = torch.stack(logps).exp().tolist()
                expected.append(dict(zip(completions, mass, strict=True)))
        for i, drawn in enumerate(counts):
            assert sum(expected[i].values()) == pytest.approx(1.0, abs=1e-5)
            assert all(expected[i][y] > 0 for y in drawn)
            for j, probabilities in enumerate(expected):
                if i == j:
                    assert pvalue(drawn, probabilities) > 0.01
                else:  # the test can tell the shares apart
                    assert pvalue(drawn, probabilities) < 1e-4


@pytest.mark.parametrize("sampling", [{}, RESHAPED, MIN_P], ids=["plain", "reshaped", "min_p"])
def test_logprobs_are_the_policys_and_sampling_logprobs_the_mixtures(model: Path, sampling):
    policy, reference = moved_model(model), plain_model(model)
    shares = [0.25, 0.0, 0.8, 1.0, 0.25]
    groups = sample(mixing_generator(model, max_new_tokens=12, **sampling), PROMPTS, shares)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for c, share in zip(group, shares, strict=True):
            with torch.no_grad():
                plain = plain_logprobs(policy, prompt.ids, c.ids)
                drawn = mixture_logprobs(policy, reference, prompt.ids, c.ids, share, **sampling)
            np.testing.assert_allclose(c.logprobs, plain, rtol=0, atol=1e-5)
            np.testing.assert_allclose(c.behaviour_logprobs, drawn, rtol=0, atol=1e-5)
            assert (c.sampling_logprobs is None) == (share == 0.0 and not sampling)
            assert (c.reference_share, c.version) == (share, 1)
            assert c.finished == (c.ids[-1] == EOS)
    assert {len(c.ids) for group in groups for c in group} > {12}


@pytest.mark.parametrize("sampling", [{}, RESHAPED], ids=["plain", "reshaped"])
def test_share_one_draws_what_the_starting_model_draws(model: Path, sampling):
    found = sample(mixing_generator(model, max_new_tokens=12, **sampling), PROMPTS, [1.0, 1.0])
    starting = make_generator(model, max_new_tokens=12, **sampling)
    expected = starting.sample(sample_request(PROMPTS)).completions
    for one, other in zip(flat(found), flat(expected), strict=True):
        assert (one.ids.tolist(), one.seed) == (other.ids.tolist(), other.seed)
        np.testing.assert_array_equal(one.sampling_logprobs, other.behaviour_logprobs)
        assert np.abs(one.logprobs - other.logprobs).max() > 1e-3


def test_policy_samples_are_the_same_beside_mixture_samples(model: Path):
    generator = mixing_generator(model, max_new_tokens=12)
    plain = generator.sample(sample_request(PROMPTS, 3)).completions
    assert_same(flat(sample(generator, PROMPTS, [0.0] * 3)), flat(plain))
    for alone, group in zip(plain, sample(generator, PROMPTS, [0.0, 0.5, 0.0]), strict=True):
        assert_same(group[::2], alone[::2], gap=1e-5)


def test_a_mixture_sample_is_the_same_whatever_stands_beside_it(model: Path):
    generator = mixing_generator(model, max_new_tokens=12)
    first = sample(generator, PROMPTS, [0.0, 0.5])
    for shares in ([0.5, 0.5, 0.5], [1.0, 0.5, 0.2]):
        for one, other in zip(sample(generator, PROMPTS, shares), first, strict=True):
            assert_same(one[1:2], other[1:], gap=1e-5)
    (alone,) = sample(generator, PROMPTS[3:4], [0.0, 0.5])
    assert_same(alone, first[3], gap=1e-5)


def test_completions_come_in_sample_order_with_their_own_seeds(model: Path):
    shares = [0.5, 0.0, 1.0, 0.5]
    groups = sample(mixing_generator(model, max_new_tokens=4), PROMPTS, shares)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert [(c.position, c.sample, c.reference_share, c.seed) for c in group] == [
            (prompt.position, i, share, derive_seed(0, "sampling", prompt.position, i))
            for i, share in enumerate(shares)
        ]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([0.0, 1.5], r"reference_shares\[1\]=1.5: must be from 0 \(policy\) to 1 \(reference\)"),
        ([-0.1, 0.5], r"reference_shares\[0\]=-0.1: must be from 0"),
        ([0.0, float("nan")], r"reference_shares\[1\]=nan: must be from 0"),
    ],
)
def test_a_share_is_between_0_and_1(model: Path, shares, message: str):
    with pytest.raises(ValueError, match=message):
        sample(mixing_generator(model), PROMPTS, shares)


def test_every_sample_has_a_share(model: Path):
    request = replace(sample_request(PROMPTS, 3), reference_shares=(0.0, 0.5))
    with pytest.raises(ValueError, match=r"2 for samples=3; give one for each sample"):
        mixing_generator(model).sample(request)


def test_a_share_needs_a_reference(model: Path):
    generator = make_generator(model, max_new_tokens=2)
    assert sample(generator, PROMPTS, [0.0, 0.0])
    with pytest.raises(ValueError, match=r"reference_shares\[1\]=0.5.* build it with reference=Tr"):
        sample(generator, PROMPTS, [0.0, 0.5])
