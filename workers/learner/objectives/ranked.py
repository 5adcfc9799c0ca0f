"""The loss of a whole ranking."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.learner.objectives.records import RankedLogps


def plackett_luce_loss(logps: RankedLogps, beta: float) -> Tensor:
    """``−Σ_{k<K} log softmax_{j≥k}(βh)[k]``, [G]; K = 2 is DPO. App. A.3, arXiv:2305.18290."""
    reward_GK = (beta * logps.logratio).masked_fill(~logps.keep_mask_GK, -torch.inf)
    # From the last place on, the log of what is still to be ranked.
    remaining_GK = torch.logcumsumexp(reward_GK.flip(-1), -1).flip(-1)
    place_GK = torch.where(logps.keep_mask_GK, remaining_GK - reward_GK, 0.0)
    return place_GK.sum(-1)  # the last place's term is log 1
