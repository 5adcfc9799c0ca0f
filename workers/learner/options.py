"""How the learner optimises, and against which reference: torch-free."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from judges.tagged_union import TaggedUnion
from workers.interval import Interval, Positive


class ReferenceSchedule(BaseModel):
    """A reference that follows the policy: one of the two."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every_rounds: int | None = Field(
        default=None, ge=1, description="Becomes the policy when every N-th round begins"
    )
    ema: Annotated[float, Interval("(0, 1)")] | None = Field(
        default=None, description="Moves towards the policy when a round begins, by this decay"
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> ReferenceSchedule:
        if (self.every_rounds is None) == (self.ema is None):
            raise ValueError("give either every_rounds or ema, e.g. {every_rounds: 1}, {ema: 0.99}")
        return self


def _tag(value: Any) -> str:
    if isinstance(value, dict | ReferenceSchedule):
        return "schedule"
    if value == "frozen":
        return "frozen"
    raise ValueError("must be frozen, {every_rounds: N} or {ema: a}")


Update: TypeAlias = Annotated[
    Literal["frozen"] | ReferenceSchedule,
    TaggedUnion(_tag, {"frozen": Literal["frozen"], "schedule": ReferenceSchedule}),
]


class ReferenceOptions(BaseModel):
    """The policy that log-ratios are taken against. It changes only when a round begins."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    update: Update = Field(
        default="frozen",
        description="frozen: the starting model; {every_rounds: N}: the policy, copied when every "
        "N-th round begins; {ema: a}: a^u·reference + (1 − a^u)·policy when a round begins, u "
        "updates after the one before",
    )


def is_averaged(reference: ReferenceOptions) -> bool:
    """Whether the reference is a moving average of policies."""
    update = reference.update
    return isinstance(update, ReferenceSchedule) and update.ema is not None


class LearnerOptions(BaseModel):
    """The optimizer and how an update is cut into micro-batches."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: int = Field(
        default=1,
        ge=1,
        description="Learner processes; `freshpairs plan` lays out more, a run has one as yet",
    )
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="CPU threads; auto = its fair share of the cores"
    )
    gpus: float = Field(
        default=0.0, ge=0.0, le=1.0, description="GPU to learn on, or a share of one; 0 = the CPU"
    )
    resources: dict[str, Positive] = Field(
        default_factory=dict, description="Custom resources of the cluster that each process needs"
    )
    optimizer: Literal["adamw"] = Field(default="adamw", description="Optimizer")
    learning_rate: float = Field(default=1e-6, gt=0.0, description="Peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="Learning rate after warmup; linear and cosine fall to 0"
    )
    warmup: int = Field(default=0, ge=0, description="Updates of linear warmup")
    weight_decay: float = Field(default=0.0, ge=0.0, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(default=1.0, gt=0.0, description="Gradient-norm clipping")
    tokens_per_micro_batch: int = Field(
        default=4096, ge=1, description="Tokens, prompt and padding included, computed at one time"
    )


def learning_rate(options: LearnerOptions, version: int, updates: int) -> float:
    """Learning rate of the update that makes version ``version + 1`` of a run of ``updates``."""
    if version < options.warmup:
        return options.learning_rate * (version + 1) / options.warmup
    remaining = (updates - version) / max(1, updates - options.warmup)
    match options.schedule:
        case "constant":
            return options.learning_rate
        case "linear":
            return options.learning_rate * remaining
        case "cosine":
            return options.learning_rate * 0.5 * (1.0 - math.cos(math.pi * remaining))
