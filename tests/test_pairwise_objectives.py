"""Each loss of a pair against its formula in plain Python, and where it drives a policy to."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.objective_helpers import (
    PAIRWISE,
    Row,
    losses_and_gradients,
    normal,
    random_rows,
    record,
    require_close,
    sigmoid,
    slopes,
    sp,
)
from workers.learner.objectives import PairLogps, build_objective


def logit(mean: float) -> float:
    return mean - math.log(1.0 - math.exp(mean))


def f_prime(divergence: str, logratio: float) -> float:
    ratio = math.exp(logratio)
    return -1.0 / ratio if divergence == "forward_kl" else math.log(2 * ratio / (1 + ratio))


def exo(r: Row, beta: float, trust: float) -> float:
    up, down = sigmoid(beta * r.d), sigmoid(-beta * r.d)
    return up * math.log(up / trust) + down * math.log(down / (1 - trust))


def discopop(r: Row, beta: float, tau: float) -> float:
    u = beta * r.d
    s = sigmoid(u / tau)
    return (1 - s) * sp(-u) + s * math.exp(-u)


def ipo(r: Row, tau: float, length_normalized: bool) -> float:
    d = r.w / r.n_w - r.l / r.n_l if length_normalized else r.d
    return (d - 1 / (2 * tau)) ** 2


# The preference term of a pair (chosen, rejected) whose label is certain.
FORMULAS: dict[str, Callable[..., float]] = {
    "dpo": lambda r, beta: sp(-beta * r.d),
    "robust_dpo": lambda r, beta, flip_probability: (
        ((1 - flip_probability) * sp(-beta * r.d) - flip_probability * sp(beta * r.d))
        / (1 - 2 * flip_probability)
    ),
    "ipo": ipo,
    "slic": lambda r, beta: max(0.0, 1 - beta * r.d),
    "simpo": lambda r, beta, gamma: sp(-(beta * (r.mean_w - r.mean_l) - gamma)),
    "orpo": lambda r, lam: lam * sp(-(logit(r.mean_w) - logit(r.mean_l))),
    "cpo": lambda r, beta: sp(-beta * (r.policy_chosen - r.policy_rejected)),
    "length_normalized_dpo": lambda r, beta: sp(-beta * (r.w / r.n_w - r.l / r.n_l)),
    "length_regularized_dpo": lambda r, beta, length_alpha: sp(
        -(beta * r.d + length_alpha * (r.n_w - r.n_l))
    ),
    "dpop": lambda r, beta, positive_lambda: sp(-beta * (r.d - positive_lambda * max(0.0, -r.w))),
    "nca": lambda r, beta: sp(-beta * r.w) + sp(beta * r.w) / 2 + sp(beta * r.l) / 2,
    "sppo": lambda r, beta: (r.w - 1 / (2 * beta)) ** 2 + (r.l + 1 / (2 * beta)) ** 2,
    "apo_zero": lambda r, beta: (1 - sigmoid(beta * r.w)) + sigmoid(beta * r.l),
    "apo_down": lambda r, beta: sigmoid(beta * r.w) + (1 - sigmoid(beta * r.d)),
    "bco_pair": lambda r, beta: sp(-beta * r.w) + sp(beta * r.l),
    "discopop": discopop,
    "f_dpo": lambda r, beta, divergence: sp(
        -beta * (f_prime(divergence, r.w) - f_prime(divergence, r.l))
    ),
    "xpo": lambda r, beta: sp(-beta * r.d),
}

DRAWS: dict[str, Callable[[random.Random], Any]] = {
    "beta": lambda draw: draw.uniform(0.05, 1.0),
    "tau": lambda draw: draw.uniform(0.05, 1.0),
    "flip_probability": lambda draw: draw.uniform(0.0, 0.45),
    "gamma": lambda draw: draw.uniform(0.0, 2.0),
    "lam": lambda draw: draw.uniform(0.05, 2.0),
    "length_alpha": lambda draw: draw.uniform(0.005, 0.2),
    "positive_lambda": lambda draw: draw.uniform(0.5, 10.0),
    "length_normalized": lambda draw: draw.random() < 0.5,
    "divergence": lambda draw: draw.choice(["forward_kl", "jensen_shannon"]),
}
HYPER = {
    "dpo": ["beta"],
    "robust_dpo": ["beta", "flip_probability"],
    "ipo": ["tau", "length_normalized"],
    "simpo": ["beta", "gamma"],
    "orpo": ["lam"],
    "length_regularized_dpo": ["beta", "length_alpha"],
    "dpop": ["beta", "positive_lambda"],
    "discopop": ["beta", "tau"],
    "f_dpo": ["beta", "divergence"],
}


def drawn(name: str, draw: random.Random) -> dict[str, Any]:
    return {key: DRAWS[key](draw) for key in HYPER.get(name, ["beta"])}


def whole_loss(
    name: str,
    hyper: dict[str, Any],
    *,
    label_prob: float = 1.0,
    label_smoothing: float | None = None,
    nll_weight: float | None = None,
    weight: float = 1.0,
    alpha: float = 0.0,
    reference_wrote_chosen: bool = False,
) -> Callable[[Row], float]:
    """The loss of one pair with everything that may be added, as a function of the pair."""
    defaults = {"exo": 1e-3}.get(name, 0.0), {"cpo": 1.0}.get(name, 0.0)
    smoothing = defaults[0] if label_smoothing is None else label_smoothing
    likelihood = (defaults[1] if nll_weight is None else nll_weight) + (name == "orpo")
    trust = label_prob * (1 - smoothing) + (1 - label_prob) * smoothing

    def loss(row: Row) -> float:
        if name == "exo":
            preference = exo(row, hyper["beta"], trust)
        else:
            certain = FORMULAS[name]
            preference = trust * certain(row, **hyper)
            if trust < 1.0:
                preference += (1 - trust) * certain(row.swapped(), **hyper)
        bonus = row.policy_chosen if reference_wrote_chosen else row.policy_rejected
        return weight * (preference - likelihood * row.mean_w + alpha * bonus)

    return loss


def require_formulas(
    options: dict[str, Any], logps: PairLogps, rows: list[Row], wanted: list[Callable[[Row], float]]
) -> None:
    """The losses are those of the formulas, the gradients their central differences."""
    loss, chosen, rejected = losses_and_gradients(options, logps)
    require_close(loss, [f(row) for f, row in zip(wanted, rows, strict=True)], 1e-9)
    expected = [slopes(f, row) for f, row in zip(wanted, rows, strict=True)]
    require_close(chosen, [along_chosen for along_chosen, _ in expected], 1e-6)
    require_close(rejected, [along_rejected for _, along_rejected in expected], 1e-6)


def test_every_objective_of_pairs_has_its_formula():
    assert set(PAIRWISE) == {*FORMULAS, "exo"}


@pytest.mark.parametrize("name", PAIRWISE)
def test_the_formula(name):
    draw = random.Random(name)
    for seed in range(6):
        hyper = drawn(name, draw)
        rows = random_rows(seed, 8, 1.5 if name == "f_dpo" else 6.0)
        options, columns, alpha = {"name": name, **hyper}, {}, 0.0
        origin = [draw.random() < 0.5 for _ in rows]
        if name == "xpo":
            alpha = options["alpha"] = draw.uniform(0.0, 0.1)
            columns["chosen_from_reference"] = torch.tensor(origin)
        wanted = [whole_loss(name, hyper, alpha=alpha, reference_wrote_chosen=o) for o in origin]
        require_formulas(options, record(rows, **columns), rows, wanted)


MODIFIERS: dict[str, dict[str, Any]] = {
    "label_smoothing": {"label_smoothing": 0.15},
    "soft_labels": {"soft": True},
    "nll_weight": {"nll_weight": 0.7},
    "wpo": {"wpo": True},
    "all": {"label_smoothing": 0.2, "soft": True, "nll_weight": 1.3, "wpo": True},
}


@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize("modifier", MODIFIERS)
def test_what_can_be_added_to_any_loss(name, modifier):
    added = MODIFIERS[modifier]
    draw = random.Random(f"{name} {modifier}")
    hyper = drawn(name, draw)
    rows = random_rows(11, 8, 1.5 if name == "f_dpo" else 5.0)
    options = {"name": name, **hyper, **{k: v for k, v in added.items() if k != "soft"}}
    # From the wrong label for certain to the right one.
    label_prob = [i / 7 for i in range(8)] if "soft" in added else [1.0] * 8
    columns: dict[str, Any] = {"label_prob": label_prob} if "soft" in added else {}
    if name == "xpo":
        options["alpha"], columns["chosen_from_reference"] = 0.01, torch.arange(8) < 4
    weight = [draw.uniform(0.1, 1.5) * draw.uniform(0.1, 1.5) for _ in rows]
    if "wpo" in added:
        first = [draw.uniform(0.1, 1.5) for _ in rows]
        columns["wpo_chosen"] = first
        columns["wpo_rejected"] = [w / f for w, f in zip(weight, first, strict=True)]
    wanted = [
        whole_loss(
            name,
            hyper,
            label_prob=label_prob[i],
            label_smoothing=added.get("label_smoothing"),
            nll_weight=added.get("nll_weight"),
            weight=weight[i] if "wpo" in added else 1.0,
            alpha=options.get("alpha", 0.0),
            reference_wrote_chosen=i < 4,
        )
        for i in range(8)
    ]
    require_formulas(options, record(rows, **columns), rows, wanted)


def test_the_weight_of_wpo_is_not_differentiated_through():
    rows = random_rows(3, 6)
    plain = record(rows)
    loss, chosen, rejected = losses_and_gradients({"name": "dpo"}, plain)
    logps = record(rows)
    weights = {
        "wpo_chosen": (logps.policy_chosen / logps.chosen_tokens).exp(),
        "wpo_rejected": (logps.policy_rejected / logps.rejected_tokens).exp(),
    }
    columns = {item.name: getattr(logps, item.name) for item in fields(logps)}
    found = losses_and_gradients({"name": "dpo", "wpo": True}, PairLogps(**columns | weights))
    weight = [math.exp(row.mean_w + row.mean_l) for row in rows]
    for mine, without in zip(found, (loss, chosen, rejected), strict=True):
        scaled = [w * value for w, value in zip(weight, without, strict=True)]
        assert mine == pytest.approx(scaled, rel=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-15), (torch.float32, 1e-6)], ids=str
)
def test_policy_equal_to_reference_gives_ln_2(dtype, tolerance):
    same = Row(-50.3, -61.7, -50.3, -61.7, 10, 12)
    for beta in (0.01, 0.1, 5.0):
        loss = build_objective({"name": "dpo", "beta": beta})(record([same], dtype)).loss
        assert loss.dtype == dtype
        assert loss.item() == pytest.approx(math.log(2.0), abs=tolerance)


def test_label_smoothing_shrinks_a_soft_label_towards_a_half():
    # A judge's 0.9, right with probability 0.8: 0.9 * 0.8 + 0.1 * 0.2 = 0.74.
    logps = record([Row(-8.5, -10.0, -10.0, -10.0, 1, 1)], label_prob=[0.9])
    loss = build_objective({"name": "dpo", "beta": 1.0, "label_smoothing": 0.2})(logps).loss
    assert loss.item() == pytest.approx(0.74 * sp(-1.5) + 0.26 * sp(1.5), rel=1e-12)


def test_a_smoothed_label_rests_at_its_own_probability():
    # cDPO stops where σ(βd) = 1 − ε: d = log(0.9/0.1) / 0.5.
    d = math.log(9.0) / 0.5
    options = {"name": "dpo", "beta": 0.5, "label_smoothing": 0.1}
    for shift, sign in ((-0.1, -1), (0.0, 0), (0.1, 1)):
        logps = record([Row(-9.0 + d + shift, -10.0, -9.0, -10.0, 1, 1)])
        _, chosen, _ = losses_and_gradients(options, logps)
        assert chosen[0] * sign > 1e-4 if sign else abs(chosen[0]) < 1e-12


@pytest.mark.parametrize("name", [*PAIRWISE, "pdpo"])
def test_a_batch_is_its_pairs_in_any_order(name):
    rows = random_rows(5, 7, 1.5 if name == "f_dpo" else 5.0)
    order = [3, 0, 6, 2, 5, 1, 4]
    columns: dict[str, Any] = {
        "label_prob": [0.9, 0.2, 1.0, 0.5, 0.7, 0.0, 1.0],
        "behaviour_chosen": [row.policy_chosen - 0.3 * i for i, row in enumerate(rows)],
        "behaviour_rejected": [row.policy_rejected + 0.4 for row in rows],
        "wpo_chosen": [0.1 * i + 0.2 for i in range(7)],
        "wpo_rejected": [0.9 - 0.1 * i for i in range(7)],
        "prompt_ids": torch.arange(7),
        "chosen_from_reference": torch.arange(7) % 2 == 0,
    }
    added = {"weights": "raw"} if name == "pdpo" else {"wpo": True}

    def of(rows_taken: list[int]) -> tuple[list[float], list[float], list[float]]:
        taken = {
            key: [value[i] for i in rows_taken] if isinstance(value, list) else value[rows_taken]
            for key, value in columns.items()
        }
        logps = record([rows[i] for i in rows_taken], **taken)
        return losses_and_gradients({"name": name, **added}, logps)

    together, permuted = of(list(range(7))), of(order)
    alone = [of([i]) for i in range(7)]
    for part in range(3):
        require_close(permuted[part], [together[part][i] for i in order], 1e-12)
        require_close([one[part][0] for one in alone], together[part], 1e-12)


# Where soft Bradley–Terry labels over all pairs of six responses drive a tabular policy.

REFERENCE = (0.7 * normal(0, 6)).log_softmax(-1)
REWARD = 1.5 * normal(1, 6)
TOKENS = torch.tensor([3, 1, 7, 4, 9, 2])
BETTER = torch.sigmoid(REWARD[:, None] - REWARD[None, :])  # P(i is better than j)


def tilted(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def matching(ratio: Callable[[Tensor], Tensor]) -> Tensor:
    """π_ref·ratio(r − λ) for the λ at which it sums to one, by bisection."""
    low, high = float(REWARD.min()) - 50.0, float(REWARD.max()) + 50.0
    for _ in range(200):
        middle = (low + high) / 2
        total = float((REFERENCE.exp() * ratio(REWARD - middle)).sum())
        low, high = (middle, high) if not 0 < total < 1 else (low, middle)
    return REFERENCE.exp() * ratio(REWARD - high)


def forward_kl_ratio(excess: Tensor) -> Tensor:
    """β f'(ρ) = −β/ρ = excess, which must be negative."""
    return torch.where(excess < 0, -1.5 / excess, torch.inf)


def jensen_shannon_ratio(excess: Tensor) -> Tensor:
    """1.5·log(2ρ/(1+ρ)) = excess, which must be below 1.5·log 2."""
    power = (excess / 1.5).exp()
    return torch.where(power < 2, power / (2 - power), torch.inf)


# IPO is at E_y'[P(y ≻ y')] of a uniform y': the normal equations of its squares over all pairs.
OPTIMA: dict[str, tuple[dict[str, Any], Tensor, Tensor]] = {
    "dpo": ({"name": "dpo", "beta": 0.5}, BETTER, tilted(REFERENCE + REWARD / 0.5)),
    "dpo, larger beta": ({"name": "dpo", "beta": 2.0}, BETTER, tilted(REFERENCE + REWARD / 2.0)),
    "xpo": ({"name": "xpo", "beta": 0.5, "alpha": 0}, BETTER, tilted(REFERENCE + REWARD / 0.5)),
    "exo": (
        {"name": "exo", "beta": 0.5, "label_smoothing": 0.01},
        (BETTER - 0.01) / 0.98,  # what is trusted is Bradley–Terry
        tilted(REFERENCE + REWARD / 0.5),
    ),
    "robust_dpo": (
        {"name": "robust_dpo", "beta": 0.5, "flip_probability": 0.2},
        0.8 * BETTER + 0.2 * (1 - BETTER),  # labels flipped as often as it was told
        tilted(REFERENCE + REWARD / 0.5),
    ),
    "cpo": (
        {"name": "cpo", "beta": 0.5, "nll_weight": 0.0},
        BETTER,
        tilted(REWARD / 0.5),  # as if the reference were uniform
    ),
    "length_regularized_dpo": (
        {"name": "length_regularized_dpo", "beta": 0.5, "length_alpha": 0.1},
        BETTER,
        tilted(REFERENCE + (REWARD - 0.1 * TOKENS) / 0.5),
    ),
    "ipo": (
        {"name": "ipo", "tau": 0.3},
        BETTER,
        tilted(REFERENCE + BETTER.mean(-1) / 0.3),
    ),
    "f_dpo, forward_kl": (
        {"name": "f_dpo", "beta": 1.5, "divergence": "forward_kl"},
        BETTER,
        matching(forward_kl_ratio),
    ),
    "f_dpo, jensen_shannon": (
        {"name": "f_dpo", "beta": 1.5, "divergence": "jensen_shannon"},
        BETTER,
        matching(jensen_shannon_ratio),
    ),
}


@pytest.mark.parametrize("name", OPTIMA)
def test_the_population_optimum(name):
    options, label_prob, optimum = OPTIMA[name]
    objective = build_objective(options)
    first, second = torch.triu_indices(6, 6, offset=1)
    logits = REFERENCE.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=2000,
        tolerance_grad=1e-12,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logps = logits.log_softmax(-1)
        loss = objective(
            PairLogps(
                policy_chosen=logps[first],
                policy_rejected=logps[second],
                ref_chosen=REFERENCE[first],
                ref_rejected=REFERENCE[second],
                chosen_tokens=TOKENS[first],
                rejected_tokens=TOKENS[second],
                label_prob=label_prob[first, second],
                chosen_from_reference=first < 0,
            )
        ).loss.mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(optimum.sum()) == pytest.approx(1.0, abs=1e-9)
    assert logits.softmax(-1).tolist() == pytest.approx(optimum.tolist(), abs=1e-5)
    assert (optimum - REFERENCE.exp()).abs().max() > 0.05  # it is not where it began
