"""Measures of drift: pure functions of completions, each None where it is undefined.

Log-probabilities are taken at temperature 1. Where a round was sampled at another temperature, or
with top-p or top-k, the samples are not the policy's own: entropy and KL are then averages over
what was sampled, no longer unbiased estimates of the policy's, though still comparable from round
to round.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from workers.messages import Completion, DoubleArray, IntArray, PromptGroup

NGRAM = 4
COMPARED = 64
"""Completions that are compared with each other at most: 2016 pairs."""

Band: TypeAlias = tuple[float, float]
"""Lowest and highest mean reference log-probability, nats a token."""

CENTRAL_PERCENTILES = (1.0, 99.0)
"""Between these the reference's own samples are at home."""


def own_completions(groups: Sequence[PromptGroup]) -> list[Completion]:
    """The policy's own samples: opponents' are left out."""
    return [c for group in groups for c in group.completions if not c.reference_share]


def own_scores(groups: Sequence[PromptGroup]) -> DoubleArray:
    """[N] the scores of the policy's own samples, those that are INVALID left out."""
    scores = [
        score
        for group in groups
        for completion, score in zip(group.completions, group.judgement.scores, strict=True)
        if not completion.reference_share
    ]
    found = np.array(scores, np.float64)
    valid: DoubleArray = found[np.isfinite(found)]
    return valid


def kl_to_reference(completions: Sequence[Completion]) -> float | None:
    """KL(π_θ ‖ π_ref) in nats a sequence: the mean of Σ_t (logprobs − reference_logprobs).

    Unbiased for samples of the policy at temperature 1, so it may come out below zero. None
    without completions or where the reference has not scored them all.
    """
    log_ratios = _log_ratios(completions)
    return float(log_ratios.mean()) if log_ratios is not None and log_ratios.size else None


def kl_per_token(completions: Sequence[Completion]) -> float | None:
    """Nats a token: Σ (logprobs − reference_logprobs) over all tokens / number of tokens."""
    log_ratios = _log_ratios(completions)
    tokens = _token_count(completions)
    return float(log_ratios.sum()) / tokens if log_ratios is not None and tokens else None


def entropy(completions: Sequence[Completion]) -> float | None:
    """Nats a token: the mean over all tokens of −logprobs.

    For samples at temperature 1 the expectation of −logprobs given the tokens before it is the
    entropy of that next-token distribution, so this estimates, without bias at each position, the
    policy's entropy at temperature 1 where its own samples take it.
    """
    tokens = _token_count(completions)
    if not tokens:
        return None
    return -sum(float(c.logprobs.sum(dtype=np.float64)) for c in completions) / tokens


def length_mean(completions: Sequence[Completion]) -> float | None:
    """Tokens a completion, a sampled EOS among them."""
    return _token_count(completions) / len(completions) if completions else None


def length_ratio(completions: Sequence[Completion], reference_length: float | None) -> float | None:
    """Mean length / mean length of the reference's own samples."""
    length = length_mean(completions)
    return length / reference_length if length is not None and reference_length else None


def eos_rate(completions: Sequence[Completion]) -> float | None:
    """Share of completions that ended by themselves."""
    return sum(c.finished for c in completions) / len(completions) if completions else None


def repetition_rate(completions: Sequence[Completion]) -> float | None:
    """Mean over completions of 1 − distinct / total 4-grams of token ids.

    0 for a completion of fewer than five tokens: a single 4-gram repeats nothing.
    """
    if not completions:
        return None
    return sum(_repetition(c.ids.tolist()) for c in completions) / len(completions)


def distinct_ngrams(completions: Sequence[Completion]) -> float | None:
    """Distinct / all 4-grams of token ids, over all completions together.

    It falls when different prompts get the same phrases, which ``repetition_rate`` does not see.
    The more completions there are, the lower it is (phrases run out, as types do in a corpus):
    compare rounds of the same number. None where no completion has four tokens.
    """
    codes = _ngram_codes([c.ids for c in completions])
    return len(np.unique(codes)) / len(codes) if len(codes) else None


def self_similarity(groups: Sequence[PromptGroup]) -> float | None:
    """Mean Jaccard index (shared / all) of the sets of 2-grams of completions of different prompts.

    Of all pairs among the first ``COMPARED`` of the policy's own: each prompt's first completion,
    then each prompt's second, and so on, so that prompts are many. None without such a pair; a
    completion of fewer than two tokens has no 2-grams and is left out.
    """
    compared = [
        (group.prompt.ids.tolist(), _bigrams(completion))
        for completion, group in itertools.islice(_by_sample(groups), COMPARED)
    ]
    found = [
        len(one & other) / len(one | other)
        for (prompt, one), (other_prompt, other) in itertools.combinations(compared, 2)
        if prompt != other_prompt and one and other
    ]
    return sum(found) / len(found) if found else None


def central_band(completions: Sequence[Completion]) -> Band | None:
    """The central 98 % of the completions' mean reference log-probability, nats a token."""
    means = _mean_reference_logprobs(completions)
    if means is None or not means.size:
        return None
    low, high = np.percentile(means, CENTRAL_PERCENTILES)
    return float(low), float(high)


def off_reference(
    completions: Sequence[Completion], band: Band | None
) -> tuple[float, float] | None:
    """Shares of completions below the band and above it, by mean reference log-probability.

    Below is what the reference would hardly say, above what it would say but never so predictably.
    """
    means = _mean_reference_logprobs(completions)
    if band is None or means is None or not means.size:
        return None
    return float(np.mean(means < band[0])), float(np.mean(means > band[1]))


def _repetition(ids: list[int]) -> float:
    total = len(ids) - NGRAM + 1
    if total < 2:
        return 0.0
    distinct = len(set(zip(*(ids[start : start + total] for start in range(NGRAM)), strict=True)))
    return 1.0 - distinct / total


def _ngram_codes(sequences: Sequence[IntArray]) -> IntArray:
    """[N] a number for each 4-gram within a sequence, equal where the 4-grams are.

    Two ids below 2^32 make one number, two of those, by their ranks, the next: exact, and in arrays
    because an offline round has tens of millions of 4-grams.
    """
    lengths = [len(ids) for ids in sequences]
    if sum(lengths) < NGRAM:
        return np.empty(0, np.int64)
    ids = np.concatenate(sequences)
    _, bigrams = np.unique(_joined(ids[:-1], ids[1:]), return_inverse=True)
    codes = _joined(bigrams[:-2], bigrams[2:])
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    within = sequence[: 1 - NGRAM] == sequence[NGRAM - 1 :]
    kept: IntArray = codes[within]
    return kept


def _joined(high: IntArray, low: IntArray) -> IntArray:
    return (high << 32) | low


def _by_sample(groups: Sequence[PromptGroup]) -> list[tuple[Completion, PromptGroup]]:
    """The policy's own completions: each prompt's first, then each prompt's second, …"""
    ranked = [
        (rank, completion, group)
        for group in groups
        for rank, completion in enumerate(own_completions([group]))
    ]
    return [(completion, group) for _, completion, group in sorted(ranked, key=lambda r: r[0])]


def _bigrams(completion: Completion) -> set[tuple[int, int]]:
    return set(itertools.pairwise(completion.ids.tolist()))


def _token_count(completions: Sequence[Completion]) -> int:
    return sum(len(c.ids) for c in completions)


def _log_ratios(completions: Sequence[Completion]) -> DoubleArray | None:
    """[N] Σ_t (logprobs − reference_logprobs) of each completion."""
    sums = []
    for c in completions:
        if c.reference_logprobs is None:
            return None
        sums.append(np.subtract(c.logprobs, c.reference_logprobs, dtype=np.float64).sum())
    return np.array(sums, dtype=np.float64)


def _mean_reference_logprobs(completions: Sequence[Completion]) -> DoubleArray | None:
    """[N] mean per-token reference log-probability; a completion of no tokens has none."""
    means = []
    for c in completions:
        if c.reference_logprobs is None:
            return None
        if c.reference_logprobs.size:
            means.append(c.reference_logprobs.mean(dtype=np.float64))
    return np.array(means, dtype=np.float64)
