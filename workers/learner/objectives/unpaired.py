"""Losses of completions that are desirable or not, without partners."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from workers.learner.objectives.records import UnpairedLogps, required


def kto_kl(logps: UnpairedLogps) -> Tensor:
    """z = max(0, mean of log π/π_ref over the mismatched completions), a constant scalar.

    The clamp comes after the mean over the whole update; 0 where nothing could be mismatched (a
    single prompt). arXiv:2402.01306, Sec. 4.1.
    """
    policy = required(logps.mismatched_policy, "mismatched_policy").detach()
    if not len(policy):
        return policy.new_zeros(())
    return (policy - required(logps.mismatched_ref, "mismatched_ref")).mean().clamp_min(0.0)


def kto_loss(
    logps: UnpairedLogps,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    kl: Tensor,
) -> Tensor:
    """``λ_D·(1 − σ(β(w − z)))`` of desirable, ``λ_U·(1 − σ(β(z − l)))`` of undesirable ones, [B].

    Eq. 8, arXiv:2402.01306.
    """
    above = beta * (logps.logratio - kl)
    return torch.where(
        logps.desirable.bool(),
        desirable_weight * torch.sigmoid(-above),
        undesirable_weight * torch.sigmoid(above),
    )


def bco_loss(logps: UnpairedLogps, beta: float, delta: float) -> Tensor:
    """``sp(−(βw − δ))`` of desirable, ``ratio·sp(βl − δ)`` of undesirable completions, [B].

    Eq. 8 and 10, arXiv:2404.04656.
    """
    above = beta * logps.logratio - delta
    undesirable = -logsigmoid(-above)
    if logps.density_ratio is not None:
        undesirable = logps.density_ratio * undesirable
    return torch.where(logps.desirable.bool(), -logsigmoid(above), undesirable)
