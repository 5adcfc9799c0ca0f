"""Losses of the policy's own samples, by the chance that each beats an opponent."""

from __future__ import annotations

from torch import Tensor

from workers.learner.objectives.records import SampledLogps


def nash_md_loss(logps: SampledLogps, beta: float) -> Tensor:
    """``β·sg(log π/π_ref)·log π − (P(y≻y') − ½)·log π``, [B]; its gradient is Nash-MD's.

    Sec. 7, arXiv:2312.00886: the opponent y' is a sample of the geometric mixture.
    """
    return (beta * logps.logratio.detach() - (logps.win_prob - 0.5)) * logps.policy
