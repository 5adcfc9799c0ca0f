"""Plackett–Luce against enumeration, Nash-MD against the gradient of its game."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.objective_helpers import central_differences, normal, relative_error, require_close
from workers.learner.objectives import PairLogps, RankedLogps, SampledLogps, build_objective

BETA = 0.4
POLICY_K = [-20.0, -13.5, -31.0, -18.0]
REF_K = [-22.0, -13.0, -29.5, -23.0]


def double(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ranked(policy: Tensor, ref: Tensor, keep: list[list[bool]] | None = None) -> RankedLogps:
    return RankedLogps(
        policy_GK=policy,
        ref_GK=ref,
        tokens_GK=torch.ones_like(ref),
        keep_mask_GK=torch.ones_like(ref, dtype=torch.bool) if keep is None else torch.tensor(keep),
    )


def negative_log_probability(ranking: tuple[int, ...]) -> float:
    """Completions are drawn one after the other, each in proportion to e^(βh) among those left."""
    strength = [math.exp(BETA * (p - r)) for p, r in zip(POLICY_K, REF_K, strict=True)]
    left, probability = list(ranking), 1.0
    for best in ranking:
        probability *= strength[best] / sum(strength[i] for i in left)
        left.remove(best)
    return -math.log(probability)


def test_every_ranking_of_four():
    rankings = list(itertools.permutations(range(4)))
    policy, ref = double(POLICY_K)[torch.tensor(rankings)], double(REF_K)[torch.tensor(rankings)]
    loss = build_objective({"name": "plackett_luce", "beta": BETA})(ranked(policy, ref)).loss
    require_close(loss.tolist(), [negative_log_probability(r) for r in rankings], 1e-12)
    # The 24 probabilities are a distribution; those with 0 before 2 make Bradley–Terry's P(0 ≻ 2).
    assert (-loss).exp().sum().item() == pytest.approx(1.0, rel=1e-12)
    first = torch.tensor([r.index(0) < r.index(2) for r in rankings])
    pair = 1 / (1 + math.exp(-BETA * (2.0 - -1.5)))
    assert (-loss)[first].exp().sum().item() == pytest.approx(pair, rel=1e-12)


def test_the_gradient_of_a_ranking():
    policy, ref = double([POLICY_K, POLICY_K[::-1]]).requires_grad_(), double([REF_K, REF_K[::-1]])
    objective = build_objective({"name": "plackett_luce", "beta": BETA})
    objective(ranked(policy, ref)).loss.sum().backward()
    wanted = central_differences(lambda p: objective(ranked(p, ref)).loss.sum(), policy.detach())
    require_close(policy.grad.flatten().tolist(), wanted.flatten().tolist(), 1e-8)
    assert policy.grad.abs().min() > 1e-3


def test_two_places_are_dpo():
    policy, ref = 5.0 * normal(0, 9, 2) - 40.0, 5.0 * normal(1, 9, 2) - 40.0
    two, sides = policy.clone().requires_grad_(), policy.clone().requires_grad_()
    loss = build_objective({"name": "plackett_luce", "beta": BETA})(ranked(two, ref)).loss
    dpo = build_objective({"name": "dpo", "beta": BETA})(
        PairLogps(
            policy_chosen=sides[:, 0],
            policy_rejected=sides[:, 1],
            ref_chosen=ref[:, 0],
            ref_rejected=ref[:, 1],
            chosen_tokens=torch.ones(9),
            rejected_tokens=torch.ones(9),
        )
    ).loss
    loss.sum().backward()
    dpo.sum().backward()
    assert loss.tolist() == pytest.approx(dpo.tolist(), rel=1e-12, abs=1e-14)
    assert two.grad.flatten().tolist() == pytest.approx(sides.grad.flatten().tolist(), abs=1e-14)


@pytest.mark.parametrize("padding", [0.0, -1e4, math.nan, math.inf])
def test_rankings_of_unlike_length(padding):
    keep = [[True] * 4, [True, True, True, False], [True, True, False, False], [True] + [False] * 3]
    policy, ref = double([POLICY_K] * 4), double([REF_K] * 4)
    policy = torch.where(torch.tensor(keep), policy, padding).requires_grad_()
    objective = build_objective({"name": "plackett_luce", "beta": BETA})
    loss = objective(ranked(policy, ref, keep)).loss
    loss.sum().backward()
    assert loss[3].item() == 0.0  # the only one is the first
    for row, count in enumerate((4, 3, 2, 1)):
        short = double([POLICY_K[:count]]).requires_grad_()
        alone = objective(ranked(short, double([REF_K[:count]]))).loss
        alone.sum().backward()
        assert loss[row].item() == pytest.approx(alone.item(), rel=1e-12, abs=1e-14)
        wanted = [*short.grad[0].tolist(), *[0.0] * (4 - count)]
        assert policy.grad[row].tolist() == pytest.approx(wanted, abs=1e-14)


# Nash-MD on a tabular policy: 5 responses, a judge whose preferences are no reward's.

REFERENCE_Y = normal(2, 5).log_softmax(-1)
POLICY_Y = (0.8 * normal(3, 5)).log_softmax(-1)
BEATS_YY = torch.sigmoid(2.0 * (normal(4, 5, 5) - normal(4, 5, 5).T))  # P(y ≻ y')


@pytest.mark.parametrize("mixture", [0.0, 0.3, 1.0])
def test_the_expected_gradient_is_that_of_the_regularised_game(mixture):
    """Over all y of the policy and y' of the mixture: ∇ of β KL(π, π_ref) − P(π ≻ mixture)."""
    objective = build_objective({"name": "nash_md", "beta": BETA, "mixture": mixture})
    assert objective.needs.opponent == mixture
    opponent_Y = ((1 - mixture) * POLICY_Y + mixture * REFERENCE_Y).softmax(-1)
    logits = POLICY_Y.clone().requires_grad_()
    logps_Y = logits.log_softmax(-1)
    y, opponent = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    loss = objective(
        SampledLogps(
            policy=logps_Y[y],
            ref=REFERENCE_Y[y],
            tokens=torch.ones(25),
            win_prob=BEATS_YY[y, opponent],
        )
    ).loss
    chance = POLICY_Y.exp()[y] * opponent_Y[opponent]
    (chance * loss).sum().backward()

    def game(logits: Tensor) -> Tensor:
        logps = logits.log_softmax(-1)
        kl = (logps.exp() * (logps - REFERENCE_Y)).sum()
        return BETA * kl - logps.exp() @ BEATS_YY @ opponent_Y

    wanted = central_differences(game, POLICY_Y)
    assert relative_error(logits.grad, wanted) < 1e-8
    assert wanted.norm() > 0.05


def test_a_sample_that_ties_is_only_held_to_the_reference():
    policy = double([-3.0]).requires_grad_()
    loss = build_objective({"name": "nash_md", "beta": 0.2})(
        SampledLogps(
            policy=policy, ref=double([-5.0]), tokens=torch.ones(1), win_prob=double([0.5])
        )
    ).loss
    loss.sum().backward()
    # 0.2 · 2 · (−3); the log-ratio is a constant: slope 0.2 · 2.
    assert loss.item() == pytest.approx(-1.2, rel=1e-12)
    assert policy.grad.item() == pytest.approx(0.4, rel=1e-12)
