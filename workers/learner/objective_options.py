"""Every objective by its config name, with its hyper-parameters and their ranges: torch-free.

The formulas are in ``workers/learner/objectives/``; the names and definitions, with their sources,
in docs/objectives.md.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from judges.errors import UserError
from judges.plugins import args_key, is_plugin, load_plugin, open_parameters, required
from workers.tagged_union import TaggedUnion

Records: TypeAlias = Literal["pairs", "unpaired", "ranked", "sampled"]
"""What an objective is given: PairLogps, UnpairedLogps, RankedLogps or SampledLogps."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What an objective must be given, besides the policy's log-probabilities.

    ``whole_update``: all examples of an update at one time, because a loss depends on others'.
    ``mismatched``: log-ratios of completions under other prompts. ``collisions``: the weights of
    WPO. ``opponent``: the reference's share in the distribution that draws the second completion
    of each prompt; 0 is the policy.
    """

    records: Records = "pairs"
    reference: bool = True
    whole_update: bool = False
    per_token: bool = False
    mismatched: bool = False
    collisions: bool = False
    opponent: float = 0.0


@dataclass(frozen=True, slots=True)
class Interval:
    """The range of a hyper-parameter, as it is written in mathematics: ``Interval("[0, 0.5)")``."""

    text: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def check(self, value: float) -> float:
        """The value itself; raises ValueError outside the range, also for NaN."""
        low, high = (float(end.replace("∞", "inf")) for end in self.text[1:-1].split(","))
        above = low < value or (self.text[0] == "[" and value == low)
        below = value < high or (self.text[-1] == "]" and value == high)
        if not (above and below):
            raise ValueError(f"must be in {self.text}")
        return value


Positive: TypeAlias = Annotated[float, Interval("(0, ∞)")]
NonNegative: TypeAlias = Annotated[float, Interval("[0, ∞)")]
FlipProbability: TypeAlias = Annotated[float, Interval("[0, 0.5)")]

_BETA = "Strength of the pull towards the reference: larger keeps the policy nearer"


class Options(BaseModel):
    """What every objective has: a name, what it needs, and an implicit reward to log."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="Which objective")

    @property
    def needs(self) -> Needs:
        """What the learner must give this objective."""
        return Needs()

    @property
    def settings(self) -> str:
        """Every hyper-parameter that is not at rest, for people: ``beta 0.1, tau 0.05``."""
        values = self.model_dump(exclude={"name"}).items()
        return ", ".join(f"{key} {value}" for key, value in values if value)

    @property
    def reward_scale(self) -> float:
        """β of the implicit reward that is logged, ``β·log π/π_ref``."""
        beta: float = getattr(self, "beta", 1.0)
        return beta

    def implicit_reward(self, logps: Any, ref: Any, tokens: Any) -> Any:
        """The reward that the policy assigns to completions, [N] from arrays [N]."""
        return self.reward_scale * (logps - ref)


class PairwiseOptions(Options):
    """A loss of a pair, with what can be added to any of them."""

    label_smoothing: FlipProbability = Field(
        default=0.0, description="Probability that a label is wrong (cDPO)"
    )
    nll_weight: NonNegative = Field(
        default=0.0, description="α of −α·log π(chosen)/tokens, added to the loss"
    )
    wpo: bool = Field(
        default=False, description="Weigh each pair by how likely the policy would write it (WPO)"
    )

    @property
    def needs(self) -> Needs:
        return Needs(collisions=self.wpo)


class DpoOptions(PairwiseOptions):
    """Direct preference optimisation, arXiv:2305.18290."""

    name: Literal["dpo"] = "dpo"
    beta: Positive = Field(default=0.1, description=_BETA)


class RobustDpoOptions(PairwiseOptions):
    """DPO unbiased under labels flipped at a known rate, arXiv:2403.00409."""

    name: Literal["robust_dpo"] = "robust_dpo"
    beta: Positive = Field(default=0.1, description=_BETA)
    flip_probability: FlipProbability = Field(default=0.1, description="Rate of flipped labels")


class IpoOptions(PairwiseOptions):
    """Identity preference optimisation, arXiv:2310.12036."""

    name: Literal["ipo"] = "ipo"
    tau: Positive = Field(default=0.1, description="Regularisation: the target margin is 1/(2τ)")
    length_normalized: bool = Field(default=False, description="Log-ratios per token")

    @property
    def reward_scale(self) -> float:
        return self.tau


class SlicOptions(PairwiseOptions):
    """Hinge loss on the log-ratio margin, arXiv:2305.10425."""

    name: Literal["slic"] = "slic"
    beta: Positive = Field(default=0.1, description="Inverse of the margin asked for")


class _ReferenceFreeOptions(PairwiseOptions):
    @property
    def needs(self) -> Needs:
        return Needs(collisions=self.wpo, reference=False)


class SimpoOptions(_ReferenceFreeOptions):
    """Length-normalised, without a reference, arXiv:2405.14734."""

    name: Literal["simpo"] = "simpo"
    beta: Positive = Field(default=2.0, description="Scale of the mean log-probability")
    gamma: NonNegative = Field(default=1.0, description="Target margin, absolute (not a ratio)")

    def implicit_reward(self, logps: Any, ref: Any, tokens: Any) -> Any:
        return self.beta * logps / tokens


class OrpoOptions(_ReferenceFreeOptions):
    """Likelihood of the chosen and odds ratio, without a reference, arXiv:2403.07691."""

    name: Literal["orpo"] = "orpo"
    lam: NonNegative = Field(default=0.1, description="Weight λ of the odds-ratio term")

    def implicit_reward(self, logps: Any, ref: Any, tokens: Any) -> Any:
        return logps / tokens


class CpoOptions(_ReferenceFreeOptions):
    """DPO with a uniform reference and likelihood of the chosen, arXiv:2401.08417."""

    name: Literal["cpo"] = "cpo"
    beta: Positive = Field(default=0.1, description="Scale of the log-probability margin")
    nll_weight: NonNegative = Field(default=1.0, description="α of −α·log π(chosen)/tokens")

    def implicit_reward(self, logps: Any, ref: Any, tokens: Any) -> Any:
        return self.beta * logps


class LengthNormalizedDpoOptions(PairwiseOptions):
    """DPO on log-ratios per token (LN-DPO)."""

    name: Literal["length_normalized_dpo"] = "length_normalized_dpo"
    beta: Positive = Field(default=0.1, description=_BETA)


class LengthRegularizedDpoOptions(PairwiseOptions):
    """DPO with a penalty on length, arXiv:2403.19159."""

    name: Literal["length_regularized_dpo"] = "length_regularized_dpo"
    beta: Positive = Field(default=0.1, description=_BETA)
    length_alpha: NonNegative = Field(default=0.01, description="Nats of margin a token is worth")


class DpopOptions(PairwiseOptions):
    """DPO-Positive: the chosen's likelihood may not fall, arXiv:2402.13228."""

    name: Literal["dpop"] = "dpop"
    beta: Positive = Field(default=0.1, description=_BETA)
    positive_lambda: NonNegative = Field(default=5.0, description="Penalty λ on a falling chosen")


class ExoOptions(PairwiseOptions):
    """Reverse KL to the labels' distribution, arXiv:2402.00856."""

    name: Literal["exo"] = "exo"
    beta: Positive = Field(default=0.1, description=_BETA)
    label_smoothing: Annotated[float, Interval("(0, 0.5)")] = Field(
        default=1e-3, description="ε of the target distribution (1 − ε, ε)"
    )


class NcaOptions(PairwiseOptions):
    """Noise-contrastive alignment of absolute likelihoods, arXiv:2402.05369."""

    name: Literal["nca"] = "nca"
    beta: Positive = Field(default=0.1, description=_BETA)


class SppoOptions(PairwiseOptions):
    """Self-play preference optimisation, squared, arXiv:2405.00675."""

    name: Literal["sppo"] = "sppo"
    beta: Positive = Field(default=0.1, description="1/η of the paper: the targets are ±1/(2β)")


class ApoZeroOptions(PairwiseOptions):
    """Anchored: chosen up, rejected down, arXiv:2408.06266."""

    name: Literal["apo_zero"] = "apo_zero"
    beta: Positive = Field(default=0.1, description=_BETA)


class ApoDownOptions(PairwiseOptions):
    """Anchored: both down, the rejected more, arXiv:2408.06266."""

    name: Literal["apo_down"] = "apo_down"
    beta: Positive = Field(default=0.1, description=_BETA)


class BcoPairOptions(PairwiseOptions):
    """Binary classifier on each side of a pair, δ = 0, arXiv:2404.04656."""

    name: Literal["bco_pair"] = "bco_pair"
    beta: Positive = Field(default=0.1, description=_BETA)


class DiscopopOptions(PairwiseOptions):
    """A loss found by search: logistic and exponential, blended, arXiv:2406.08414."""

    name: Literal["discopop"] = "discopop"
    beta: Positive = Field(default=0.1, description=_BETA)
    tau: Positive = Field(default=0.05, description="Temperature τ of the blend")


class FDpoOptions(PairwiseOptions):
    """DPO for another divergence than reverse KL, arXiv:2309.16240."""

    name: Literal["f_dpo"] = "f_dpo"
    beta: Positive = Field(default=0.1, description=_BETA)
    divergence: Literal["forward_kl", "jensen_shannon"] = Field(
        default="jensen_shannon", description="Divergence that holds the policy to its reference"
    )


class XpoOptions(PairwiseOptions):
    """DPO between a sample of the policy and one of the reference, optimistic, arXiv:2405.21046."""

    name: Literal["xpo"] = "xpo"
    beta: Positive = Field(default=0.1, description=_BETA)
    alpha: NonNegative = Field(default=1e-5, description="Weight α of log π(reference's sample)")

    @property
    def needs(self) -> Needs:
        return Needs(collisions=self.wpo, opponent=1.0)


class PdpoOptions(Options):
    """DPO's loss expected under the policy itself, by its full gradient."""

    name: Literal["pdpo"] = "pdpo"
    beta: Positive = Field(default=0.1, description=_BETA)
    score_weight: NonNegative = Field(
        default=0.1, description="Weight of the score-function part; 0 is online DPO"
    )
    baseline: Literal["ln2", "leave_one_out", "none"] = Field(
        default="ln2", description="Subtracted from the loss in the score-function part"
    )
    weights: Literal["none", "raw", "clipped", "self_normalized"] = Field(
        default="none", description="Importance weights of pairs older than the policy"
    )
    clip: Positive = Field(default=2.0, description="Largest weight, with weights: clipped")

    @property
    def needs(self) -> Needs:
        whole = self.baseline == "leave_one_out" or self.weights == "self_normalized"
        return Needs(whole_update=whole)


class KtoOptions(Options):
    """Kahneman–Tversky optimisation of unpaired labels, arXiv:2402.01306."""

    name: Literal["kto"] = "kto"
    beta: Positive = Field(default=0.1, description=_BETA)
    desirable_weight: NonNegative = Field(default=1.0, description="λ_D")
    undesirable_weight: NonNegative = Field(default=1.0, description="λ_U")

    @property
    def needs(self) -> Needs:
        return Needs(records="unpaired", whole_update=True, mismatched=True)


class BcoOptions(Options):
    """Binary classifier of unpaired labels with a running offset, arXiv:2404.04656."""

    name: Literal["bco"] = "bco"
    beta: Positive = Field(default=0.1, description=_BETA)
    embedding_model: str | None = Field(
        default=None,
        description="Sentence encoder of the prompts, e.g. minilm-l6-v2 (`freshpairs fetch`), for "
        "UDM weights on undesirable completions; null = no weights",
    )

    @property
    def needs(self) -> Needs:
        return Needs(records="unpaired", whole_update=True)


class PlackettLuceOptions(Options):
    """The likelihood of a whole ranking, arXiv:2305.18290 App. A.3."""

    name: Literal["plackett_luce"] = "plackett_luce"
    beta: Positive = Field(default=0.1, description=_BETA)

    @property
    def needs(self) -> Needs:
        return Needs(records="ranked")


class NashMdOptions(Options):
    """Mirror descent to the Nash equilibrium of the judge's preferences, arXiv:2312.00886."""

    name: Literal["nash_md"] = "nash_md"
    beta: Positive = Field(default=0.1, description=_BETA)
    mixture: Annotated[float, Interval("[0, 1]")] = Field(
        default=0.5, description="The reference's share in the geometric mixture played against"
    )

    @property
    def needs(self) -> Needs:
        return Needs(records="sampled", opponent=self.mixture)


class OwnOptions(Options):
    """An objective of your own: a function from log-probabilities to losses."""

    name: str
    beta: Positive = Field(default=0.1, description="Scale of the implicit rewards that are logged")
    args: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the function"
    )

    def load(self) -> Callable[..., Any]:
        """The function. Raises UserError where it cannot be loaded or does not take the args."""
        key = "objective.name"
        function = load_plugin(self.name, key=key)
        open_, _ = open_parameters(function, self.args, key=key, spec=self.name)
        if missing := required(open_)[1:]:
            raise UserError(
                f"{args_key(key)}: {self.name} needs {', '.join(missing)}: give it there"
            )
        return function

    @property
    def needs(self) -> Needs:
        """What its ``@needs(…)`` says. Raises UserError as ``load``."""
        return needs_of(self.load())

    def implicit_reward(self, logps: Any, ref: Any, tokens: Any) -> Any:
        return self.beta * (logps if ref is None else logps - ref)


BUILT_IN: Mapping[str, type[Options]] = {
    options.model_fields["name"].default: options
    for options in (
        DpoOptions,
        RobustDpoOptions,
        IpoOptions,
        SlicOptions,
        SimpoOptions,
        OrpoOptions,
        CpoOptions,
        LengthNormalizedDpoOptions,
        LengthRegularizedDpoOptions,
        DpopOptions,
        ExoOptions,
        NcaOptions,
        SppoOptions,
        ApoZeroOptions,
        ApoDownOptions,
        BcoPairOptions,
        DiscopopOptions,
        FDpoOptions,
        XpoOptions,
        PdpoOptions,
        KtoOptions,
        BcoOptions,
        PlackettLuceOptions,
        NashMdOptions,
    )
}
"""The objectives by name, in the order of docs/objectives.md."""

_OWN = "own"


def _tag(value: Any) -> str:
    if not isinstance(value, dict | Options):
        raise ValueError(f"objective={value}: must be a mapping, e.g. {{name: dpo, beta: 0.1}}")
    name = value.get("name", "dpo") if isinstance(value, dict) else value.name
    if not isinstance(name, str):
        raise ValueError(f"objective.name={name}: must be text, one of {', '.join(BUILT_IN)}")
    if name in BUILT_IN:
        return name
    if is_plugin(name):
        return _OWN
    near = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"objective.name={name}: no such objective; did you mean {near!r}? "
        "(your own: path/to/file.py:function or installed.module:function)"
    )


ObjectiveOptions: TypeAlias = Annotated[Options, TaggedUnion(_tag, {**BUILT_IN, _OWN: OwnOptions})]
"""In a config: the options of the objective that ``name`` names; without a name, DPO's."""

_Function = TypeVar("_Function", bound=Callable[..., Any])
_ATTRIBUTE = "__freshpairs_needs__"


def needs(
    records: Records = "pairs",
    *,
    reference: bool = True,
    whole_update: bool = False,
    per_token: bool = False,
    mismatched: bool = False,
) -> Callable[[_Function], _Function]:
    """Says what an objective of your own must be given; without it, pairs and their reference.

    The arguments are those of ``Needs``.
    """
    wanted = Needs(records, reference, whole_update, per_token, mismatched)

    def mark(function: _Function) -> _Function:
        setattr(function, _ATTRIBUTE, wanted)
        return function

    return mark


def needs_of(function: Callable[..., Any]) -> Needs:
    """What a function decorated with ``@needs(…)`` asks for; the default of one that is not."""
    found: Needs = getattr(function, _ATTRIBUTE, Needs())
    return found
