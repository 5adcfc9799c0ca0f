"""The resampling dial: how many updates a round feeds, and which pairs each update gets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipeline.batch import update_batch
from pipeline.learner import RemoteLearner
from pipeline.ledger import with_reference_logprobs
from workers.generator import SamplingOptions
from workers.learner.needs import Needs
from workers.messages import BatchCompletion, Completion, Round, UpdateBatch
from workers.seeds import derive_seed

ScoresT = TypeVar("ScoresT")


class EarlyOptions(BaseModel):
    """Ending a round early when its pairs have gone stale: not built yet."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ess_below: None = Field(default=None, description="Not built yet")
    kl_above: None = Field(default=None, description="Not built yet")


class ResamplingOptions(BaseModel):
    """How often the policy writes fresh pairs. It changes their age, never their number."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    updates_per_round: Annotated[int, Field(ge=1)] | float = Field(
        default=1, description="Updates fed by one sampling: 1 is on-policy, .inf samples once"
    )
    passes: int = Field(default=1, ge=1, description="Times a round's pairs are learned from")
    rounds_in_flight: int = Field(
        default=0, ge=0, description="Rounds sampled and judged while the learner learns; 0 waits"
    )
    replay: list[float] = Field(
        default=[1.0], description="Shares of this and earlier rounds (only this one is built yet)"
    )
    correction: Literal["none"] = Field(
        default="none", description="Off-policy weights (not built yet)"
    )
    early: EarlyOptions = Field(
        default_factory=EarlyOptions, description="Early resampling (not built yet)"
    )

    @field_validator("replay")
    @classmethod
    def _this_round_only(cls, shares: list[float]) -> list[float]:
        if shares != [1.0]:
            raise ValueError("earlier rounds cannot be mixed in yet; use [1.0]")
        return shares

    @field_validator("updates_per_round")
    @classmethod
    def _whole_or_infinite(cls, value: int | float) -> int | float:
        if value == math.inf or (value >= 1 and value == int(value)):
            return value if value == math.inf else int(value)
        raise ValueError("a whole number from 1, or .inf")


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """Round ``index`` feeds ``updates`` updates with the prompts ``start .. start + prompts``."""

    index: int
    first_update: int
    updates: int
    start: int
    prompts: int


class Dial:
    """The whole run's rounds, known beforehand: sampling, judging and learning budgets are equal
    at every setting (DESIGN: the dial keeps the budget)."""

    def __init__(self, options: ResamplingOptions, updates: int, prompts_per_update: int) -> None:
        self._passes = options.passes
        self._prompts_per_update = prompts_per_update
        span = options.updates_per_round * options.passes
        self._span = updates if math.isinf(span) else min(int(span), updates)
        self._updates = updates
        self.lag_bound = (options.rounds_in_flight + 1) * self._span - 1

    def __len__(self) -> int:
        return math.ceil(self._updates / self._span)

    def check_lag(self, version: int, round_: Round) -> None:
        """Raise RuntimeError if the learner is further ahead of a round than admission allows."""
        lag = version - round_.version
        if not 0 <= lag <= self.lag_bound:
            raise RuntimeError(
                f"round {round_.index} was sampled by version {round_.version}, the learner is at "
                f"{version}: lag {lag} is outside [0, {self.lag_bound}]"
            )

    def plan(self, index: int) -> RoundPlan:
        """Round ``index``; the last one is cut to fit the run. Raises IndexError past the end."""
        if not 0 <= index < len(self):
            raise IndexError(f"round {index}: the run has {len(self)} rounds")
        sampled_before = index * math.ceil(self._span / self._passes) * self._prompts_per_update
        updates = min(self._span, self._updates - index * self._span)
        prompts = math.ceil(updates / self._passes) * self._prompts_per_update
        return RoundPlan(index, index * self._span, updates, sampled_before, prompts)


def batches(
    plan: RoundPlan, round_: Round, sampling: SamplingOptions, needs: Needs, run_seed: int
) -> list[UpdateBatch]:
    """The updates a round feeds, in order, as the objective ``needs`` their examples.

    Each takes the next ``prompts_per_update`` prompts; the first pass in stream order, each later
    pass in a derived order of its own.
    """
    groups = list(round_.groups)
    found: list[UpdateBatch] = []
    passed = 0
    while len(found) < plan.updates:
        order = np.arange(len(groups))
        if passed:
            seed = derive_seed(run_seed, "pass", plan.index, passed)
            order = np.random.default_rng(seed).permutation(len(groups))
        for first in range(0, len(groups), sampling.prompts_per_update):
            chosen = [groups[i] for i in order[first : first + sampling.prompts_per_update]]
            found.append(update_batch(chosen, needs, sampling.truncated))
        passed += 1
    return found[: plan.updates]


def with_reference(
    plan: RoundPlan,
    round_: Round,
    sampling: SamplingOptions,
    needs: Needs,
    run_seed: int,
    learner: RemoteLearner,
) -> Round:
    """The round with every completion's reference log-probabilities.

    Scored so that policy = reference gives a log-ratio of exactly 0.
    """
    score = learner.score_reference
    return with_reference_logprobs(
        round_, scored_once(plan, round_, sampling, needs, run_seed, score)
    )


def scored_once(
    plan: RoundPlan,
    round_: Round,
    sampling: SamplingOptions,
    needs: Needs,
    run_seed: int,
    score: Callable[[Sequence[UpdateBatch]], list[list[ScoresT]]],
) -> dict[tuple[int, int], ScoresT]:
    """What ``score`` says of each completion of a round, by position and sample.

    Each is scored once, in the batches of the first pass, hence the micro-batches of its update;
    completions that no example holds are scored apart.
    """
    learned = batches(plan, round_, sampling, needs, run_seed)
    first_pass = learned[: math.ceil(len(round_.groups) / sampling.prompts_per_update)]
    held = {_key(item.completion) for batch in first_pass for item in batch.completions}
    others = tuple(
        BatchCompletion(group.prompt.ids, completion)
        for group in round_.groups
        for completion in group.completions
        if _key(completion) not in held
    )
    scored_batches = [*first_pass, UpdateBatch(others, ())]
    scored: dict[tuple[int, int], ScoresT] = {}
    for batch, scores in zip(scored_batches, score(scored_batches), strict=True):
        for item, found in zip(batch.completions, scores, strict=True):
            scored[_key(item.completion)] = found
    return scored


def _key(completion: Completion) -> tuple[int, int]:
    return completion.position, completion.sample
