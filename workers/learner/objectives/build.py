"""From the options of an objective to the function that computes it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from pydantic import TypeAdapter
from torch import Tensor

from judges.errors import UserError
from workers.learner.needs import Needs
from workers.learner.objective_options import (
    BcoOptions,
    KtoOptions,
    NashMdOptions,
    ObjectiveOptions,
    OwnOptions,
    PdpoOptions,
    PlackettLuceOptions,
    SftOptions,
)
from workers.learner.objectives import pairwise
from workers.learner.objectives.pdpo import importance_weight, pdpo_surrogate, score_baseline
from workers.learner.objectives.ranked import plackett_luce_loss
from workers.learner.objectives.records import (
    Logps,
    ObjectiveOutput,
    PairLogps,
    RankedLogps,
    SampledLogps,
    UnpairedLogps,
    required,
)
from workers.learner.objectives.running import RunningMean
from workers.learner.objectives.sampled import nash_md_loss
from workers.learner.objectives.unpaired import bco_loss, kto_kl, kto_loss
from workers.learner.pairwise_options import ExoOptions, Options, PairwiseOptions


class NonFiniteLossError(FloatingPointError):
    """A loss overflowed; the message names the example and its log-probabilities."""


class Objective(Protocol):
    """Computes one loss an example of the records it needs."""

    @property
    def needs(self) -> Needs:
        """What its records must hold."""
        ...

    def __call__(self, logps: Any) -> ObjectiveOutput:
        """The losses [B]. Raises NonFiniteLossError, ValueError for a record that lacks a field."""
        ...

    def state(self) -> dict[str, float]:
        """What a checkpoint must hold."""
        ...

    def load(self, state: Mapping[str, float]) -> None:
        """Take up what ``state`` gave."""
        ...


def build_objective(options: Options | Mapping[str, Any]) -> Objective:
    """The objective a config names; mappings are validated first.

    An objective of the user's own is called as ``fn(logps, **args)`` with the record it asked for
    and returns the loss of each example, a differentiable tensor [B]. Raises pydantic's
    ValidationError (a ValueError) for options out of range and UserError for a plug-in that cannot
    be loaded, does not take its args, or returns another shape.
    """
    if not isinstance(options, Options):
        adapter: TypeAdapter[Options] = TypeAdapter(ObjectiveOptions)
        options = adapter.validate_python(dict(options))
    match options:
        case OwnOptions():
            own = partial(_own, options.load(), options)
            return _Pure(options.name, options.needs, own)
        case BcoOptions():
            return _Bco(options)
        case SftOptions():
            return _Pure(options.name, options.needs, _sft)
        case PdpoOptions():
            return _Pure(options.name, options.needs, partial(_pdpo, options))
        case KtoOptions():
            return _Pure(options.name, options.needs, partial(_kto, options))
        case PlackettLuceOptions():
            return _Pure(options.name, options.needs, partial(_plackett_luce, options))
        case NashMdOptions():
            return _Pure(options.name, options.needs, partial(_nash_md, options))
        case PairwiseOptions():
            return _Pure(options.name, options.needs, partial(_pairwise, options))
    raise TypeError(f"{type(options).__name__}: not the options of an objective")


@dataclass(frozen=True, slots=True)
class _Pure:
    """An objective without memory."""

    name: str
    needs: Needs
    compute: Callable[[Any], ObjectiveOutput]

    def __call__(self, logps: Logps) -> ObjectiveOutput:
        output = self.compute(logps)
        _require_finite(self.name, logps, output.loss)
        return output

    def state(self) -> dict[str, float]:
        return {}

    def load(self, state: Mapping[str, float]) -> None:
        pass


class _Bco:
    """BCO with δ, the running mean of every β-scaled log-ratio it was called with."""

    def __init__(self, options: BcoOptions) -> None:
        self.needs: Needs = options.needs
        self._beta = options.beta
        self._delta = RunningMean()

    def __call__(self, logps: UnpairedLogps) -> ObjectiveOutput:
        self._delta.add((self._beta * logps.logratio.detach()).tolist())
        loss = bco_loss(logps, self._beta, self._delta.mean)
        _require_finite("bco", logps, loss)
        return ObjectiveOutput(loss, {"delta": torch.full_like(loss, self._delta.mean)})

    def state(self) -> dict[str, float]:
        return self._delta.state()

    def load(self, state: Mapping[str, float]) -> None:
        self._delta = RunningMean(**state)


PairLoss: TypeAlias = Callable[[PairLogps], Tensor]


PAIR_LOSSES: Mapping[str, Callable[..., Tensor]] = {
    "dpo": pairwise.dpo_loss,
    "robust_dpo": pairwise.robust_dpo_loss,
    "ipo": pairwise.ipo_loss,
    "slic": pairwise.slic_loss,
    "simpo": pairwise.simpo_loss,
    "orpo": pairwise.orpo_loss,
    "cpo": pairwise.cpo_loss,
    "length_normalized_dpo": pairwise.length_normalized_dpo_loss,
    "length_regularized_dpo": pairwise.length_regularized_dpo_loss,
    "dpop": pairwise.dpop_loss,
    "nca": pairwise.nca_loss,
    "sppo": pairwise.sppo_loss,
    "apo_zero": pairwise.apo_zero_loss,
    "apo_down": pairwise.apo_down_loss,
    "bco_pair": pairwise.bco_pair_loss,
    "discopop": pairwise.discopop_loss,
    "f_dpo": pairwise.f_dpo_loss,
    "xpo": pairwise.xpo_loss,
}
"""The loss of a pair whose label is certain; its arguments are the objective's own options."""


def _certain(options: PairwiseOptions) -> PairLoss:
    shared = set(PairwiseOptions.model_fields)
    return partial(PAIR_LOSSES[options.name], **options.model_dump(exclude=shared))


def _pairwise(options: PairwiseOptions, logps: PairLogps) -> ObjectiveOutput:
    """The preference term under the trust in each label, then likelihood and weight."""
    trusted = _trusted(logps, options.label_smoothing)
    if isinstance(options, ExoOptions):
        loss = pairwise.exo_loss(logps, options.beta, trusted)
    else:
        loss = _soft_label(_certain(options), logps, trusted)
    if options.likelihood:
        loss = loss + options.likelihood * pairwise.nll_loss(logps)
    if options.wpo:  # Eq. 2, arXiv:2406.11827
        chosen = required(logps.wpo_chosen, "wpo_chosen")
        loss = (chosen * required(logps.wpo_rejected, "wpo_rejected")).detach() * loss
    return ObjectiveOutput(loss)


def _trusted(logps: PairLogps, label_smoothing: float) -> Tensor:
    """P(the label is right) [B]: the judge's probability, trusted only to 1 − ε.

    Label smoothing is Mitchell's cDPO note.
    """
    label_prob = logps.label_prob
    if label_prob is None:
        label_prob = torch.ones_like(logps.policy_chosen)
    return label_prob * (1.0 - label_smoothing) + (1.0 - label_prob) * label_smoothing


def _soft_label(certain: PairLoss, logps: PairLogps, trusted: Tensor) -> Tensor:
    """``p·loss(chosen, rejected) + (1−p)·loss(rejected, chosen)``, [B]."""
    loss = certain(logps)
    doubted = (trusted < 1.0).nonzero().squeeze(-1)
    if not len(doubted):
        return loss
    other = certain(logps.take(doubted).swapped())
    return (trusted * loss).index_add(0, doubted, (1.0 - trusted[doubted]) * other)


def _sft(logps: PairLogps) -> ObjectiveOutput:
    return ObjectiveOutput(pairwise.nll_loss(logps))


def _pdpo(options: PdpoOptions, logps: PairLogps) -> ObjectiveOutput:
    certain: PairLoss = partial(pairwise.dpo_loss, beta=options.beta)
    loss = _soft_label(certain, logps, _trusted(logps, 0.0))
    baseline = score_baseline(options.baseline, loss, logps.prompt_ids)
    weight = importance_weight(options.weights, logps, options.clip)
    surrogate = pdpo_surrogate(logps, loss, baseline, weight, options.score_weight)
    return ObjectiveOutput(surrogate, {"preference_loss": loss.detach(), "weight": weight})


def _kto(options: KtoOptions, logps: UnpairedLogps) -> ObjectiveOutput:
    kl = kto_kl(logps)
    weights = (options.desirable_weight, options.undesirable_weight)
    loss = kto_loss(logps, options.beta, *weights, kl)
    return ObjectiveOutput(loss, {"kl": kl.expand_as(loss)})


def _plackett_luce(options: PlackettLuceOptions, logps: RankedLogps) -> ObjectiveOutput:
    return ObjectiveOutput(plackett_luce_loss(logps, options.beta))


def _nash_md(options: NashMdOptions, logps: SampledLogps) -> ObjectiveOutput:
    return ObjectiveOutput(nash_md_loss(logps, options.beta))


def _own(function: Callable[..., Tensor], options: OwnOptions, logps: Logps) -> ObjectiveOutput:
    try:
        loss = function(logps, **options.args)
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        line = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{line.filename}:{line.lineno}"
        raise UserError(
            f"objective.name={options.name}: it failed at {where}: {reason}: mend it"
        ) from error
    examples = _examples(logps).shape[:1]
    if not isinstance(loss, Tensor) or loss.shape != examples:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        what = "a pair" if isinstance(logps, PairLogps) else "an example"
        raise UserError(
            f"objective.name={options.name}: returned {got}; return one loss {what}, "
            f"a tensor of shape {tuple(examples)}"
        )
    return ObjectiveOutput(loss)


def _examples(logps: Logps) -> Tensor:
    match logps:
        case PairLogps():
            return logps.policy_chosen
        case RankedLogps():
            return logps.policy_GK
        case _:
            return logps.policy


def _require_finite(name: str, logps: Logps, loss: Tensor) -> None:
    """Raises NonFiniteLossError with the first example at fault: its prompt and its numbers."""
    wrong = (~torch.isfinite(loss.detach())).nonzero().flatten().tolist()
    if not wrong:
        return
    row = wrong[0]
    what = "pair" if isinstance(logps, PairLogps) else "example"
    prompt = "" if logps.prompt_ids is None else f" (prompt {int(logps.prompt_ids[row])})"
    shown = ", ".join(
        f"{name} {values[row].tolist()}" for name, values in _columns(logps) if values is not None
    )
    raise NonFiniteLossError(
        f"objective {name}: the loss of {what} {row}{prompt} is {loss[row].item()} at {shown}: "
        "these log-probabilities are out of its range; lower learner.learning_rate, or use an "
        "objective that grows more slowly (e.g. dpo)"
    )


def _columns(logps: Logps) -> list[tuple[str, Tensor | None]]:
    """The log-probabilities of a record, by name."""
    match logps:
        case PairLogps():
            places = ["_chosen", "_rejected"]
        case RankedLogps():
            places = ["_GK"]
        case _:
            places = [""]
    whose = ("policy", "ref")
    return [(f"{w}{place}", getattr(logps, f"{w}{place}")) for w in whose for place in places]
