"""PDPO: DPO's loss expected under the policy itself, J(θ) = E_{y,y'∼π}[L], by its full gradient.

∇J = E[L·∇(log π(y) + log π(y')) + ∇L]. The surrogate below has this gradient in expectation; its
value is not J, which is logged as ``preference_loss``.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from workers.learner.objectives.records import PairLogps


def pdpo_surrogate(
    logps: PairLogps, loss: Tensor, baseline: Tensor, weight: Tensor, score_weight: float
) -> Tensor:
    """``sg(weight)·(score_weight·sg(L − b)·(log π(y) + log π(y')) + L)``, [B].

    The weight stays outside the gradient: differentiating ``weight·L`` through a clipped weight
    would lose the score part.
    """
    both = logps.policy_chosen + logps.policy_rejected
    score = score_weight * (loss - baseline).detach() * both
    return weight.detach() * (score + loss)


def score_baseline(
    kind: Literal["ln2", "leave_one_out", "none"], loss: Tensor, prompt_ids: Tensor | None
) -> Tensor:
    """b [B], independent of the pair it is subtracted from, hence unbiased.

    ``leave_one_out`` is the mean loss over other prompts' pairs (0 where there are none): pairs of
    one prompt may share a completion.
    """
    match kind:
        case "none":
            return torch.zeros_like(loss)
        case "ln2":
            return torch.full_like(loss, math.log(2.0))
        case "leave_one_out":
            if prompt_ids is None:
                prompt_ids = torch.arange(len(loss), device=loss.device)
            others = (prompt_ids[:, None] != prompt_ids[None, :]).to(loss.dtype)
            return (others @ loss.detach()) / others.sum(-1).clamp_min(1.0)


def importance_weight(
    kind: Literal["none", "raw", "clipped", "self_normalized"], logps: PairLogps, clip: float
) -> Tensor:
    """π(y)·π(y') / (μ(y)·μ(y')) of each pair, [B], for the distribution μ it was sampled from.

    ``clipped`` at ``clip``; ``self_normalized`` has mean 1 over the update. Without a record of μ
    the policy itself sampled: weight 1.
    """
    behaviour = (logps.behaviour_chosen, logps.behaviour_rejected)
    if kind == "none" or behaviour[0] is None or behaviour[1] is None:
        return torch.ones_like(logps.policy_chosen)
    both = (logps.policy_chosen + logps.policy_rejected).detach()
    log_weight = both - behaviour[0] - behaviour[1]
    match kind:
        case "raw":
            return log_weight.exp()
        case "clipped":
            return log_weight.clamp_max(math.log(clip)).exp()
        case "self_normalized":
            return torch.softmax(log_weight, -1) * len(log_weight)
