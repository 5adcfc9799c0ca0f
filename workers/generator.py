"""What a generator is, whatever its backend, and its options: torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from workers.messages import Completion, IntArray, Prompt
from workers.weight_sync.buckets import Receipt, WeightPush


class SamplingOptions(BaseModel):
    """How completions are drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts_per_update: int = Field(
        default=32, ge=1, description="Prompts whose pairs one update learns from"
    )
    completions_per_prompt: int = Field(
        default=2, description="Samples of the policy for each prompt, at least 2"
    )
    temperature: float = Field(
        default=1.0, gt=0.0, allow_inf_nan=False, description="Softmax temperature"
    )
    top_p: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="Keep the smallest set of tokens with at least this probability; 1 keeps all",
    )
    top_k: int | None = Field(
        default=None, ge=1, description="Keep only the k most likely tokens; null keeps all"
    )
    max_new_tokens: int = Field(default=64, ge=1, description="Longest completion, in tokens")
    truncated: Literal["train", "mask", "drop"] = Field(
        default="train",
        description="A completion cut at max_new_tokens is learned from like any other (train), "
        "only contrasted with (mask: no gradient flows into it), or its pairs are dropped (drop)",
    )

    @property
    def reshapes(self) -> bool:
        """Whether tokens are drawn from another distribution than the policy's plain softmax."""
        return self.temperature != 1.0 or self.top_p < 1.0 or self.top_k is not None


class GeneratorOptions(BaseModel):
    """Which backend samples, and how many replicas of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: Literal["auto", "transformers"] = Field(
        default="auto", description="Sampling engine; auto = transformers until vLLM is built in"
    )
    replicas: int = Field(default=1, ge=1, description="Generators that share each round")
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="CPU threads of each; auto = its fair share of the cores"
    )
    gpus: Literal[0] = Field(default=0, description="GPUs of each (only CPU is built yet)")
    engine: dict[str, Any] = Field(
        default_factory=dict, max_length=0, description="Engine arguments (transformers has none)"
    )


@dataclass(frozen=True, slots=True, eq=False)
class SampleRequest:
    """A work unit: prompts sampled together, its composition independent of the replicas.

    A sample's seed is derived from (run seed, purpose, the prompt's position, the sample's index).
    ``reference_shares`` has the μ of each sample: it is drawn from π^(1−μ)·π_ref^μ, normalised
    token by token (0 is the policy, 1 the reference); empty is the policy for every sample.
    """

    prompts: tuple[Prompt, ...]
    samples: int
    run_seed: int
    purpose: str
    reference_shares: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class SampledUnit:
    """The completions of a work unit, n for each prompt, and what sampling took in seconds."""

    completions: tuple[tuple[Completion, ...], ...]
    seconds: float


class Generator(Protocol):
    """Samples completions with the weights that were pushed to it last."""

    def load(self, push: WeightPush) -> Receipt:
        """Take these weights, or raise if they did not arrive as they were sent."""
        ...

    def sample(self, request: SampleRequest) -> SampledUnit:
        """Draw the request's completions; each carries the version that wrote it."""
        ...

    def probe(self, prompt_ids: IntArray, new_tokens: int) -> Completion:
        """Continue a probe greedily, recording the log-probabilities sampled under."""
        ...
