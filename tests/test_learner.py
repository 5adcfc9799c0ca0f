"""An update is DPO's: its loss, its gradient, its step and every number of its record."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.learner_helpers import (
    batch_of,
    flat_weights,
    item,
    make_generator,
    make_learner,
    plain_logprobs,
    plain_model,
    prompts_of,
    sampled_batch,
    with_reference,
)
from workers.learner.learner import Learner
from workers.learner.options import LearnerOptions, learning_rate
from workers.learner.pairwise_options import DpoOptions
from workers.learner.statistics import effective_sample_share
from workers.messages import BatchCompletion, BatchPair, UpdateBatch
from workers.options import PolicyOptions

NO_PAIRS = UpdateBatch((), ())
PROMPTS = {
    "tiny_model": prompts_of([1, 5, 8], [1, 9, 3, 20, 5, 6, 11], [1], [1, 23, 4, 5, 17]),
    "stories15m": prompts_of([1, 9038, 2501, 263, 931], [1, 319, 4123], [1, 450, 2586, 411, 278]),
}


def written_batch(count: int = 8) -> UpdateBatch:
    """Pairs of many lengths, some with soft labels; the reference finds some of them unlikely."""
    random = np.random.default_rng(0)

    def random_item(prompt: list[int]) -> BatchCompletion:
        ids = random.integers(3, 24, random.integers(1, 9)).tolist()
        return item(prompt, [*ids, 2], reference=random.normal(-4, 1, len(ids) + 1))

    items, pairs = [], []
    for index in range(count):
        prompt = [1, *random.integers(3, 24, random.integers(0, 6)).tolist()]
        items += [random_item(prompt), random_item(prompt)]
        pairs.append((2 * index, 2 * index + 1, [1.0, 0.75][index % 2]))
    return batch_of(items, *pairs)


def reordered(batch: UpdateBatch) -> UpdateBatch:
    """The same pairs, they and their completions in another order."""
    random = np.random.default_rng(1)
    order = random.permutation(len(batch.completions))
    place = {int(old): new for new, old in enumerate(order)}
    pairs = [
        replace(pair, chosen=place[pair.chosen], rejected=place[pair.rejected])
        for pair in (batch.examples[i] for i in random.permutation(len(batch.examples)))
    ]
    return UpdateBatch(tuple(batch.completions[i] for i in order), tuple(pairs))


def plain_loss(model, batch: UpdateBatch, beta: float, reference=None) -> Tensor:
    """Eq. 7, arXiv:2305.18290 with soft labels: a forward pass for each side of each pair."""

    def log_ratio(c: BatchCompletion) -> Tensor:
        ids = c.completion.ids
        logps = plain_logprobs(model, c.prompt_ids, ids).sum()
        if reference is None:
            known = float(c.completion.reference_logprobs.sum(dtype=np.float64))
        else:
            with torch.no_grad():
                known = plain_logprobs(reference, c.prompt_ids, ids).sum()
        return (logps if c.learn else logps.detach()) - known

    losses = []
    for pair in batch.examples:
        chosen, rejected = batch.completions[pair.chosen], batch.completions[pair.rejected]
        margin = beta * (log_ratio(chosen) - log_ratio(rejected))
        p = pair.label_prob
        losses.append(-p * logsigmoid(margin) - (1 - p) * logsigmoid(-margin))
    return torch.stack(losses).mean()


def plain_gradient(model: Path, batch: UpdateBatch, beta: float = 0.1) -> Tensor:
    policy = plain_model(model)
    gradients = torch.autograd.grad(plain_loss(policy, batch, beta), list(policy.parameters()))
    return torch.cat([g.flatten() for g in gradients])


def gradient(model: Path, batch: UpdateBatch, **options) -> Tensor:
    """What the optimizer is given by one update, unclipped."""
    learner = make_learner(model, max_grad_norm=1e9, **options)
    found: list[Tensor] = []
    learner._optimizer.register_step_pre_hook(
        lambda *_: found.extend(p.grad.flatten().clone() for p in learner._policy.parameters())
    )
    learner.update(batch)
    return torch.cat(found)


def assert_gradient(found: Tensor, expected: Tensor, tolerance: float = 1e-5):
    """Equal to a tolerance relative to the largest entry."""
    scale = float(expected.abs().max())
    assert scale > 1e-3
    torch.testing.assert_close(found, expected, atol=tolerance * scale, rtol=0)


def timeless(record):
    return {name: value for name, value in record.items() if name != "seconds"}


@pytest.mark.parametrize("model", PROMPTS)
@pytest.mark.parametrize("tokens_per_micro_batch", [1, 4096])
def test_loss_is_ln_2_before_the_first_update(
    model: str, tokens_per_micro_batch: int, request: pytest.FixtureRequest
):
    directory = request.getfixturevalue(model)
    learner = make_learner(directory, tokens_per_micro_batch=tokens_per_micro_batch)
    generator = make_generator(directory, max_new_tokens=12)
    record = learner.update(with_reference(learner, sampled_batch(generator, PROMPTS[model])))
    assert record["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert record["margin"] == record["rewards_chosen"] == record["rewards_rejected"] == 0.0
    assert record["grad_norm"] > 0


def test_updates_equal_a_plain_implementation(tiny_model: Path):
    """Loss, clipped gradient and AdamW's steps, over three updates, the reference computed."""
    beta, rate, decay, max_norm = 0.3, 1e-3, 0.1, 0.5
    learner = make_learner(
        tiny_model,
        objective=DpoOptions(beta=beta),
        learning_rate=rate,
        weight_decay=decay,
        max_grad_norm=max_norm,
        tokens_per_micro_batch=64,
    )
    policy = plain_model(tiny_model)
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate, weight_decay=decay)
    batch = with_reference(learner, written_batch())
    for _ in range(3):
        record = learner.update(batch)
        loss = plain_loss(policy, batch, beta, reference)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
        optimizer.step()
        assert record["loss"] == pytest.approx(loss.item(), abs=1e-6)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert norm > max_norm
    weights = torch.cat([p.detach().flatten() for p in policy.parameters()])
    difference = (flat_weights(learner) - weights).abs()
    # AdamW divides by the gradient's size, so where that is rounding its step is, too.
    assert float(torch.quantile(difference, 0.999)) < 1e-6
    assert float(difference.max()) < rate / 10
    assert float((weights - flat_weights(make_learner(tiny_model))).abs().median()) > rate


@pytest.mark.parametrize("tied", [True, False])
def test_gradient_is_that_of_plain_logits(tmp_path: Path, tied: bool):
    model = tiny.save_model(tmp_path, tied=tied)
    batch = written_batch()
    assert_gradient(gradient(model, batch), plain_gradient(model, batch))


@pytest.mark.parametrize("tokens_per_micro_batch", [1, 40, 100, 4096])
def test_gradient_does_not_depend_on_micro_batches(tiny_model: Path, tokens_per_micro_batch: int):
    batch = written_batch()
    together = gradient(tiny_model, batch, tokens_per_micro_batch=10_000)
    split = gradient(tiny_model, batch, tokens_per_micro_batch=tokens_per_micro_batch)
    assert_gradient(split, together)


def test_gradient_does_not_depend_on_order(tiny_model: Path):
    batch = written_batch()
    for budget in (60, 4096):
        options = {"tokens_per_micro_batch": budget}
        assert_gradient(
            gradient(tiny_model, reordered(batch), **options),
            gradient(tiny_model, batch, **options),
        )


def test_gradient_does_not_depend_on_padding(tiny_model: Path):
    """A fourth pair, long and without a gradient, pads the others; the mean is over four then."""
    batch = written_batch(3)
    long = [item([1, 3], [token] * 38, learn=False) for token in (5, 6)]
    padded = UpdateBatch((*batch.completions, *long), (*batch.examples, BatchPair(6, 7, 1.0)))
    assert_gradient(gradient(tiny_model, padded) * 4 / 3, gradient(tiny_model, batch))


@pytest.mark.parametrize("tokens_per_micro_batch", [1, 4096])
def test_completions_of_no_pair_learn_nothing(tiny_model: Path, tokens_per_micro_batch: int):
    batch = written_batch(3)
    unpaired = [item([1, 3], [5] * 20), item([1], [6, 2])]
    options = {"tokens_per_micro_batch": tokens_per_micro_batch}
    assert_gradient(
        gradient(
            tiny_model, replace(batch, completions=(*batch.completions, *unpaired)), **options
        ),
        gradient(tiny_model, batch),
    )


def test_a_shared_completion_learns_from_each_of_its_pairs(tiny_model: Path):
    shared, *others = (
        item([1, 4], ids, reference=-3.0) for ids in ([5, 6, 2], [7, 2], [8, 9, 10, 2], [11])
    )
    batch = batch_of([shared, *others], (0, 1), (2, 0), (0, 3, 0.8))
    copies = batch_of(
        [shared, others[0], others[1], shared, shared, others[2]], (0, 1), (2, 3), (4, 5, 0.8)
    )
    found = gradient(tiny_model, batch)
    assert_gradient(found, gradient(tiny_model, copies))
    assert_gradient(found, plain_gradient(tiny_model, batch))


@pytest.mark.parametrize("masked", [{0}, {1}, {3, 4}, {0, 3, 5}])
def test_no_gradient_flows_into_a_masked_completion(tiny_model: Path, masked: set[int]):
    batch = written_batch(3)
    items = [replace(c, learn=i not in masked) for i, c in enumerate(batch.completions)]
    batch = replace(batch, completions=tuple(items))
    assert_gradient(gradient(tiny_model, batch), plain_gradient(tiny_model, batch))


def test_nothing_is_learned_where_all_are_masked(tiny_model: Path):
    learner = make_learner(tiny_model, weight_decay=0.1, learning_rate=0.1)
    batch = written_batch(2)
    items = tuple(replace(c, learn=False) for c in batch.completions)
    before = flat_weights(learner)
    record = learner.update(replace(batch, completions=items))
    expected = plain_loss(plain_model(tiny_model), batch, 0.1).item()
    assert record["loss"] == pytest.approx(expected, abs=1e-6)
    assert (record["grad_norm"], learner.version) == (0.0, 1)
    assert torch.equal(flat_weights(learner), before)


@pytest.mark.parametrize(
    "completions", [(), written_batch(2).completions], ids=["none", "unpaired"]
)
def test_an_update_without_pairs_counts_and_changes_nothing(tiny_model: Path, completions):
    learner = make_learner(tiny_model, warmup=4, learning_rate=0.1, weight_decay=0.1)
    learner.update(written_batch(2))
    before = flat_weights(learner)
    record = learner.update(UpdateBatch(completions, ()))
    assert learner.version == 2
    assert torch.equal(flat_weights(learner), before)
    known = {"pairs": 0, "tokens": 0, "lags": {}, "objective": {}, "reference_version": 0}
    known |= {"learning_rate": pytest.approx(0.05)}
    measures = "loss margin accuracy rewards_chosen rewards_rejected chosen_logps rejected_logps"
    measures += " grad_norm lag_mean lag_max kl_from_sampler replayed"
    measures += " ess ess_per_token policy_ess policy_ess_per_token"
    assert timeless(record) == dict.fromkeys(measures.split()) | known


def test_record_by_hand(tiny_model: Path):
    """Three pairs with log-ratios (2, −1), (−½, ½), (−1, −2); the learner is at version 5.

    The pairs were sampled at versions 5, 3 and 2, with weights 1, ½·6 and 2·½ towards now.
    """
    model = plain_model(tiny_model)
    rows = [
        ([1, 4], [5, 6, 2], 2.0, math.log(7), 5),
        ([1, 4], [7, 2], -1.0, math.log(9), 5),
        ([1], [8, 9, 10, 11, 2], -0.5, math.log(1 / 2), 3),
        ([1], [12], 0.5, math.log(6), 3),
        ([1, 3, 3, 3], [13, 2], -1.0, math.log(2), 2),
        ([1, 3, 3, 3], [14, 15, 16, 2], -2.0, math.log(1 / 2), 2),
    ]
    items, logps = [], []
    for prompt, ids, log_ratio, log_weight, version in rows:
        with torch.no_grad():
            logprobs = plain_logprobs(model, prompt, ids).double().numpy()
        logps.append(logprobs.sum())
        items.append(
            item(
                prompt,
                ids,
                reference=logprobs - log_ratio / len(ids),
                behaviour=logprobs - log_weight / len(ids),
                version=version,
            )
        )
    learner = make_learner(tiny_model, objective=DpoOptions(beta=0.2), tokens_per_micro_batch=1)
    for _ in range(5):
        learner.update(NO_PAIRS)
    record = learner.update(batch_of(items, (0, 1), (2, 3), (4, 5, 0.75)))

    def softplus(z: float) -> float:
        return math.log1p(math.exp(z))

    losses = [softplus(-0.6), softplus(0.2), 0.75 * softplus(-0.2) + 0.25 * softplus(0.2)]
    weights = np.array([1.0, 3.0, 1.0])
    per_token = weights ** (1 / np.array([5, 6, 6]))
    # Σ_t (r − 1 − ln r), r the same at each of a completion's tokens; 0 for the current version's.
    moved = sum(
        len(ids) * math.expm1(log_weight / len(ids)) - log_weight
        for _, ids, _, log_weight, version in rows
        if version < 5
    )
    expected = {
        "loss": sum(losses) / 3,
        "margin": 0.2 * (3 - 1 + 1) / 3,
        "accuracy": 2 / 3,
        "rewards_chosen": 0.2 * (2 - 0.5 - 1) / 3,
        "rewards_rejected": 0.2 * (-1 + 0.5 - 2) / 3,
        "chosen_logps": np.mean(logps[::2]),
        "rejected_logps": np.mean(logps[1::2]),
        "lag_mean": 5 / 3,
        "lag_max": 3,
        "ess": 25 / 33,
        "ess_per_token": per_token.sum() ** 2 / (3 * (per_token**2).sum()),
        # Sampled by the plain softmax: the policies' ratio is the weight.
        "policy_ess": 25 / 33,
        "policy_ess_per_token": per_token.sum() ** 2 / (3 * (per_token**2).sum()),
        "kl_from_sampler": moved / 17,
        "pairs": 3,
        "tokens": 17,
    }
    assert (record.pop("lags"), record.pop("replayed")) == ({"0": 1, "2": 1, "3": 1}, None)
    del record["seconds"], record["grad_norm"], record["learning_rate"]
    assert (record.pop("objective"), record.pop("reference_version")) == ({}, 0)
    assert record == pytest.approx(expected, abs=1e-5)


def test_weights_are_towards_the_distribution_sampled_from(tiny_model: Path):
    """Of two pairs one was drawn under reshaped log-probabilities, three times less likely."""
    first, second = [1, 4], [1, 5]
    model = plain_model(tiny_model)
    items = []
    for prompt in (first, second):
        for ids in ([6, 2], [7, 8]):
            with torch.no_grad():
                logprobs = plain_logprobs(model, prompt, ids).numpy()
            items.append(item(prompt, ids, behaviour=logprobs, version=-1))
    reshaped = items[0].completion.logprobs - np.float32(math.log(3) / 2)
    items[0] = replace(
        items[0], completion=replace(items[0].completion, sampling_logprobs=reshaped)
    )
    record = make_learner(tiny_model).update(batch_of(items, (0, 1), (2, 3)))
    assert record["ess"] == pytest.approx((3 + 1) ** 2 / (2 * (9 + 1)), abs=1e-5)


@pytest.mark.parametrize(
    ("weights", "share"),
    [([5.0], 1.0), ([2.0, 2.0, 2.0], 1.0), ([1.0, 3.0], 0.8), ([1.0, 0.0, 0.0, 0.0], 0.25)],
)
@pytest.mark.parametrize("scale", [-1000.0, 0.0, 1000.0])
def test_effective_sample_share(weights: list[float], share: float, scale: float):
    with np.errstate(divide="ignore"):
        assert effective_sample_share(np.log(weights) + scale) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", {0: 1 / 4, 1: 1 / 2, 3: 1.0, 4: 1.0, 11: 1.0}),
        ("linear", {0: 1 / 4, 2: 3 / 4, 3: 1.0, 4: 1.0, 5: 7 / 8, 8: 1 / 2, 11: 1 / 8}),
        (
            "cosine",
            {0: 1 / 4, 3: 1.0, 4: 1.0, 6: 0.8535534, 8: 1 / 2, 10: 0.1464466, 11: 0.0380602},
        ),
    ],
)
def test_learning_rate(schedule: str, rates: dict[int, float]):
    """Four updates of warmup and eight of the schedule, by the version they start from."""
    options = LearnerOptions(learning_rate=3e-5, schedule=schedule, warmup=4)
    for version, rate in rates.items():
        assert learning_rate(options, version, 12) == pytest.approx(3e-5 * rate, rel=1e-6)


def test_learning_rate_without_warmup_starts_at_its_peak():
    options = LearnerOptions(learning_rate=1.0, schedule="linear")
    assert [learning_rate(options, v, 4) for v in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_steps_are_as_long_as_the_schedule_says(tiny_model: Path):
    """AdamW's first step moves each weight by the learning rate: here 4/8 of it, past NO_PAIRS."""
    learner = make_learner(tiny_model, updates=8, learning_rate=1e-3, schedule="linear")
    for _ in range(4):
        learner.update(NO_PAIRS)
    before = flat_weights(learner)
    record = learner.update(written_batch())
    moved = (flat_weights(learner) - before).abs()
    assert record["learning_rate"] == pytest.approx(5e-4)
    assert float(moved.max()) == pytest.approx(5e-4, rel=1e-3)


def test_a_gradient_that_is_not_finite_changes_nothing(tiny_model: Path):
    learner, untouched = make_learner(tiny_model), make_learner(tiny_model)
    batch = written_batch()
    items = list(batch.completions)
    items[5] = item(items[5].prompt_ids, items[5].completion.ids, reference=math.nan)
    with pytest.raises(FloatingPointError, match=r"dpo: the loss of pair \d \(prompt 0\) is nan"):
        learner.update(replace(batch, completions=tuple(items)))
    assert learner.version == 0
    assert torch.equal(flat_weights(learner), flat_weights(untouched))
    assert timeless(learner.update(batch)) == timeless(untouched.update(batch))
    assert torch.equal(flat_weights(learner), flat_weights(untouched))


def test_a_completion_never_scored_by_the_reference_is_an_error(tiny_model: Path):
    batch = written_batch(1)
    bare = replace(batch.completions[0].completion, reference_logprobs=None)
    items = (replace(batch.completions[0], completion=bare), batch.completions[1])
    with pytest.raises(ValueError, match="never scored by the reference"):
        make_learner(tiny_model).update(replace(batch, completions=items))


def test_reference_stays_where_the_policy_began(tiny_model: Path):
    learner = make_learner(tiny_model, learning_rate=0.05)
    batch = written_batch()
    (before,) = learner.score_reference([batch])
    for found, expected in zip(before, learner.score_policy(batch), strict=True):
        assert np.array_equal(found, expected)
    learner.update(batch)
    (after,) = learner.score_reference([batch])
    moved = learner.score_policy(batch)
    for found, expected, policy in zip(after, before, moved, strict=True):
        assert np.array_equal(found, expected)
        assert np.abs(policy - expected).max() > 0.01


def test_a_resumed_learner_goes_on_bit_for_bit(tiny_model: Path, tmp_path: Path):
    other = tiny.save_model(tmp_path / "other", spread=0.4)
    batches = [reordered(written_batch(n)) for n in (3, 5, 4, 2)]
    options = {"learning_rate": 0.01, "schedule": "cosine", "updates": 4, "weight_decay": 0.01}
    learner = make_learner(tiny_model, **options)
    for batch in batches[:2]:
        learner.update(batch)
    learner.save(tmp_path)
    resumed = make_learner(other, **options)
    assert resumed.load(tmp_path) == resumed.version == 2
    for batch in batches[2:]:
        assert timeless(resumed.update(batch)) == timeless(learner.update(batch))
    assert torch.equal(flat_weights(resumed), flat_weights(learner))
    assert resumed.weights().checksum == learner.weights().checksum
    for found, expected in zip(
        resumed.score_reference(batches), learner.score_reference(batches), strict=True
    ):
        for one, other_one in zip(found, expected, strict=True):
            assert np.array_equal(one, other_one)


def test_adopt_takes_another_models_weights_and_keeps_the_reference(
    tiny_model: Path, tmp_path: Path
):
    other = tiny.save_model(tmp_path, spread=0.4)
    learner = make_learner(tiny_model)
    batch = written_batch()
    learner.adopt(PolicyOptions(model=str(other)), 7)
    assert learner.version == learner.weights().version == 7
    assert torch.equal(flat_weights(learner), flat_weights(make_learner(other)))
    for found, expected in zip(
        learner.score_reference([batch])[0],
        make_learner(tiny_model).score_policy(batch),
        strict=True,
    ):
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_export_loads_with_transformers(tmp_path: Path, tied: bool):
    learner: Learner = make_learner(tiny.save_model(tmp_path / "m", tied=tied), learning_rate=0.01)
    learner.update(written_batch())
    learner.export(tmp_path / "policy")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype="auto")
    ours = dict(learner._policy.named_parameters())
    theirs = dict(exported.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (
        exported.get_output_embeddings().weight is exported.get_input_embeddings().weight
    ) == tied
