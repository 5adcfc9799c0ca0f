"""Every objective by its config name, with its hyper-parameters and their ranges: torch-free.

The formulas are in ``workers/learner/objectives/``; definitions and sources in docs/objectives.md.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from judges.errors import UserError
from judges.plugins import args_key, is_plugin, load_plugin, open_parameters, required
from judges.tagged_union import TaggedUnion
from workers.interval import Interval, NonNegative, Positive
from workers.learner.needs import Needs, needs_of
from workers.learner.pairwise_options import (
    BETA,
    ApoDownOptions,
    ApoZeroOptions,
    BcoPairOptions,
    CpoOptions,
    DiscopopOptions,
    DpoOptions,
    DpopOptions,
    ExoOptions,
    FDpoOptions,
    IpoOptions,
    LengthNormalizedDpoOptions,
    LengthRegularizedDpoOptions,
    NcaOptions,
    Options,
    OrpoOptions,
    RobustDpoOptions,
    SimpoOptions,
    SlicOptions,
    SppoOptions,
    XpoOptions,
)


class SftOptions(Options):
    """Supervised fine-tuning on the chosen of each pair (Preferred-FT), without a reference."""

    name: Literal["sft"] = "sft"

    @property
    def needs(self) -> Needs:
        return Needs(reference=False)

    @property
    def likelihood(self) -> float:
        return 1.0

    def implicit_reward(self, logps: Any, ref: Any, tokens: Any) -> Any:
        return logps / tokens


class PdpoOptions(Options):
    """DPO's loss expected under the policy itself, by its full gradient."""

    name: Literal["pdpo"] = "pdpo"
    beta: Positive = Field(default=0.1, description=BETA)
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
        return Needs(whole_update=whole, sampling_logprobs=self.weights != "none")


class KtoOptions(Options):
    """Kahneman–Tversky optimisation of unpaired labels, arXiv:2402.01306."""

    name: Literal["kto"] = "kto"
    beta: Positive = Field(default=0.1, description=BETA)
    desirable_weight: NonNegative = Field(default=1.0, description="λ_D")
    undesirable_weight: NonNegative = Field(default=1.0, description="λ_U")

    @property
    def needs(self) -> Needs:
        return Needs(records="unpaired", mismatched=True)


class BcoOptions(Options):
    """Binary classifier of unpaired labels with a running offset, arXiv:2404.04656."""

    name: Literal["bco"] = "bco"
    beta: Positive = Field(default=0.1, description=BETA)
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
    beta: Positive = Field(default=0.1, description=BETA)

    @property
    def needs(self) -> Needs:
        return Needs(records="ranked")


class NashMdOptions(Options):
    """Mirror descent to the Nash equilibrium of the judge's preferences, arXiv:2312.00886."""

    name: Literal["nash_md"] = "nash_md"
    beta: Positive = Field(default=0.1, description=BETA)
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
        SftOptions,
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
