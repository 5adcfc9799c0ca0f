"""Sizes and bytes against counts by hand, and against what a real update holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import Config, load_config
from pipeline.plan.accelerators import GIB, GPUS, MBU, MFU, gpu_named, roofline
from pipeline.plan.memory import (
    CPU_CACHE,
    ENGINE,
    PROCESS,
    Sizes,
    engine_room,
    generator_memory,
    judge_memory,
    learner_memory,
    sizes_of,
)
from pipeline.plan.rates import Lengths
from tests import tiny
from workers.learner.logprobs import chunked_logprobs
from workers.models.footprint import Footprint, policy_footprint, saved_bytes
from workers.models.load import load_policy
from workers.options import LoraOptions, PolicyOptions

ROOT = Path(__file__).parents[1]
CLUSTER = sorted((ROOT / "configs/cluster").glob("*.yaml"))

QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
}


def config(model: Path, folder: Path, **sections: Any) -> Config:
    return tiny.config(model, folder, **sections)


# 24 words, 32 wide, two layers: q and o 32·32, k and v 32·16, three of 32·64, two norms of 32.
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
TINY = 24 * 32 + 2 * LAYER + 32


def test_parameters_by_hand(tiny_model: Path, tmp_path: Path) -> None:
    found = policy_footprint(PolicyOptions(model=str(tiny_model)))
    assert (found.parameters, found.trainable) == (TINY, TINY)
    assert (found.largest_block, found.head) == (LAYER, 24 * 32)
    assert found.kv_a_token == 2 * 2 * 2 * 8  # keys and values, layers, heads, width
    assert (found.context, found.plain) == (64, False)
    untied = tiny.save_model(tmp_path / "untied", tied=False)
    assert policy_footprint(PolicyOptions(model=str(untied))).parameters == TINY + 24 * 32


def test_adapters_by_hand(tiny_model: Path) -> None:
    """Rank 2: 2·(in + out) of each linear module but the head."""
    policy = PolicyOptions(model=str(tiny_model), lora=LoraOptions(rank=2))
    found = policy_footprint(policy)
    adapters = 2 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert (found.trainable, found.parameters) == (adapters, TINY + adapters)


@pytest.mark.parametrize("lora", [None, LoraOptions(rank=2)])
def test_activations_are_those_of_the_real_model(
    tiny_model: Path, lora: LoraOptions | None
) -> None:
    """Byte by byte what autograd saves of real tensors, of another batch than was counted."""
    policy = PolicyOptions(model=str(tiny_model), lora=lora)
    model = load_policy(policy)
    ids = torch.randint(3, 24, (6, 40), generator=torch.Generator().manual_seed(0))
    head = model.get_output_embeddings()
    with saved_bytes(model) as kept:
        hidden = model.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
        chunked_logprobs(hidden, head.weight, head.bias, ids.flatten())
    expected = policy_footprint(policy).activation_bytes_a_token * ids.numel()
    assert sum(kept.values()) == pytest.approx(expected, rel=0.01)


def test_a_directory_needs_no_weights(tmp_path: Path) -> None:
    """Qwen3-8B: two embeddings, 36 layers with norms of queries and keys, a last norm."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    found = policy_footprint(PolicyOptions(model=str(tmp_path)))
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 2 * 128
    layer = attention + 3 * 4096 * 12288 + 2 * 4096
    assert found.parameters == 2 * 151936 * 4096 + 36 * layer + 4096 == 8_190_735_360
    assert found.kv_a_token == 2 * 36 * 8 * 128


FOOTPRINT = Footprint(
    parameters=1000,
    trainable=100,
    largest_block=200,
    head=60,
    hidden=6,
    vocabulary=10,
    layers=2,
    kv_a_token=16,
    context=64,
    activation_bytes_a_token=50,
    plain=False,
)
SIZES = Sizes(FOOTPRINT, generator_bytes=2, judges={"a": 70, "b": 0})
LENGTHS = Lengths(2.0, 6.0)


def test_a_learners_bytes_by_hand(tiny_model: Path, tmp_path: Path) -> None:
    """float32: weights 4·1000, of the 100 learned 4 each, 8 of moments, 4 of the reference; 10
    tokens; the head's gradient 4·60 and three hidden states; two versions of 2·100 pushed."""
    sections = {"learner": {"tokens_per_micro_batch": 10}, "resampling": {"rounds_in_flight": 1}}
    cfg = config(tiny_model, tmp_path, **sections)
    parts = {
        "weights": 4000,
        "gradients": 400,
        "optimizer": 800,
        "reference": 400,
        "activations": 500,
        "backward of the head": 4 * (60 + 3 * 6 * 10),
        "process": PROCESS["cpu"],
        "pushes": 400,
    }
    assert learner_memory(cfg, SIZES).parts == parts
    alone = config(tiny_model, tmp_path, objective={"name": "simpo"}, **sections)
    assert "reference" not in learner_memory(alone, SIZES).parts
    sharded = cfg.model_copy(
        update={"learner": cfg.learner.model_copy(update={"workers": 4, "gpus": 1.0})}
    )
    found = learner_memory(sharded, SIZES)
    assert [found.parts[p] for p in ("weights", "gradients", "optimizer", "reference")] == [
        1000,
        100,
        200,
        100,
    ]
    assert (found.parts["gathered block"], found.gpus) == (800, 1)
    assert "pushes" not in found.parts  # they wait in RAM


def test_an_engines_cache_by_hand(tiny_model: Path, tmp_path: Path) -> None:
    """A token is 16 numbers of 2 bytes, a sequence 8 tokens."""

    def cfg(gpus: float = 1.0, **engine: Any) -> Config:
        generator = {"backend": "vllm", "gpus": gpus, "engine": engine, "dtype": "bfloat16"}
        return config(tiny_model, tmp_path, generator=generator)

    said = engine_room(cfg(kv_cache_memory_bytes=3200), SIZES, LENGTHS, None)
    assert (said.cache, said.tokens, said.sequences) == (3200, 100, 12)
    capacity = 2 * (ENGINE + PROCESS["gpu"] + 2000 + 3200)
    left = engine_room(cfg(gpu_memory_utilization=0.5), SIZES, LENGTHS, capacity)
    assert (left.cache, left.tokens) == (3200, 100)
    few = engine_room(cfg(kv_cache_memory_bytes=3200, max_num_seqs=5), SIZES, LENGTHS, None)
    assert few.sequences == 5
    two = cfg(2.0, kv_cache_memory_bytes=3200, tensor_parallel_size=2)
    assert engine_room(two, SIZES, LENGTHS, None).tokens == 200
    held = generator_memory(two, SIZES, LENGTHS, None)
    assert held.parts["weights"] == 1000
    assert engine_room(cfg(), SIZES, LENGTHS, 1.0).cache == 0  # nothing left: it does not fit
    on_cpu = config(tiny_model, tmp_path, generator={"backend": "vllm"})
    assert engine_room(on_cpu, SIZES, LENGTHS, None).cache == CPU_CACHE


def test_an_embedded_generators_bytes_by_hand(tiny_model: Path, tmp_path: Path) -> None:
    """A unit of 4 prompts × 2 of 2 + 8 tokens, 16 numbers each; three tables of logits."""
    parts = generator_memory(config(tiny_model, tmp_path), SIZES, LENGTHS, None).parts
    assert parts == {
        "weights": 4000,
        "KV cache": 4 * 8 * 10 * 16,
        "logits": 4 * 3 * 8 * 10,
        "process": PROCESS["cpu"],
    }
    assert judge_memory(config(tiny_model, tmp_path), SIZES, None).parts == {
        "a": 70,
        "process": PROCESS["cpu"],
    }


def test_a_roofline_by_hand(tiny_model: Path, tmp_path: Path) -> None:
    """6 operations a parameter and token in float32; a step reads the weights once, and of each
    sequence its cache, on average prompt and half its completion."""
    engine = {"kv_cache_memory_bytes": 3200}
    generator = {"backend": "vllm", "gpus": 1.0, "engine": engine, "dtype": "bfloat16"}
    cfg = config(tiny_model, tmp_path, generator=generator)
    gpu = GPUS["h100"]
    found = roofline(cfg, SIZES, gpu, LENGTHS)
    flops = gpu.float32 * MFU
    assert found.update(3) == pytest.approx(3 * 6 * 1000 * 2 * 8 / flops)
    assert found.score(3) == pytest.approx(3 * 2 * 1000 * 2 * 8 / flops)
    bandwidth = gpu.bandwidth * MBU
    reading = 16 * 2 * (2 + 3) / bandwidth
    computing = 2 * 1000 / (gpu.bfloat16 * MFU)
    prefill = 2 * 1000 * 2 / (gpu.bfloat16 * MFU)
    each = prefill + 2 * 6 * max(reading, computing)
    assert found.sample(6) == pytest.approx(6 * each + 6 * 2000 / bandwidth)  # 12 fit at once
    assert found.sample(7) == pytest.approx(7 * each + 2 * 6 * 2000 / bandwidth)
    assert set(found.origin.values()) == {"arithmetic"}


@pytest.mark.slow
@pytest.mark.parametrize("path", CLUSTER, ids=lambda path: path.stem)
def test_the_cluster_configs_fit_gpus_of_80_gb(path: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    cfg = load_config(path, [f"policy.model={tmp_path}"])
    if cfg.judge.name == "reward_model":
        cfg = load_config(path, [f"policy.model={tmp_path}", f"judge.args.model={tmp_path}"])
    sizes, capacity = sizes_of(cfg), gpu_named("h100").gib * GIB
    assert 40 * GIB < learner_memory(cfg, sizes).total < 0.9 * capacity
    assert generator_memory(cfg, sizes, Lengths(256.0, 512.0), capacity).total < capacity
    assert judge_memory(cfg, sizes, capacity).total < capacity
