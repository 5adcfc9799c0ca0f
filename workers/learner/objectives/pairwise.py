"""Losses of a pair whose label is certain, one function a method.

w, l and d = w − l are the log-ratios of chosen, of rejected, and their margin; sp is softplus, σ
the logistic function. Each returns [B] losses, and none overflows for log-ratios of ±700 nats in
float32 unless its own value does.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from workers.learner.objectives.records import PairLogps, required


def dpo_loss(logps: PairLogps, beta: float) -> Tensor:
    """Direct preference optimisation: ``sp(−βd)``. Eq. 7, arXiv:2305.18290."""
    return -logsigmoid(beta * logps.margin)


def robust_dpo_loss(logps: PairLogps, beta: float, flip_probability: float) -> Tensor:
    """``[(1−ε)·sp(−βd) − ε·sp(βd)] / (1−2ε)``: DPO's loss, unbiased under flips.

    Eq. 14, arXiv:2403.00409.
    """
    scaled = beta * logps.margin
    kept, flipped = -logsigmoid(scaled), -logsigmoid(-scaled)
    return ((1.0 - flip_probability) * kept - flip_probability * flipped) / (
        1.0 - 2.0 * flip_probability
    )


def ipo_loss(logps: PairLogps, tau: float, length_normalized: bool) -> Tensor:
    """``(d − 1/(2τ))²``, d per token where normalised. Eq. 17, arXiv:2310.12036."""
    margin = _margin_per_token(logps) if length_normalized else logps.margin
    return (margin - 1.0 / (2.0 * tau)) ** 2


def slic_loss(logps: PairLogps, beta: float) -> Tensor:
    """``max(0, 1 − βd)``. arXiv:2305.10425, on log-ratios."""
    return (1.0 - beta * logps.margin).clamp_min(0.0)


def simpo_loss(logps: PairLogps, beta: float, gamma: float) -> Tensor:
    """``sp(−(β(log π_w/n_w − log π_l/n_l) − γ))``. Eq. 6, arXiv:2405.14734."""
    chosen = logps.policy_chosen / logps.chosen_tokens
    rejected = logps.policy_rejected / logps.rejected_tokens
    return -logsigmoid(beta * (chosen - rejected) - gamma)


def orpo_loss(logps: PairLogps, lam: float) -> Tensor:
    """``λ·sp(−(logit_w − logit_l))`` of the mean token probabilities; Eq. 7, arXiv:2403.07691.

    The likelihood of the chosen, ``−log π_w/n_w``, is added by ``nll_loss``.
    """
    chosen = _logit(logps.policy_chosen / logps.chosen_tokens)
    rejected = _logit(logps.policy_rejected / logps.rejected_tokens)
    return -lam * logsigmoid(chosen - rejected)


def cpo_loss(logps: PairLogps, beta: float) -> Tensor:
    """``sp(−β(log π_w − log π_l))``. Eq. 3, arXiv:2401.08417; its likelihood is ``nll_loss``."""
    return -logsigmoid(beta * (logps.policy_chosen - logps.policy_rejected))


def nll_loss(logps: PairLogps) -> Tensor:
    """``−log π(y_w)/n_w``, normalised per sequence. Eq. 1, arXiv:2404.19733."""
    return -logps.policy_chosen / logps.chosen_tokens


def length_normalized_dpo_loss(logps: PairLogps, beta: float) -> Tensor:
    """``sp(−β(w/n_w − l/n_l))`` (LN-DPO)."""
    return -logsigmoid(beta * _margin_per_token(logps))


def length_regularized_dpo_loss(logps: PairLogps, beta: float, length_alpha: float) -> Tensor:
    """``sp(−(βd + α(n_w − n_l)))``. Eq. 9, arXiv:2403.19159."""
    longer = (logps.chosen_tokens - logps.rejected_tokens).to(logps.margin.dtype)
    return -logsigmoid(beta * logps.margin + length_alpha * longer)


def dpop_loss(logps: PairLogps, beta: float, positive_lambda: float) -> Tensor:
    """``sp(−β(d − λ·max(0, −w)))``. Eq. 3, arXiv:2402.13228."""
    fallen = relu(-logps.chosen_logratio)
    return -logsigmoid(beta * (logps.margin - positive_lambda * fallen))


def exo_loss(logps: PairLogps, beta: float, trusted: Tensor) -> Tensor:
    """``KL((σ(βd), σ(−βd)) ‖ (p, 1−p))`` for the trust p [B] in the label. arXiv:2402.00856."""
    up, down = logsigmoid(beta * logps.margin), logsigmoid(-beta * logps.margin)
    return up.exp() * (up - trusted.log()) + down.exp() * (down - torch.log1p(-trusted))


def nca_loss(logps: PairLogps, beta: float) -> Tensor:
    """``sp(−βw) + ½·sp(βw) + ½·sp(βl)``. Eq. 11, arXiv:2402.05369, K = 2."""
    chosen, rejected = beta * logps.chosen_logratio, beta * logps.rejected_logratio
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def sppo_loss(logps: PairLogps, beta: float) -> Tensor:
    """``(w − 1/(2β))² + (l + 1/(2β))²``. Algorithm 1, arXiv:2405.00675, η = 1/β."""
    target = 1.0 / (2.0 * beta)
    return (logps.chosen_logratio - target) ** 2 + (logps.rejected_logratio + target) ** 2


def apo_zero_loss(logps: PairLogps, beta: float) -> Tensor:
    """``(1 − σ(βw)) + σ(βl)``. arXiv:2408.06266."""
    return torch.sigmoid(-beta * logps.chosen_logratio) + torch.sigmoid(
        beta * logps.rejected_logratio
    )


def apo_down_loss(logps: PairLogps, beta: float) -> Tensor:
    """``σ(βw) + (1 − σ(βd))``. arXiv:2408.06266."""
    return torch.sigmoid(beta * logps.chosen_logratio) + torch.sigmoid(-beta * logps.margin)


def bco_pair_loss(logps: PairLogps, beta: float) -> Tensor:
    """``sp(−βw) + sp(βl)``. arXiv:2404.04656 with δ = 0."""
    return -logsigmoid(beta * logps.chosen_logratio) - logsigmoid(-beta * logps.rejected_logratio)


def discopop_loss(logps: PairLogps, beta: float, tau: float) -> Tensor:
    """``(1−s)·sp(−u) + s·e^(−u)``, u = βd, s = σ(u/τ). Eq. 5, arXiv:2406.08414."""
    scaled = beta * logps.margin
    # s·e^(−u) in one exponent: s vanishes where e^(−u) overflows.
    exponential = torch.exp(logsigmoid(scaled / tau) - scaled)
    return -torch.sigmoid(-scaled / tau) * logsigmoid(scaled) + exponential


def f_dpo_loss(
    logps: PairLogps, beta: float, divergence: Literal["forward_kl", "jensen_shannon"]
) -> Tensor:
    """``sp(−β(f'(e^w) − f'(e^l)))``. Theorem 1, arXiv:2309.16240."""
    chosen, rejected = logps.chosen_logratio, logps.rejected_logratio
    if divergence == "jensen_shannon":
        # f'(r) = log(2r/(1+r)) = log 2 + log σ(log r); log 2 cancels.
        return -logsigmoid(beta * (logsigmoid(chosen) - logsigmoid(rejected)))
    # f'(r) = −1/r: the logit is β(e^(−l) − e^(−w)), the difference of two terms given by their
    # logarithms, so that a finite loss has a finite gradient. It overflows to a certain loss of 0
    # where the rejected's term is the larger; elsewhere an overflow is an infinite loss.
    chosen_term, rejected_term = math.log(beta) - chosen, math.log(beta) - rejected
    ceiling = math.log(torch.finfo(chosen.dtype).max) / 2.0
    settled = (rejected_term > ceiling) & (rejected_term > chosen_term)
    chosen_term = torch.where(settled, torch.zeros_like(chosen), chosen_term)
    rejected_term = torch.where(settled, torch.full_like(rejected, ceiling), rejected_term)
    return -logsigmoid(torch.exp(rejected_term) - torch.exp(chosen_term))


def xpo_loss(logps: PairLogps, beta: float, alpha: float) -> Tensor:
    """DPO's loss and ``α·log π(y_ref)``: optimism, away from what the reference says.

    Eq. 5, arXiv:2405.21046. ``chosen_from_reference`` says which side the reference wrote.
    """
    origin = required(logps.chosen_from_reference, "chosen_from_reference")
    reference_sample = torch.where(origin.bool(), logps.policy_chosen, logps.policy_rejected)
    return dpo_loss(logps, beta) + alpha * reference_sample


def _margin_per_token(logps: PairLogps) -> Tensor:
    """w/n_w − l/n_l, [B] nats a token."""
    return (
        logps.chosen_logratio / logps.chosen_tokens
        - logps.rejected_logratio / logps.rejected_tokens
    )


def _logit(mean_logprob: Tensor) -> Tensor:
    """log p − log(1−p) of p = e^m; a certain completion (m = 0) counts as just less than one."""
    below_one = mean_logprob.clamp_max(-torch.finfo(mean_logprob.dtype).eps)
    return below_one - torch.log(-torch.expm1(below_one))
