"""The options of the resampling dial."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from workers.interval import Interval, Positive
from workers.learner.correction_options import Correction, CorrectionName

ALL: Literal["all"] = "all"

Share = Annotated[float, Interval("(0, 1)")]


class EarlyOptions(BaseModel):
    """Ending a round early, when its pairs have gone stale: any of these does it.

    Measured on the pairs of each update that are the round's own, before its step.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ess_below: Share | None = Field(
        default=None,
        description="Effective sample size of the pairs' importance weights, as a share of them; "
        "it collapses within a few updates where completions are long",
    )
    ess_per_token_below: Share | None = Field(
        default=None, description="The same with the weights' logarithms divided by their tokens"
    )
    kl_above: Positive | None = Field(
        default=None,
        description="KL from the policy that sampled the pairs to the policy, in nats a token",
    )
    rule: str | None = Field(
        default=None,
        description="A rule of your own: path/to/file.py:name or installed.module:name, which is "
        "given the update's record and says whether to resample",
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of your own rule"
    )


class AdaptiveOptions(BaseModel):
    """The dial turned by the run itself: as many updates a round as keep its pairs fresh enough."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: Share = Field(
        default=0.5, description="Effective sample size to hold at a round's last update"
    )
    measure: Literal["ess", "ess_per_token"] = Field(
        default="ess", description="Of the pairs, or the same per token"
    )
    min: int = Field(default=1, ge=1, description="Fewest updates a round feeds in a pass")
    max: int = Field(default=64, ge=1, description="Most updates a round feeds in a pass")

    @model_validator(mode="after")
    def _ordered(self) -> AdaptiveOptions:
        if self.min > self.max:
            raise ValueError(f"min: {self.min} is more than max, {self.max}")
        return self


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
    replay: list[float] | Literal["all"] = Field(
        default=[1.0],
        description="Shares of this round, the one before, the one before that …, in what a round "
        "learns from: [0.55, 0.3, 0.15] samples 0.55 of its prompts anew. all: it samples as many "
        "as ever, and learns from as many drawn from everything sampled so far",
    )
    correction: CorrectionName = Field(
        default="none",
        description="Weight of a pair older than the policy: its importance weight, raw, clipped "
        "at `clip` or self_normalized over the update; or wpo, how likely the policy would write "
        "it (arXiv:2406.11827)",
    )
    clip: Positive = Field(default=2.0, description="Largest weight, with correction: clipped")
    early: EarlyOptions = Field(default_factory=EarlyOptions, description="Early resampling")
    adaptive: AdaptiveOptions | None = Field(
        default=None,
        description="true, or {target, measure, min, max}: the run chooses updates_per_round "
        "itself, from what is set there on",
    )

    @property
    def weights(self) -> Correction:
        """How pairs older than the policy are weighed."""
        return Correction(self.correction, self.clip)

    @property
    def replays(self) -> bool:
        """Whether rounds learn from earlier ones."""
        return self.replay == ALL or len(self.replay) > 1

    @field_validator("adaptive", mode="before")
    @classmethod
    def _on_or_off(cls, value: Any) -> Any:
        return {} if value is True else None if value is False else value

    @field_validator("replay")
    @classmethod
    def _shares(cls, shares: list[float] | Literal["all"]) -> list[float] | Literal["all"]:
        if shares == ALL:
            return shares
        if not shares or not all(0.0 < share <= 1.0 for share in shares):
            raise ValueError("shares above 0, e.g. [0.55, 0.3, 0.15], or all")
        if not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
            raise ValueError(f"the shares sum to {sum(shares):g}, not to 1: mend them")
        if max(shares) > shares[0]:
            raise ValueError(
                f"an earlier round has {shares[0]:g} of a round's prompts to give, not "
                f"{max(shares):g}: let the first share be the largest"
            )
        return shares

    @field_validator("updates_per_round")
    @classmethod
    def _whole_or_infinite(cls, value: int | float) -> int | float:
        if value == math.inf or (value >= 1 and value == int(value)):
            return value if value == math.inf else int(value)
        raise ValueError("a whole number from 1, or .inf")

    @model_validator(mode="after")
    def _within_bounds(self) -> ResamplingOptions:
        bounds = self.adaptive
        if bounds is not None and not bounds.min <= self.updates_per_round <= bounds.max:
            raise ValueError(
                f"updates_per_round={self.updates_per_round:g}: adaptive starts from it, so it "
                f"must be from {bounds.min} to {bounds.max} (adaptive.min, adaptive.max)"
            )
        if self.early.args and self.early.rule is None:
            raise ValueError("early.args: are of a rule of your own: set early.rule")
        return self
