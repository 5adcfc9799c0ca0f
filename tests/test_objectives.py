"""Objectives: golden values of other implementations, limits, the optimum, a user's own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from judges.errors import UserError
from workers.learner.objectives import PairLogps, build_objective
from workers.learner.options import ObjectiveOptions

GOLDEN = Path(__file__).resolve().parent.parent.parent / "shared" / "golden" / "objectives.json"
POLICY = ("policy_chosen", "policy_rejected")


def golden() -> dict[str, Any]:
    if not GOLDEN.is_file():
        return {"rows": [], "cases": []}
    found: dict[str, Any] = json.loads(GOLDEN.read_text())
    return found


def golden_cases() -> list[Any]:
    """The cases of the file whose objective is built: dpo, with and without label smoothing."""
    built = set(ObjectiveOptions.model_fields)
    return [
        pytest.param(case, id=" ".join(f"{k}={v}" for k, v in case["objective"].items()))
        for case in golden()["cases"]
        if case["objective"]["name"] == "dpo" and set(case["objective"]) <= built
    ]


def pairs(margins: list[float], dtype: torch.dtype = torch.float64, **fields: Tensor) -> PairLogps:
    """Pairs with these log-ratio margins d, split unevenly over chosen and rejected."""
    d = torch.tensor(margins, dtype=dtype)
    return PairLogps(
        policy_chosen=(-50.0 + 0.25 * d).requires_grad_(),
        policy_rejected=(-60.0 - 0.75 * d).requires_grad_(),
        ref_chosen=torch.full_like(d, -50.0),
        ref_rejected=torch.full_like(d, -60.0),
        chosen_tokens=torch.full((len(margins),), 10),
        rejected_tokens=torch.full((len(margins),), 12),
        **fields,
    )


def losses_and_gradients(
    objective: dict[str, Any], logps: PairLogps
) -> tuple[list[float], list[float], list[float]]:
    loss = build_objective(objective)(logps).loss
    loss.sum().backward()
    chosen, rejected = logps.policy_chosen.grad, logps.policy_rejected.grad
    assert chosen is not None
    assert rejected is not None
    return loss.tolist(), chosen.tolist(), rejected.tolist()


def softplus(z: float) -> float:
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


def sigmoid(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-z)) if z >= 0 else math.exp(z) / (1.0 + math.exp(z))


@pytest.mark.skipif(not GOLDEN.is_file(), reason=f"no {GOLDEN}: it is not part of the repository")
def test_the_golden_file_has_dpo_with_and_without_label_smoothing():
    options = [case.values[0]["objective"] for case in golden_cases()]
    assert [(o["beta"], o.get("label_smoothing", 0.0)) for o in options] == [
        (0.1, 0.0),
        (0.5, 0.0),
        (0.1, 0.1),
    ]


@pytest.mark.skipif(not GOLDEN.is_file(), reason=f"no {GOLDEN}: it is not part of the repository")
@pytest.mark.parametrize("case", golden_cases())
def test_another_implementations_losses_and_gradients(case):
    rows = golden()["rows"]

    def column(name: str) -> Tensor:
        return torch.tensor([row[name] for row in rows], dtype=torch.float64)

    logps = PairLogps(
        policy_chosen=column("policy_chosen").requires_grad_(),
        policy_rejected=column("policy_rejected").requires_grad_(),
        ref_chosen=column("ref_chosen"),
        ref_rejected=column("ref_rejected"),
        chosen_tokens=column("len_chosen"),
        rejected_tokens=column("len_rejected"),
    )
    found = losses_and_gradients(case["objective"], logps)
    expected = (case["loss"], case["grad_policy_chosen"], case["grad_policy_rejected"])
    assert len(case["loss"]) == len(rows) == 12
    for mine, theirs in zip(found, expected, strict=True):
        for value, wanted in zip(mine, theirs, strict=True):
            assert abs(value - wanted) <= 1e-9 * (1.0 + abs(wanted))


def test_policy_equal_to_reference_gives_ln_2():
    for dtype, tolerance in ((torch.float64, 1e-15), (torch.float32, 1e-6)):
        for beta in (0.01, 0.1, 5.0):
            loss = build_objective({"name": "dpo", "beta": beta})(pairs([0.0], dtype)).loss
            assert loss.dtype == dtype
            assert loss.item() == pytest.approx(math.log(2.0), abs=tolerance)


def test_the_gradient_is_beta_times_the_probability_of_being_wrong():
    margins = [-30.0, -2.0, 0.0, 0.5, 7.0]
    for beta in (0.1, 1.5):
        loss, chosen, rejected = losses_and_gradients({"name": "dpo", "beta": beta}, pairs(margins))
        for d, value, up, down in zip(margins, loss, chosen, rejected, strict=True):
            assert value == pytest.approx(softplus(-beta * d), rel=1e-12)
            assert up == pytest.approx(-beta * sigmoid(-beta * d), rel=1e-12)
            assert down == -up


def test_a_soft_label_weighs_both_directions():
    margins = [-3.0, 0.0, 4.0, 4.0]
    p = [0.9, 0.3, 0.5, 1.0]
    logps = pairs(margins, label_prob=torch.tensor(p, dtype=torch.float64))
    loss, chosen, _ = losses_and_gradients({"name": "dpo", "beta": 0.7}, logps)
    for i, d in enumerate(margins):
        z = 0.7 * d
        assert loss[i] == pytest.approx(p[i] * softplus(-z) + (1 - p[i]) * softplus(z), rel=1e-12)
        # d/dd of it: beta (sigmoid(beta d) - p); it rests where sigmoid(beta d) = p.
        assert chosen[i] == pytest.approx(0.7 * (sigmoid(z) - p[i]), abs=1e-12)


def test_label_smoothing_is_the_soft_label_one_minus_epsilon():
    margins = [-3.0, 0.2, 4.0]
    smoothed = {"name": "dpo", "beta": 0.4, "label_smoothing": 0.2}
    soft = pairs(margins, label_prob=torch.full((3,), 0.8, dtype=torch.float64))
    expected = losses_and_gradients({"name": "dpo", "beta": 0.4}, soft)
    for mine, theirs in zip(losses_and_gradients(smoothed, pairs(margins)), expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-12)


def test_label_smoothing_shrinks_a_soft_label_towards_a_half():
    # A judge's 0.9, right with probability 0.8: 0.9 * 0.8 + 0.1 * 0.2 = 0.74.
    logps = pairs([1.5], label_prob=torch.tensor([0.9], dtype=torch.float64))
    loss = build_objective({"name": "dpo", "beta": 1.0, "label_smoothing": 0.2})(logps).loss
    assert loss.item() == pytest.approx(0.74 * softplus(-1.5) + 0.26 * softplus(1.5), rel=1e-12)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_extreme_log_ratios_stay_finite_in_float32(beta, label_smoothing):
    objective = {"name": "dpo", "beta": beta, "label_smoothing": label_smoothing}
    # Each log-ratio at +-700 nats: d = +-1400, and exp of it is far outside float32.
    chosen = torch.tensor([700.0, -700.0], dtype=torch.float32)
    logps = PairLogps(
        policy_chosen=(chosen - 1000.0).requires_grad_(),
        policy_rejected=(-chosen - 1000.0).requires_grad_(),
        ref_chosen=torch.full((2,), -1000.0),
        ref_rejected=torch.full((2,), -1000.0),
        chosen_tokens=torch.tensor([10, 10]),
        rejected_tokens=torch.tensor([10, 10]),
        label_prob=torch.ones(2),
    )
    loss, up, down = losses_and_gradients(objective, logps)
    wrong = beta * 1400.0
    assert loss == pytest.approx([label_smoothing * wrong, (1 - label_smoothing) * wrong], rel=1e-6)
    assert up == pytest.approx([beta * label_smoothing, -beta * (1 - label_smoothing)], rel=1e-6)
    assert down == pytest.approx([-g for g in up], rel=1e-6)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_population_optimum_is_the_tilted_reference(beta):
    """Soft Bradley-Terry labels over all pairs drive the policy to pi_ref exp(r / beta) / Z."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(-1)
    reward = torch.randn(6, generator=generator, dtype=torch.float64)
    first, second = torch.triu_indices(6, 6, offset=1)
    label_prob = torch.tensor(
        [sigmoid(float(reward[i] - reward[j])) for i, j in zip(first, second, strict=True)],
        dtype=torch.float64,
    )
    tokens = torch.ones(len(first), dtype=torch.long)
    objective = build_objective({"name": "dpo", "beta": beta})
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logps = logits.log_softmax(-1)
        loss = objective(
            PairLogps(
                policy_chosen=logps[first],
                policy_rejected=logps[second],
                ref_chosen=reference[first],
                ref_rejected=reference[second],
                chosen_tokens=tokens,
                rejected_tokens=tokens,
                label_prob=label_prob,
            )
        ).loss.mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    tilted = [math.exp(float(p) + float(r) / beta) for p, r in zip(reference, reward, strict=True)]
    optimum = [value / sum(tilted) for value in tilted]
    assert logits.softmax(-1).tolist() == pytest.approx(optimum, abs=1e-4)
    # The optimum is not where it began.
    assert max(abs(p - math.exp(float(q))) for p, q in zip(optimum, reference, strict=True)) > 0.05


def test_an_objective_of_the_users_own_gets_the_record_and_its_args(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def squared(logps, target, scale=1.0):\n"
        "    margin = logps.chosen_logratio - logps.rejected_logratio\n"
        "    return scale * (margin - target) ** 2 * logps.lag\n"
    )
    options = {"name": f"{path}:squared", "args": {"target": 3.0, "scale": 0.5}}
    logps = pairs([1.0, 5.0, 3.0], lag=torch.tensor([1, 2, 7]))
    loss, chosen, rejected = losses_and_gradients(options, logps)
    # 0.5 (1-3)^2 1 = 2,  0.5 (5-3)^2 2 = 4,  0; gradients (d - 3) lag.
    assert loss == pytest.approx([2.0, 4.0, 0.0], abs=1e-9)
    assert chosen == pytest.approx([-2.0, 4.0, 0.0], abs=1e-9)
    assert rejected == pytest.approx([2.0, -4.0, 0.0], abs=1e-9)


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        ("loss.mean()", r"shape \(\)"),
        ("loss[:, None]", r"shape \(2, 1\)"),
        ("loss[:1]", r"shape \(1,\)"),
        ("loss.tolist()", "list"),
        ("None", "NoneType"),
    ],
)
def test_an_objective_that_returns_no_loss_a_pair(tmp_path, returned, got):
    path = tmp_path / "mine.py"
    path.write_text(f"def f(logps):\n    loss = logps.chosen_logratio\n    return {returned}\n")
    objective = build_objective({"name": f"{path}:f"})
    message = rf"^objective\.name={path}:f: returned {got}; return one loss a pair, .*shape \(2,\)$"
    with pytest.raises(UserError, match=message):
        objective(pairs([1.0, 2.0]))


def test_an_objective_that_cannot_be_loaded(tmp_path):
    with pytest.raises(UserError, match=r"^objective\.name=.*no\.py:f: no file "):
        build_objective({"name": f"{tmp_path}/no.py:f"})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": 0.0}, "beta\n.*greater than 0 "),
        ({"beta": -0.1}, "beta\n.*greater than 0 "),
        ({"label_smoothing": 0.5}, r"label_smoothing\n.*less than 0\.5 "),
        ({"label_smoothing": -0.01}, "label_smoothing\n.*greater than or equal to 0 "),
        ({"name": "dop"}, "no such objective; did you mean 'dpo'"),
        ({"name": "ipo"}, "did you mean 'dpo'.*path/to/file.py:function"),
        ({"betta": 0.1}, "betta\n.*not permitted"),
    ],
)
def test_options_out_of_range_or_unknown(options, said):
    with pytest.raises(ValidationError, match=said):
        build_objective(options)
