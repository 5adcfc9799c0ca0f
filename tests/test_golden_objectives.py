"""The losses and gradients of other implementations, on the rows of the golden file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.objective_helpers import Row, losses_and_gradients, record, require_close
from workers.learner.density_ratio import density_ratio
from workers.learner.objective_options import BUILT_IN
from workers.learner.objectives import SampledLogps, UnpairedLogps, build_objective

PATH = Path(__file__).resolve().parent.parent.parent / "shared" / "golden" / "objectives.json"
GOLDEN: dict[str, Any] = (
    json.loads(PATH.read_text())
    if PATH.is_file()
    else {"rows": [], "cases": [], "batch_cases": {"rows": [], "cases": []}}
)
BATCH_ROWS: list[dict[str, float]] = GOLDEN["batch_cases"]["rows"]
BATCH_CASES: dict[str, dict[str, Any]] = {c["name"]: c for c in GOLDEN["batch_cases"]["cases"]}

pytestmark = pytest.mark.skipif(
    not PATH.is_file(), reason=f"no {PATH}: it is not part of the repository"
)

FLOAT32 = {"orpo", "exo"}  # which the file's authors computed in float32, in part
NOT_BUILT = {"aot_b0.1_rows0-7", "ld_dpo_alpha0.5_b0.1"}  # optional methods


def rows_of(rows: list[dict[str, float]]) -> list[Row]:
    keys = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    return [
        Row(*(row[key] for key in keys), int(row["len_chosen"]), int(row["len_rejected"]))
        for row in rows
    ]


def column(name: str, rows: list[dict[str, float]] = BATCH_ROWS) -> Tensor:
    return torch.tensor([row[name] for row in rows], dtype=torch.float64)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=" ".join(f"{k}={v}" for k, v in case["objective"].items()))
        for case in GOLDEN["cases"]
    ],
)
def test_a_loss_of_a_pair(case):
    found = losses_and_gradients(case["objective"], record(rows_of(GOLDEN["rows"])))
    tolerance = 1e-6 if case["objective"]["name"] in FLOAT32 else 1e-9
    assert len(case["loss"]) == 12
    for mine, theirs in zip(
        found,
        (case["loss"], case["grad_policy_chosen"], case["grad_policy_rejected"]),
        strict=True,
    ):
        require_close(mine, theirs, tolerance)


def check_kto(case: dict[str, Any]) -> None:
    params = case["params"]
    weights = {key: params[key] for key in ("beta", "desirable_weight", "undesirable_weight")}
    for side, kind in (("chosen", "desirable"), ("rejected", "undesirable")):
        policy = column(f"policy_{side}").requires_grad_()
        output = build_objective({"name": "kto", **weights})(
            UnpairedLogps(
                policy=policy,
                ref=column(f"ref_{side}"),
                tokens=column(f"len_{side}"),
                desirable=torch.full((20,), kind == "desirable"),
                mismatched_policy=torch.tensor(params["KL_policy_logps"], dtype=torch.float64),
                mismatched_ref=torch.tensor(params["KL_ref_logps"], dtype=torch.float64),
            )
        )
        output.loss.sum().backward()
        assert output.measures["kl"].tolist() == [case["kl_used"]] * 20
        require_close(output.loss.tolist(), case[f"loss_{kind}"], 1e-9)
        require_close(policy.grad.tolist(), case[f"grad_{kind}_policy_{side}"], 1e-9)


def check_kto_mixed(case: dict[str, Any]) -> None:
    params = case["params"]
    weights = {key: params[key] for key in ("beta", "desirable_weight", "undesirable_weight")}
    rows = BATCH_ROWS[:8]
    desirable = torch.arange(8) % 3 != 0
    policy = torch.where(
        desirable, column("policy_chosen", rows), column("policy_rejected", rows)
    ).requires_grad_()
    loss = build_objective({"name": "kto", **weights})(
        UnpairedLogps(
            policy=policy,
            ref=torch.where(desirable, column("ref_chosen", rows), column("ref_rejected", rows)),
            tokens=torch.ones(8),
            desirable=desirable,
            mismatched_policy=torch.full((4,), params["kl"], dtype=torch.float64),
            mismatched_ref=torch.zeros(4, dtype=torch.float64),
        )
    ).loss.mean()
    loss.backward()
    require_close([loss.item()], [case["batch_loss"]], 1e-9)
    require_close(policy.grad.tolist(), case["grad"], 1e-9)


def check_bco(case: dict[str, Any]) -> None:
    """The batches up to this one, through one objective: its δ runs on."""
    objective = build_objective({"name": "bco", **case["params"]})
    last = int(case["name"][-1])
    for first, end in ((0, 6), (6, 12), (12, 20))[: last + 1]:
        rows = BATCH_ROWS[first:end]
        chosen = column("policy_chosen", rows).requires_grad_()
        rejected = column("policy_rejected", rows).requires_grad_()
        output = objective(
            UnpairedLogps(
                policy=torch.cat([chosen, rejected]),
                ref=torch.cat([column("ref_chosen", rows), column("ref_rejected", rows)]),
                tokens=torch.ones(2 * len(rows)),
                desirable=torch.arange(2 * len(rows)) < len(rows),
            )
        )
    output.loss.mean().backward()
    require_close([objective.state()["mean"]], [case["delta_after_update"]], 1e-6)
    require_close(output.loss.tolist(), case["losses_desirable_then_undesirable"], 1e-6)
    require_close([output.loss.mean().item()], [case["batch_mean"]], 1e-6)
    require_close(chosen.grad.tolist(), case["grad_policy_chosen"], 1e-6)
    require_close(rejected.grad.tolist(), case["grad_policy_rejected"], 1e-6)


def check_udm(case: dict[str, Any]) -> None:
    weights = density_ratio(case["params"]["p_chosen_given_prompt"])
    require_close(weights.tolist(), case["weights"], 1e-6)


def check_xpo(case: dict[str, Any]) -> None:
    """The chosen columns are the policy's sample, which wins where the row is even."""
    policy_wins = [index % 2 == 0 for index in range(20)]
    rows = [
        row if wins else row.swapped()
        for row, wins in zip(rows_of(BATCH_ROWS), policy_wins, strict=True)
    ]
    logps = record(rows, chosen_from_reference=~torch.tensor(policy_wins))
    loss, winner, loser = losses_and_gradients({"name": "xpo", **case["params"]}, logps)
    require_close(loss, case["loss"], 1e-9)
    for index, wins in enumerate(policy_wins):
        mine, theirs = (winner, loser) if wins else (loser, winner)
        require_close([mine[index]], [case["grad_policy_chosen"][index]], 1e-9)
        require_close([theirs[index]], [case["grad_policy_rejected"][index]], 1e-9)


def check_nash_md(case: dict[str, Any]) -> None:
    policy = column("policy_chosen").requires_grad_()
    loss = build_objective({"name": "nash_md", **case["params"]})(
        SampledLogps(
            policy=policy,
            ref=column("ref_chosen"),
            tokens=column("len_chosen"),
            win_prob=(torch.arange(20, dtype=torch.float64) + 0.5) / 20,
        )
    ).loss
    loss.sum().backward()
    require_close(loss.tolist(), case["loss"], 1e-9)
    require_close(policy.grad.tolist(), case["grad_policy_chosen"], 1e-9)


def check_wpo(case: dict[str, Any]) -> None:
    """ω is e to the mean log-probability a token, less log Σp² = −1."""
    rows = rows_of(BATCH_ROWS)
    sum_of_squares = case["params"]["log_sum_sq_probs_per_token"]
    logps = record(
        rows,
        wpo_chosen=(
            torch.tensor([row.mean_w for row in rows], dtype=torch.float64) - sum_of_squares
        ).exp(),
        wpo_rejected=(
            torch.tensor([row.mean_l for row in rows], dtype=torch.float64) - sum_of_squares
        ).exp(),
    )
    loss, chosen, rejected = losses_and_gradients({"name": "dpo", "beta": 0.1, "wpo": True}, logps)
    require_close(loss, case["loss"], 1e-9)
    require_close(chosen, case["grad_policy_chosen"], 1e-9)
    require_close(rejected, case["grad_policy_rejected"], 1e-9)


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "kto_kl_2_b0.1_dw1.0_uw1.33": check_kto,
    "kto_kl_30_b0.1_dw1.0_uw1.0": check_kto,
    "kto_batch8_mixed": check_kto_mixed,
    "bco_running_batch0": check_bco,
    "bco_running_batch1": check_bco,
    "bco_running_batch2": check_bco,
    "bco_udm_weight": check_udm,
    "xpo_b0.1_alpha0.01": check_xpo,
    "nash_md_b0.1": check_nash_md,
    "wpo_b0.1_sumsq-1": check_wpo,
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_loss_of_a_batch(name):
    CHECKS[name](BATCH_CASES[name])


def test_no_case_is_left_out():
    assert len(GOLDEN["cases"]) == 23
    assert set(BATCH_CASES) == set(CHECKS) | NOT_BUILT
    # And no objective, but for those that no other implementation was at hand for.
    named = {case["objective"]["name"] for case in GOLDEN["cases"]}
    named |= {"kto", "bco", "xpo", "nash_md"}
    assert set(BUILT_IN) - named == {"plackett_luce", "pdpo", "sft"}
