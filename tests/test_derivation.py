"""docs/derivation.md, step by step, on a tabular policy: 3 prompts, 6 completions, float64.

Suffixes: X prompts, Y completions of a prompt, B pairs. The numbers a formula is held against come
from enumeration, from central differences or from L-BFGS, never from the formula.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from workers.learner.objectives import PairLogps, build_objective

PAGE = Path(__file__).parents[1] / "docs" / "derivation.md"
BETA = 0.6


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=random(seed), dtype=torch.float64)


REFERENCE_XY = (1.5 * normal(0, 3, 6)).log_softmax(-1)  # log-probabilities
REWARD_XY = normal(1, 3, 6)
POLICY_XY = (1.5 * normal(2, 3, 6)).log_softmax(-1)  # some policy, an optimum of nothing
SHIFT_X1 = 3.0 * normal(3, 3, 1)  # f(x): a reward that only the prompt decides
# Every ordered pair of two completions of a prompt: [3, B].
PAIRS = torch.tensor(
    [(x, i, j) for x in range(3) for i, j in itertools.permutations(range(6), 2)]
).T


def dpo(
    logps_XY: Tensor, pairs: Tensor = PAIRS, beta: float = BETA, label_prob: Tensor | None = None
) -> Tensor:
    """The project's DPO loss [B] of the pairs (prompt, chosen, rejected) [3, B]."""
    x, chosen, rejected = pairs
    one_token = torch.ones_like(x)
    return (
        build_objective({"name": "dpo", "beta": beta})(
            PairLogps(
                policy_chosen=logps_XY[x, chosen],
                policy_rejected=logps_XY[x, rejected],
                ref_chosen=REFERENCE_XY[x, chosen],
                ref_rejected=REFERENCE_XY[x, rejected],
                chosen_tokens=one_token,
                rejected_tokens=one_token,
                label_prob=label_prob,
            )
        )
    ).loss


def dpo_of_logratios(w: Tensor, l: Tensor, beta: float) -> Tensor:  # noqa: E741
    """The project's DPO loss [B] of pairs with these log-ratios [B]."""
    zero, one_token = torch.zeros_like(w), torch.ones_like(w)
    pairs = PairLogps(
        policy_chosen=w - 9.0,
        policy_rejected=l - 7.0,
        ref_chosen=zero - 9.0,
        ref_rejected=zero - 7.0,
        chosen_tokens=one_token,
        rejected_tokens=one_token,
    )
    return build_objective({"name": "dpo", "beta": beta})(pairs).loss


def kl_by_prompt(logps_XY: Tensor, other_XY: Tensor) -> Tensor:
    """KL(policy ‖ other) of each prompt [X], nats, by enumeration."""
    return (logps_XY.exp() * (logps_XY - other_XY)).sum(-1)


def value_by_prompt(logps_XY: Tensor, reward_XY: Tensor = REWARD_XY, beta: float = BETA) -> Tensor:
    """E[r] − β KL(π ‖ π_ref) of each prompt [X], by enumeration."""
    return (logps_XY.exp() * reward_XY).sum(-1) - beta * kl_by_prompt(logps_XY, REFERENCE_XY)


def tilted_logps(reward_XY: Tensor = REWARD_XY, beta: float = BETA) -> Tensor:
    """Step 2's closed form, log of π_ref exp(r/β) / Z."""
    return (REFERENCE_XY + reward_XY / beta).log_softmax(-1)


def lbfgs(loss: Callable[[Tensor], Tensor], *shape: int) -> Tensor:
    """Where a scalar loss of parameters of this shape is least, from 0."""
    parameters = torch.zeros(*shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=1000,
        tolerance_grad=1e-11,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(parameters)
        value.backward()
        return value

    optimizer.step(closure)
    assert parameters.grad is not None
    assert parameters.grad.abs().max() < 1e-6, "L-BFGS has not arrived"
    return parameters.detach()


def best_policy(
    reward_XY: Tensor = REWARD_XY,
    beta: float = BETA,
    prompt_weights: tuple[float, ...] = (1.0, 1.0, 1.0),
) -> Tensor:
    """Step 1's problem solved by L-BFGS over the logits: log-probabilities [X, Y]."""
    weights_X = torch.tensor(prompt_weights, dtype=torch.float64)
    logits = lbfgs(
        lambda logits: (
            -(weights_X * value_by_prompt(logits.log_softmax(-1), reward_XY, beta)).sum()
        ),
        3,
        6,
    )
    return logits.log_softmax(-1)


@cache
def optimum(beta: float = BETA) -> Tensor:
    return best_policy(beta=beta)


def central_differences(f: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5) -> Tensor:
    """df/d(at_p) of f: [P] → [B], as [B, P]."""
    steps = step * torch.eye(len(at), dtype=at.dtype)
    return torch.stack([(f(at + s) - f(at - s)) / (2 * step) for s in steps], dim=-1)


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    assert found.shape == expected.shape
    return bool((found - expected).abs().max() <= tolerance)


# 1. The problem


def test_the_problem_is_a_mean_of_penalised_rewards():
    # Samples know nothing of KL: the mean of r − β log(π/π_ref) over them is the objective.
    drawn = torch.multinomial(POLICY_XY.exp(), 200_000, replacement=True, generator=random(7))
    penalised = (REWARD_XY - BETA * (POLICY_XY - REFERENCE_XY)).gather(1, drawn)
    standard_error_X = penalised.std(-1) / math.sqrt(200_000)
    assert ((penalised.mean(-1) - value_by_prompt(POLICY_XY)).abs() < 4 * standard_error_X).all()
    # At the reference the penalty is 0 and only the reward is left.
    assert close(value_by_prompt(REFERENCE_XY), (REFERENCE_XY.exp() * REWARD_XY).sum(-1), 1e-15)


def test_the_problem_is_solved_prompt_by_prompt():
    rare_and_common = best_policy(prompt_weights=(0.1, 1.0, 7.0))
    assert close(rare_and_common.exp(), optimum().exp(), 1e-6)


# 2. Its optimum


def test_the_closed_form_is_the_numerical_optimum():
    for beta in (0.3, BETA, 3.0):
        assert close(tilted_logps(beta=beta).exp(), optimum(beta).exp(), 1e-7)
        assert (optimum(beta) - REFERENCE_XY).abs().max() > 0.1


def test_what_a_policy_falls_short_by_is_a_kl():
    for policy in (POLICY_XY, REFERENCE_XY, normal(4, 3, 6).log_softmax(-1)):
        shortfall = value_by_prompt(optimum()) - value_by_prompt(policy)
        assert (shortfall > 0.01).all()
        assert close(shortfall, BETA * kl_by_prompt(policy, tilted_logps()), 1e-9)


# 3. The reward through the optimum


def test_the_reward_is_the_log_ratio_of_its_optimum_plus_beta_log_z():
    z_X1 = (REFERENCE_XY.exp() * (REWARD_XY / BETA).exp()).sum(-1, keepdim=True)
    log_ratio_XY = optimum() - REFERENCE_XY  # of the policy that L-BFGS found
    assert close(BETA * log_ratio_XY + BETA * z_X1.log(), REWARD_XY, 1e-6)
    # β log Z is not a fudge: it is the objective's value at the optimum.
    assert close(BETA * z_X1.log().squeeze(-1), value_by_prompt(optimum()), 1e-9)


def test_any_policy_is_the_optimum_of_its_implicit_reward():
    implicit_XY = BETA * (POLICY_XY - REFERENCE_XY)
    assert close(best_policy(implicit_XY).exp(), POLICY_XY.exp(), 1e-6)
    assert close(best_policy(implicit_XY + SHIFT_X1).exp(), POLICY_XY.exp(), 1e-6)
    z_X = (REFERENCE_XY.exp() * (implicit_XY / BETA).exp()).sum(-1)
    assert close(z_X, torch.ones_like(z_X), 1e-14)


# 4. Bradley–Terry


def test_the_partition_function_cancels_from_bradley_terry():
    x, first, second = PAIRS
    strength = REWARD_XY.exp()
    enumerated = strength[x, first] / (strength[x, first] + strength[x, second])
    logratio = optimum() - REFERENCE_XY
    through_policy = torch.sigmoid(BETA * (logratio[x, first] - logratio[x, second]))
    assert close(through_policy, enumerated, 1e-6)
    # A reward shifted by f(x) has another Z, the same optimum and the same preferences.
    shifted = (REWARD_XY + SHIFT_X1).exp()
    assert close(shifted[x, first] / (shifted[x, first] + shifted[x, second]), enumerated, 1e-14)


# 5. The loss


def test_the_loss_is_the_negative_log_likelihood_of_the_labels():
    x, first, second = PAIRS
    strength = REWARD_XY.exp()
    wins = torch.bernoulli(
        strength[x, first] / (strength[x, first] + strength[x, second]), generator=random(7)
    )
    labelled = torch.where(wins.bool(), PAIRS, PAIRS[[0, 2, 1]])
    # Under the policy as a judge: strength (π/π_ref)^β, by Python's floats, multiplied up.
    power = ((POLICY_XY - REFERENCE_XY).exp() ** BETA).tolist()
    likelihood = math.prod(
        power[x][chosen] / (power[x][chosen] + power[x][rejected])
        for x, chosen, rejected in labelled.T.tolist()
    )
    loss = dpo(POLICY_XY, labelled)
    assert len(loss) == 90
    assert loss.mean().item() == pytest.approx(-math.log(likelihood) / 90, rel=1e-12)


def test_at_the_reference_every_pair_costs_ln_2():
    assert close(dpo(REFERENCE_XY), torch.full((90,), math.log(2.0), dtype=torch.float64), 1e-15)


# 6. Plackett–Luce


def plackett_luce(score: Tensor, ranking: tuple[int, ...]) -> float:
    """P(ranking), best first, from scores of K completions: chosen one by one from those left."""
    ranked = score[list(ranking)]
    return math.prod(float(ranked[k].exp() / ranked[k:].exp().sum()) for k in range(len(ranking)))


def test_the_partition_function_cancels_from_plackett_luce():
    logratio = optimum() - REFERENCE_XY
    for x in range(3):
        probabilities = []
        for ranking in itertools.permutations(range(6), 4):
            by_reward = plackett_luce(REWARD_XY[x], ranking)
            assert plackett_luce(BETA * logratio[x], ranking) == pytest.approx(by_reward, rel=1e-5)
            if set(ranking) == {0, 1, 2, 3}:
                probabilities.append(by_reward)
        assert math.fsum(probabilities) == pytest.approx(1.0, rel=1e-12)


def test_plackett_luce_is_bradley_terry_on_two():
    x, chosen, rejected = PAIRS
    implicit_XY = BETA * (POLICY_XY - REFERENCE_XY)
    for pair, loss in zip(PAIRS.T.tolist(), dpo(POLICY_XY).tolist(), strict=True):
        x, chosen, rejected = pair
        probability = plackett_luce(implicit_XY[x], (chosen, rejected))
        assert -math.log(probability) == pytest.approx(loss, rel=1e-12)
        # And in a ranking of four, who comes first of two is Bradley–Terry again.
        among = [chosen, rejected, *[y for y in range(6) if y not in (chosen, rejected)][:2]]
        marginal = math.fsum(
            plackett_luce(implicit_XY[x], ranking)
            for ranking in itertools.permutations(among)
            if ranking.index(chosen) < ranking.index(rejected)
        )
        assert -math.log(marginal) == pytest.approx(loss, rel=1e-9)


# 7. The gradient

FEATURES_YP = normal(5, 6, 4)  # a log-linear policy: what moves one completion moves the others
THETA_P = normal(6, 4)


def log_linear(theta_P: Tensor) -> Tensor:
    """Log-probabilities [X, Y] of the policy ∝ π_ref exp(Fθ)."""
    return (REFERENCE_XY + FEATURES_YP @ theta_P).log_softmax(-1)


def test_the_gradient_is_the_weighted_difference_of_scores():
    x, chosen, rejected = PAIRS
    policy_XY = log_linear(THETA_P)
    # ∇ log π(y) = F(y) − E_π[F], by enumeration.
    score_XYP = FEATURES_YP - (policy_XY.exp() @ FEATURES_YP)[:, None, :]
    logratio = policy_XY - REFERENCE_XY
    d = logratio[x, chosen] - logratio[x, rejected]
    formula = (-BETA * torch.sigmoid(-BETA * d))[:, None] * (
        score_XYP[x, chosen] - score_XYP[x, rejected]
    )
    measured = central_differences(lambda theta_P: dpo(log_linear(theta_P)), THETA_P)
    assert close(measured, formula, 1e-8)
    assert measured.abs().max() > 0.5


def test_the_weight_is_large_where_the_implicit_reward_ranks_wrongly():
    x, chosen, rejected = PAIRS
    implicit_XY = BETA * (POLICY_XY - REFERENCE_XY)
    wrong = implicit_XY[x, chosen] < implicit_XY[x, rejected]
    # The weight as measured: the slope of the loss along the chosen log-probability, over −β.
    w, l = (POLICY_XY - REFERENCE_XY)[x, chosen], (POLICY_XY - REFERENCE_XY)[x, rejected]  # noqa: E741
    step = 1e-5
    slope = (dpo_of_logratios(w + step, l, BETA) - dpo_of_logratios(w - step, l, BETA)) / (2 * step)
    weight = -slope / BETA
    assert int(wrong.sum()) == 45  # one direction of each pair
    assert weight[wrong].min() > 0.5 > weight[~wrong].max()
    # It is the probability the policy, as a judge, gives to the wrong order.
    power = (POLICY_XY - REFERENCE_XY).exp() ** BETA
    judged = power[x, rejected] / (power[x, chosen] + power[x, rejected])
    assert close(weight, judged, 1e-9)
    assert weight.max() > 0.9
    assert weight.min() < 0.1


# 8. Beta


def test_a_larger_beta_needs_a_smaller_gap_for_the_same_probability():
    def gap(probability: float, beta: float) -> float:
        """d at which the loss says the chosen wins with this probability, by bisection."""
        low, high = -1000.0, 1000.0
        for _ in range(80):
            middle = torch.tensor([(low + high) / 2], dtype=torch.float64)
            said = math.exp(-float(dpo_of_logratios(middle, 0.0 * middle, beta)))
            low, high = (float(middle), high) if said < probability else (low, float(middle))
        return (low + high) / 2

    for probability in (0.6, 0.9, 0.999):
        gaps = [gap(probability, beta) for beta in (0.05, 0.1, 0.2, 0.4)]
        assert gaps[0] > gaps[1] > gaps[2] > gaps[3] > 0
        for i, beta in enumerate((0.05, 0.1, 0.2, 0.4)):
            odds = probability / (1 - probability)
            assert gaps[i] == pytest.approx(math.log(odds) / beta, rel=1e-9)


def test_a_larger_beta_keeps_the_optimum_nearer_the_reference():
    betas = (0.6, 1.2, 2.4, 4.8, 9.6)
    kls = [kl_by_prompt(optimum(beta), REFERENCE_XY) for beta in betas]
    assert all((larger < smaller).all() for smaller, larger in itertools.pairwise(kls))
    assert (kls[0] > 0.3).all()
    assert (kls[-1] < 0.05).all()
    for beta in betas:
        policy = optimum(beta)
        mean = (policy.exp() * REWARD_XY).sum(-1, keepdim=True)
        variance = (policy.exp() * (REWARD_XY - mean) ** 2).sum(-1)
        step = 1e-2 * beta
        measured = (
            kl_by_prompt(best_policy(beta=beta + step), REFERENCE_XY)
            - kl_by_prompt(best_policy(beta=beta - step), REFERENCE_XY)
        ) / (2 * step)
        assert close(measured / (-variance / beta**3), torch.ones(3, dtype=torch.float64), 1e-3)


def test_a_hard_label_is_never_satisfied():
    d = torch.tensor([0.0, 1.0, 8.0, 64.0, 256.0], dtype=torch.float64)
    for beta in (0.1, 1.0):
        assert (dpo_of_logratios(d, 0.0 * d, beta).diff() < 0).all()


# 9. The plane of probability ratios


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
@pytest.mark.parametrize("point", [(1.0, 1.0), (1.3, 0.4), (0.7, 0.2), (0.5, 2.0)])
def test_the_gradient_in_the_plane_of_ratios(point, beta):
    def loss(ratios: Tensor) -> Tensor:
        return dpo_of_logratios(ratios[:1].log(), ratios[1:].log(), beta)

    x1, x2 = point
    at = torch.tensor(point, dtype=torch.float64)
    along_1, along_2 = central_differences(loss, at, 1e-6)[0].tolist()
    assert along_1 == pytest.approx(-beta * x2**beta / (x1 * (x1**beta + x2**beta)), rel=1e-7)
    assert along_2 == pytest.approx(beta * x2 ** (beta - 1) / (x1**beta + x2**beta), rel=1e-7)
    assert abs(along_1 / along_2) == pytest.approx(x2 / x1, rel=1e-7)
    along_w, along_l = central_differences(lambda log: loss(log.exp()), at.log(), 1e-6)[0].tolist()
    assert along_w == pytest.approx(-along_l, rel=1e-7)
    assert along_w < 0


# 10. What the loss is least at


def soft_labels(pairs: Tensor) -> Tensor:
    """P(chosen better) [B] of pairs under Bradley–Terry, from the rewards."""
    x, chosen, rejected = pairs
    strength = REWARD_XY.exp()
    return strength[x, chosen] / (strength[x, chosen] + strength[x, rejected])


def dpo_optimum(pairs: Tensor, weights_B: Tensor) -> Tensor:
    logits = lbfgs(
        lambda logits: (
            weights_B * dpo(logits.log_softmax(-1), pairs, label_prob=soft_labels(pairs))
        ).sum(),
        3,
        6,
    )
    return logits.log_softmax(-1)


def test_soft_labels_over_all_pairs_reach_the_optimum_of_the_problem():
    each_once = PAIRS[:, PAIRS[1] < PAIRS[2]]
    found = dpo_optimum(each_once, torch.ones(45, dtype=torch.float64))
    assert close(found.exp(), optimum().exp(), 1e-5)  # two problems, one policy
    assert close(found.exp(), tilted_logps().exp(), 1e-5)


def test_a_tabular_policy_does_not_care_which_pairs_are_frequent():
    each_once = PAIRS[:, PAIRS[1] < PAIRS[2]]
    uneven = 0.1 + 3.0 * torch.rand(45, generator=random(7), dtype=torch.float64)
    assert close(dpo_optimum(each_once, uneven).exp(), optimum().exp(), 1e-5)
    # Five pairs a prompt are enough when they connect its six completions.
    star = PAIRS[:, PAIRS[1] == 0]
    assert star.shape == (3, 15)
    assert close(dpo_optimum(star, uneven[:15]).exp(), optimum().exp(), 1e-5)


def test_a_policy_with_shared_parameters_does():
    def fitted(weights_B: Tensor) -> Tensor:
        theta = lbfgs(
            lambda theta: (weights_B * dpo(log_linear(theta), label_prob=soft_labels(PAIRS))).sum(),
            4,
        )
        return log_linear(theta)

    low = fitted((PAIRS[1:].sum(0) < 5).double() + 0.1)
    high = fitted((PAIRS[1:].sum(0) >= 5).double() + 0.1)
    assert (low.exp() - high.exp()).abs().max() > 0.05
    assert (low.exp() - optimum().exp()).abs().max() > 0.05


# The page


def test_every_step_names_its_test():
    page = PAGE.read_text()
    tests = {name for name in globals() if name.startswith("test_")}
    sections = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    steps = [section for section in sections if re.match(r"\d+\. ", section)]
    assert [int(step.split(".")[0]) for step in steps] == list(range(1, 11))
    (errors,) = [s for s in sections if s.startswith("Errors of common write-ups\n")]
    bullets = re.split(r"^- ", errors, flags=re.MULTILINE)[1:]
    assert len(bullets) == 3

    def named(text: str) -> set[str]:
        return set(re.findall(r"`tests/test_derivation\.py::(test_\w+)`", text))

    for step in steps:
        last_line = step.strip().splitlines()[-1]
        assert last_line.startswith("Checked by `tests/test_derivation.py::test_"), step
    for claim in (*steps, *bullets):
        assert named(claim), claim
    assert named(page) == tests
