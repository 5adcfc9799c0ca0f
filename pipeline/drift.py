"""Drift: how far the policy has left its reference and its data.

Every measure comes from log-probabilities the round already carries, so watching costs nothing.
They are taken at temperature 1. Where a round was sampled at another temperature, or with top-p or
top-k, the samples are not the policy's own: entropy and KL are then averages over what was sampled,
no longer unbiased estimates of the policy's, though still comparable from round to round.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from workers.messages import Completion, DoubleArray, Fate, PromptGroup, Round

CENTRAL_PERCENTILES = (1.0, 99.0)
"""Between these the reference's own samples are at home."""

DROPPED = tuple(fate for fate in Fate if fate is not Fate.LEARN)
NGRAM = 4


class Drift:
    """Measures rounds, and remembers where the reference's own samples lie.

    The band is the central 98 % of mean per-token reference log-probability (nats a token) over
    the completions of a round whose policy is the reference: the first one of each reference.
    """

    def __init__(self, averaged: bool = False) -> None:
        """``averaged``: past version 0 the reference is a mean of policies, none of which it is."""
        self._averaged = averaged
        self._band: tuple[float, float] | None = None
        self._reference_version: int | None = None

    def of(self, round_: Round) -> dict[str, Any]:
        """The measures of a round: float, int, None where undefined; ``dropped`` is by reason.

        Measures of completions are of the policy's own: an opponent's are left out. ``pairs`` and
        ``dropped`` count labels where completions are labelled without a partner.
        ``off_reference_share`` is the share of completions outside the band, on either side: what
        the reference would hardly say, and what it would say but never so predictably. None where
        the round has no reference log-probabilities or its reference never sampled a round.
        """
        completions = [c for c in round_.completions if not c.reference_share]
        is_reference = round_.version == round_.reference_version
        if self._averaged and round_.version > 0:
            is_reference = False
        if is_reference and round_.reference_version != self._reference_version:
            self._band = _central_band(completions)
            self._reference_version = round_.reference_version
        scores = np.array([score for group in round_.groups for score in _own_scores(group)])
        valid_scores = scores[np.isfinite(scores)]
        fates = Counter([pair.fate for pair in round_.pairs] + [x.fate for x in round_.labels])
        return {
            "reference_version": round_.reference_version,
            "prompts": len(round_.groups),
            "completions": len(round_.completions),
            "pairs": fates[Fate.LEARN],
            "dropped": {fate.value: fates[fate] for fate in DROPPED},
            "score_mean": float(valid_scores.mean()) if valid_scores.size else None,
            "score_std": float(valid_scores.std()) if valid_scores.size else None,
            "kl_to_reference": kl_to_reference(completions),
            "kl_per_token": kl_per_token(completions),
            "entropy": entropy(completions),
            "length_mean": length_mean(completions),
            "eos_rate": eos_rate(completions),
            "off_reference_share": self._off_reference_share(round_, completions),
            "repetition_rate": repetition_rate(completions),
            "judging": dict(round_.judging),
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {
            "band": None if self._band is None else list(self._band),
            "reference_version": self._reference_version,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state`` gave."""
        band = state["band"]
        self._band = None if band is None else (float(band[0]), float(band[1]))
        self._reference_version = state["reference_version"]

    def _off_reference_share(
        self, round_: Round, completions: Sequence[Completion]
    ) -> float | None:
        means = _mean_reference_logprobs(completions)
        of_this_reference = round_.reference_version == self._reference_version
        if self._band is None or not of_this_reference or means is None or not means.size:
            return None
        low, high = self._band
        return float(np.mean((means < low) | (means > high)))


def _own_scores(group: PromptGroup) -> list[float]:
    """The scores of the policy's own completions."""
    scores = group.judgement.scores.tolist()
    both = zip(group.completions, scores, strict=True)
    return [score for completion, score in both if not completion.reference_share]


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


def _repetition(ids: list[int]) -> float:
    total = len(ids) - NGRAM + 1
    if total < 2:
        return 0.0
    distinct = len(set(zip(*(ids[start : start + total] for start in range(NGRAM)), strict=True)))
    return 1.0 - distinct / total


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


def _central_band(completions: Sequence[Completion]) -> tuple[float, float] | None:
    means = _mean_reference_logprobs(completions)
    if means is None or not means.size:
        return None
    low, high = np.percentile(means, CENTRAL_PERCENTILES)
    return float(low), float(high)
