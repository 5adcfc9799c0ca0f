"""Tokens per second on a GPU: vLLM called directly, our generator on the same engine, transformers.

A random Llama of a billion parameters in bfloat16, 64 prompts of 64 tokens × 2 samples, 128 new
tokens, temperature 1. Sides:

- ours: VllmGenerator.sample. Ids, log-probabilities, text.
- direct: vllm.LLM.generate on the same engine, with the same seeds, log-probabilities and stop
  tokens, else vLLM's defaults; whether it drew the same tokens is compared.
- direct_plain: direct without seeds and log-probabilities.
- transformers: on a CPU our TransformersGenerator.sample; it knows no other device, so on a GPU
  transformers' own generate, which gives ids alone, without stop tokens.

Beside them vllm_load: VllmGenerator.load of a push that lies in the host's memory. Sides alternate,
the first repeat is not counted, medians are quoted. Prints one JSON line, in it why a side was left
out (vLLM or pydantic not installed): where there is no GPU, that. ``--tiny`` is a small model and
batch on whatever there is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

Rows = Sequence[Sequence[int]]
Side = Callable[[int], Rows]
"""A call by its run seed: the ids of every completion."""

LOAD = "vllm_load"
BOS, EOS, PAD, FIRST_WORD = 1, 2, 0, 3
MEMORY_SHARE = 0.5  # of the GPU's, for vLLM: transformers' model is on it as well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16, help="of 61 M parameters each")
    parser.add_argument("--prompts", type=int, default=64, help="sampled together, twice each")
    parser.add_argument("--new-tokens", type=int, default=128, help="longest completion")
    parser.add_argument("--repeats", type=int, default=5, help="counted calls of each side")
    parser.add_argument("--without-vllm", action="store_true", help="leave vLLM out")
    parser.add_argument("--tiny", action="store_true", help="small, on the CPU too")
    options = parser.parse_args()
    if options.tiny:
        options.layers, options.prompts, options.new_tokens = 2, 4, 8
    facts = {"benchmark": "gpu/generate", **_machine()}
    if facts["gpu"] is None and not options.tiny:
        print(json.dumps(facts | {"skipped": "torch sees no GPU; --tiny runs on the CPU"}))
        return
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        facts |= _measured(Path(folder), options, "cpu" if facts["gpu"] is None else "cuda")
    print(json.dumps(facts))


def _measured(folder: Path, options: argparse.Namespace, device: str) -> dict[str, Any]:
    model = _save_model(folder, options, device)
    parameters = sum(p.numel() for p in model.parameters())
    prompts = torch.randint(
        FIRST_WORD, model.config.vocab_size, (options.prompts, 64), generator=torch.manual_seed(0)
    )
    prompts[:, 0] = BOS
    sides: dict[str, Side] = {}
    skipped: dict[str, str] = {}
    for build in (_vllm, _transformers):
        try:
            sides |= build(folder, model, prompts, options)
        except (ImportError, RuntimeError, ValueError) as error:  # UserError is a ValueError
            skipped[build.__name__.lstrip("_")] = f"{type(error).__name__}: {error}"
    speeds: dict[str, list[float]] = {side: [] for side in sides if side != LOAD}
    load_seconds: list[float] = []
    same_tokens = True
    for repeat in range(options.repeats + 1):
        drawn = {}
        for side, call in sides.items():
            began = time.perf_counter()
            drawn[side] = call(repeat)
            seconds = time.perf_counter() - began
            if repeat and side == LOAD:
                load_seconds.append(seconds)
            elif repeat:
                speeds[side].append(sum(map(len, drawn[side])) / seconds)
        if "ours" in drawn:
            same_tokens &= list(map(list, drawn["ours"])) == list(map(list, drawn["direct"]))
    medians = {side: statistics.median(values) for side, values in speeds.items()}
    ours = medians.get("ours")
    return {
        "device": device,
        "parameters": parameters,
        "prompts": options.prompts,
        "new_tokens": options.new_tokens,
        "repeats": options.repeats,
        "tokens_per_second": medians,
        "runs": speeds,
        "ours_times": {s: ours / m for s, m in medians.items() if s != "ours"} if ours else {},
        "same_tokens": same_tokens if ours else None,
        "vllm_load_seconds": statistics.median(load_seconds) if load_seconds else None,
        "skipped": skipped,
    }


def _machine() -> dict[str, Any]:
    """The GPU's name and count, driver, torch and transformers."""
    found = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if found else None,
        "gpus": torch.cuda.device_count(),
        "driver": _driver() if found else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.split("\n")[0].strip()


def _save_model(folder: Path, options: argparse.Namespace, device: str) -> Any:
    """A random Llama on the device and, with a word-level tokenizer, in the folder."""
    config = LlamaConfig(
        vocab_size=64 if options.tiny else 32000,
        hidden_size=64 if options.tiny else 2048,
        intermediate_size=128 if options.tiny else 8192,
        num_hidden_layers=options.layers,
        num_attention_heads=2 if options.tiny else 32,
        num_key_value_heads=1 if options.tiny else 8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    model = model.to(torch.float32 if device == "cpu" else torch.bfloat16)
    model.save_pretrained(folder)
    special = {"<pad>": PAD, "<s>": BOS, "</s>": EOS}
    words = special | {f"w{i}": i for i in range(FIRST_WORD, config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return model


def _vllm(
    folder: Path,
    model: Any,
    prompts: torch.Tensor,
    options: argparse.Namespace,
) -> dict[str, Side]:
    """An engine as our generator builds it, and vLLM's own class in front of the same one."""
    if options.without_vllm:
        raise ValueError("--without-vllm")
    from workers.generator import GeneratorOptions, SamplingOptions
    from workers.options import PolicyOptions
    from workers.seeds import derive_seed
    from workers.vllm_engine import ENVIRONMENT
    from workers.weight_sync.buckets import pack
    from workers.weight_sync.transport import ObjectStore, push_of

    os.environ |= ENVIRONMENT
    from vllm import LLM, LLMEngine, SamplingParams

    from workers.vllm_generator import VllmGenerator

    on_gpu = model.device.type == "cuda"
    engine = {"gpu_memory_utilization": MEMORY_SHARE} if on_gpu else {}
    generator = VllmGenerator(
        PolicyOptions(model=str(folder)),
        SamplingOptions(max_new_tokens=options.new_tokens),
        GeneratorOptions(backend="vllm", dtype="bfloat16" if on_gpu else "float32", engine=engine),
    )
    weights = {name: p.detach().cpu() for name, p in model.named_parameters()}
    push = push_of(0, pack(weights), ObjectStore())

    def load(_: int) -> Rows:
        generator.load(push)
        return []

    with mock.patch.object(LLMEngine, "from_engine_args", return_value=generator._engine):
        llm = LLM(model=str(folder))

    def direct(exact: bool) -> Side:
        def call(run_seed: int) -> Rows:
            asked, params = [], []
            for position, ids in enumerate(prompts.tolist()):
                for sample in range(2):
                    seed = derive_seed(run_seed, "sampling", position, sample)
                    own = {"seed": seed, "logprobs": 0} if exact else {}
                    asked.append({"prompt_token_ids": ids})
                    params.append(
                        SamplingParams(
                            temperature=1.0,
                            max_tokens=options.new_tokens,
                            stop_token_ids=[EOS],
                            ignore_eos=True,
                            **own,
                        )
                    )
            outputs = llm.generate(asked, params, use_tqdm=False)
            return [output.outputs[0].token_ids for output in outputs]

        return call

    return {
        LOAD: load,
        "ours": _sampled(generator, prompts),
        "direct": direct(True),
        "direct_plain": direct(False),
    }


def _transformers(
    folder: Path, model: Any, prompts: torch.Tensor, options: argparse.Namespace
) -> dict[str, Side]:
    if model.device.type == "cpu":
        from workers.generator import SamplingOptions
        from workers.options import PolicyOptions
        from workers.transformers_generator import TransformersGenerator

        sampling = SamplingOptions(max_new_tokens=options.new_tokens)
        generator = TransformersGenerator(PolicyOptions(model=str(folder)), sampling)
        return {"transformers": _sampled(generator, prompts)}
    ids = prompts.repeat_interleave(2, dim=0).to(model.device)
    model.generation_config.eos_token_id = None

    def call(run_seed: int) -> Rows:
        torch.manual_seed(run_seed)
        drawn = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            max_new_tokens=options.new_tokens,
        )
        rows: Rows = drawn[:, ids.shape[1] :].tolist()
        return rows

    return {"transformers": call}


def _sampled(generator: Any, prompts: torch.Tensor) -> Side:
    from workers.generator import SampleRequest
    from workers.messages import Prompt

    rows = tuple(Prompt(position, ids, "") for position, ids in enumerate(prompts.numpy()))

    def call(run_seed: int) -> Rows:
        groups = generator.sample(SampleRequest(rows, 2, run_seed, "sampling")).completions
        return [completion.ids.tolist() for group in groups for completion in group]

    return call


if __name__ == "__main__":
    main()
