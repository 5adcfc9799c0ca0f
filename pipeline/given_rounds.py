"""Rounds of given pairs: offline training is the loop without anybody who samples."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.given_pairs import GivenPairs
from pipeline.learner import RemoteLearner
from pipeline.resampling import RoundPlan
from pipeline.sync import WeightSync
from workers.messages import Round

GIVEN = "given"
"""What a round of given pairs has in place of its judge's name."""


@dataclass(frozen=True, slots=True, eq=False)
class _There:
    """A round that is there already."""

    round_: Round

    def result(self) -> Round:
        return self.round_


@dataclass(frozen=True, slots=True, eq=False)
class GivenRounds:
    """Takes each round's prompts from a given set; no weights have to be anywhere for it."""

    pairs: GivenPairs

    def submit(self, plan: RoundPlan, learner: RemoteLearner, sync: WeightSync) -> _There:
        """The planned round, as of the learner's version: lag counts from when it was admitted."""
        groups = self.pairs.take(plan.start, plan.prompts, learner.version)
        seconds = {"generate": 0.0, "judge": 0.0}
        return _There(Round(plan.index, learner.version, tuple(groups), GIVEN, seconds, given=True))
