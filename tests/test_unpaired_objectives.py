"""KTO and BCO: their formulas in plain Python, KTO's z, BCO's running δ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.objective_helpers import require_close, sigmoid, slope, sp
from workers.learner.objectives import UnpairedLogps, build_objective

POLICY = [-20.0, -31.5, -12.25, -40.0, -8.0]
REF = [-24.0, -30.0, -12.25, -47.0, -3.0]
DESIRABLE = [True, False, False, True, True]


def double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def record(
    policy: list[float] = POLICY,
    ref: list[float] = REF,
    desirable: list[bool] = DESIRABLE,
    *,
    mismatched: list[float] = (),
    **columns: Any,
) -> UnpairedLogps:
    """Completions, and log-ratios of mismatched ones (whose reference is at −50)."""
    return UnpairedLogps(
        policy=double(policy).requires_grad_(),
        ref=double(ref),
        tokens=torch.full((len(policy),), 10),
        desirable=torch.tensor(desirable),
        mismatched_policy=double([ratio - 50.0 for ratio in mismatched]),
        mismatched_ref=torch.full((len(mismatched),), -50.0, dtype=torch.float64),
        **columns,
    )


@pytest.mark.parametrize("beta", [0.1, 0.8])
def test_kto(beta):
    options = {"name": "kto", "beta": beta, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    logps = record(mismatched=[-1.0, 4.0, 3.0])  # z = 2
    output = build_objective(options)(logps)
    output.loss.sum().backward()

    def loss(policy: float, ref: float, desirable: bool) -> float:
        if desirable:
            return 1.5 * (1 - sigmoid(beta * (policy - ref - 2.0)))
        return 0.7 * (1 - sigmoid(beta * (2.0 - (policy - ref))))

    rows = list(zip(POLICY, REF, DESIRABLE, strict=True))
    require_close(output.loss.tolist(), [loss(*row) for row in rows], 1e-12)
    wanted = [slope(lambda p, row=row: loss(p, *row[1:]), row[0]) for row in rows]
    require_close(logps.policy.grad.tolist(), wanted, 1e-8)
    assert output.measures["kl"].tolist() == [2.0] * 5


@pytest.mark.parametrize(
    ("mismatched", "z"),
    [
        ([-4.0, 2.0, 8.0], 2.0),  # clamped one by one they would have the mean 10/3
        ([-9.0, 3.0], 0.0),
        ([30.0], 30.0),
        ([], 0.0),
    ],
)
def test_the_mean_of_the_mismatched_is_clamped_not_each(mismatched, z):
    output = build_objective({"name": "kto", "beta": 0.5})(
        record([-9.0], [-10.0], [True], mismatched=mismatched)
    )
    assert output.measures["kl"].tolist() == [z]
    assert output.loss.item() == pytest.approx(sigmoid(-0.5 * (1.0 - z)), rel=1e-12)


def test_no_gradient_flows_through_z():
    mismatched = double([-48.0, -45.0]).requires_grad_()
    policy = double(POLICY).requires_grad_()
    logps = UnpairedLogps(
        policy=policy,
        ref=double(REF),
        tokens=torch.ones(5),
        desirable=torch.tensor(DESIRABLE),
        mismatched_policy=mismatched,
        mismatched_ref=double([-50.0, -50.0]),
    )
    output = build_objective({"name": "kto"})(logps)
    assert output.measures["kl"].tolist() == [3.5] * 5
    assert not output.measures["kl"].requires_grad
    gradient = torch.autograd.grad(output.loss.sum(), mismatched, allow_unused=True)
    assert gradient == (None,)


def test_bco_with_its_running_mean():
    objective = build_objective({"name": "bco", "beta": 0.5})
    # β-scaled log-ratios 2, −0.75, 0, 3.5, −2.5: their mean is 0.45.
    first = record()
    output = objective(first)
    output.loss.sum().backward()
    assert output.measures["delta"].tolist() == pytest.approx([0.45] * 5, rel=1e-12)

    def loss(policy: float, ref: float, desirable: bool) -> float:
        above = 0.5 * (policy - ref) - 0.45
        return sp(-above) if desirable else sp(above)

    rows = list(zip(POLICY, REF, DESIRABLE, strict=True))
    require_close(output.loss.tolist(), [loss(*row) for row in rows], 1e-12)
    # δ is a constant: the slope at a fixed δ.
    wanted = [slope(lambda p, row=row: loss(p, *row[1:]), row[0]) for row in rows]
    require_close(first.policy.grad.tolist(), wanted, 1e-8)
    # Two more, 4 and 0: δ = (5·0.45 + 4 + 0) / 7.
    second = objective(record([-2.0, -7.0], [-10.0, -7.0], [True, False]))
    assert second.measures["delta"].tolist() == pytest.approx([6.25 / 7] * 2, rel=1e-12)
    assert second.loss.tolist() == pytest.approx([sp(6.25 / 7 - 4.0), sp(-6.25 / 7)], rel=1e-12)


def test_bco_goes_on_from_its_state():
    objective, resumed = (build_objective({"name": "bco", "beta": 0.5}) for _ in range(2))
    assert objective.state() == {"mean": 0.0, "count": 0.0}
    objective(record())
    assert objective.state() == {"mean": pytest.approx(0.45, rel=1e-12), "count": 5.0}
    resumed.load(objective.state())
    later = [record([-2.0, -7.0], [-10.0, -7.0], [True, False]) for _ in range(2)]
    assert objective(later[0]).loss.tolist() == resumed(later[1]).loss.tolist()
    assert objective.state() == resumed.state()
    assert objective.state()["count"] == 7.0


def test_the_density_ratio_weighs_the_undesirable_only():
    ratio = [3.0, 0.5, 10.0, 3.0, 3.0]
    plain = build_objective({"name": "bco"})(record()).loss.tolist()
    weighed = build_objective({"name": "bco"})(record(density_ratio=double(ratio))).loss.tolist()
    wanted = [
        value if desirable else value * r
        for value, r, desirable in zip(plain, ratio, DESIRABLE, strict=True)
    ]
    assert weighed == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_the_order_of_the_completions_does_not_matter(name):
    order = [4, 2, 0, 3, 1]
    straight = build_objective({"name": name})(record(mismatched=[1.0, 2.5])).loss
    shuffled = build_objective({"name": name})(
        record(
            [POLICY[i] for i in order],
            [REF[i] for i in order],
            [DESIRABLE[i] for i in order],
            mismatched=[2.5, 1.0],
        )
    ).loss
    require_close(shuffled.tolist(), straight[order].tolist(), 1e-12)
