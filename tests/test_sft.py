"""Supervised fine-tuning on the chosen side: its loss by hand, and that nothing else counts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline import job
from pipeline.ledger import Ledger
from tests import tiny
from tests.objective_helpers import Row, losses_and_gradients, random_rows, record, slopes
from workers.learner.objectives import PairLogps, build_objective
from workers.learner.pairwise_options import PairwiseOptions
from workers.messages import Fate

ROWS = [Row(-12.0, -3.0, -10.0, -5.0, 4, 2), Row(-7.0, -70.0, -7.5, -9.0, 10, 3)]


def test_the_loss_is_the_mean_surprise_of_a_chosen_token() -> None:
    loss, chosen, rejected = losses_and_gradients({"name": "sft"}, record(ROWS))
    assert loss == pytest.approx([3.0, 0.7], rel=1e-12)
    assert chosen == pytest.approx([-0.25, -0.1], rel=1e-12)  # −1/n_w
    assert rejected == [0.0, 0.0]


def test_the_gradient_is_that_of_the_formula() -> None:
    rows = random_rows(5, 8)
    _, chosen, rejected = losses_and_gradients({"name": "sft"}, record(rows))
    expected = [slopes(lambda row: -row.policy_chosen / row.n_w, row) for row in rows]
    assert chosen == pytest.approx([along for along, _ in expected], rel=1e-6)
    assert rejected == [along for _, along in expected] == [0.0] * 8


def test_it_is_what_nll_weight_adds_to_another_objective() -> None:
    rows = random_rows(6, 8)
    plain = losses_and_gradients({"name": "dpo"}, record(rows))
    added = losses_and_gradients({"name": "dpo", "nll_weight": 2.0}, record(rows))
    alone = losses_and_gradients({"name": "sft"}, record(rows))
    for before, after, mine in zip(plain, added, alone, strict=True):
        parts = [(b - a) / 2.0 for a, b in zip(before, after, strict=True)]
        assert mine == pytest.approx(parts, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("value", [0.0, -1e30, -math.inf, math.nan])
def test_nothing_but_the_chosen_counts(value: float) -> None:
    """Neither the rejected, impossible as it may be, nor a reference, nor the label's certainty."""
    expected = losses_and_gradients({"name": "sft"}, record(ROWS))
    odd = torch.full((2,), value, dtype=torch.float64)
    logps: PairLogps = replace(
        record(ROWS, label_prob=[0.1, 1.0]),
        policy_rejected=odd.clone().requires_grad_(),
        ref_chosen=odd,
        ref_rejected=None,
        rejected_tokens=torch.tensor([1, 999]),
    )
    assert losses_and_gradients({"name": "sft"}, logps) == expected


def test_it_has_no_settings_and_no_reference() -> None:
    objective = build_objective({"name": "sft"})
    assert not objective.needs.reference
    assert objective.needs.records == "pairs"
    for key in PairwiseOptions.model_fields.keys() - {"name"}:
        with pytest.raises(ValueError, match=f"{key}\n.*not permitted"):
            build_objective({"name": "sft", key: 0.1})


def test_a_run_raises_what_was_chosen(tiny_model: Path, tmp_path: Path) -> None:
    """The first loss is that of the ledger's own log-probabilities; later ones are lower."""
    cfg = tiny.config(
        tiny_model,
        tmp_path,
        objective={"name": "sft"},
        learner={"learning_rate": 1e-3, "threads": 1},
        resampling={"updates_per_round": 1, "passes": 6},
    )
    job.run(cfg, quiet=True)
    first = Ledger(cfg.run_dir / "ledger").read(0)
    learned = [
        group.completions[pair.chosen]
        for group in first.groups
        for pair in group.pairs
        if pair.fate is Fate.LEARN
    ]
    updates = [r for r in tiny.records(cfg.run_dir) if r["kind"] == "update"]
    surprise = [-float(c.logprobs.mean(dtype="float64")) for c in learned]
    assert updates[0]["pairs"] == len(learned) > 1
    assert updates[0]["loss"] == pytest.approx(sum(surprise) / len(surprise), abs=1e-4)
    assert updates[0]["rewards_chosen"] == pytest.approx(-updates[0]["loss"], abs=1e-6)
    losses = [record["loss"] for record in updates]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1
