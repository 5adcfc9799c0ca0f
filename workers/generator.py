"""What a generator is, whatever its backend, and its options: torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from workers.interval import NonNegative, Positive
from workers.learner.needs import Needs
from workers.messages import Completion, IntArray, Prompt
from workers.options import PolicyOptions
from workers.seeds import derive_seed
from workers.weight_sync.buckets import Receipt, WeightPush
from workers.weight_sync.proof import Proof
from workers.weight_sync.transport import TransportName


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
    min_p: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Drop tokens less likely than this share of the most likely one's probability",
    )
    stop_tokens: list[Annotated[int, Field(strict=True)] | str] = Field(
        default_factory=list,
        description="Tokens that end a completion besides the model's own, as ids or exact strings",
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        description="Strings that end a completion once they stand in its text; they stay in it",
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
        return bool(self.reshaped_by)

    @property
    def reshaped_by(self) -> str:
        """The options that make it so, as ``key=value, …``; empty where none does."""
        plain = {"temperature": 1.0, "min_p": 0.0, "top_k": None, "top_p": 1.0}
        values = {name: getattr(self, name) for name in plain}
        return ", ".join(f"{k}={v:g}" for k, v in values.items() if v != plain[k])


class GapOptions(BaseModel):
    """How far a generator's log-probabilities may be from the learner's, and what is done then."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stop_above: Positive | None = Field(
        default=None,
        description="A push whose probe differs by more, in nats a token, is not sampled from: it "
        "is made again, the generator restarted, the run stopped; null = 1e-3, in bfloat16 1",
    )
    correct_above: NonNegative | None = Field(
        default=None,
        description="A round whose gap is larger, in nats a token, is corrected; null = none is",
    )
    correction: Literal["recompute", "truncated"] = Field(
        default="recompute",
        description="Record the learner's log-probabilities in place of the generator's "
        "(recompute), and besides weigh each loss by min(clip, learner / generator) (truncated)",
    )
    clip: Positive = Field(default=2.0, description="Largest weight of a truncated correction")

    @property
    def weight_clip(self) -> float | None:
        """The largest weight of a loss; None where losses are not weighed."""
        return self.clip if self.correction == "truncated" else None


class GeneratorOptions(BaseModel):
    """Which backend samples, and how many replicas of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: Literal["auto", "transformers", "vllm"] = Field(
        default="auto",
        description="Sampling engine; auto = vllm where it is installed, else transformers",
    )
    replicas: int = Field(default=1, ge=1, description="Generators that share each round")
    min_replicas: int | None = Field(
        default=None,
        ge=1,
        description="Generators that a run starts with, on nodes that come and go: the others join "
        "when there is room, what a lost one owed is sampled by those that are left; null = all",
    )
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="CPU threads of each; auto = its fair share of the cores"
    )
    gpus: float = Field(
        default=0.0, ge=0.0, allow_inf_nan=False, description="GPUs of each; fractions share one"
    )
    resources: dict[str, Positive] = Field(
        default_factory=dict, description="Custom resources of the cluster that each needs"
    )
    max_model_len: int | None = Field(
        default=None,
        ge=2,
        description="Longest prompt and completion together, in tokens; null = the model's context",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Precision it samples in; auto = the policy's"
    )
    transport: Literal["auto"] | TransportName = Field(
        default="auto",
        description="How weights get here: Ray's object_store, gloo (CPUs of many nodes), nccl "
        "(GPUs), ipc (the learner's own GPU); auto = object_store",
    )
    in_flight_updates: bool = Field(
        default=False,
        description="Pushes reach completions under way, which go on with the new weights; else "
        "they wait for the rounds before them",
    )
    gap: GapOptions = Field(default_factory=GapOptions)
    engine: dict[str, Any] = Field(
        default_factory=dict, description="More engine arguments, by vLLM's own names"
    )

    def backend_for(self, needs: Needs) -> Literal["transformers", "vllm"]:
        """What samples: auto takes vLLM where it is installed and can give what is needed."""
        if self.backend != "auto":
            return self.backend
        return "vllm" if find_spec("vllm") and not needs.opponent else "transformers"

    @property
    def moves_by(self) -> TransportName:
        """How weights get to the generators."""
        return "object_store" if self.transport == "auto" else self.transport

    def dtype_for(self, policy: PolicyOptions) -> str:
        """The precision to sample in."""
        return policy.dtype if self.dtype == "auto" else self.dtype

    def gap_limit(self, policy: PolicyOptions) -> float:
        """The largest gap of a push that is sampled from, in nats a token."""
        if self.gap.stop_above is not None:
            return self.gap.stop_above
        return 1e-3 if self.dtype_for(policy) == "float32" else 1.0


@dataclass(frozen=True, slots=True, eq=False)
class SampleRequest:
    """A work unit: prompts sampled together, its composition independent of the replicas.

    A sample's seed is derived from (run seed, purpose, the prompt's position, the sample's index).
    ``reference_shares`` has the μ of each sample: it is drawn from π^(1−μ)·π_ref^μ, normalised
    token by token (0 is the policy, 1 the reference); empty is the policy for every sample.
    ``after_push`` counts the pushes that the generator must have settled before it begins.
    ``sampling`` says how to draw where it is not as the generator was told to. ``round`` is the one
    it is of, for the log; None: of none.
    """

    prompts: tuple[Prompt, ...]
    samples: int
    run_seed: int
    purpose: str
    reference_shares: tuple[float, ...] = ()
    after_push: int = 0
    sampling: SamplingOptions | None = None
    round: int | None = None

    def seed(self, prompt: Prompt, sample: int) -> int:
        """Of one sample: of what it is for and nothing else."""
        return derive_seed(self.run_seed, self.purpose, prompt.position, sample)

    def answer(self, completions: Sequence[Completion], seconds: float) -> SampledUnit:
        """What comes back: the completions, prompt by prompt, in the order of their samples."""
        starts = range(0, len(completions), self.samples)
        grouped = tuple(tuple(completions[i : i + self.samples]) for i in starts)
        return SampledUnit(grouped, seconds, self.round)


@dataclass(frozen=True, slots=True, eq=False)
class SampledUnit:
    """The completions of a work unit, n for each prompt, and what sampling took in seconds.

    ``round`` is the request's: whoever judges them knows by it what they are of.
    """

    completions: tuple[tuple[Completion, ...], ...]
    seconds: float
    round: int | None = None


class Generator(Protocol):
    """Samples completions with the weights that were pushed to it last."""

    def load(self, push: WeightPush) -> Receipt:
        """Take these weights, or raise if they did not arrive as they were sent."""
        ...

    def sample(self, request: SampleRequest) -> SampledUnit:
        """Draw the request's completions; each carries the version that wrote it."""
        ...

    def prove(
        self, prompt_ids: IntArray, sent: Receipt, expected: Completion, limit: float
    ) -> Proof:
        """Show that the last push is what is sampled, or raise; then sample nothing.

        ``expected`` is the learner's own greedy continuation of the probe, ``limit`` the largest
        difference of a log-probability, in nats.
        """
        ...

    def rest(self) -> None:
        """Give an accelerator's memory back until the next call, where the engine can."""
        ...
