"""The models that an AI judge may ask: their sections of a config, told apart by ``kind``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from judges.client_options import OpenAIOptions
from judges.tagged_union import TaggedUnion


class LocalClientOptions(BaseModel):
    """A model in the judge's own process, run by transformers or by a vLLM engine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["transformers", "vllm"] = Field(description="What runs it")
    model: str = Field(
        min_length=1, description="A Hugging Face id, a directory, or a fetched model"
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Of its weights")
    max_model_len: int | None = Field(
        default=None, ge=1, description="Longest question and answer, in tokens; null = the model's"
    )
    engine: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of the vLLM engine, as for generator.engine"
    )

    @model_validator(mode="after")
    def _fits_its_kind(self) -> LocalClientOptions:
        if self.kind == "transformers" and (self.dtype != "float32" or self.engine):
            raise ValueError("kind: transformers computes in float32 and takes no engine")
        return self


class PolicyClientOptions(BaseModel):
    """The policy itself, as it is when the round is sampled (self-rewarding)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["policy"] = Field(description="The run's own policy")


def _kind(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    if kind in ("openai", "policy"):
        return str(kind)
    if kind in ("transformers", "vllm"):
        return "local"
    raise ValueError("kind must be openai, transformers, vllm or policy, e.g. {kind: policy}")


ClientOptions: TypeAlias = Annotated[
    OpenAIOptions | LocalClientOptions | PolicyClientOptions,
    TaggedUnion(
        _kind,
        {"openai": OpenAIOptions, "local": LocalClientOptions, "policy": PolicyClientOptions},
    ),
]
