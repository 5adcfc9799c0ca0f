"""Statistics are of completions' own tokens: padding beside them changes none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import drift_measures
from workers.learner.learner import Learner
from workers.learner.options import LearnerOptions
from workers.learner.pairwise_options import DpoOptions
from workers.messages import (
    BatchCompletion,
    BatchPair,
    Completion,
    Fate,
    Judgement,
    Pair,
    Prompt,
    PromptGroup,
    UpdateBatch,
)
from workers.options import PolicyOptions

LENGTHS = [(2, 9), (7, 3), (1, 5), (12, 12)]
LONG = 40
MEASURES = ("kl_to_reference", "kl_per_token", "entropy", "length_mean", "eos_rate")
OF_UPDATES = ("loss", "margin", "chosen_logps", "rejected_logps", "ess", "ess_per_token")


@pytest.fixture(scope="module")
def learner(tiny_model: Path) -> Learner:
    policy = PolicyOptions(model=str(tiny_model))
    options = LearnerOptions(threads=1, tokens_per_micro_batch=100_000, learning_rate=0.05)
    return Learner(policy, options, DpoOptions(), updates=8)


def drawn(position: int, sample: int, length: int) -> Completion:
    rng = np.random.default_rng((position, sample))
    ids = rng.integers(3, 24, length)
    logprobs = -rng.random(length).astype(np.float32)
    return Completion(position, sample, 0, 0, ids, logprobs, None, bool(sample), "")


def batch_of(lengths: list[tuple[int, int]], companion: int | None) -> UpdateBatch:
    """Pairs; beside them, if asked for, a completion of so many tokens that is in no pair."""
    items, pairs = [], []
    for position, both in enumerate(lengths):
        prompt = np.array([1, 3 + position])
        pairs.append(BatchPair(len(items), len(items) + 1, 1.0))
        items += [BatchCompletion(prompt, drawn(position, s, n)) for s, n in enumerate(both)]
    if companion is not None:
        items.append(BatchCompletion(np.array([1]), drawn(99, 0, companion)))
    return UpdateBatch(tuple(items), tuple(pairs))


def measured(learner: Learner, batch: UpdateBatch) -> list[Completion]:
    """The pairs' completions with the policy's and a reference's log-probabilities."""
    policy = learner.score_policy(batch)
    [reference] = learner.score_reference([batch])
    found = [
        replace(item.completion, logprobs=logprobs, reference_logprobs=of_reference)
        for item, logprobs, of_reference in zip(batch.completions, policy, reference, strict=True)
    ]
    return [completion for completion in found if completion.position != 99]


def test_padding_changes_no_measure_of_drift(learner: Learner) -> None:
    moved = batch_of(LENGTHS, None)
    [reference] = learner.score_reference([moved])
    scored = tuple(
        replace(item, completion=replace(item.completion, reference_logprobs=row))
        for item, row in zip(moved.completions, reference, strict=True)
    )
    learner.update(replace(moved, completions=scored))  # the policy is no longer its reference
    plain = measured(learner, batch_of(LENGTHS, None))
    padded = measured(learner, batch_of(LENGTHS, LONG))
    band = drift_measures.central_band(plain)
    for name in MEASURES:
        measure = getattr(drift_measures, name)
        assert measure(padded) == pytest.approx(measure(plain), abs=1e-5), name
    assert abs(drift_measures.kl_per_token(plain) or 0.0) > 1e-3
    assert drift_measures.central_band(padded) == pytest.approx(band, abs=1e-5)
    # By hand, of the tokens alone.
    ratios = [np.subtract(c.logprobs, c.reference_logprobs, dtype=np.float64) for c in plain]
    tokens = sum(len(row) for row in ratios)
    assert tokens == sum(a + b for a, b in LENGTHS)
    total = sum(row.sum() for row in ratios)
    assert drift_measures.kl_per_token(plain) == pytest.approx(total / tokens)
    assert drift_measures.kl_to_reference(plain) == pytest.approx(total / len(ratios))


def test_padding_changes_no_measure_of_an_update(tiny_model: Path) -> None:
    """One pair in a micro-batch of its own, and beside one three times as long."""
    found = []
    for tokens in (1, 100_000):
        policy = PolicyOptions(model=str(tiny_model))
        options = LearnerOptions(threads=1, tokens_per_micro_batch=tokens, learning_rate=0.05)
        learner = Learner(policy, options, DpoOptions(), updates=8)
        for _ in range(2):  # the second meets a policy that has moved
            batch = batch_of([*LENGTHS, (LONG, LONG)], None)
            scores = learner.score_reference([batch])[0]
            items = tuple(
                replace(item, completion=replace(item.completion, reference_logprobs=row))
                for item, row in zip(batch.completions, scores, strict=True)
            )
            record = learner.update(replace(batch, completions=items))
        found.append(record)
    alone, padded = found
    for name in (*OF_UPDATES, "kl_from_sampler"):
        assert padded[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-5), name
    assert alone["tokens"] == padded["tokens"] == sum(a + b for a, b in LENGTHS) + 2 * LONG


def test_the_panel_of_a_round_does_not_see_who_is_beside_whom() -> None:
    """Off-reference, repetition and diversity are of ids and means: as one batch, or prompt by
    prompt."""
    groups = []
    for position, both in enumerate(LENGTHS):
        completions = tuple(
            replace(c, reference_logprobs=c.logprobs)
            for c in (drawn(position, s, n) for s, n in enumerate(both))
        )
        judgement = Judgement(position, np.zeros(2), (None, None))
        pair = Pair(position, 0, 1, 1.0, Fate.LEARN)
        prompt = Prompt(position, np.array([1, position]), "")
        groups.append(PromptGroup(prompt, completions, judgement, (pair,)))
    everything = drift_measures.own_completions(groups)
    band = (-0.6, -0.4)
    shares = [drift_measures.off_reference(g.completions, band) for g in groups]
    whole = drift_measures.off_reference(everything, band)
    assert whole == pytest.approx([np.mean([s[i] for s in shares if s]) for i in (0, 1)])
    repetition = [drift_measures.repetition_rate(g.completions) for g in groups]
    assert drift_measures.repetition_rate(everything) == pytest.approx(np.mean(repetition))
