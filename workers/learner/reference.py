"""The reference: the policy that log-ratios are taken against, and when it moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from workers.learner.logprobs import CompletionScorer
from workers.learner.options import ReferenceOptions, ReferenceSchedule
from workers.models.lora import frozen_copy, load_model_state, model_state, trainable


class Reference:
    """A frozen copy of the starting model that follows the policy on a schedule.

    It moves only when a round begins, so every completion of a round is scored once, by one
    reference. ``version`` is the policy version that it last took up. With LoRA only its adapters
    are its own and move; ``ema`` then averages A and B, not their product.
    """

    def __init__(self, starting_model: Any, options: ReferenceOptions) -> None:
        self.version = 0
        self._round = 0
        self._schedule = options.update
        self._model = frozen_copy(starting_model)
        self.score = CompletionScorer(self._model)

    @torch.no_grad()
    def begin_round(self, index: int, policy: Any, version: int) -> None:
        """Move as the schedule says; a round that has begun before (a resumed one) moves nothing.

        ``every_rounds: N`` copies the policy at rounds N, 2N, …; ``ema: a`` takes
        ``a^u·reference + (1 − a^u)·policy``, u being the updates since it last moved.
        """
        if index <= self._round:
            return
        self._round = index
        match self._schedule:
            case ReferenceSchedule(every_rounds=int(rounds)) if index % rounds == 0:
                self._towards(policy, 1.0, version)
            case ReferenceSchedule(ema=float(decay)):
                self._towards(policy, 1.0 - decay ** (version - self.version), version)

    def _towards(self, policy: Any, share: float, version: int) -> None:
        learned = trainable(policy)
        for name, mine in trainable(self._model).items():
            mine.lerp_(learned[name], share)
        self.version = version

    @torch.no_grad()
    def give_to(self, policy: Any) -> None:
        """Make the policy's weights those of the reference."""
        own = trainable(self._model)
        for name, theirs in trainable(policy).items():
            theirs.copy_(own[name])

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"model": model_state(self._model), "version": self.version, "round": self._round}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state`` gave."""
        load_model_state(self._model, state["model"])
        self.version = int(state["version"])
        self._round = int(state["round"])
