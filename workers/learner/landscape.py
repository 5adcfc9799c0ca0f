"""What an objective does to one pair: its loss and gradient over a plane of likelihoods.

The plane is (x₁, x₂) = (π/π_ref of the chosen, of the rejected completion), or its logarithm. Loss
and gradient are the objective's own, by autograd through ``build_objective``; numpy comes out.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from judges.errors import UserError
from workers.learner.needs import Needs
from workers.learner.objective_options import BcoOptions, KtoOptions
from workers.learner.objectives import (
    NonFiniteLossError,
    Objective,
    PairLogps,
    RankedLogps,
    SampledLogps,
    TokenLogprobs,
    UnpairedLogps,
    build_objective,
)
from workers.learner.pairwise_options import Options
from workers.messages import DoubleArray

TOKENS = 20
REFERENCE_LOGPS = -20.0
"""Of either completion: its tokens, and its log-probability under the reference in nats."""

_EXACT = 1.0 + 1e-9  # rounding does not decide what lies on a boundary


class Region(enum.IntEnum):
    """What the gradient in (x₁, x₂) does; the pulls are −∂L/∂x₁ (up) and ∂L/∂x₂ (down).

    ``SADDLE``: both, within a factor of 2 of each other. ``COLLAPSE``: the rejected is pushed down
    more than twice as hard as the chosen is pulled up; ``RESCUE`` the other way round.
    ``REVERSED``: the chosen is pushed down or the rejected pulled up. ``SETTLED``: no gradient.
    """

    SADDLE = 0
    COLLAPSE = 1
    RESCUE = 2
    REVERSED = 3
    SETTLED = 4


@dataclass(frozen=True, slots=True, eq=False)
class Plane:
    """Loss and its gradient [N, N] over a square: row i is the rejected's, column j the chosen's.

    ``axis`` [N] has the values of both coordinates, that gradients are taken with respect to.
    """

    axis: DoubleArray
    loss: DoubleArray
    chosen_gradient: DoubleArray
    rejected_gradient: DoubleArray


def ratio_plane(options: Options, axis: DoubleArray) -> Plane:
    """Over x = π/π_ref; gradients ∂L/∂x. Raises UserError where the objective has no number."""
    return _plane(options, axis, log=False)


def log_plane(options: Options, axis: DoubleArray) -> Plane:
    """Over log π/π_ref in nats; gradients ∂L/∂log x. Raises as ``ratio_plane``."""
    return _plane(options, axis, log=True)


def regions(plane: Plane) -> npt.NDArray[np.int8]:
    """The ``Region`` [N, N] of each point of a ``ratio_plane``, from its gradient alone."""
    up, down = -plane.chosen_gradient, plane.rejected_gradient
    found = np.full(up.shape, Region.REVERSED, np.int8)
    forward = (up >= 0.0) & (down >= 0.0)
    found[forward] = Region.SADDLE
    found[forward & (down > 2.0 * _EXACT * up)] = Region.COLLAPSE
    found[forward & (up > 2.0 * _EXACT * down)] = Region.RESCUE
    found[(up == 0.0) & (down == 0.0)] = Region.SETTLED
    return found


def shares(found: npt.NDArray[np.int8]) -> Mapping[Region, float]:
    """The share of the points in each region."""
    return {region: float(np.mean(found == region)) for region in Region}


def is_surrogate(options: Options) -> bool:
    """Whether the gradient is another than the slope of the loss's own value.

    So it is where a part of the loss is held constant on purpose (PDPO, Nash-MD). The loss is
    differenced along (1, −½) in log space; the median passes over kinks.
    """
    axis, step = np.linspace(-2.0, 2.0, 10), 1e-4
    plane, objective = log_plane(options, axis), _build(options)
    chosen, rejected = _points(axis)
    ahead = _losses(objective, options, chosen + step, rejected - 0.5 * step)
    behind = _losses(objective, options, chosen - step, rejected + 0.5 * step)
    slope = ((ahead - behind) / (2.0 * step)).detach().numpy()
    gradient = (plane.chosen_gradient - 0.5 * plane.rejected_gradient).ravel()
    return bool(np.median(np.abs(slope - gradient)) > 0.01 * np.median(np.abs(slope)))


def _plane(options: Options, axis: DoubleArray, log: bool) -> Plane:
    first, second = (point.requires_grad_() for point in _points(axis))
    chosen, rejected = (first, second) if log else (first.log(), second.log())
    loss = _losses(_build(options), options, chosen, rejected)
    if not loss.requires_grad:
        raise UserError(
            f"objective.name={options.name}: its loss does not depend on the policy: compute it "
            "from the record's log-probabilities, without detach()"
        )
    gradients = torch.autograd.grad(loss.sum(), (first, second), materialize_grads=True)
    wrong = torch.stack([~gradient.isfinite() for gradient in gradients]).any(0).nonzero()
    if len(wrong):
        x1, x2 = (side.detach()[wrong[0]].exp().item() for side in (chosen, rejected))
        raise UserError(
            f"objective.name={options.name}: its gradient is not finite at x₁ = {x1:.4g}, "
            f"x₂ = {x2:.4g}: use other hyper-parameters, or compute it in a stabler form"
        )
    values = (loss.detach(), *gradients)
    return Plane(axis, *(value.double().numpy().reshape(len(axis), -1) for value in values))


def _points(axis: DoubleArray) -> tuple[Tensor, Tensor]:
    """The coordinates [N·N] of chosen and rejected, in double precision."""
    values = torch.tensor(axis, dtype=torch.float64)
    chosen, rejected = torch.meshgrid(values, values, indexing="xy")
    return chosen.reshape(-1), rejected.reshape(-1)


def _build(options: Options) -> Objective:
    objective = build_objective(options)
    if isinstance(options, BcoOptions):  # so long a past that δ stays where it is
        objective.load({"mean": 0.0, "count": 1e18})
    return objective


def one_at_a_time(options: Options) -> bool:
    """Whether points would change each other's loss. What KTO and BCO share is held at 0."""
    return options.needs.whole_update and not isinstance(options, KtoOptions | BcoOptions)


def _losses(objective: Objective, options: Options, chosen: Tensor, rejected: Tensor) -> Tensor:
    """The loss [B] at these log-ratios [B] of chosen and rejected."""
    try:
        if not one_at_a_time(options):
            return _batch(objective, chosen, rejected)
        beside = chosen.new_zeros(1)  # the update's other pair stands at the reference
        updates = [
            _batch(objective, torch.cat([chosen[i : i + 1], beside]), torch.cat([other, beside]))
            for i, other in enumerate(rejected[:, None])
        ]
        return torch.stack([losses[0] for losses in updates])
    except NonFiniteLossError as error:
        raise UserError(str(error)) from error


@dataclass(frozen=True, slots=True, eq=False)
class _Scored:
    """Columns [B] over completions of ``TOKENS`` tokens at these log-ratios [B]."""

    policy: Tensor
    ref: Tensor | None
    tokens: Tensor
    logprobs: TokenLogprobs | None


def _scored(logratio: Tensor, needs: Needs) -> _Scored:
    policy = REFERENCE_LOGPS + logratio
    ref = torch.full_like(policy, REFERENCE_LOGPS).detach() if needs.reference else None
    tokens = torch.full(policy.shape, TOKENS)
    per_token = None
    if needs.per_token:
        per_token = TokenLogprobs(
            policy_BT=_spread(policy),
            ref_BT=None if ref is None else _spread(ref),
            keep_mask_BT=torch.ones(len(policy), TOKENS, dtype=torch.bool),
        )
    return _Scored(policy, ref, tokens, per_token)


def _spread(logps: Tensor) -> Tensor:
    """[B, T] log-probabilities of tokens from those [B] of completions: every token alike."""
    return (logps / TOKENS)[:, None].expand(-1, TOKENS)


def _batch(objective: Objective, chosen: Tensor, rejected: Tensor) -> Tensor:
    """The losses [B] of B examples in one record; of single completions, the two sides' sum."""
    count = len(chosen)
    match objective.needs.records:
        case "pairs":
            return objective(_pairs(chosen, rejected, objective.needs)).loss
        case "ranked":
            return objective(_rankings(chosen, rejected, objective.needs)).loss
        case "unpaired":
            loss = objective(_labelled(chosen, rejected, objective.needs)).loss
        case "sampled":
            loss = objective(_samples(chosen, rejected, objective.needs)).loss
    return loss[:count] + loss[count:]


def _pairs(chosen: Tensor, rejected: Tensor, needs: Needs) -> PairLogps:
    one, other = _scored(chosen, needs), _scored(rejected, needs)
    return PairLogps(
        policy_chosen=one.policy,
        policy_rejected=other.policy,
        ref_chosen=one.ref,
        ref_rejected=other.ref,
        chosen_tokens=one.tokens,
        rejected_tokens=other.tokens,
        label_prob=torch.ones_like(chosen).detach(),
        behaviour_chosen=one.policy.detach(),
        behaviour_rejected=other.policy.detach(),
        wpo_chosen=torch.ones_like(chosen).detach(),
        wpo_rejected=torch.ones_like(chosen).detach(),
        prompt_ids=torch.arange(len(chosen)),
        lag=torch.zeros_like(one.tokens),
        chosen_from_reference=torch.zeros(len(chosen), dtype=torch.bool),
        chosen_logprobs=one.logprobs,
        rejected_logprobs=other.logprobs,
    )


def _rankings(chosen: Tensor, rejected: Tensor, needs: Needs) -> RankedLogps:
    both = _scored(torch.stack([chosen, rejected], -1).flatten(), needs)
    shape = (len(chosen), 2)
    return RankedLogps(
        policy_GK=both.policy.reshape(shape),
        ref_GK=None if both.ref is None else both.ref.reshape(shape),
        tokens_GK=both.tokens.reshape(shape),
        keep_mask_GK=torch.ones(shape, dtype=torch.bool),
        behaviour_GK=both.policy.detach().reshape(shape),
        prompt_ids=torch.arange(len(chosen)),
        lag=torch.zeros(len(chosen), dtype=torch.int64),
        logprobs=both.logprobs,
    )


def _labelled(chosen: Tensor, rejected: Tensor, needs: Needs) -> UnpairedLogps:
    """All that are desirable, then all that are not; z = 0."""
    both = _scored(torch.cat([chosen, rejected]), needs)
    mismatched = chosen.new_full((1,), REFERENCE_LOGPS) if needs.mismatched else None
    return UnpairedLogps(
        policy=both.policy,
        ref=both.ref,
        tokens=both.tokens,
        desirable=torch.arange(len(both.policy)) < len(chosen),
        mismatched_policy=mismatched,
        mismatched_ref=mismatched,
        behaviour=both.policy.detach(),
        prompt_ids=torch.arange(len(chosen)).repeat(2),
        lag=torch.zeros_like(both.tokens),
        logprobs=both.logprobs,
    )


def _samples(chosen: Tensor, rejected: Tensor, needs: Needs) -> SampledLogps:
    """All that win for certain, then all that lose."""
    both = _scored(torch.cat([chosen, rejected]), needs)
    return SampledLogps(
        policy=both.policy,
        ref=both.ref,
        tokens=both.tokens,
        win_prob=(torch.arange(len(both.policy)) < len(chosen)).to(both.policy.dtype),
        behaviour=both.policy.detach(),
        prompt_ids=torch.arange(len(chosen)).repeat(2),
        lag=torch.zeros_like(both.tokens),
        logprobs=both.logprobs,
    )
