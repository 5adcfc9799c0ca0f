"""A reset puts the policy back to its reference, and the optimizer to its beginning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.tracking import UPDATE_KEYS
from tests.learner_helpers import batch_of, flat_weights, item, make_learner, with_reference
from workers.learner.learner import Learner
from workers.learner.objective_options import BcoOptions
from workers.learner.options import LearnerOptions, ReferenceOptions
from workers.learner.pairwise_options import DpoOptions, SimpoOptions
from workers.messages import BatchLabel, UpdateBatch
from workers.models.lora import trainable
from workers.options import LoraOptions, PolicyOptions

RATE = 0.01


def pairs(turn: int = 0) -> UpdateBatch:
    """Two pairs of the tiny model's tokens, other ones each turn."""
    first, second = 5 + turn, 11 + turn
    return batch_of(
        [
            item([1, 3], [first, 7, 2]),
            item([1, 3], [6, second, 9]),
            item([1, 4, 4], [8, first]),
            item([1, 4, 4], [second, 2]),
        ],
        (0, 1),
        (3, 2),
    )


def learner_of(model: Path, **reference: Any) -> Learner:
    return Learner(
        PolicyOptions(model=str(model)),
        LearnerOptions(learning_rate=RATE),
        DpoOptions(),
        100,
        ReferenceOptions(**reference),
    )


def teach(learner: Learner, updates: int = 3) -> None:
    for turn in range(updates):
        learner.update(with_reference(learner, pairs(turn)))


def reference_weights(learner: Learner) -> dict[str, Tensor]:
    assert learner._reference is not None
    return {name: p.clone() for name, p in trainable(learner._reference._model).items()}


def assert_policy_is(learner: Learner, expected: dict[str, Tensor]) -> None:
    found = trainable(learner._policy)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_policy_is_its_starting_model_again(tiny_model: Path) -> None:
    learner, fresh = learner_of(tiny_model), learner_of(tiny_model)
    teach(learner)
    assert not torch.equal(flat_weights(learner), flat_weights(fresh))
    learner.reset()
    assert torch.equal(flat_weights(learner), flat_weights(fresh))
    assert_policy_is(learner, reference_weights(learner))


def test_it_counts_as_an_update_that_learned_from_nothing(tiny_model: Path) -> None:
    learner = learner_of(tiny_model)
    teach(learner)
    record = learner.reset()
    assert learner.version == 4
    assert sorted(record) == sorted(UPDATE_KEYS)
    told = {name: value for name, value in record.items() if value is not None}
    assert told.pop("seconds") >= 0.0
    assert told == {
        "reference_version": 0,
        "learning_rate": 0.0,
        "pairs": 0,
        "tokens": 0,
        "lags": {},
        "objective": {},
    }


def test_what_follows_is_what_a_new_run_would_do(tiny_model: Path) -> None:
    """Adam's moments and its count of steps are gone: the next steps are a first run's, to the bit.

    Kept, they would carry the policy on the way it was going.
    """
    learner, fresh = learner_of(tiny_model), learner_of(tiny_model)
    teach(learner)
    learner.reset()
    for turn in (7, 8):
        losses = [
            each.update(with_reference(each, pairs(turn)))["loss"] for each in (learner, fresh)
        ]
        assert losses[0] == losses[1]
    assert torch.equal(flat_weights(learner), flat_weights(fresh))


def test_the_weights_that_generators_get_are_the_references(tiny_model: Path) -> None:
    learner = learner_of(tiny_model)
    start = learner.weights().checksum
    teach(learner)
    assert learner.weights().checksum != start
    learner.reset()
    push = learner.weights()
    assert (push.version, push.checksum) == (4, start)


def test_the_policy_stays_apart_from_its_reference(tiny_model: Path) -> None:
    """Its weights are a copy: what is learned afterwards is not learned by the reference."""
    learner = learner_of(tiny_model)
    before = reference_weights(learner)
    teach(learner)
    learner.reset()
    teach(learner)
    after = reference_weights(learner)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(flat_weights(learner), flat_weights(learner_of(tiny_model)))


def test_an_average_of_policies_is_what_is_gone_back_to(tiny_model: Path) -> None:
    """Elastic reset: start + (1 − 0.5²)·(policy − start) after two updates at a decay of 0.5."""
    learner = learner_of(tiny_model, update={"ema": 0.5})
    start = {name: p.detach().clone() for name, p in trainable(learner._policy).items()}
    teach(learner, 2)
    taught = {name: p.detach().clone() for name, p in trainable(learner._policy).items()}
    learner.begin_round(1)
    teach(learner, 1)
    assert learner.reset()["reference_version"] == 2
    for name, found in trainable(learner._policy).items():
        expected = start[name] + 0.75 * (taught[name] - start[name])
        torch.testing.assert_close(found.detach(), expected, atol=1e-6, rtol=0)
    assert_policy_is(learner, reference_weights(learner))


def test_a_copy_that_was_taken_up_is_what_is_gone_back_to(tiny_model: Path) -> None:
    learner = learner_of(tiny_model, update={"every_rounds": 1})
    teach(learner, 2)
    taken_up = {name: p.detach().clone() for name, p in trainable(learner._policy).items()}
    learner.begin_round(1)
    teach(learner, 1)
    learner.reset()
    assert_policy_is(learner, taken_up)


def test_with_lora_the_adapters_go_back(tiny_model: Path) -> None:
    learner = Learner(
        PolicyOptions(model=str(tiny_model), lora=LoraOptions(rank=2)),
        LearnerOptions(learning_rate=RATE),
        DpoOptions(),
        100,
    )
    teach(learner)
    adapters = trainable(learner._policy)
    assert any(p.abs().max() > 0 for name, p in adapters.items() if ".lora_B." in name)
    learner.reset()
    assert_policy_is(learner, reference_weights(learner))
    assert all(p.abs().max() == 0 for name, p in adapters.items() if ".lora_B." in name)


def test_a_checkpoint_of_a_reset_goes_on_to_the_bit(tiny_model: Path, tmp_path: Path) -> None:
    learner, resumed = learner_of(tiny_model), learner_of(tiny_model)
    teach(learner)
    learner.reset()
    learner.save(tmp_path)
    teach(resumed, 1)  # so that there is something to be put away
    assert resumed.load(tmp_path) == 4
    for each in (learner, resumed):
        teach(each, 2)
    assert torch.equal(flat_weights(learner), flat_weights(resumed))


def test_without_a_reference_there_is_nothing_to_go_back_to(tiny_model: Path) -> None:
    learner = make_learner(tiny_model, objective=SimpoOptions())
    with pytest.raises(ValueError, match="a reset needs a reference"):
        learner.reset()
    assert learner.version == 0


def test_a_reference_that_is_only_watched_will_do(tiny_model: Path) -> None:
    learner = Learner(
        PolicyOptions(model=str(tiny_model)),
        LearnerOptions(learning_rate=RATE),
        SimpoOptions(),
        100,
        keep_reference=True,
    )
    start = flat_weights(learner).clone()
    teach(learner)
    learner.reset()
    assert torch.equal(flat_weights(learner), start)


def test_bco_forgets_the_log_ratios_of_the_policy_that_is_no_more(tiny_model: Path) -> None:
    learner = make_learner(tiny_model, objective=BcoOptions(), learning_rate=RATE)
    items = [item([1, 3], [5, 7, 2]), item([1, 4], [6, 9])]
    batch = UpdateBatch(tuple(items), (BatchLabel(0, True, "x"), BatchLabel(1, False, "y")))
    for _ in range(3):
        learner.update(with_reference(learner, batch))
    assert learner._loss.state()["objective"]["mean"] != 0.0
    learner.reset()
    assert learner._loss.state()["objective"] == {"mean": 0.0, "count": 0.0}
