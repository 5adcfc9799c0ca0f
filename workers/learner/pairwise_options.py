"""Options of the objectives of a pair, by config name: torch-free.

The formulas are in ``workers/learner/objectives/pairwise.py``; definitions and sources in
docs/objectives.md.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from workers.interval import FlipProbability, Interval, NonNegative, Positive
from workers.learner.needs import Needs

BETA = "Strength of the pull towards the reference: larger keeps the policy nearer"


class Options(BaseModel):
    """What every objective has: a name, what it needs, and an implicit reward to log."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="Which objective")

    @property
    def needs(self) -> Needs:
        """What the learner must give this objective."""
        return Needs()

    @property
    def likelihood(self) -> float:
        """Weight of −log π(chosen)/tokens in the loss."""
        return 0.0

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

    @property
    def likelihood(self) -> float:
        return self.nll_weight


class DpoOptions(PairwiseOptions):
    """Direct preference optimisation, arXiv:2305.18290."""

    name: Literal["dpo"] = "dpo"
    beta: Positive = Field(default=0.1, description=BETA)


class RobustDpoOptions(PairwiseOptions):
    """DPO unbiased under labels flipped at a known rate, arXiv:2403.00409."""

    name: Literal["robust_dpo"] = "robust_dpo"
    beta: Positive = Field(default=0.1, description=BETA)
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

    @property
    def likelihood(self) -> float:
        """Its own 1, and what ``nll_weight`` adds."""
        return 1.0 + self.nll_weight

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
    beta: Positive = Field(default=0.1, description=BETA)


class LengthRegularizedDpoOptions(PairwiseOptions):
    """DPO with a penalty on length, arXiv:2403.19159."""

    name: Literal["length_regularized_dpo"] = "length_regularized_dpo"
    beta: Positive = Field(default=0.1, description=BETA)
    length_alpha: NonNegative = Field(default=0.01, description="Nats of margin a token is worth")


class DpopOptions(PairwiseOptions):
    """DPO-Positive: the chosen's likelihood may not fall, arXiv:2402.13228."""

    name: Literal["dpop"] = "dpop"
    beta: Positive = Field(default=0.1, description=BETA)
    positive_lambda: NonNegative = Field(default=5.0, description="Penalty λ on a falling chosen")


class ExoOptions(PairwiseOptions):
    """Reverse KL to the labels' distribution, arXiv:2402.00856."""

    name: Literal["exo"] = "exo"
    beta: Positive = Field(default=0.1, description=BETA)
    label_smoothing: Annotated[float, Interval("(0, 0.5)")] = Field(
        default=1e-3, description="ε of the target distribution (1 − ε, ε)"
    )


class NcaOptions(PairwiseOptions):
    """Noise-contrastive alignment of absolute likelihoods, arXiv:2402.05369."""

    name: Literal["nca"] = "nca"
    beta: Positive = Field(default=0.1, description=BETA)


class SppoOptions(PairwiseOptions):
    """Self-play preference optimisation, squared, arXiv:2405.00675."""

    name: Literal["sppo"] = "sppo"
    beta: Positive = Field(default=0.1, description="1/η of the paper: the targets are ±1/(2β)")


class ApoZeroOptions(PairwiseOptions):
    """Anchored: chosen up, rejected down, arXiv:2408.06266."""

    name: Literal["apo_zero"] = "apo_zero"
    beta: Positive = Field(default=0.1, description=BETA)


class ApoDownOptions(PairwiseOptions):
    """Anchored: both down, the rejected more, arXiv:2408.06266."""

    name: Literal["apo_down"] = "apo_down"
    beta: Positive = Field(default=0.1, description=BETA)


class BcoPairOptions(PairwiseOptions):
    """Binary classifier on each side of a pair, δ = 0, arXiv:2404.04656."""

    name: Literal["bco_pair"] = "bco_pair"
    beta: Positive = Field(default=0.1, description=BETA)


class DiscopopOptions(PairwiseOptions):
    """A loss found by search: logistic and exponential, blended, arXiv:2406.08414."""

    name: Literal["discopop"] = "discopop"
    beta: Positive = Field(default=0.1, description=BETA)
    tau: Positive = Field(default=0.05, description="Temperature τ of the blend")


class FDpoOptions(PairwiseOptions):
    """DPO for another divergence than reverse KL, arXiv:2309.16240."""

    name: Literal["f_dpo"] = "f_dpo"
    beta: Positive = Field(default=0.1, description=BETA)
    divergence: Literal["forward_kl", "jensen_shannon"] = Field(
        default="jensen_shannon", description="Divergence that holds the policy to its reference"
    )


class XpoOptions(PairwiseOptions):
    """DPO between a sample of the policy and one of the reference, optimistic, arXiv:2405.21046."""

    name: Literal["xpo"] = "xpo"
    beta: Positive = Field(default=0.1, description=BETA)
    alpha: NonNegative = Field(default=1e-5, description="Weight α of log π(reference's sample)")

    @property
    def needs(self) -> Needs:
        return Needs(collisions=self.wpo, opponent=1.0)
