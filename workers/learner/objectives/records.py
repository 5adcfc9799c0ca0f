"""What an objective is given, and what it returns.

Every log-probability is a sum over completion tokens, a sampled EOS included, at temperature 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TokenLogprobs:
    """Log-probabilities [B, T] token by token, padded on the right where ``keep_mask`` is false.

    ``ref_BT`` is None where the objective has no reference.
    """

    policy_BT: Tensor
    ref_BT: Tensor | None
    keep_mask_BT: Tensor


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PairLogps:
    """B pairs: log-probabilities [B] of chosen and rejected under policy and reference.

    ``ref_*`` are constants, None without a reference; ``*_tokens`` [B] are token counts;
    ``label_prob`` [B] is P(chosen is better), None meaning 1. ``behaviour_*`` [B] are
    log-probabilities under the distribution really sampled from, None meaning the policy itself.
    ``wpo_*`` [B] are WPO's ω of each side. ``prompt_ids`` [B] tell prompts apart, None meaning that
    each pair has a prompt of its own. ``lag`` [B] is learner version − version that sampled the
    pair. ``chosen_from_reference`` [B] says which side the reference wrote (XPO). ``*_logprobs``
    are there for an objective that asked for them.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    label_prob: Tensor | None = None
    behaviour_chosen: Tensor | None = None
    behaviour_rejected: Tensor | None = None
    wpo_chosen: Tensor | None = None
    wpo_rejected: Tensor | None = None
    prompt_ids: Tensor | None = None
    lag: Tensor | None = None
    chosen_from_reference: Tensor | None = None
    chosen_logprobs: TokenLogprobs | None = None
    rejected_logprobs: TokenLogprobs | None = None

    @property
    def chosen_logratio(self) -> Tensor:
        """w = log π(y_w|x) − log π_ref(y_w|x), [B] nats."""
        return self.policy_chosen - required(self.ref_chosen, "ref_chosen")

    @property
    def rejected_logratio(self) -> Tensor:
        """l = log π(y_l|x) − log π_ref(y_l|x), [B] nats."""
        return self.policy_rejected - required(self.ref_rejected, "ref_rejected")

    @property
    def margin(self) -> Tensor:
        """d = w − l, [B] nats."""
        return self.chosen_logratio - self.rejected_logratio

    def swapped(self) -> PairLogps:
        """The pairs as they would be had the label been the other."""
        sides: dict[str, Any] = {}
        for item in fields(self):
            if "chosen" in item.name and item.name != "chosen_from_reference":
                other = item.name.replace("chosen", "rejected")
                sides[item.name], sides[other] = getattr(self, other), getattr(self, item.name)
        origin = self.chosen_from_reference
        return replace(
            self, **sides, chosen_from_reference=None if origin is None else ~origin.bool()
        )

    def take(self, rows: Tensor) -> PairLogps:
        """The pairs of these rows, by index or mask; token by token they are left out."""
        columns = {item.name: getattr(self, item.name) for item in fields(self)}
        kept: dict[str, Any] = {
            name: value[rows] if isinstance(value, Tensor) else None
            for name, value in columns.items()
        }
        return replace(self, **kept)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class UnpairedLogps:
    """B completions, each desirable or not: log-probabilities [B] under policy and reference.

    ``mismatched_*`` [M] are those of completions under prompts that they were not written for,
    constants. ``density_ratio`` [B] weighs undesirable completions (BCO's UDM), None meaning 1. The
    other fields are as in ``PairLogps``.
    """

    policy: Tensor
    ref: Tensor | None = None
    tokens: Tensor
    desirable: Tensor
    mismatched_policy: Tensor | None = None
    mismatched_ref: Tensor | None = None
    density_ratio: Tensor | None = None
    behaviour: Tensor | None = None
    prompt_ids: Tensor | None = None
    lag: Tensor | None = None
    logprobs: TokenLogprobs | None = None

    @property
    def logratio(self) -> Tensor:
        """log π(y|x) − log π_ref(y|x), [B] nats."""
        return self.policy - required(self.ref, "ref")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RankedLogps:
    """G rankings of up to K completions, best first: log-probabilities [G, K].

    ``keep_mask_GK`` is false past the end of a ranking. The other fields are as in ``PairLogps``;
    ``logprobs`` has a row for each place of each ranking, G·K in all.
    """

    policy_GK: Tensor
    ref_GK: Tensor | None = None
    tokens_GK: Tensor
    keep_mask_GK: Tensor
    behaviour_GK: Tensor | None = None
    prompt_ids: Tensor | None = None
    lag: Tensor | None = None
    logprobs: TokenLogprobs | None = None

    @property
    def logratio(self) -> Tensor:
        """log π(y|x) − log π_ref(y|x), [G, K] nats."""
        return self.policy_GK - required(self.ref_GK, "ref_GK")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SampledLogps:
    """B samples of the policy: log-probabilities [B], and P(better than its opponent) [B].

    The other fields are as in ``PairLogps``.
    """

    policy: Tensor
    ref: Tensor | None = None
    tokens: Tensor
    win_prob: Tensor
    behaviour: Tensor | None = None
    prompt_ids: Tensor | None = None
    lag: Tensor | None = None
    logprobs: TokenLogprobs | None = None

    @property
    def logratio(self) -> Tensor:
        """log π(y|x) − log π_ref(y|x), [B] nats."""
        return self.policy - required(self.ref, "ref")


Logps: TypeAlias = PairLogps | UnpairedLogps | RankedLogps | SampledLogps


@dataclass(frozen=True, slots=True, eq=False)
class ObjectiveOutput:
    """``loss`` [B], one value an example, differentiable; an update takes the mean over all.

    ``measures`` [B] each are constants worth logging, e.g. KTO's ``kl``.
    """

    loss: Tensor
    measures: Mapping[str, Tensor] = field(default_factory=dict)


def required(value: Tensor | None, name: str) -> Tensor:
    """The value; raises ValueError where a record came without it."""
    if value is None:
        raise ValueError(f"this objective needs {name}: give it in the record")
    return value
