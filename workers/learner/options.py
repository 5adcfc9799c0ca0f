"""What the learner optimises and how: torch-free."""

from __future__ import annotations

import difflib
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from judges.plugins import is_plugin

BUILT_IN = ("dpo",)


class ObjectiveOptions(BaseModel):
    """The loss of a pair. ``beta`` also scales the implicit rewards that are logged."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        default="dpo", description="dpo, path/to/file.py:function or installed.module:function"
    )
    beta: float = Field(
        default=0.1,
        gt=0.0,
        description="Strength of the pull towards the reference: larger keeps the policy nearer",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0.0,
        lt=0.5,
        description="Probability that a label is wrong (cDPO); only for dpo",
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of an objective of your own"
    )

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if is_plugin(name) or name in BUILT_IN:
            return name
        near = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"no such objective; did you mean {near!r}? "
            "(your own: path/to/file.py:function or installed.module:function)"
        )


class ReferenceOptions(BaseModel):
    """The policy that log-ratios are taken against."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    update: Literal["frozen"] = Field(
        default="frozen", description="frozen: the starting model, for the whole run"
    )


class LearnerOptions(BaseModel):
    """The optimizer and how an update is cut into micro-batches."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: Literal[1] = Field(default=1, description="Learner processes (only one is built yet)")
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="CPU threads; auto = its fair share of the cores"
    )
    gpus: Literal[0] = Field(default=0, description="GPUs of each (only CPU is built yet)")
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
