"""Preference objectives: pure functions of per-sequence log-probabilities."""

from workers.learner.needs import needs
from workers.learner.objectives.build import NonFiniteLossError, Objective, build_objective
from workers.learner.objectives.records import (
    ObjectiveOutput,
    PairLogps,
    RankedLogps,
    SampledLogps,
    TokenLogprobs,
    UnpairedLogps,
)

__all__ = [
    "NonFiniteLossError",
    "Objective",
    "ObjectiveOutput",
    "PairLogps",
    "RankedLogps",
    "SampledLogps",
    "TokenLogprobs",
    "UnpairedLogps",
    "build_objective",
    "needs",
]
