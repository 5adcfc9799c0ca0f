"""PDPO's estimator by enumeration: its expectation is the gradient of J(θ) = E_{y,y'∼π}[L].

A tabular policy; suffixes: X prompts, Y responses of a prompt, B pairs. J's gradient comes from
central differences of the sum over all pairs of all prompts.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.objective_helpers import central_differences, normal, relative_error
from workers.learner.objectives import ObjectiveOutput, PairLogps, build_objective
from workers.learner.objectives.pdpo import importance_weight, pdpo_surrogate, score_baseline
from workers.learner.statistics import effective_sample_share

BETA = 0.7


class World:
    """Prompts with their policy, reference and judge, and every ordered pair of responses."""

    def __init__(self, prompts: int, responses: int, soft: bool = False) -> None:
        self.logits_XY = 1.2 * normal(prompts, prompts, responses)
        self.reference_XY = (1.2 * normal(7, prompts, responses)).log_softmax(-1)
        self.behaviour_XY = (1.2 * normal(8, prompts, responses)).log_softmax(-1)
        reward_XY = normal(9, prompts, responses)
        every = itertools.product(range(prompts), range(responses), range(responses))
        x, y, other = torch.tensor(list(every)).T
        # The judge: what has the higher reward is chosen, for certain or by Bradley–Terry.
        swap = reward_XY[x, y] < reward_XY[x, other]
        self.x = x
        self.chosen, self.rejected = torch.where(swap, other, y), torch.where(swap, y, other)
        margin = reward_XY[x, self.chosen] - reward_XY[x, self.rejected]
        self.label_prob = torch.sigmoid(margin) if soft else torch.ones_like(margin)

    def pairs(self, logits_XY: Tensor, rows: Tensor | None = None) -> PairLogps:
        """These of the pairs, all by default."""
        rows = torch.arange(len(self.x)) if rows is None else rows
        x, chosen, rejected = self.x[rows], self.chosen[rows], self.rejected[rows]
        logps_XY = logits_XY.log_softmax(-1)
        return PairLogps(
            policy_chosen=logps_XY[x, chosen],
            policy_rejected=logps_XY[x, rejected],
            ref_chosen=self.reference_XY[x, chosen],
            ref_rejected=self.reference_XY[x, rejected],
            chosen_tokens=torch.ones_like(x),
            rejected_tokens=torch.ones_like(x),
            label_prob=self.label_prob[rows],
            prompt_ids=x,
        )

    def with_behaviour(self, logps: PairLogps) -> PairLogps:
        return replace(
            logps,
            behaviour_chosen=self.behaviour_XY[self.x, self.chosen],
            behaviour_rejected=self.behaviour_XY[self.x, self.rejected],
        )

    def chance(self, logps_XY: Tensor) -> Tensor:
        """Of a uniform prompt and two of its samples being each pair, [B]."""
        both = logps_XY[self.x, self.chosen] + logps_XY[self.x, self.rejected]
        return both.exp() / len(self.logits_XY)

    def preference_loss(self, logits_XY: Tensor) -> Tensor:
        """L [B] of every pair, from its definition."""
        ratio_XY = logits_XY.log_softmax(-1) - self.reference_XY
        u = BETA * (ratio_XY[self.x, self.chosen] - ratio_XY[self.x, self.rejected])
        right, wrong = torch.log1p(torch.exp(-u)), torch.log1p(torch.exp(u))
        return self.label_prob * right + (1 - self.label_prob) * wrong

    def true_gradient(self) -> Tensor:
        """∇J, [X, Y]."""

        def j(logits_XY: Tensor) -> Tensor:
            chance_B = self.chance(logits_XY.log_softmax(-1))
            return (chance_B * self.preference_loss(logits_XY)).sum()

        return central_differences(j, self.logits_XY)

    def expected_gradient(self, *, sampler_XY: Tensor | None = None, **options: Any) -> Tensor:
        """Of the surrogate, over all pairs as the policy or another sampler draws them."""
        logits_XY = self.logits_XY.clone().requires_grad_()
        logps = self.pairs(logits_XY)
        if sampler_XY is not None:
            logps = self.with_behaviour(logps)
        drawn_from = logits_XY.log_softmax(-1) if sampler_XY is None else sampler_XY
        surrogate = pdpo(**options)(logps).loss
        weighted = (self.chance(drawn_from).detach() * surrogate).sum()
        return torch.autograd.grad(weighted, logits_XY)[0]


def pdpo(**options: Any) -> Any:
    return build_objective({"name": "pdpo", "beta": BETA, "score_weight": 1.0, **options})


WORLDS = {
    "a prompt": World(1, 6),
    "three prompts": World(3, 6),
    "soft labels": World(2, 5, soft=True),
}


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("baseline", ["ln2", "none"])
def test_the_expected_gradient_is_that_of_j(name, baseline):
    world = WORLDS[name]
    wanted = world.true_gradient()
    found = world.expected_gradient(baseline=baseline)
    assert relative_error(found, wanted) < 1e-6
    # Without the score part, or with a minus before it, it is another gradient.
    dpo_part = world.expected_gradient(baseline=baseline, score_weight=0.0)
    assert relative_error(dpo_part, wanted) > 0.2
    assert relative_error(2 * dpo_part - found, wanted) > 0.4


@pytest.mark.parametrize("score_weight", [0.1, 0.5])
def test_the_score_weight_scales_the_score_part_only(score_weight):
    world = WORLDS["three prompts"]
    dpo_part, whole = (world.expected_gradient(score_weight=s) for s in (0.0, 1.0))
    found = world.expected_gradient(score_weight=score_weight)
    assert relative_error(found, dpo_part + score_weight * (whole - dpo_part)) < 1e-12


def test_without_the_score_part_it_is_dpo():
    world = WORLDS["soft labels"]
    logps = world.pairs(world.logits_XY)
    dpo = build_objective({"name": "dpo", "beta": BETA})(logps).loss
    output = pdpo(score_weight=0.0)(logps)
    assert output.loss.tolist() == pytest.approx(dpo.tolist(), rel=1e-12)
    # J is logged, whatever the surrogate's value is.
    assert pdpo()(logps).measures["preference_loss"].tolist() == pytest.approx(dpo.tolist())


def test_ln_2_makes_the_estimate_steadier():
    world = WORLDS["a prompt"]
    chance = world.chance(world.logits_XY.log_softmax(-1)).tolist()

    def spread(baseline: str) -> float:
        """Standard deviation of the estimate of one pair, over |∇J|."""
        mean, variance = world.true_gradient(), 0.0
        for row, p in enumerate(chance):
            logits = world.logits_XY.clone().requires_grad_()
            loss = pdpo(baseline=baseline)(world.pairs(logits, torch.tensor([row]))).loss.sum()
            (gradient,) = torch.autograd.grad(loss, logits)
            variance += p * float((gradient - mean).square().sum())
        return math.sqrt(variance) / float(mean.norm())

    assert spread("ln2") < 0.8 * spread("none")


# Leave-one-out: every batch of one pair of prompt 1 and two of prompt 0 that share a completion.

SMALL = World(2, 3)
BATCHES = list(itertools.product(range(3), repeat=5))


def mean_over_batches(surrogate: Any) -> Tensor:
    """E over all batches of the gradient of the mean of a surrogate of its pairs, [X, Y].

    Prompt 0's pairs weigh a half each, so that each prompt counts once, as in J.
    """
    logits_XY = SMALL.logits_XY.clone().requires_grad_()
    log_policy = SMALL.logits_XY.log_softmax(-1)
    row = {key: i for i, key in enumerate(itertools.product(range(2), range(3), range(3)))}
    total = torch.zeros(())
    for a, b, c, d, e in BATCHES:  # a, b, c answer prompt 0; d, e prompt 1
        rows = torch.tensor([row[0, a, b], row[0, a, c], row[1, d, e]])
        chance = (log_policy[0, [a, b, c]].sum() + log_policy[1, [d, e]].sum()).exp()
        loss = surrogate(SMALL.pairs(logits_XY, rows))
        total = total + chance * (loss * torch.tensor([0.25, 0.25, 0.5])).sum()
    return torch.autograd.grad(total, logits_XY)[0]


def with_baseline(baseline_of: Any) -> Any:
    """The surrogate with another baseline, a function of the losses of a batch."""
    dpo = build_objective({"name": "dpo", "beta": BETA})

    def surrogate(logps: PairLogps) -> Tensor:
        loss = dpo(logps).loss
        return pdpo_surrogate(logps, loss, baseline_of(loss), torch.ones_like(loss), 1.0)

    return surrogate


def test_leave_one_out_is_unbiased():
    wanted = SMALL.true_gradient()
    found = mean_over_batches(lambda logps: pdpo(baseline="leave_one_out")(logps).loss)
    assert relative_error(found, wanted) < 1e-6


@pytest.mark.parametrize(
    "baseline_of",
    [
        pytest.param(lambda loss: loss.mean().expand(3), id="mean with the pair itself"),
        pytest.param(lambda loss: (loss.sum() - loss) / 2, id="pairs of the same prompt"),
    ],
)
def test_other_means_are_biased(baseline_of):
    found = mean_over_batches(with_baseline(baseline_of))
    assert relative_error(found, SMALL.true_gradient()) > 0.05


def test_pairs_of_a_prompt_are_not_in_each_others_baseline():
    loss = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)

    def baseline(prompts: list[int] | None) -> list[float]:
        ids = None if prompts is None else torch.tensor(prompts)
        return score_baseline("leave_one_out", loss, ids).tolist()

    assert baseline([5, 5, 3, 9]) == pytest.approx([6.0, 6.0, 11 / 3, 7 / 3], rel=1e-12)
    # Without ids each has a prompt of its own; with one prompt there are no others.
    assert baseline(None) == pytest.approx([14 / 3, 13 / 3, 11 / 3, 7 / 3], rel=1e-12)
    assert baseline([2, 2, 2, 2]) == [0.0] * 4


def test_a_baseline_is_made_where_the_losses_are():
    loss = torch.empty(3, device="meta")
    assert score_baseline("leave_one_out", loss, None).device == loss.device


# Importance weights: pairs from another sampler than the policy.


@pytest.mark.parametrize("name", WORLDS)
def test_raw_weights_give_the_gradient_on_policy(name):
    world = WORLDS[name]
    wanted = world.true_gradient()
    found = world.expected_gradient(weights="raw", sampler_XY=world.behaviour_XY)
    assert relative_error(found, wanted) < 1e-6
    unweighted = world.expected_gradient(weights="none", sampler_XY=world.behaviour_XY)
    assert relative_error(unweighted, wanted) > 0.2


def gradients_by_pair(weights: str, clip: float = 2.0) -> tuple[ObjectiveOutput, Tensor]:
    """What the objective returns for all pairs, and the gradient of each loss [B, X, Y]."""
    world = WORLDS["three prompts"]
    logits = world.logits_XY.clone().requires_grad_()
    output = pdpo(weights=weights, clip=clip)(world.with_behaviour(world.pairs(logits)))
    each = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in output.loss]
    return output, torch.stack(each)


def ratios() -> Tensor:
    """π(y)π(y') / (μ(y)μ(y')) of all pairs, [B]."""
    world = WORLDS["three prompts"]
    return world.chance(world.logits_XY.log_softmax(-1)) / world.chance(world.behaviour_XY)


@pytest.mark.parametrize("clip", [0.5, 2.0])
def test_clipped_weights_keep_the_score_part(clip):
    _, unweighted = gradients_by_pair("none")
    output, clipped = gradients_by_pair("clipped", clip)
    wanted = ratios().clamp_max(clip)
    assert 0.2 < float((wanted == clip).double().mean()) < 0.8
    assert output.measures["weight"].tolist() == pytest.approx(wanted.tolist(), rel=1e-12)
    assert relative_error(clipped, wanted[:, None, None] * unweighted) < 1e-12


def test_self_normalized_weights_have_mean_1():
    _, unweighted = gradients_by_pair("none")
    output, normalized = gradients_by_pair("self_normalized")
    weight = output.measures["weight"]
    wanted = ratios() / ratios().mean()
    assert weight.mean().item() == pytest.approx(1.0, rel=1e-12)
    assert weight.tolist() == pytest.approx(wanted.tolist(), rel=1e-12)
    assert relative_error(normalized, wanted[:, None, None] * unweighted) < 1e-12
    # The weights' size cancels, however far the sampler is.
    world = WORLDS["three prompts"]
    logps = world.with_behaviour(world.pairs(world.logits_XY))
    far = replace(logps, behaviour_chosen=logps.behaviour_chosen - 2000.0)
    again = importance_weight("self_normalized", far, 2.0)
    assert again.tolist() == pytest.approx(wanted.tolist(), rel=1e-9)


@pytest.mark.parametrize("weights", ["none", "raw", "clipped", "self_normalized"])
def test_weights_are_1_where_the_policy_itself_sampled(weights):
    world = WORLDS["three prompts"]
    logps = world.pairs(world.logits_XY)
    assert pdpo(weights=weights)(logps).measures["weight"].tolist() == [1.0] * 108
    # As they are at lag 0, where what was recorded is the policy.
    recorded = replace(
        logps, behaviour_chosen=logps.policy_chosen, behaviour_rejected=logps.policy_rejected
    )
    weight = pdpo(weights=weights)(recorded).measures["weight"]
    assert weight.tolist() == pytest.approx([1.0] * 108, rel=1e-12)


@pytest.mark.parametrize(
    ("weights", "share"),
    [
        ([1.0, 2.0, 3.0], 36 / (3 * 14)),
        ([5.0, 5.0, 5.0, 5.0], 1.0),
        ([0.0, 0.0, 7.0, 0.0], 0.25),
        ([1.0], 1.0),
    ],
)
def test_the_effective_sample_share(weights, share):
    with np.errstate(divide="ignore"):
        log_weight = np.log(np.array(weights))
    for shift in (0.0, 900.0, -900.0):  # e^900 is beyond float64
        assert effective_sample_share(log_weight + shift) == pytest.approx(share, rel=1e-9)
