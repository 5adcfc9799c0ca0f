"""Off-policy correction: weights against enumeration, 1 on the policy's own samples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from judges.errors import UserError
from pipeline import job
from tests import tiny
from workers.learner.assembly import ScoredRows
from workers.learner.correction import example_weights
from workers.learner.correction_options import Correction
from workers.learner.pairwise_options import DpoOptions
from workers.learner.statistics import Scored, effective_sample_share, update_measures
from workers.messages import BatchCompletion, BatchPair, Completion, UpdateBatch

TOKENS = (0, 1, 2)
OLD, NEW = np.log([0.5, 0.3, 0.2]), np.log([0.2, 0.3, 0.5])
NAMES = ("raw", "clipped", "self_normalized", "wpo")


def completion(token: int, version: int, sampled: Any = None, share: float = 0.0) -> Completion:
    logprobs = np.array([OLD[token]], np.float32)
    sampling = None if sampled is None else np.array([sampled[token]], np.float32)
    ids = np.array([token], np.int64)
    return Completion(0, 0, 0, version, ids, logprobs, sampling, True, "", reference_share=share)


def batch_of(completions: Sequence[Completion]) -> UpdateBatch:
    """Neighbours are pairs."""
    items = tuple(BatchCompletion(np.zeros(1, np.int64), c) for c in completions)
    pairs = tuple(BatchPair(i, i + 1, 1.0) for i in range(0, len(items), 2))
    return UpdateBatch(items, pairs)


def scored_by(batch: UpdateBatch, logprobs: Any) -> ScoredRows:
    rows = {
        i: torch.tensor([logprobs[int(c.completion.ids[0])]])
        for i, c in enumerate(batch.completions)
    }
    collisions = {i: torch.tensor([math.log(np.exp(2 * np.array(logprobs)).sum())]) for i in rows}
    return ScoredRows(rows, collisions)


def weights(name: Any, batch: UpdateBatch, logprobs: Any, version: int = 1, clip: float = 2.0):
    scored = scored_by(batch, logprobs)
    return example_weights(Correction(name, clip), batch, scored, batch.examples, version).numpy()


@pytest.mark.parametrize("name", ["none", *NAMES])
def test_on_policy_every_weight_is_exactly_one(name):
    """At lag 0 whatever rounding has made of the recorded log-probability."""
    batch = batch_of([completion(token, version=1) for token in (0, 1, 2, 2)])
    assert weights(name, batch, OLD + 1e-4).tolist() == [1.0, 1.0]


def test_the_raw_weight_makes_the_old_mean_the_new_one():
    """Over all pairs: Σ μ(y)μ(y') w f = Σ π(y)π(y') f, for any f."""
    f = np.array([[1.0, -2.0, 3.0], [0.5, 0.0, 4.0], [7.0, 1.0, -1.0]])
    old = new = 0.0
    for y, other in itertools.product(TOKENS, TOKENS):
        [weight] = weights("raw", batch_of([completion(y, 0), completion(other, 0)]), NEW)
        old += math.exp(OLD[y] + OLD[other]) * weight * f[y, other]
        new += math.exp(NEW[y] + NEW[other]) * f[y, other]
    assert old == pytest.approx(new, rel=1e-6)


def test_the_weights_by_hand():
    """π/μ is 0.4, 1 and 2.5 for the three tokens."""
    batch = batch_of([completion(t, 0) for t in (0, 1, 1, 2, 2, 2)])
    assert weights("raw", batch, NEW) == pytest.approx([0.4, 2.5, 6.25], rel=1e-6)
    assert weights("clipped", batch, NEW) == pytest.approx([0.4, 2.0, 2.0], rel=1e-6)
    assert weights("clipped", batch, NEW, clip=3.0) == pytest.approx([0.4, 2.5, 3.0], rel=1e-6)
    total = 0.4 + 2.5 + 6.25
    expected = [3 * w / total for w in (0.4, 2.5, 6.25)]
    assert weights("self_normalized", batch, NEW) == pytest.approx(expected, rel=1e-6)
    collision = 0.2**2 + 0.3**2 + 0.5**2
    wpo = [0.2 * 0.3 / collision**2, 0.3 * 0.5 / collision**2, 0.5**2 / collision**2]
    assert weights("wpo", batch, NEW) == pytest.approx(wpo, rel=1e-6)


def test_given_pairs_are_weighed_by_wpo_from_the_first_update_on():
    """They carry the version at which their round began: nobody of this run wrote them."""
    batch = batch_of([completion(token, version=1) for token in (0, 2)])
    items = tuple(replace(item, given=True) for item in batch.completions)
    collision = 0.2**2 + 0.3**2 + 0.5**2
    found = weights("wpo", replace(batch, completions=items), NEW)
    assert found == pytest.approx([0.2 * 0.5 / collision**2], rel=1e-6)


def test_what_was_really_sampled_counts_not_the_plain_softmax():
    """Drawn at another temperature: μ is the tempered distribution, at any lag."""
    tempered = OLD / 0.5
    tempered = tempered - np.log(np.exp(tempered).sum())
    for version in (0, 1):
        batch = batch_of([completion(t, version, tempered) for t in (0, 2)])
        expected = math.exp(NEW[0] + NEW[2] - tempered[0] - tempered[2])
        assert weights("raw", batch, NEW) == pytest.approx([expected], rel=1e-5)


def test_an_opponents_sample_was_never_meant_to_be_the_policys():
    batch = batch_of([completion(2, 0), completion(0, 0, share=1.0)])
    assert weights("raw", batch, NEW) == pytest.approx([2.5], rel=1e-6)


def test_ess_against_enumeration():
    """Of every pair once, drawn as often as μ says: (Σ μ w)² / Σ μ w², by a weighted list."""
    counts = {0: 5, 1: 3, 2: 2}
    tokens = [t for t, n in counts.items() for _ in range(n)]
    ratio = np.array([0.4, 1.0, 2.5])[tokens]
    expected = ratio.sum() ** 2 / (10 * (ratio**2).sum())
    assert expected == pytest.approx(1 / (0.5 * 0.16 + 0.3 + 0.2 * 6.25))
    assert effective_sample_share(np.log(ratio)) == pytest.approx(expected)
    assert effective_sample_share(np.full(7, -3.0)) == 1.0


def measures(lags, log_weight, moved, replayed=(), log_ratio=None):
    completions = [completion(0, 10 - lag) for lag in lags for _ in range(2)]
    batch = batch_of(completions)
    items = tuple(
        replace(item, replayed=at // 2 in replayed) for at, item in enumerate(batch.completions)
    )
    n = len(items)
    scored = Scored(
        np.zeros(n),
        np.zeros(n),
        np.array(log_weight),
        np.zeros(n) if log_ratio is None else np.array(log_ratio),
        np.array(moved),
        np.zeros(n // 2),
        {},
    )
    return update_measures(replace(batch, completions=items), scored, DpoOptions(), 10)


def test_the_ages_of_an_update_by_hand():
    found = measures([0, 2, 2], [0, 0, math.log(2), 0, 0, 0], [0.0, 0.0, 0.1, 0.2, 0.3, 0.0])
    assert (found["lag_mean"], found["lag_max"]) == (pytest.approx(4 / 3), 2)
    assert found["lags"] == {"0": 1, "2": 2}
    assert found["ess"] == pytest.approx(16 / (3 * 6))
    root = math.sqrt(2)  # half the log-weight: a pair has two tokens
    assert found["ess_per_token"] == pytest.approx((2 + root) ** 2 / (3 * 4))
    assert found["kl_from_sampler"] == pytest.approx(0.6 / 6)
    assert found["replayed"] is None


def test_replayed_pairs_have_ages_of_their_own():
    found = measures([1, 1, 7], [0, 0, 0, 0, 9.0, 0], [0, 0, 0, 0, 0.5, 0.5], replayed={2})
    assert (found["lag_max"], found["ess"], found["kl_from_sampler"]) == (1, 1.0, 0.0)
    assert found["lags"] == {"1": 2}
    assert found["replayed"] == {
        "pairs": 1,
        "lag_mean": 7.0,
        "lag_max": 7,
        "ess": 1.0,
        "ess_per_token": 1.0,
        "policy_ess": 1.0,
        "policy_ess_per_token": 1.0,
        "kl_from_sampler": 0.5,
    }


def test_the_policys_own_ess_knows_nothing_of_how_samples_were_drawn():
    """Tempered samples have weights at lag 0; the policy that drew them is the policy."""
    weights = [0.0, 0.0, math.log(3), 0.0]
    found = measures([0, 0], weights, [0.0] * 4)
    assert found["ess"] == pytest.approx(16 / 20)
    assert (found["policy_ess"], found["policy_ess_per_token"]) == (1.0, 1.0)
    found = measures([1, 1], [0.0] * 4, [0.0] * 4, log_ratio=weights)
    assert (found["ess"], found["policy_ess"]) == (1.0, pytest.approx(16 / 20))


# --- in runs ----------------------------------------------------------------------------------


def updates(cfg: Any) -> list[dict[str, Any]]:
    job.run(cfg, quiet=True)
    return [r for r in tiny.records(cfg.run_dir) if r["kind"] == "update"]


def stale(tiny_model, folder, name: str, correction: str, **sections: Any) -> list[dict[str, Any]]:
    resampling = {"updates_per_round": 3, "correction": correction}
    run = {"name": "tiny", "updates": 3, "dir": str(folder / f"{name}-{correction}")}
    return updates(
        tiny.config(
            tiny_model,
            folder,
            run=run,
            resampling=resampling,
            learner={"learning_rate": 0.01, "tokens_per_micro_batch": 4096},
            **sections,
        )
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_corrected_run_learns_as_before_until_its_pairs_are_old(tiny_model, tmp_path, name):
    plain = stale(tiny_model, tmp_path, "a", "none")
    corrected = stale(tiny_model, tmp_path, "a", name)
    assert corrected[0]["objective"].pop("correction_weight") == 1.0
    seconds = {"seconds": None}
    assert plain[0] | seconds == corrected[0] | seconds
    weight = corrected[1]["objective"]["correction_weight"]
    if name == "self_normalized":
        assert weight == pytest.approx(1.0)
    else:
        assert weight != 1.0
    assert corrected[1]["loss"] != plain[1]["loss"]


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_do_not_change_a_weight(tiny_model, tmp_path, name):
    def run(tokens: int) -> list[dict[str, Any]]:
        cfg = tiny.config(
            tiny_model,
            tmp_path,
            run={"name": "tiny", "updates": 3, "dir": str(tmp_path / f"{name}-{tokens}")},
            resampling={"updates_per_round": 3, "correction": name},
            learner={"learning_rate": 0.01, "tokens_per_micro_batch": tokens},
        )
        return updates(cfg)

    for one, many in zip(run(4096), run(30), strict=True):
        for key in ("loss", "grad_norm", "ess", "kl_from_sampler"):
            assert one[key] == pytest.approx(many[key], rel=1e-3, abs=1e-6), key
        assert one["objective"]["correction_weight"] == pytest.approx(
            many["objective"]["correction_weight"], rel=1e-4
        )


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"objective": {"name": "pdpo"}},
            "resampling.correction=raw: pdpo has weights of its own: set objective.weights",
        ),
        (
            {"sampling": {"completions_per_prompt": 4, "prompts_per_update": 4}},
            "resampling.correction=raw: importance weights are of pairs drawn at random, and "
            "pairing.strategy=best_worst picks from sampling.completions_per_prompt=4",
        ),
    ],
)
def test_weights_that_would_be_wrong_are_refused(tiny_model, tmp_path, sections, said):
    with pytest.raises(UserError) as caught:
        tiny.config(tiny_model, tmp_path, resampling={"correction": "raw"}, **sections)
    assert said in str(caught.value)


def test_a_pair_is_weighed_once(tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"objective\.wpo weighs every pair already"):
        tiny.config(
            tiny_model,
            tmp_path,
            resampling={"correction": "wpo"},
            objective={"name": "dpo", "wpo": True},
        )
