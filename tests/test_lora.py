"""LoRA is W + (alpha/rank)·B·A: scored, learned, pushed, saved and exported as nothing else."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from judges.errors import UserError
from pipeline import job, stopping
from pipeline.config import Config
from pipeline.learner import RemoteLearner
from pipeline.stopping import Stopped
from tests import tiny
from tests.learner_helpers import (
    batch_of,
    item,
    plain_logprobs,
    plain_model,
    prompts_of,
    sample_request,
)
from workers.generator import SamplingOptions
from workers.learner.learner import Learner
from workers.learner.options import LearnerOptions, ReferenceOptions
from workers.learner.pairwise_options import DpoOptions
from workers.messages import UpdateBatch
from workers.models.load import load_policy
from workers.models.lora import ADAPTER, frozen_copy, merged, trainable, with_adapters
from workers.options import LoraOptions, PolicyOptions
from workers.transformers_generator import TransformersGenerator

LORA = LoraOptions(rank=4, alpha=6.0)
SCALE = 6.0 / 4
ATTENTION = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32)}
MLP = {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
PROMPTS = prompts_of([1, 5, 8], [1, 9, 3, 20, 5, 6, 11], [1], [1, 23, 4, 5, 17])
BATCH = batch_of(
    [
        item([1, 5, 8], [4, 7, 7, 12, 2], reference=-3.0),
        item([1, 5, 8], [9, 2], reference=-2.5),
        item([1, 20], [6, 6, 3], reference=-3.5),
        item([1, 20], [11, 15, 18, 2], reference=-2.0),
    ],
    (0, 1),
    (2, 3, 0.75),
)


def options_of(model: Path, lora: LoraOptions | None = LORA) -> PolicyOptions:
    return PolicyOptions(model=str(model), lora=lora)


def make_learner(
    model: Path,
    lora: LoraOptions | None = LORA,
    reference: ReferenceOptions | None = None,
    **options: Any,
) -> Learner:
    options = {"learning_rate": 0.03} | options
    return Learner(options_of(model, lora), LearnerOptions(**options), DpoOptions(), 100, reference)


def move(model: Any, seed: int = 1) -> None:
    """Adapters far from the identity, as after a long way of learning."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in trainable(model).values():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=noise))


def by_hand(path: Path, adapters: dict[str, Tensor], scale: float = SCALE) -> Any:
    """The plain model with W + scale·B·A for every A and B among the tensors."""
    model = plain_model(path)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, a in adapters.items():
            if ".lora_A." in name:
                b = adapters[name.replace("lora_A", "lora_B")]
                weights[f"{name.partition('.lora_A.')[0]}.weight"] += scale * (b @ a)
    return model


def scores(learner: Learner, batch: UpdateBatch = BATCH) -> list[Tensor]:
    return [torch.from_numpy(found) for found in learner.score_policy(batch)]


def reference_scores(learner: Learner) -> list[Tensor]:
    (found,) = learner.score_reference([BATCH])
    return [torch.from_numpy(logprobs) for logprobs in found]


def plain_scores(model: Any, batch: UpdateBatch = BATCH) -> list[Tensor]:
    with torch.no_grad():
        return [plain_logprobs(model, c.prompt_ids, c.completion.ids) for c in batch.completions]


def close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.allclose(a, b, atol=tolerance, rtol=0) for a, b in pairs)


def copies(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def equal(some: dict[str, Any], others: dict[str, Any]) -> bool:
    assert some.keys() == others.keys()
    return all(torch.equal(some[name], others[name]) for name in some)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its logits are of order 1, so that float32 keeps log-probabilities to 1e-5."""
    return tiny.save_model(tmp_path_factory.mktemp("mild"), spread=0.2)


# --- the model -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        ("all-linear", 2 * [*ATTENTION, *MLP]),
        (["v_proj", "q_proj"], 2 * ["q_proj", "v_proj"]),
        (["0.mlp.up_proj"], ["up_proj"]),
    ],
)
def test_scores_are_those_of_the_merged_weights(
    model: Path, targets: Any, adapted: list[str]
) -> None:
    learner = make_learner(model, LORA.model_copy(update={"target_modules": targets}))
    assert type(learner._policy) is LlamaForCausalLM
    start = plain_scores(plain_model(model))
    assert close(scores(learner), start)
    move(learner._policy)
    expected = plain_scores(by_hand(model, trainable(learner._policy)))
    assert close(scores(learner), expected)
    assert not close(start, expected, 1e-2)
    names = [name.split(".") for name in trainable(learner._policy)]
    assert [name[-4] for name in names if name[-3] == "lora_A"] == adapted


def test_adapters_start_the_same_whatever_was_drawn_before(model: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    policy = load_policy(options_of(model))
    one = trainable(policy)
    assert [name for name, p in policy.named_parameters() if p.requires_grad] == list(one)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    other = trainable(load_policy(options_of(model)))
    assert equal(one, other)
    starts = [tensor.detach() for name, tensor in one.items() if ".lora_A." in name]
    assert len({float(tensor.sum()) for tensor in starts}) == len(starts) == 14
    for tensor in starts:  # as PEFT draws them: uniform within 1/√inputs
        bound = tensor.shape[1] ** -0.5
        assert 0.8 * bound < float(tensor.abs().max()) <= bound
    assert all(not t.any() for name, t in one.items() if ".lora_B." in name)


def test_a_module_that_the_model_lacks(model: Path) -> None:
    for target in ("w_proj", "mlp", "lm_head", "embed_tokens"):
        lora = LORA.model_copy(update={"target_modules": ["q_proj", target]})
        with pytest.raises(UserError) as caught:
            load_policy(options_of(model, lora))
        assert str(caught.value) == (
            f"policy.lora.target_modules={target}: no linear module of this model takes an adapter "
            "by that name; choose from down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, "
            "v_proj, or all-linear"
        )


def test_weights_that_lie_transposed_are_merged_too() -> None:
    """GPT-2's linear modules are Conv1D."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=24, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    policy = with_adapters(GPT2LMHeadModel(config).eval(), LORA)
    move(policy)
    ids = torch.tensor([[1, 5, 8, 3, 17]])
    with torch.no_grad():
        torch.testing.assert_close(merged(policy)(ids).logits, policy(ids).logits)


def test_full_weights_are_trained_without_lora(model: Path) -> None:
    plain = load_policy(options_of(model, None))
    assert trainable(plain).keys() == dict(plain.named_parameters()).keys()
    copy = frozen_copy(plain)
    for mine, its in zip(plain.parameters(), copy.parameters(), strict=True):
        assert mine.data_ptr() != its.data_ptr()
        assert mine.requires_grad
        assert not its.requires_grad


# --- the learner -----------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_merged_parametrisation(model: Path) -> None:
    learner = make_learner(model, max_grad_norm=1e9)
    move(learner._policy)
    adapters = copies(trainable(learner._policy))
    for tensor in adapters.values():
        tensor.requires_grad_()
    plain = plain_model(model)
    weights = dict(plain.named_parameters())
    for name in adapters:
        if ".lora_A." in name:
            key = f"{name.partition('.lora_A.')[0]}.weight"
            b = adapters[name.replace("lora_A", "lora_B")]
            weights[key] = weights[key] + SCALE * (b @ adapters[name])

    def log_ratio(index: int) -> Tensor:
        c = BATCH.completions[index]
        row = torch.tensor([[*c.prompt_ids, *c.completion.ids]])
        out = torch.func.functional_call(plain, weights, (row,), {"use_cache": False})
        logps = out.logits[0, len(c.prompt_ids) - 1 : -1].log_softmax(-1)
        picked = logps[torch.arange(len(c.completion.ids)), torch.from_numpy(c.completion.ids)]
        return picked.sum() - float(c.completion.reference_logprobs.sum())

    losses = []
    for pair in BATCH.examples:
        margin = 0.1 * (log_ratio(pair.chosen) - log_ratio(pair.rejected))
        p = pair.label_prob
        losses.append(-p * logsigmoid(margin) - (1 - p) * logsigmoid(-margin))
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(adapters.values()))

    found: dict[str, Tensor] = {}
    learner._optimizer.register_step_pre_hook(
        lambda *_: found.update(
            {n: p.grad.clone() for n, p in learner._policy.named_parameters() if p.grad is not None}
        )
    )
    base = copies({n: p for n, p in learner._policy.named_parameters() if n not in adapters})
    record = learner.update(BATCH)
    assert list(found) == list(adapters)
    scale = max(float(g.abs().max()) for g in expected)
    assert scale > 1e-3
    for gradient, name in zip(expected, adapters, strict=True):
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * scale, rtol=0)
    norm = math.sqrt(sum(float(g.square().sum()) for g in expected))
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert equal(base, {n: p for n, p in learner._policy.named_parameters() if n in base})
    held = learner._optimizer.state_dict()
    assert len(held["state"]) == len(held["param_groups"][0]["params"]) == len(adapters)


def test_a_push_is_the_adapters_and_is_what_is_sampled(model: Path) -> None:
    learner = make_learner(model)
    sampling = SamplingOptions(max_new_tokens=8)
    generator = TransformersGenerator(options_of(model), sampling)
    generator.load(learner.weights())
    before = generator.probe(PROMPTS[1].ids, 8)
    move(learner._policy)
    learner.version = 1
    push = learner.weights()
    sides = 2 * sum(map(sum, [*ATTENTION.values(), *MLP.values()]))  # inputs and outputs, 2 layers
    assert sum(bucket.size for bucket in push.buckets) == sides * LORA.rank * 4
    assert all(".lora_" in slot.name for bucket in push.buckets for slot in bucket.slots)
    assert generator.load(push) == learner.sent()
    assert generator.version == 1
    plain = by_hand(model, trainable(learner._policy))
    for prompt in PROMPTS:
        found = generator.probe(prompt.ids, 8)
        ids = list(prompt.ids)
        for _ in range(8):
            ids.append(int(plain(torch.tensor([ids])).logits[0, -1].argmax()))
        assert found.ids.tolist() == ids[len(prompt.ids) :]
        expected = plain_logprobs(plain, prompt.ids, found.ids).detach()
        torch.testing.assert_close(torch.from_numpy(found.logprobs), expected, atol=1e-5, rtol=0)
    assert generator.probe(PROMPTS[1].ids, 8).ids.tolist() != before.ids.tolist()


def test_an_opponents_reference_is_the_base(model: Path) -> None:
    learner = make_learner(model)
    sampling = SamplingOptions(max_new_tokens=6)
    generator = TransformersGenerator(options_of(model), sampling, reference=True)
    move(learner._policy)
    generator.load(learner.weights())
    request = replace(sample_request(PROMPTS), reference_shares=(0.0, 1.0))
    policy, start = by_hand(model, trainable(learner._policy)), plain_model(model)
    for prompt, group in zip(PROMPTS, generator.sample(request).completions, strict=True):
        for completion in group:  # logprobs are the policy's, sampling_logprobs the mixture's
            ids = completion.ids
            expected = plain_logprobs(policy, prompt.ids, ids).detach().numpy()
            assert completion.logprobs == pytest.approx(expected, abs=1e-5)
        expected = plain_logprobs(start, prompt.ids, group[1].ids).detach().numpy()
        assert group[1].sampling_logprobs == pytest.approx(expected, abs=1e-5)
    assert shares_base(generator._model, generator._reference)


def shares_base(one: Any, other: Any) -> bool:
    """Whether just the tensors that are no adapters lie in the same memory."""
    mine, its = dict(one.named_parameters()), dict(other.named_parameters())
    assert mine.keys() == its.keys()
    return all(
        (mine[name].data_ptr() == its[name].data_ptr()) == (".lora_" not in name) for name in mine
    )


@pytest.mark.parametrize(
    ("update", "share"), [("frozen", 0.0), ({"every_rounds": 2}, 1.0), ({"ema": 0.5}, 0.75)]
)
def test_the_reference_moves_its_adapters_alone(model: Path, update: Any, share: float) -> None:
    learner = make_learner(model, reference=ReferenceOptions(update=update))
    reference = learner._reference
    assert reference is not None
    assert shares_base(learner._policy, reference._model)
    start = copies(trainable(learner._policy))
    before = reference_scores(learner)
    assert close(before, scores(learner), 0.0)
    move(learner._policy)
    learner.version = 2
    assert close(before, reference_scores(learner), 0.0)
    assert close(before, plain_scores(plain_model(model)))
    learner.begin_round(2)
    policy = trainable(learner._policy)
    expected = {name: (1 - share) * start[name] + share * policy[name].detach() for name in start}
    for name, tensor in trainable(reference._model).items():
        torch.testing.assert_close(tensor, expected[name])
        assert not tensor.requires_grad
    assert close(reference_scores(learner), plain_scores(by_hand(model, expected)))
    assert shares_base(learner._policy, reference._model)


def test_a_checkpoint_is_the_adapters_and_goes_on_bit_for_bit(model: Path, tmp_path: Path) -> None:
    def learner() -> Learner:
        return make_learner(model, reference=ReferenceOptions(update={"ema": 0.9}))

    one, other = learner(), learner()
    for index in range(2):
        one.begin_round(index)
        one.update(BATCH)
    one.save(tmp_path)
    state = torch.load(tmp_path / "learner.pt", weights_only=True)
    names = trainable(one._policy).keys()
    assert state["policy"].keys() == state["reference"]["model"].keys() == names
    assert other.load(tmp_path) == 2
    for each in (one, other):
        each.begin_round(2)
        each.update(BATCH)
    assert equal(dict(one._policy.named_parameters()), dict(other._policy.named_parameters()))
    mine, its = (trainable(each._reference._model) for each in (one, other))
    assert equal(mine, its)
    assert all(p.any() for p in trainable(one._policy).values())


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "0.mlp.down_proj"]])
def test_export_is_the_merged_policy_and_the_adapter_alone(
    model: Path, tmp_path: Path, targets: Any
) -> None:
    lora = LoraOptions(rank=3, alpha=4.5, target_modules=targets)
    learner = make_learner(model, lora)
    move(learner._policy)
    learner.export(tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    expected = by_hand(model, trainable(learner._policy), 1.5)
    theirs = dict(exported.named_parameters())
    assert theirs.keys() == dict(expected.named_parameters()).keys()
    for name, tensor in expected.named_parameters():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-6, rtol=0)
    assert exported.get_output_embeddings().weight is exported.get_input_embeddings().weight
    assert close(scores(learner), plain_scores(exported))
    adapted = peft.PeftModel.from_pretrained(plain_model(model), tmp_path / "adapter").eval()
    assert close(scores(learner), plain_scores(adapted))
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 4.5)
    assert config["base_model_name_or_path"] == str(model)
    assert not any(f".{ADAPTER}." in name for name in names)


def test_what_was_exported_is_adopted_and_pushed(model: Path, tmp_path: Path) -> None:
    learner, other = make_learner(model), make_learner(model)
    move(learner._policy)
    learner.export(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    other.adopt(options_of(tmp_path), 7)
    assert equal(trainable(learner._policy), trainable(other._policy))
    assert equal(dict(learner._policy.named_parameters()), dict(other._policy.named_parameters()))
    assert close(reference_scores(other), plain_scores(plain_model(model)))
    generator = TransformersGenerator(options_of(model), SamplingOptions())
    assert generator.load(other.weights()) == other.sent()
    full = make_learner(model, None)
    full.adopt(options_of(tmp_path, None), 7)
    assert close(scores(full), scores(learner))
    with pytest.raises(UserError, match=r"adapter does not hold adapters of this rank and these"):
        make_learner(model, LORA.model_copy(update={"rank": 2})).adopt(options_of(tmp_path), 7)
    with pytest.raises(UserError, match=r"leave policy\.lora as it was in the run"):
        make_learner(model).adopt(options_of(model), 7)


# --- whole runs ------------------------------------------------------------------------------


def config(model: Path, folder: Path, name: str) -> Config:
    return tiny.config(
        model,
        folder,
        run={"name": "tiny", "updates": 6, "dir": str(folder / name)},
        policy={"model": str(model), "lora": {"rank": 4, "target_modules": ["q_proj", "up_proj"]}},
        resampling={"updates_per_round": 2},
        learner={"learning_rate": 0.03, "threads": 1},
        reference={"update": {"every_rounds": 2}},
        generator={"threads": 1, "backend": "transformers"},
        evaluation={"every": 3, "count": 5, "prompts": {"path": str(folder / "prompts.jsonl")}},
    )


def test_a_run_ends_evaluates_and_resumes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = job.run(config(model, tmp_path, "whole"), quiet=True)
    records = tiny.records(whole.run_dir)
    updates = [record for record in records if record["kind"] == "update"]
    assert [record["reference_version"] for record in updates] == [0, 0, 0, 0, 4, 4]
    losses = [record["loss"] for record in updates]
    assert [losses[0], losses[4]] == pytest.approx([math.log(2)] * 2, abs=1e-7)
    assert losses[2] != pytest.approx(math.log(2), abs=1e-3)
    start = load_file(model / "model.safetensors")
    end = load_file(whole.run_dir / "policy" / "model.safetensors")
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved == {name for name in start if "q_proj" in name or "up_proj" in name}
    card = (whole.run_dir / "policy" / "README.md").read_text()
    assert "LoRA of rank 4, alpha 32, on q_proj, up_proj: merged into these weights" in card
    assert (whole.run_dir / "policy" / "adapter").stat().st_mode & 0o100

    again = job.evaluate(config(model, tmp_path, "whole"))
    last = {record["judge"]: record for record in whole.evaluations}
    for record in again.evaluations:
        for key in ("quality", "quality_baseline", "win", "tie", "loss", "length_mean"):
            assert record[key] == last[record["judge"]][key]
    assert any(record["quality"] != record["quality_baseline"] for record in again.evaluations)

    update = RemoteLearner.update
    stops: list[stopping.Stop] = []
    monkeypatch.setattr(job, "Stop", lambda where: stops.append(stopping.Stop(where)) or stops[0])

    def update_then_ask(learner: RemoteLearner, batch: UpdateBatch) -> dict[str, Any]:
        record = update(learner, batch)
        stops[0].requested |= learner.version == 5
        return record

    monkeypatch.setattr(RemoteLearner, "update", update_then_ask)
    cut = config(model, tmp_path, "cut")
    with pytest.raises(Stopped, match="stopped after update 5"):
        job.run(cut, quiet=True)
    monkeypatch.undo()
    job.resume(cut.run_dir, quiet=True)
    assert tiny.records(cut.run_dir) == records
    assert equal(end, load_file(cut.run_dir / "policy/model.safetensors"))
    adapter = Path("policy") / "adapter" / "adapter_model.safetensors"
    assert equal(load_file(whole.run_dir / adapter), load_file(cut.run_dir / adapter))
