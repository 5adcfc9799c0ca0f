"""The options of the objectives, what each must be given, and objectives of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from judges.errors import UserError
from tests.objective_helpers import PAIRWISE, losses_and_gradients, random_rows, record
from workers.learner.objective_options import BUILT_IN
from workers.learner.objectives import (
    PairLogps,
    RankedLogps,
    SampledLogps,
    UnpairedLogps,
    build_objective,
)

REFERENCE_FREE = {"simpo", "orpo", "cpo", "sft"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": 0.0}, r"beta\n.*must be in \(0, ∞\)"),
        ({"beta": -0.1}, r"beta\n.*must be in \(0, ∞\)"),
        ({"beta": float("nan")}, r"beta\n.*must be in \(0, ∞\)"),
        ({"beta": float("inf")}, r"beta\n.*must be in \(0, ∞\)"),
        ({"label_smoothing": 0.5}, r"label_smoothing\n.*must be in \[0, 0\.5\)"),
        ({"label_smoothing": -0.01}, r"label_smoothing\n.*must be in \[0, 0\.5\)"),
        ({"nll_weight": -1.0}, r"nll_weight\n.*must be in \[0, ∞\)"),
        ({"name": "robust_dpo", "flip_probability": 0.5}, r"must be in \[0, 0\.5\)"),
        ({"name": "ipo", "tau": 0.0}, r"tau\n.*must be in \(0, ∞\)"),
        ({"name": "simpo", "gamma": -0.1}, r"gamma\n.*must be in \[0, ∞\)"),
        ({"name": "orpo", "lam": -0.1}, r"lam\n.*must be in \[0, ∞\)"),
        ({"name": "exo", "label_smoothing": 0.0}, r"must be in \(0, 0\.5\)"),
        ({"name": "f_dpo", "divergence": "reverse_kl"}, "'forward_kl' or 'jensen_shannon'"),
        ({"name": "xpo", "alpha": -1e-9}, r"alpha\n.*must be in \[0, ∞\)"),
        ({"name": "nash_md", "mixture": 1.01}, r"mixture\n.*must be in \[0, 1\]"),
        ({"name": "pdpo", "clip": 0.0}, r"clip\n.*must be in \(0, ∞\)"),
        ({"name": "pdpo", "weights": "clip"}, "'clipped' or 'self_normalized'"),
        ({"name": "pdpo", "baseline": "mean"}, "'leave_one_out' or 'none'"),
        ({"name": "kto", "desirable_weight": -1}, r"desirable_weight\n.*must be in \[0, ∞\)"),
        ({"name": "dpoo"}, r"objective\.name=dpoo: no such objective; did you mean 'dpo'\?"),
        ({"name": "simp"}, r"did you mean 'simpo'\? .*path/to/file\.py:function"),
        ({"name": "quite different"}, r"no such objective; did you mean '\w+'\?"),
        ({"name": 3}, "must be text, one of dpo, robust_dpo, "),
        ({"betta": 0.1}, "betta\n.*not permitted"),
        ({"name": "dpo", "tau": 0.1}, "tau\n.*not permitted"),
        ({"name": "kto", "label_smoothing": 0.1}, "label_smoothing\n.*not permitted"),
        ({"name": "sft", "nll_weight": 0.1}, "nll_weight\n.*not permitted"),
    ],
)
def test_options_out_of_range_or_unknown(options, said):
    with pytest.raises(ValidationError, match=said):
        build_objective(options)


def test_the_ends_of_the_ranges_that_are_allowed():
    for options in (
        {"label_smoothing": 0.0, "nll_weight": 0.0},
        {"name": "robust_dpo", "flip_probability": 0.0},
        {"name": "nash_md", "mixture": 0.0},
        {"name": "nash_md", "mixture": 1.0},
        {"name": "pdpo", "score_weight": 0.0},
        {"name": "simpo", "gamma": 0.0},
    ):
        build_objective(options)


def test_without_a_name_it_is_dpo():
    rows = random_rows(0, 3)
    for beta in (0.1, 0.6):
        named = losses_and_gradients({"name": "dpo", "beta": beta}, record(rows))
        assert losses_and_gradients({"beta": beta}, record(rows)) == named
    assert losses_and_gradients({}, record(rows)) == losses_and_gradients(
        {"beta": 0.1}, record(rows)
    )


# What a record must hold.

ROWS = random_rows(1, 4)


def whole_pairs(**columns: Any) -> PairLogps:
    origin = torch.arange(4) < 2
    return record(ROWS, **{"chosen_from_reference": origin, **columns})


@pytest.mark.parametrize("name", sorted(REFERENCE_FREE))
def test_objectives_without_a_reference(name):
    expected = losses_and_gradients({"name": name}, whole_pairs())
    without = replace(whole_pairs(), ref_chosen=None, ref_rejected=None)
    assert losses_and_gradients({"name": name}, without) == expected
    # Soft labels and smoothing do without one too.
    soft = replace(without, label_prob=torch.tensor([0.1, 0.9, 1.0, 0.5]))
    smoothing = {"label_smoothing": 0.1} if name in PAIRWISE else {}
    losses_and_gradients({"name": name, **smoothing}, soft)


def one(values: list[float]) -> Tensor:
    return torch.tensor(values)


WHOLE: dict[str, Callable[[], Any]] = {
    "pairs": whole_pairs,
    "unpaired": lambda: UnpairedLogps(
        policy=one([-3.0, -4.0]),
        ref=one([-3.5, -3.0]),
        tokens=one([2, 2]),
        desirable=torch.tensor([True, False]),
        mismatched_policy=one([-2.0]),
        mismatched_ref=one([-2.5]),
    ),
    "ranked": lambda: RankedLogps(
        policy_GK=one([[-1.0, -2.0]]),
        ref_GK=one([[-1.0, -1.0]]),
        tokens_GK=one([[1, 1]]),
        keep_mask_GK=torch.ones(1, 2, dtype=torch.bool),
    ),
    "sampled": lambda: SampledLogps(
        policy=one([-1.0]), ref=one([-2.0]), tokens=one([1]), win_prob=one([0.3])
    ),
}
MISSING = [
    *((name, {}, "ref_chosen") for name in [*PAIRWISE, "pdpo"] if name not in REFERENCE_FREE),
    *((name, {}, "ref_rejected") for name in [*PAIRWISE, "pdpo"] if name not in REFERENCE_FREE),
    *(
        (name, {"wpo": True}, field)
        for name in PAIRWISE
        for field in ("wpo_chosen", "wpo_rejected")
    ),
    ("xpo", {}, "chosen_from_reference"),
    ("kto", {}, "ref"),
    ("kto", {}, "mismatched_policy"),
    ("kto", {}, "mismatched_ref"),
    ("bco", {}, "ref"),
    ("plackett_luce", {}, "ref_GK"),
    ("nash_md", {}, "ref"),
]


@pytest.mark.parametrize(("name", "options", "field"), MISSING)
def test_a_record_that_lacks_a_field(name, options, field):
    objective = build_objective({"name": name, **options})
    whole = WHOLE[objective.needs.records]()
    if "wpo" in options:
        whole = replace(whole, wpo_chosen=torch.ones(4), wpo_rejected=torch.ones(4))
    objective(whole)
    with pytest.raises(ValueError, match=rf"^this objective needs {field}: "):
        objective(replace(whole, **{field: None}))


def test_swapped_pairs_have_the_other_label():
    logps = whole_pairs(wpo_chosen=torch.arange(4), wpo_rejected=-torch.arange(4))
    other = logps.swapped()
    for field in ("policy", "ref", "wpo"):
        chosen, rejected = f"{field}_chosen", f"{field}_rejected"
        assert getattr(other, chosen) is getattr(logps, rejected)
        assert getattr(other, rejected) is getattr(logps, chosen)
    assert other.chosen_tokens.tolist() == [row.n_l for row in ROWS]
    assert other.chosen_from_reference.tolist() == [False, False, True, True]
    taken = other.take(torch.tensor([3, 0]))
    assert taken.policy_chosen.tolist() == [ROWS[3].policy_rejected, ROWS[0].policy_rejected]
    assert taken.chosen_from_reference.tolist() == [True, False]
    assert taken.label_prob is None


def test_an_objective_says_what_it_needs():
    for name in BUILT_IN:
        needs = build_objective({"name": name}).needs
        assert needs.reference == (name not in REFERENCE_FREE)
        assert needs.mismatched == (name == "kto")
        # Only these have losses that depend on the other examples of an update.
        assert needs.whole_update == (name == "bco")
        assert needs.opponent == {"xpo": 1.0, "nash_md": 0.5}.get(name, 0.0)
    for options in ({"baseline": "leave_one_out"}, {"weights": "self_normalized"}):
        assert build_objective({"name": "pdpo", **options}).needs.whole_update
    for name in PAIRWISE:
        assert build_objective({"name": name, "wpo": True}).needs.collisions
        assert not build_objective({"name": name}).needs.collisions


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "bco"])
def test_only_bco_has_a_state(name):
    objective = build_objective({"name": name})
    objective(WHOLE[objective.needs.records]())
    assert objective.state() == {}
    objective.load({})


# Objectives of the user's own.


def plugin(folder: Path, source: str) -> Path:
    path = folder / "mine.py"
    path.write_text("from workers.learner.objectives import needs\n\n\n" + source)
    return path


def test_an_objective_of_the_users_own_gets_the_record_and_its_args(tmp_path):
    path = plugin(
        tmp_path,
        "def squared(logps, target, scale=1.0):\n"
        "    margin = logps.chosen_logratio - logps.rejected_logratio\n"
        "    return scale * (margin - target) ** 2 * logps.lag\n",
    )
    options = {"name": f"{path}:squared", "args": {"target": 3.0, "scale": 0.5}}
    logps = replace(
        record(random_rows(0, 3)),
        policy_chosen=torch.tensor([-9.0, -5.0, -7.0], dtype=torch.float64, requires_grad=True),
        policy_rejected=torch.full((3,), -20.0, dtype=torch.float64, requires_grad=True),
        ref_chosen=torch.full((3,), -10.0, dtype=torch.float64),
        ref_rejected=torch.full((3,), -20.0, dtype=torch.float64),
        lag=torch.tensor([1, 2, 7]),
    )
    loss, chosen, rejected = losses_and_gradients(options, logps)
    # Margins 1, 5, 3: 0.5 (1-3)^2 1 = 2,  0.5 (5-3)^2 2 = 4,  0; gradients (d - 3) lag.
    assert loss == pytest.approx([2.0, 4.0, 0.0], abs=1e-9)
    assert chosen == pytest.approx([-2.0, 4.0, 0.0], abs=1e-9)
    assert rejected == pytest.approx([2.0, -4.0, 0.0], abs=1e-9)


@pytest.mark.parametrize("records", sorted(WHOLE))
def test_an_objective_of_the_users_own_asks_for_a_record(tmp_path, records):
    path = plugin(
        tmp_path,
        f"@needs({records!r}, reference=False, whole_update=True, per_token=True)\n"
        "def mine(logps):\n"
        "    policy = getattr(logps, 'policy', None)\n"
        "    policy = getattr(logps, 'policy_chosen', None) if policy is None else policy\n"
        "    return (logps.policy_GK.sum(-1) if policy is None else policy) * -2.0\n",
    )
    objective = build_objective({"name": f"{path}:mine"})
    wanted = {
        "pairs": [-2.0 * row.policy_chosen for row in ROWS],
        "unpaired": [6.0, 8.0],
        "ranked": [6.0],
        "sampled": [2.0],
    }
    assert objective(WHOLE[records]()).loss.tolist() == pytest.approx(wanted[records])
    needs = objective.needs
    assert (needs.records, needs.reference, needs.whole_update) == (records, False, True)
    assert (needs.per_token, needs.mismatched, needs.collisions) == (True, False, False)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({}, r"^objective\.args: .*mine\.py:f needs target, width: give it there$"),
        ({"target": 1.0}, r"^objective\.args: .*:f needs width: give it there$"),
        (
            {"target": 1.0, "widht": 2.0},
            r"^objective\.args\.widht: .*:f takes no such argument \(did you mean width\?\): "
            "it takes logps, target, width, scale$",
        ),
    ],
)
def test_args_that_the_function_does_not_take(tmp_path, args, said):
    path = plugin(tmp_path, "def f(logps, target, width, scale=1.0):\n    return logps.lag\n")
    with pytest.raises(UserError, match=said):
        build_objective({"name": f"{path}:f", "args": args})


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        ("loss.mean()", r"shape \(\)"),
        ("loss[:, None]", r"shape \(4, 1\)"),
        ("loss[:1]", r"shape \(1,\)"),
        ("loss.tolist()", "list"),
        ("None", "NoneType"),
    ],
)
def test_an_objective_that_returns_no_loss_a_pair(tmp_path, returned, got):
    path = plugin(
        tmp_path, f"def f(logps):\n    loss = logps.chosen_logratio\n    return {returned}\n"
    )
    objective = build_objective({"name": f"{path}:f"})
    message = rf"^objective\.name={path}:f: returned {got}; return one loss a pair, .*shape \(4,\)$"
    with pytest.raises(UserError, match=message):
        objective(whole_pairs())


def test_an_objective_that_returns_a_loss_a_place(tmp_path):
    path = plugin(tmp_path, "@needs('ranked')\ndef f(logps):\n    return logps.policy_GK\n")
    message = r"returned shape \(1, 2\); return one loss an example, a tensor of shape \(1,\)$"
    with pytest.raises(UserError, match=message):
        build_objective({"name": f"{path}:f"})(WHOLE["ranked"]())


def test_an_objective_that_cannot_be_loaded(tmp_path):
    with pytest.raises(UserError, match=r"^objective\.name=.*no\.py:f: no file "):
        build_objective({"name": f"{tmp_path}/no.py:f"})
