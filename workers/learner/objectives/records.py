"""What an objective is given, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PairLogps:
    """Summed log-probabilities [B] of B pairs: completion tokens, EOS included when sampled.

    ``ref_*`` are constants; ``*_tokens`` [B] are token counts; ``label_prob`` [B] is P(chosen is
    better), None meaning 1; ``lag`` [B] is learner version − version that sampled the pair.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    label_prob: Tensor | None = None
    lag: Tensor | None = None

    @property
    def chosen_logratio(self) -> Tensor:
        """w = log π(y_w|x) − log π_ref(y_w|x), [B] nats."""
        return self.policy_chosen - self.ref_chosen

    @property
    def rejected_logratio(self) -> Tensor:
        """l = log π(y_l|x) − log π_ref(y_l|x), [B] nats."""
        return self.policy_rejected - self.ref_rejected


@dataclass(frozen=True, slots=True, eq=False)
class ObjectiveOutput:
    """``loss`` [B], one value a pair, differentiable; the update takes its mean over all pairs."""

    loss: Tensor
