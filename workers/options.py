"""The policy as every worker needs to know it: torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


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
    lora: None = Field(default=None, description="Adapters are not built yet: full weights only")
