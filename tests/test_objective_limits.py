"""Far from the reference, float32: a loss with its gradients, or an error that names the pair."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.objective_helpers import PAIRWISE
from workers.learner.objectives import (
    NonFiniteLossError,
    Objective,
    PairLogps,
    RankedLogps,
    SampledLogps,
    UnpairedLogps,
    build_objective,
)

LOGRATIOS = [-700.0, -200.0, -20.0, 0.0, 20.0, 200.0, 700.0]
REF = -1000.0
SIDES = list(itertools.product(LOGRATIOS, repeat=2))
GRID = [(*sides, *n) for sides in SIDES for n in itertools.product((1, 7, 4096), repeat=2)]


def pairs(rows: list[tuple[float, float, int, int]], ref: float = REF, **columns: Tensor) -> Any:
    """Pairs of these log-ratios and lengths, all columns given that an objective may ask for."""
    chosen, rejected, n_w, n_l = torch.tensor(rows).T
    size = len(rows)
    return PairLogps(
        **{
            "policy_chosen": (ref + chosen).requires_grad_(),
            "policy_rejected": (ref + rejected).requires_grad_(),
            "ref_chosen": torch.full((size,), ref),
            "ref_rejected": torch.full((size,), ref),
            "chosen_tokens": n_w.long(),
            "rejected_tokens": n_l.long(),
            "wpo_chosen": torch.full((size,), 0.5),
            "wpo_rejected": torch.full((size,), 0.25),
            "behaviour_chosen": torch.full((size,), ref),
            "behaviour_rejected": torch.full((size,), ref),
            "chosen_from_reference": torch.arange(size) % 2 == 0,
            **columns,
        }
    )


def require_finite(objective: Objective, logps: PairLogps) -> Tensor:
    """The losses, after they and both gradients were seen to be finite float32."""
    loss = objective(logps).loss
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss).all()
    columns = [logps.policy_chosen, logps.policy_rejected]
    for gradient in torch.autograd.grad(loss.sum(), columns, materialize_grads=True):
        assert torch.isfinite(gradient).all()
    return loss.detach()


VARIANTS: dict[str, list[dict[str, Any]]] = {
    "ipo": [{}, {"length_normalized": True}, {"tau": 0.001}],
    "simpo": [{}, {"beta": 10.0}],
    "orpo": [{}, {"lam": 10.0}],
    "discopop": [{}, {"beta": 10.0}, {"beta": 0.1, "tau": 0.5}],
    "robust_dpo": [{}, {"flip_probability": 0.49}],
    "f_dpo": [{"beta": beta, "divergence": "jensen_shannon"} for beta in (0.01, 0.1, 10.0)],
    "pdpo": [
        {"baseline": baseline, "weights": weights, "score_weight": 1.0}
        for baseline in ("ln2", "leave_one_out", "none")
        for weights in ("none", "clipped", "self_normalized")
    ],
}
NEVER_RAISE = [
    pytest.param({"name": name, **variant}, id=" ".join([name, *map(str, variant.values())]))
    for name in [*PAIRWISE, "pdpo"]
    for variant in VARIANTS.get(name, [{"beta": beta} for beta in (0.01, 0.1, 10.0)])
]


@pytest.mark.parametrize("options", NEVER_RAISE)
def test_finite_where_the_log_ratios_are_far_out(options):
    require_finite(build_objective(options), pairs(GRID))
    if options["name"] == "pdpo":
        return
    soft = torch.tensor([0.0, 0.3, 1.0]).repeat(len(GRID))[: len(GRID)]
    added = {"label_smoothing": 0.1, "nll_weight": 1.0, "wpo": True}
    require_finite(build_objective({**options, **added}), pairs(GRID, label_prob=soft))


def test_the_objectives_that_may_raise_are_three():
    """Those with an exponential of log-ratios; all others are in the test above.

    They are f_dpo under forward_kl, discopop with τ > 1, and pdpo's raw weights.
    """
    covered = [tuple(sorted(case.values[0].items())) for case in NEVER_RAISE]
    assert {dict(options)["name"] for options in covered} == {*PAIRWISE, "pdpo"}
    divergences = {dict(options).get("divergence") for options in covered}
    assert divergences == {None, "jensen_shannon"}
    weights = {dict(options).get("weights") for options in covered}
    assert weights == {None, "none", "clipped", "self_normalized"}
    assert all(dict(o).get("tau", 0.0) <= 1.0 for o in covered if dict(o)["name"] == "discopop")


def raises(objective: Objective, row: tuple[float, float, int, int]) -> bool:
    """Whether the pair is refused, by an error that gives its numbers; else all is finite."""
    message = ""
    try:
        require_finite(objective, pairs([row]))
    except NonFiniteLossError as error:
        message = str(error)
    named = re.search(
        rf"the loss of pair 0 is (inf|-inf|nan) at policy_chosen {REF + row[0]}, "
        rf"policy_rejected {REF + row[1]}, ref_chosen {REF}, ref_rejected {REF}: ",
        message,
    )
    assert named or not message, message
    return bool(message)


@pytest.mark.parametrize("beta", [0.01, 0.1, 10.0])
def test_a_smoothed_label_puts_both_sides_of_forward_kl_at_risk(beta):
    options = {"name": "f_dpo", "divergence": "forward_kl", "beta": beta, "label_smoothing": 0.1}
    objective = build_objective(options)
    refused = {row[:2] for row in GRID if raises(objective, row)}
    assert refused == {sides for sides in SIDES if min(sides) <= -200.0}


def test_discopop_raises_only_where_it_exceeds_float32():
    # s·e^(−u) is e^(u/5 − u) at u ≪ 0: e^112 at d = −1400, e^72 at d = −900.
    objective = build_objective({"name": "discopop", "beta": 0.1, "tau": 5.0})
    assert {row[:2] for row in GRID if raises(objective, row)} == {(-700.0, 700.0)}


@pytest.mark.parametrize("beta", [0.01, 0.1, 10.0])
def test_forward_kl_raises_only_where_it_exceeds_float32(beta):
    # β e^200 is beyond float32. Where the rejected is the less likely one the loss is 0.
    objective = build_objective({"name": "f_dpo", "divergence": "forward_kl", "beta": beta})
    refused = {row[:2] for row in GRID if raises(objective, row)}
    assert refused == {sides for sides in SIDES if sides[0] <= -200.0 and sides[1] >= sides[0]}
    settled = [sides for sides in SIDES if sides[1] <= -200.0 and sides[0] > sides[1]]
    for sides in settled:
        assert require_finite(objective, pairs([(*sides, 1, 1)])).item() == 0.0


@pytest.mark.parametrize("beta", [0.1, 1.9])
def test_forward_kl_at_the_edge_of_float32(beta):
    """Where e^(−w) and e^(−l) just fit or just do not: never a finite loss of another gradient."""
    objective = build_objective({"name": "f_dpo", "divergence": "forward_kl", "beta": beta})
    edge = [-95.0, -89.0, -88.75, -88.5, -88.0, -87.0, -60.0, -44.5, -44.25, -44.0]
    refused = 0
    for chosen, rejected in itertools.product(edge, repeat=2):
        logps = pairs([(chosen, rejected, 1, 1)], ref=0.0)
        try:
            loss = require_finite(objective, logps).item()
        except NonFiniteLossError:
            refused += 1
            # The loss or a gradient term is beyond float32.
            assert math.log(beta) - chosen > math.log(torch.finfo(torch.float32).max)
            continue
        logit = beta * (math.exp(-chosen) - math.exp(-rejected))  # float64 holds it
        wanted = max(logit, 0.0) + math.log1p(math.exp(-abs(logit)))
        assert loss == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert 0 < refused < 50


def test_raw_weights_raise_only_where_they_exceed_float32():
    objective = build_objective({"name": "pdpo", "weights": "raw", "score_weight": 1.0})
    refused = {row[:2] for row in GRID if raises(objective, row)}
    # The weight is e^(w + l): every sum on the grid is at most 40 or at least 180.
    assert refused == {sides for sides in SIDES if sum(sides) > 88.0}


def test_the_error_names_the_pair_and_its_prompt():
    rows = [(0.0, 0.0, 1, 1), (20.0, 0.0, 1, 1), (-700.0, 200.0, 1, 1), (-200.0, 0.0, 1, 1)]
    logps = pairs(rows, prompt_ids=torch.tensor([11, 12, 13, 14]))
    objective = build_objective({"name": "f_dpo", "divergence": "forward_kl"})
    message = (
        r"^objective f_dpo: the loss of pair 2 \(prompt 13\) is inf at policy_chosen -1700\.0, "
        r"policy_rejected -800\.0, ref_chosen -1000\.0, ref_rejected -1000\.0: .*"
        r"lower learner\.learning_rate"
    )
    with pytest.raises(NonFiniteLossError, match=message):
        objective(logps)


@pytest.mark.parametrize("name", [*PAIRWISE, "pdpo"])
def test_a_log_probability_of_nan_is_an_error(name):
    objective = build_objective({"name": name})
    for nan in ((math.nan, 0.0), (0.0, math.nan)):
        with pytest.raises(NonFiniteLossError, match=r"the loss of pair 1 is nan at .* nan"):
            objective(pairs([(0.0, 1.0, 1, 1), (*nan, 1, 1)]))


@pytest.mark.parametrize("name", ["simpo", "orpo", "cpo"])
def test_a_mean_log_probability_of_zero(name):
    """Without a reference: each side from certain (log-probability exactly 0) to impossible."""
    logps = [0.0, -1e-30, -1e-8, -1e-3, -20.0, -1400.0]
    rows = [
        (p, q, n_w, n_l)
        for p, q in itertools.product(logps, repeat=2)
        for n_w, n_l in itertools.product((1, 4096), repeat=2)
    ]
    loss = require_finite(build_objective({"name": name}), pairs(rows, ref=0.0))
    by_row = dict(zip(rows, loss.tolist(), strict=True))
    # Both certain: no side is preferred. log 2 of ORPO is weighted by λ = 0.1, SimPO's γ is 1.
    certain = {
        "simpo": math.log1p(math.e),
        "orpo": 0.1 * math.log(2.0),
        "cpo": math.log(2.0),
    }
    assert by_row[0.0, 0.0, 1, 1] == pytest.approx(certain[name], rel=1e-6)
    assert by_row[0.0, -20.0, 1, 1] < by_row[0.0, 0.0, 1, 1] < by_row[-20.0, 0.0, 1, 1]


# Other records than pairs.


@pytest.mark.parametrize("beta", [0.01, 0.1, 10.0])
@pytest.mark.parametrize("kl", LOGRATIOS)
def test_unpaired(beta, kl):
    for name, desirable in itertools.product(("kto", "bco"), (True, False)):
        policy = (REF + torch.tensor(LOGRATIOS)).requires_grad_()
        logps = UnpairedLogps(
            policy=policy,
            ref=torch.full((7,), REF),
            tokens=torch.ones(7),
            desirable=torch.full((7,), desirable),
            mismatched_policy=torch.tensor([REF + kl]),
            mismatched_ref=torch.tensor([REF]),
        )
        objective = build_objective({"name": name, "beta": beta})
        if name == "bco":
            objective.load({"mean": beta * kl, "count": 1000.0})
        loss = objective(logps).loss
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert torch.isfinite(policy.grad).all()


@pytest.mark.parametrize("beta", [0.01, 0.1, 10.0])
def test_ranked(beta):
    policy = REF + torch.tensor(list(itertools.product(LOGRATIOS, repeat=3)))
    policy.requires_grad_()
    keep = torch.ones_like(policy, dtype=torch.bool)
    keep[::3, 2] = False
    loss = build_objective({"name": "plackett_luce", "beta": beta})(
        RankedLogps(
            policy_GK=policy,
            ref_GK=torch.full_like(policy, REF),
            tokens_GK=torch.ones_like(policy),
            keep_mask_GK=keep,
        )
    ).loss
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(policy.grad).all()
    assert policy.grad.abs().max() <= 2 * beta * 1.001  # each place pulls with β at most


def test_sampled():
    policy = (REF + torch.tensor(LOGRATIOS)).requires_grad_()
    loss = build_objective({"name": "nash_md"})(
        SampledLogps(
            policy=policy,
            ref=torch.full((7,), REF),
            tokens=torch.ones(7),
            win_prob=torch.linspace(0, 1, 7),
        )
    ).loss
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    # β·h − (P − ½).
    wanted = [0.1 * h - (i / 6 - 0.5) for i, h in enumerate(LOGRATIOS)]
    assert policy.grad.tolist() == pytest.approx(wanted, rel=1e-5)
