"""Preference objectives: pure functions of per-sequence log-probabilities."""

from workers.learner.objectives.build import Objective, build_objective
from workers.learner.objectives.records import ObjectiveOutput, PairLogps

__all__ = ["Objective", "ObjectiveOutput", "PairLogps", "build_objective"]
