"""How pairs older than the policy are weighed: torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from workers.learner.needs import Needs

CorrectionName: TypeAlias = Literal["none", "raw", "clipped", "self_normalized", "wpo"]


@dataclass(frozen=True, slots=True)
class Correction:
    """The weight of an example older than the policy; ``clip`` is the largest, where clipped."""

    name: CorrectionName = "none"
    clip: float = 2.0

    @property
    def by_importance(self) -> bool:
        """Whether it must know the distribution that was really sampled."""
        return self.name in ("raw", "clipped", "self_normalized")

    def widen(self, needs: Needs) -> Needs:
        """What an objective needs, and what its weights need besides."""
        return replace(
            needs,
            whole_update=needs.whole_update or self.name == "self_normalized",
            collisions=needs.collisions or self.name == "wpo",
            sampling_logprobs=needs.sampling_logprobs or self.by_importance,
        )
