"""A generator whose log-probabilities are off by known amounts: measured, corrected, weighed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline import gap, job, stopping
from pipeline.config import Config
from pipeline.learner import RemoteLearner
from pipeline.ledger import Ledger
from pipeline.stopping import Stopped
from tests import recomputation, tiny
from tests.learner_helpers import make_learner
from tests.test_learner import gradient
from tests.test_learner_invariance import KINDS, assert_gradient, options_of, pairs
from tests.test_ledger import make_round, require_equal
from workers.generator import GapOptions, SampledUnit, SampleRequest
from workers.learner.batching import micro_batches
from workers.learner.loss import BatchLoss
from workers.learner.statistics import Scored
from workers.messages import BatchCompletion, Completion, Fate, FloatArray, Round, UpdateBatch
from workers.transformers_generator import TransformersGenerator

PROBE_SHIFT = 0.25
CLIP = 1.1

Given = dict[tuple[int, int], tuple[FloatArray, FloatArray | None]]


def shift(position: int, sample: int) -> float:
    """What the generator adds to each log-probability of a completion, in nats."""
    return ((7 * position + 3 * sample) % 5 - 2) * 0.05


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
    """The shifted generator in place of the plain one; what it gave, by position and sample."""
    given: Given = {}
    sample, probe = TransformersGenerator.sample, TransformersGenerator.probe

    def shifted(c: Completion) -> Completion:
        logprobs = c.logprobs + np.float32(shift(c.position, c.sample))
        given[c.position, c.sample] = (logprobs, c.sampling_logprobs)
        return replace(c, logprobs=logprobs)

    def shifted_sample(self: TransformersGenerator, request: SampleRequest) -> SampledUnit:
        unit = sample(self, request)
        groups = tuple(tuple(map(shifted, group)) for group in unit.completions)
        return replace(unit, completions=groups)

    def shifted_probe(self: TransformersGenerator, *args: Any) -> Completion:
        found = probe(self, *args)
        return replace(found, logprobs=found.logprobs - np.float32(PROBE_SHIFT))

    monkeypatch.setattr(TransformersGenerator, "sample", shifted_sample)
    monkeypatch.setattr(TransformersGenerator, "probe", shifted_probe)
    return given


def config(model: Path, folder: Path, name: str = "run", **sections: Any) -> Config:
    """Two updates a round; an example or two in a micro-batch, whose composition shows in bits."""
    options = {"correct_above": 0.1, "stop_above": 1.0} | sections.pop("gap", {})
    return tiny.config(
        model,
        folder,
        run={"name": "tiny", "updates": 6, "dir": str(folder / name)},
        generator={"backend": "transformers", "threads": 1, "gap": options},
        learner={"learning_rate": 3e-3, "threads": 1, "tokens_per_micro_batch": 60},
        checkpoint={"every": 1, "keep": 9},
        **{"resampling": {"updates_per_round": 2}, **sections},
    )


def rounds_of(cfg: Config) -> list[Round]:
    return list(Ledger(cfg.run_dir / "ledger"))


def records_of(cfg: Config, kind: str) -> list[dict[str, Any]]:
    return [record for record in tiny.records(cfg.run_dir) if record["kind"] == kind]


OPPONENT = {"objective": {"name": "xpo", "alpha": 0.01}}
FOUR = {"prompts_per_update": 4, "max_new_tokens": 8, "completions_per_prompt": 4}
RUNS: dict[str, dict[str, Any]] = {
    "two of four": {"sampling": FOUR},  # two completions of each prompt are in no pair
    "kto": {"objective": {"name": "kto"}},
    "tempered": {
        "sampling": {"prompts_per_update": 4, "max_new_tokens": 8, "temperature": 0.8},
    },
    "opponent": OPPONENT,
}


@pytest.mark.parametrize("name", RUNS)
def test_what_is_recorded_is_the_learners_own(
    tiny_model: Path, tmp_path: Path, given: Given, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """By other code in value, by the update itself to the bit; nothing else of a round changes."""
    seen: list[tuple[UpdateBatch, int, Scored]] = []
    backward = BatchLoss.backward

    def watched(self: BatchLoss, batch: UpdateBatch, version: int) -> Scored:
        seen.append((batch, version, backward(self, batch, version)))
        return seen[-1][-1]

    monkeypatch.setattr(BatchLoss, "backward", watched)
    cfg = config(tiny_model, tmp_path, **RUNS[name])
    job.run(cfg, quiet=True)
    run = recomputation.Run(cfg)
    for round_ in rounds_of(cfg):
        assert round_.logprob_gap == pytest.approx(PROBE_SHIFT, abs=1e-4)
        run.use(round_.version)
        for group in round_.groups:
            for c in group.completions:
                logprobs, sampling_logprobs = given[c.position, c.sample]
                plain = run.logprobs(group.prompt.ids.tolist(), c.ids.tolist())
                assert c.logprobs.tolist() == pytest.approx(plain, abs=1e-4)
                by_hand = math.fsum(c.logprobs.tolist()) - math.fsum(logprobs.tolist())
                assert c.gap_log_weight == pytest.approx(by_hand, abs=1e-9)
                known = -shift(c.position, c.sample) * len(c.ids)
                assert c.gap_log_weight == pytest.approx(known, abs=1e-4)
                require_equal(c.sampling_logprobs, sampling_logprobs)
    compared = 0
    for batch, version, scored in seen:
        for row, item in enumerate(batch.completions):
            if item.completion.version == version:
                recorded = float(torch.from_numpy(item.completion.logprobs).sum())
                assert scored.logps[row] == recorded
                compared += 1
    assert compared > 12


@pytest.mark.parametrize("name", ["two of four", "opponent"])
def test_truncated_losses_are_those_of_other_code(
    tiny_model: Path, tmp_path: Path, given: Given, name: str
) -> None:
    options = {"correction": "truncated", "clip": CLIP}
    cfg = config(tiny_model, tmp_path, gap=options, **RUNS[name])
    job.run(cfg, quiet=True)
    updates = records_of(cfg, "update")
    losses = [record["loss"] for record in updates]
    assert losses == pytest.approx(recomputation.losses(cfg), rel=2e-4, abs=2e-4)
    if name == "opponent":
        return
    first = rounds_of(cfg)[0]  # policy = reference: each loss is ln 2
    weights = []
    for group in first.groups[:4]:
        logs = [c.gap_log_weight or math.nan for c in group.completions]
        learned = [pair for pair in group.pairs if pair.fate is Fate.LEARN]
        weights += [math.exp(logs[pair.chosen] + logs[pair.rejected]) for pair in learned]
    assert min(weights) < 0.99
    assert max(weights) > CLIP
    by_hand = math.log(2) * sum(min(CLIP, weight) for weight in weights) / len(weights)
    assert losses[0] == pytest.approx(by_hand, rel=1e-5)


def test_recomputed_rounds_are_not_weighed(tiny_model: Path, tmp_path: Path, given: Given) -> None:
    cfg = config(tiny_model, tmp_path, sampling=FOUR, gap={"clip": CLIP})
    job.run(cfg, quiet=True)
    losses = [record["loss"] for record in records_of(cfg, "update")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses == pytest.approx(recomputation.losses(cfg), rel=2e-4, abs=2e-4)


@pytest.mark.parametrize("correction", ["recompute", "truncated"])
def test_the_round_record_has_the_mean_weight(
    tiny_model: Path, tmp_path: Path, given: Given, correction: str
) -> None:
    options = {"correction": correction, "clip": CLIP}
    cfg = config(tiny_model, tmp_path, gap=options, **OPPONENT)
    job.run(cfg, quiet=True)
    clip = CLIP if correction == "truncated" else math.inf
    for record, round_ in zip(records_of(cfg, "round"), rounds_of(cfg), strict=True):
        own = [c.gap_log_weight for c in round_.completions if c.sample == 0]
        weights = [min(clip, math.exp(weight)) for weight in own if weight is not None]
        assert len(weights) == 8
        assert record["gap_weight"] == pytest.approx(sum(weights) / 8, rel=1e-9)
        assert record["logprob_gap"] == round_.logprob_gap


def test_weights_past_all_floats_and_of_no_round() -> None:
    round_ = make_round().with_completions(lambda c: replace(c, gap_log_weight=1e4))
    truncated = GapOptions(correct_above=0, correction="truncated", clip=CLIP)
    assert gap.measures(round_, truncated)["gap_weight"] == CLIP
    assert gap.measures(round_, GapOptions(correct_above=0))["gap_weight"] == math.inf
    assert gap.measures(make_round(), truncated)["gap_weight"] is None


def test_below_the_limit_nothing_changes(
    tiny_model: Path, tmp_path: Path, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(gap, "Lesson")  # without it no round can be scored again
    limits = {"correct_above": 2 * PROBE_SHIFT, "correction": "truncated", "clip": CLIP}
    plain = config(tiny_model, tmp_path, "plain", gap={"correct_above": None})
    asked = config(tiny_model, tmp_path, "asked", gap=limits)
    for cfg in (plain, asked):
        job.run(cfg, quiet=True)
    assert [record["gap_weight"] for record in records_of(asked, "round")] == [None] * 3
    require_same_run(plain, asked)


def require_same_run(one: Config, other: Config) -> None:
    """The same records, rounds and weights, bit for bit."""
    assert tiny.records(one.run_dir) == tiny.records(other.run_dir)
    for a, b in zip(rounds_of(one), rounds_of(other), strict=True):
        require_equal(replace(a, seconds={}), replace(b, seconds={}))
    mine, theirs = (load_file(c.run_dir / "policy/model.safetensors") for c in (one, other))
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


class Killed(BaseException):
    """Stands for a process that ends between two statements."""


@pytest.mark.parametrize("correction", ["recompute", "truncated"])
@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
def test_resumed_equals_uninterrupted(
    tiny_model: Path,
    tmp_path: Path,
    given: Given,
    monkeypatch: pytest.MonkeyPatch,
    correction: str,
    killed: bool,
) -> None:
    """In the middle of a round: the learner is then past the version that sampled it."""
    options = {"correction": correction, "clip": CLIP}
    whole = config(tiny_model, tmp_path, "whole", gap=options)
    job.run(whole, quiet=True)

    stops: list[stopping.Stop] = []
    update = RemoteLearner.update

    def update_then_end(learner: RemoteLearner, batch: UpdateBatch) -> dict[str, Any]:
        if killed and learner.version == 3:
            raise Killed
        record = update(learner, batch)
        stops[0].requested |= learner.version == 3
        return record

    cut = config(tiny_model, tmp_path, "cut", gap=options)
    with monkeypatch.context() as patch:
        patch.setattr(job, "Stop", lambda where: stops.append(stopping.Stop(where)) or stops[0])
        patch.setattr(RemoteLearner, "update", update_then_end)
        with pytest.raises((Stopped, Killed)):
            job.run(cut, quiet=True)
    given.clear()
    job.resume(cut.run_dir, quiet=True)
    assert {position for position, _ in given} == set(range(16, 24))  # the last round alone
    require_same_run(cut, whole)


def test_the_recomputation_counts_as_learning(
    tiny_model: Path, tmp_path: Path, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = RemoteLearner.score_policy

    def slow(learner: RemoteLearner, batches: Any) -> Any:
        time.sleep(0.5)
        return score(learner, batches)

    monkeypatch.setattr(RemoteLearner, "score_policy", slow)
    cfg = config(tiny_model, tmp_path)
    job.run(cfg, quiet=True)
    lines = (cfg.run_dir / "metrics.jsonl").read_text().splitlines()
    learned = [json.loads(line)["seconds"]["learn"] for line in lines if '"kind": "round"' in line]
    assert len(learned) == 3
    assert min(learned) > 1.0  # beside it the probes of drift are scored


# Every kind of objective, its batches written by hand

LOG_WEIGHTS = (0.1, -0.3, 0.05, 0.4)

OWN = """
from workers.learner.objectives import needs

@needs(whole_update={whole})
def hinge(logps):
    return (1 - logps.chosen_logratio + logps.rejected_logratio).clamp_min(0)
"""


def gapped(batch: UpdateBatch, log_weights: tuple[float | None, ...] = LOG_WEIGHTS) -> UpdateBatch:
    def weighed(index: int, item: BatchCompletion) -> BatchCompletion:
        log_weight = log_weights[index % len(log_weights)]
        return replace(item, completion=replace(item.completion, gap_log_weight=log_weight))

    rows = [weighed(index, item) for index, item in enumerate(batch.completions)]
    return replace(batch, completions=tuple(rows))


def weight_of(example: Any) -> float:
    return min(CLIP, math.exp(sum(LOG_WEIGHTS[row % 4] for row in example.rows)))


@pytest.fixture(params=[*(name for name, _, _ in KINDS), "own", "own, whole"])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, UpdateBatch]:
    """Options, and a batch some of whose weights are clipped."""
    named: dict[str, tuple[dict[str, Any], Callable[[], UpdateBatch]]] = {
        name: (objective, make) for name, objective, make in KINDS
    }
    if request.param.startswith("own"):
        path = tmp_path / "mine.py"
        path.write_text(OWN.format(whole=request.param == "own, whole"))
        named[request.param] = ({"name": f"{path}:hinge"}, pairs)
    objective, make = named[request.param]
    return options_of(**objective), gapped(make())


def losses(model: Path, options: Any, batch: UpdateBatch, **settings: Any) -> list[float]:
    learner = make_learner(model, objective=options, **settings)
    found: list[float] = learner._loss.backward(batch, 0).loss.tolist()
    return found


def test_each_loss_is_multiplied_by_its_weight(
    tiny_model: Path, kind: tuple[Any, UpdateBatch]
) -> None:
    options, batch = kind
    settings = {"tokens_per_micro_batch": 100_000}
    ((_, examples),) = micro_batches(batch, 100_000)
    weights = [weight_of(example) for example in examples]
    assert min(weights) < 1.0
    assert max(weights) == CLIP
    assert len(set(weights)) > 1
    plain = losses(tiny_model, options, batch, **settings)
    weighed = losses(tiny_model, options, batch, gap_clip=CLIP, **settings)
    expected = [weight * loss for weight, loss in zip(weights, plain, strict=True)]
    assert weighed == pytest.approx(expected, rel=1e-6)
    record = make_learner(tiny_model, objective=options, gap_clip=CLIP, **settings).update(batch)
    assert record["loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-6)


def test_micro_batches_do_not_change_weighed_updates(
    tiny_model: Path, kind: tuple[Any, UpdateBatch]
) -> None:
    options, batch = kind
    settings = {"objective": options, "gap_clip": CLIP}
    found = []
    for budget in (1, 40, 100_000):
        settings["tokens_per_micro_batch"] = budget
        record = make_learner(tiny_model, **settings).update(batch)
        found.append((record["loss"], gradient(tiny_model, batch, **settings)))
    for loss, slope in found[:-1]:
        assert loss == pytest.approx(found[-1][0], rel=1e-5)
        assert_gradient(slope, found[-1][1])


@pytest.mark.parametrize("name", ["ipo", "kto", "ranking", "nash_md"])
def test_the_gradient_is_the_weighed_mean_of_the_examples(tiny_model: Path, name: str) -> None:
    objective, make = next((o, m) for n, o, m in KINDS if n == name)
    options, batch = options_of(**objective), gapped(make())
    expected = sum(
        weight_of(example)
        * gradient(tiny_model, replace(batch, examples=(example,)), objective=options)
        for example in batch.examples
    ) / len(batch.examples)
    assert isinstance(expected, torch.Tensor)
    assert_gradient(gradient(tiny_model, batch, objective=options, gap_clip=CLIP), expected)


def test_an_uncorrected_round_is_not_weighed(
    tiny_model: Path, kind: tuple[Any, UpdateBatch]
) -> None:
    options, batch = kind
    plain = gapped(batch, (None,))
    found = losses(tiny_model, options, plain, gap_clip=0.5)
    assert found == losses(tiny_model, options, plain)


def test_an_opponents_sample_has_no_weight(tiny_model: Path) -> None:
    """It was not drawn from the policy, whatever the policy's log-probabilities of it are."""
    batch = gapped(pairs(), (-0.2, 5.0))
    rows = [
        replace(item, completion=replace(item.completion, reference_share=float(index % 2)))
        for index, item in enumerate(batch.completions)
    ]
    batch, options = replace(batch, completions=tuple(rows)), options_of(name="dpo")
    plain = losses(tiny_model, options, batch)
    expected = [math.exp(-0.2) * loss for loss in plain]
    assert losses(tiny_model, options, batch, gap_clip=9.0) == pytest.approx(expected, rel=1e-6)
