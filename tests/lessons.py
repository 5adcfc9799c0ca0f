"""A round's updates, without a run around it."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.lesson import Lesson, Terms
from pipeline.resampling import RoundPlan
from workers.generator import SamplingOptions
from workers.learner.needs import Needs
from workers.messages import PromptGroup, Round, UpdateBatch


def lesson(
    plan: RoundPlan,
    round_: Round,
    sampling: SamplingOptions,
    needs: Needs,
    run_seed: int,
    earlier: Sequence[PromptGroup] = (),
) -> Lesson:
    terms = Terms(sampling.prompts_per_update, sampling.truncated, needs, run_seed)
    return Lesson(plan, round_, tuple(earlier), terms)


def batches(
    plan: RoundPlan, round_: Round, sampling: SamplingOptions, needs: Needs, run_seed: int
) -> list[UpdateBatch]:
    return lesson(plan, round_, sampling, needs, run_seed).batches()
