"""Which prompts are judged when the judge's budget is spread over the run (``judge.select``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from pipeline.handles import Future, Handle
from workers.generator import SampledUnit
from workers.judge_worker import Disputed
from workers.messages import Prompt
from workers.seeds import derive_seed

Selected: TypeAlias = Future[frozenset[int]] | frozenset[int] | Disputed | None
"""Indices of a work unit's prompts that are judged, now or once it is sampled; None: all."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Judges ``judged`` of the run's ``prompts``, evenly spread over the stream.

    ``how`` None judges them all. ``by`` names the judges whose disagreement tells what is
    uncertain; none: the margin of the policy's implicit reward, asked of the ``learner``.
    """

    how: Literal["random", "uncertainty"] | None
    judged: int
    prompts: int
    by: tuple[str, ...]
    learner: Handle
    run_seed: int

    def of(self, prompts: Sequence[Prompt], sampled: Future[SampledUnit] | SampledUnit) -> Selected:
        """Those of a work unit's prompts; ``sampled`` are their completions."""
        if self.how is None or self.judged >= self.prompts:
            return None
        first = prompts[0].position
        count = self._before(first + len(prompts)) - self._before(first)
        if self.how == "random":
            rng = np.random.default_rng(derive_seed(self.run_seed, "select", first))
            return frozenset(rng.choice(len(prompts), size=count, replace=False).tolist())
        if self.by:
            return Disputed(count, self.by)
        return self.learner.submit("least_sure", tuple(prompts), sampled, count)

    def _before(self, position: int) -> int:
        """How many of the stream's prompts before that position are judged."""
        return self.judged * min(position, self.prompts) // self.prompts
