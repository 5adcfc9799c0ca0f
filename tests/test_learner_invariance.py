"""Every kind of objective: one gradient whatever the micro-batches, the order and the padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from tests.learner_helpers import item, make_learner, plain_logprobs, plain_model
from tests.test_learner import gradient
from workers.learner.objective_options import ObjectiveOptions
from workers.learner.pairwise_options import Options
from workers.messages import (
    BatchCompletion,
    BatchExample,
    BatchLabel,
    BatchPair,
    BatchRanking,
    BatchSample,
    UpdateBatch,
)


def assert_gradient(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to a tolerance relative to the largest entry, which is not nothing."""
    scale = float(expected.abs().max())
    assert scale > 1e-9
    torch.testing.assert_close(found, expected, atol=tolerance * scale, rtol=0)


Make = Callable[[], UpdateBatch]


def options_of(**values: Any) -> Options:
    adapter: TypeAdapter[Options] = TypeAdapter(ObjectiveOptions)
    return adapter.validate_python(values)


def completions(count: int = 16, seed: int = 0) -> list[BatchCompletion]:
    """Of many lengths, from versions 0 and −1; the reference finds some of them unlikely."""
    random = np.random.default_rng(seed)
    found = []
    for index in range(count):
        ids = [*random.integers(3, 24, random.integers(1, 9)).tolist(), 2]
        prompt = [1, *random.integers(3, 24, random.integers(0, 6)).tolist()]
        scores = {
            "reference": random.normal(-4, 1, len(ids)),
            "behaviour": random.normal(-3.5, 0.3, len(ids)),
        }
        found.append(item(prompt, ids, version=-(index % 2), **scores))
    return found


def pairs() -> UpdateBatch:
    examples = tuple(BatchPair(2 * i, 2 * i + 1, [1.0, 0.75][i % 2]) for i in range(8))
    return UpdateBatch(tuple(completions()), examples)


def labels() -> UpdateBatch:
    examples = tuple(BatchLabel(i, i % 3 > 0, "p") for i in range(16))
    return UpdateBatch(tuple(completions()), examples, tuple(completions(5, seed=1)))


def rankings() -> UpdateBatch:
    groups = ((0, 1, 2, 3), (4, 5), (6, 7, 8), (9, 10, 11, 12, 13), (14, 15))
    return UpdateBatch(tuple(completions()), tuple(map(BatchRanking, groups)))


def samples() -> UpdateBatch:
    examples = tuple(BatchSample(i, i / 15) for i in range(16))
    return UpdateBatch(tuple(completions()), examples)


KINDS: list[tuple[str, dict[str, Any], Make]] = [
    ("wpo", {"name": "dpo", "wpo": True, "nll_weight": 0.5}, pairs),
    ("ipo", {"name": "ipo", "length_normalized": True}, pairs),
    ("simpo", {"name": "simpo"}, pairs),
    ("pdpo", {"name": "pdpo", "score_weight": 1.0, "weights": "clipped"}, pairs),
    (
        "pdpo, whole",
        {"name": "pdpo", "baseline": "leave_one_out", "weights": "self_normalized"},
        pairs,
    ),
    ("kto", {"name": "kto", "undesirable_weight": 1.5}, labels),
    ("bco", {"name": "bco"}, labels),
    ("ranking", {"name": "plackett_luce"}, rankings),
    ("nash_md", {"name": "nash_md"}, samples),
]
kinds = pytest.mark.parametrize(
    ("objective", "make"), [pytest.param(o, m, id=n) for n, o, m in KINDS]
)


def reordered(batch: UpdateBatch) -> UpdateBatch:
    random = np.random.default_rng(1)
    order = random.permutation(len(batch.completions))
    place = {int(old): new for new, old in enumerate(order)}

    def moved(example: BatchExample) -> BatchExample:
        match example:
            case BatchPair(chosen, rejected, label_prob):
                return BatchPair(place[chosen], place[rejected], label_prob)
            case BatchLabel(row, desirable, prompt):
                return BatchLabel(place[row], desirable, prompt)
            case BatchRanking(rows):
                return BatchRanking(tuple(place[row] for row in rows))
            case BatchSample(row, win_prob):
                return BatchSample(place[row], win_prob)

    examples = [moved(batch.examples[i]) for i in random.permutation(len(batch.examples))]
    rows = tuple(batch.completions[i] for i in order)
    return UpdateBatch(rows, tuple(examples), batch.mismatched[::-1])


@kinds
def test_one_by_eight_is_eight_by_one(tiny_model: Path, objective: dict[str, Any], make: Make):
    options = options_of(**objective)
    together = gradient(tiny_model, make(), objective=options, tokens_per_micro_batch=100_000)
    for budget in (1, 40, 100):
        split = gradient(tiny_model, make(), objective=options, tokens_per_micro_batch=budget)
        assert_gradient(split, together)


@kinds
def test_order_changes_nothing(tiny_model: Path, objective: dict[str, Any], make: Make):
    options = options_of(**objective)
    for budget in (60, 100_000):
        settings = {"objective": options, "tokens_per_micro_batch": budget}
        one = gradient(tiny_model, make(), **settings)
        other = gradient(tiny_model, reordered(make()), **settings)
        assert_gradient(other, one)


@kinds
def test_records_do_not_depend_on_micro_batches(
    tiny_model: Path, objective: dict[str, Any], make: Make
):
    records = [
        make_learner(
            tiny_model, objective=options_of(**objective), tokens_per_micro_batch=budget
        ).update(make())
        for budget in (1, 100_000)
    ]
    one, other = ({k: v for k, v in r.items() if k != "seconds"} for r in records)
    measures = [record.pop("objective") for record in (one, other)]
    assert one.pop("lags") == other.pop("lags")
    undefined = [{k for k, v in record.items() if v is None} for record in (one, other)]
    assert undefined[0] == undefined[1]
    one, other = ({k: v for k, v in r.items() if v is not None} for r in (one, other))
    assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert measures[0] == pytest.approx(measures[1], rel=1e-4)


def plain_kto(model: Any, reference: Any, batch: UpdateBatch, weight: float) -> Tensor:
    """Sec. 4 of arXiv:2402.01306 by full logits, one completion at a time."""

    def logps(c: BatchCompletion, scorer: Any = model) -> Tensor:
        return plain_logprobs(scorer, c.prompt_ids, c.completion.ids).sum()

    with torch.no_grad():
        ratios = [logps(c) - logps(c, reference) for c in batch.mismatched]
        z = torch.stack(ratios).mean().clamp_min(0)
    losses = []
    for example in batch.examples:
        c = batch.completions[example.rows[0]]
        ratio = logps(c) - float(c.completion.reference_logprobs.sum(dtype=np.float64))
        if example.desirable:
            losses.append(1 - torch.sigmoid(0.1 * (ratio - z)))
        else:
            losses.append(weight * (1 - torch.sigmoid(0.1 * (z - ratio))))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("tokens_per_micro_batch", [40, 100_000])
def test_kto_is_that_of_plain_logits_also_where_z_is_positive(
    tiny_model: Path, tokens_per_micro_batch: int
):
    options = options_of(name="kto", undesirable_weight=1.5)
    batch = labels()
    learner = make_learner(
        tiny_model,
        objective=options,
        learning_rate=0.03,
        max_grad_norm=1e9,
        tokens_per_micro_batch=tokens_per_micro_batch,
    )
    policy, reference = plain_model(tiny_model), plain_model(tiny_model)
    positive = 0
    for _ in range(4):
        policy.load_state_dict(learner._policy.state_dict())
        loss = plain_kto(policy, reference, batch, 1.5)
        expected = torch.autograd.grad(loss, list(policy.parameters()))
        found: list[Tensor] = []
        hook = learner._optimizer.register_step_pre_hook(
            lambda *_, into=found: into.extend(
                p.grad.flatten().clone() for p in learner._policy.parameters()
            )
        )
        record = learner.update(batch)
        hook.remove()
        assert record["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert_gradient(torch.cat(found), torch.cat([g.flatten() for g in expected]), 1e-4)
        positive += record["objective"]["kl"] > 0.01
    assert positive


def test_a_masked_completion_gets_no_gradient_in_two_passes(tiny_model: Path):
    options = options_of(name="pdpo", baseline="leave_one_out")
    batch = pairs()
    masked = tuple(replace(c, learn=i % 2 == 0) for i, c in enumerate(batch.completions))
    nothing = tuple(replace(c, learn=False) for c in batch.completions)
    settings = {"objective": options, "tokens_per_micro_batch": 1}
    one = gradient(tiny_model, replace(batch, completions=masked), **settings)
    whole = gradient(
        tiny_model,
        replace(batch, completions=masked),
        objective=options,
        tokens_per_micro_batch=100_000,
    )
    assert_gradient(one, whole)
    learner = make_learner(tiny_model, **settings)
    assert learner.update(replace(batch, completions=nothing))["grad_norm"] == 0.0
