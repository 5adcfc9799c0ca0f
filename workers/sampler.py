"""Drawing tokens: exact inverse-CDF sampling with one uniform number a token."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_BLOCK = 256


class Drawn(NamedTuple):
    """Tokens [B]; their log-probabilities [B] under the plain softmax and as sampled."""

    ids_B: Tensor
    logprobs_B: Tensor
    sampling_logprobs_B: Tensor


def request_uniforms(seed: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The uniform numbers in [0, 1) that one request consumes, one a token."""
    return np.random.Generator(np.random.PCG64(seed)).random(count)


def draw(
    logits_BV: Tensor,
    uniforms_B: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    mixed_BV: Tensor | None = None,
    min_p: float = 0.0,
) -> Drawn:
    """Sample one token a row from ``softmax(logits / temperature)``, truncated.

    ``uniforms_B`` are float64 in [0, 1). Truncation is min-p, then top-k, then top-p among what is
    left, as in vLLM. ``mixed_BV`` are the logits to sample from where that is not the policy
    alone; ``logits_BV`` are its own, and give the plain log-probabilities, all the same.
    """
    logits_BV = logits_BV.float()
    plain = temperature == 1.0 and top_k is None and top_p >= 1.0 and min_p == 0.0
    if mixed_BV is None and plain:
        ids_B, logprobs_B = _inverse_cdf(logits_BV, uniforms_B)
        return Drawn(ids_B, logprobs_B, logprobs_B)
    source_BV = logits_BV if mixed_BV is None else mixed_BV.float()
    sampled_BV = truncate(source_BV / temperature, top_k, top_p, min_p)
    ids_B, sampling_logprobs_B = _inverse_cdf(sampled_BV, uniforms_B)
    return Drawn(ids_B, logprobs_of(logits_BV, ids_B), sampling_logprobs_B)


def geometric_mixture(policy_BV: Tensor, reference_BV: Tensor, share: float) -> Tensor:
    """Logits [B, V] of π^(1−share)·π_ref^share, up to a constant a row.

    Logits do for log π and log π_ref: they differ by a constant a row, which softmax ignores.
    """
    if share == 1.0:  # what the policy makes impossible, 0 · (−∞), is not a number
        return reference_BV.float()
    return (1.0 - share) * policy_BV.float() + share * reference_BV.float()


def logprobs_of(logits_BV: Tensor, ids_B: Tensor) -> Tensor:
    """Log-probability [B] of each row's token under the plain softmax."""
    logits_BV = logits_BV.float()
    picked_B = logits_BV.gather(-1, ids_B[:, None]).squeeze(-1)
    return picked_B - torch.logsumexp(logits_BV, dim=-1)


def truncate(logits_BV: Tensor, top_k: int | None, top_p: float, min_p: float = 0.0) -> Tensor:
    """Set to −∞ the logits below min_p, then outside the top k, then outside the nucleus of top_p.

    Below min_p is what is less likely than min_p times the most likely token.
    The nucleus is the smallest set of most likely tokens whose probability reaches top_p; the most
    likely token always stays.
    """
    if min_p > 0.0:
        floor = logits_BV.amax(-1, keepdim=True) + math.log(min_p)
        logits_BV = logits_BV.masked_fill(logits_BV < floor, -math.inf)
    if top_k is not None and top_k < logits_BV.shape[-1]:
        floor = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < floor, -math.inf)
    if top_p < 1.0:
        ordered, order = logits_BV.sort(dim=-1, descending=True)
        probabilities = torch.softmax(ordered, dim=-1)
        before = probabilities.cumsum(-1) - probabilities
        outside = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits_BV = logits_BV.masked_fill(outside, -math.inf)
    return logits_BV


def _inverse_cdf(logits_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which the cumulative probability passes the uniform number.

    Two levels, sums of blocks and then the one block, because a cumulative sum over the whole
    vocabulary costs more than the forward pass of a small model.
    """
    rows = torch.arange(len(logits_BV))
    highest_B = logits_BV.amax(-1)
    mass_BV = torch.exp(logits_BV - highest_B[:, None])
    padding = -mass_BV.shape[-1] % _BLOCK
    if padding:
        mass_BV = torch.nn.functional.pad(mass_BV, (0, padding))
    blocks = mass_BV.view(len(mass_BV), -1, _BLOCK)
    cumulative = blocks.sum(-1, dtype=torch.float32).double().cumsum(-1)
    total_B = cumulative[:, -1]
    target_B = uniforms_B * total_B
    block_B = torch.searchsorted(cumulative, target_B[:, None], right=True).squeeze(-1)
    block_B = block_B.clamp_max(blocks.shape[1] - 1)
    before_B = torch.where(block_B > 0, cumulative[rows, (block_B - 1).clamp_min(0)], 0.0)

    within = blocks[rows, block_B].double()
    inner = torch.searchsorted(
        within.cumsum(-1), (target_B - before_B)[:, None], right=True
    ).squeeze(-1)
    # Rounding can leave the target at the block's very end: the last token with any mass takes it.
    last = _BLOCK - 1 - (within > 0).flip(-1).int().argmax(-1)
    inner = torch.minimum(inner, last)
    ids_B = block_B * _BLOCK + inner
    logprobs_B = logits_BV[rows, ids_B] - highest_B - total_B.log().float()
    return ids_B, logprobs_B
