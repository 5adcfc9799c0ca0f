"""Losses of a pair, one function a method; d = w − l is the log-ratio margin of ALGORITHMS."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from workers.learner.objectives.records import PairLogps


def dpo_loss(logps: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Direct preference optimisation, [B]: ``p·sp(−βd) + (1−p)·sp(βd)``.

    Eq. 7, arXiv:2305.18290, for p = 1. A judge's probability gives a soft label p; label smoothing
    ε (Mitchell's cDPO note) trusts the label only to 1 − ε.
    """
    scaled_margin = beta * (logps.chosen_logratio - logps.rejected_logratio)
    label_prob: Tensor | float = 1.0 if logps.label_prob is None else logps.label_prob
    trusted = label_prob * (1.0 - label_smoothing) + (1.0 - label_prob) * label_smoothing
    return -trusted * logsigmoid(scaled_margin) - (1.0 - trusted) * logsigmoid(-scaled_margin)
