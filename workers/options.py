"""The policy as every worker needs to know it: torch-free."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from judges.tagged_union import TaggedUnion
from workers.interval import Positive


def _targets(value: Any) -> str:
    if value == "all-linear":
        return "all"
    if isinstance(value, list) and value:
        return "named"
    raise ValueError("must be all-linear or a list of module names, e.g. [q_proj, v_proj]")


TargetModules: TypeAlias = Annotated[
    Literal["all-linear"] | list[str],
    TaggedUnion(
        _targets,
        {"all": Literal["all-linear"], "named": list[Annotated[str, Field(min_length=1)]]},
    ),
]


class LoraOptions(BaseModel):
    """Adapters beside frozen weights: W + (alpha/rank)·B·A, without dropout."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(default=16, ge=1, description="Rows of A, columns of B")
    alpha: Positive = Field(default=32.0, description="Adapters count alpha/rank times")
    target_modules: TargetModules = Field(
        default="all-linear",
        description="Linear modules that get one, by name or end of name; all-linear = every one "
        "but the output head",
    )


class PolicyOptions(BaseModel):
    """Which model is aligned, and in which precision it is computed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        default="stories15M",
        description="A directory in Hugging Face format, a model of `freshpairs fetch`, a hub id",
    )
    dtype: Literal["float32"] = Field(
        default="float32", description="Precision of weights and computation"
    )
    lora: LoraOptions | None = Field(
        default=None,
        description="null: all weights are learned; {rank: 16, alpha: 32, target_modules: "
        "all-linear}: only adapters are, W + (alpha/rank)·B·A beside each linear module but the "
        "head, or those listed, e.g. [q_proj, v_proj]",
    )
