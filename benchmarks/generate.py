"""Tokens per second of vLLM called directly, of our generator on the same engine, of transformers.

stories15M, 32 prompts of 16 tokens × 2 samples, at most 64 new tokens, temperature 1, one thread.
Sides, each call from prompts to what the caller gets:

- ours: VllmGenerator.sample. Ids, log-probabilities, text.
- direct: vllm.LLM.generate with the same seed of each request, log-probabilities and stop tokens,
  else vLLM's defaults. The same answer, token for token: it is compared.
- direct_ids: direct, told to make no text and flat log-probabilities, as ours tells it: what vLLM
  takes for our requests.
- direct_plain: direct without seeds and log-probabilities: what exactness costs.
- transformers: TransformersGenerator.sample, in a process of its own.

The vLLM sides share one engine. Sides alternate, the first repeat is not counted, medians are
compared. Tokens are counted as drawn, and per CPU second too: a machine that is not idle blurs
those less. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from rich.console import Console
from rich.table import Table

from workers.generator import Generator, GeneratorOptions, SampleRequest, SamplingOptions
from workers.messages import Prompt
from workers.models.fetch import fetch_model
from workers.options import PolicyOptions
from workers.seeds import derive_seed
from workers.threads import thread_environment
from workers.vllm_engine import ENVIRONMENT
from workers.weight_sync.buckets import pack
from workers.weight_sync.transport import ObjectStore, push_of

PROMPTS, PROMPT_TOKENS, SAMPLES, NEW_TOKENS = 32, 16, 2, 64
VLLM_SIDES = ("ours", "direct", "direct_ids", "direct_plain")
EXACT_SIDES = ("ours", "direct", "direct_ids")


class Timed(NamedTuple):
    """One call: its seconds on the clock and of CPU, the tokens it drew, and a digest of them."""

    seconds: float
    cpu_seconds: float
    tokens: int
    digest: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="counted calls of each side")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help="longest completion")
    parser.add_argument("--without-vllm", action="store_true", help="measure transformers alone")
    options = parser.parse_args()
    with_vllm = not options.without_vllm and importlib.util.find_spec("vllm") is not None
    if not with_vllm:
        print("without vLLM (make install-vllm): only transformers is measured")
    os.environ.update(thread_environment(options.threads) | ENVIRONMENT)
    fetch_model("stories15m")

    sides = {"transformers": Process(_transformers_sides, options.new_tokens)}
    if with_vllm:
        vllm = Process(_vllm_sides, options.new_tokens)
        sides = dict.fromkeys(VLLM_SIDES, vllm) | sides
    counted: dict[str, list[Timed]] = {side: [] for side in sides}
    same_tokens = True
    for repeat in range(options.repeats + 1):
        found = {side: process.call(side, repeat) for side, process in sides.items()}
        same_tokens &= len({found[side].digest for side in EXACT_SIDES if side in found}) <= 1
        for side, timed in found.items():
            counted[side] += [timed] if repeat else []
    for process in set(sides.values()):
        process.end()

    runs = {side: [t.tokens / t.seconds for t in calls] for side, calls in counted.items()}
    speeds = {side: statistics.median(values) for side, values in runs.items()}
    cpu_speeds = {
        side: statistics.median(t.tokens / t.cpu_seconds for t in calls)
        for side, calls in counted.items()
    }
    _show(speeds, cpu_speeds, options.threads)
    facts = {"benchmark": "generate", "model": "stories15m", "threads": options.threads}
    facts |= {"prompts": PROMPTS, "samples": SAMPLES, "prompt_tokens": PROMPT_TOKENS}
    facts |= {"new_tokens": options.new_tokens, "repeats": options.repeats}
    facts |= {"tokens": {s: statistics.median(t.tokens for t in c) for s, c in counted.items()}}
    facts |= {"tokens_per_second": speeds, "runs": runs, "ours_times": _ours_times(speeds)}
    facts |= {"tokens_per_cpu_second": cpu_speeds, "ours_times_cpu": _ours_times(cpu_speeds)}
    print(json.dumps(facts | {"same_tokens": same_tokens if with_vllm else None}))


def _ours_times(speeds: dict[str, float]) -> dict[str, float]:
    """Our speed as a multiple of each other side's; empty where vLLM is not measured."""
    if "ours" not in speeds:
        return {}
    return {side: speeds["ours"] / speed for side, speed in speeds.items() if side != "ours"}


class Process:
    """A process that builds its sides once and is asked for calls of them."""

    def __init__(self, build: Callable[[int], dict[str, Side]], new_tokens: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, build, new_tokens), daemon=True
        )
        self._process.start()
        theirs.close()

    def call(self, side: str, run_seed: int) -> Timed:
        self._pipe.send((side, run_seed))
        return self._pipe.recv()

    def end(self) -> None:
        self._pipe.send(None)
        self._process.join()


Side = Callable[[int], Sequence[Sequence[int]]]
"""A call by its run seed: the ids of every completion."""


def _serve(pipe: Any, build: Callable[[int], dict[str, Side]], new_tokens: int) -> None:
    sides = build(new_tokens)
    while (asked := pipe.recv()) is not None:
        side, run_seed = asked
        began, cpu_began = time.perf_counter(), time.process_time()
        rows = sides[side](run_seed)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        digest = hashlib.sha256(repr([list(row) for row in rows]).encode()).hexdigest()
        pipe.send(Timed(seconds, cpu_seconds, sum(map(len, rows)), digest))


def _prompts() -> tuple[Prompt, ...]:
    """BOS and random ids: a step costs the same whatever they say."""
    ids = np.random.default_rng(0).integers(3, 32000, (PROMPTS, PROMPT_TOKENS))
    ids[:, 0] = 1
    return tuple(Prompt(position, row, "") for position, row in enumerate(ids))


def _sample(generator: Generator) -> Side:
    def call(run_seed: int) -> list[list[int]]:
        request = SampleRequest(_prompts(), SAMPLES, run_seed, "sampling")
        groups = generator.sample(request).completions
        return [completion.ids.tolist() for group in groups for completion in group]

    return call


def _transformers_sides(new_tokens: int) -> dict[str, Side]:
    from workers.transformers_generator import TransformersGenerator

    sampling = SamplingOptions(max_new_tokens=new_tokens)
    return {"transformers": _sample(TransformersGenerator(PolicyOptions(), sampling))}


def _vllm_sides(new_tokens: int) -> dict[str, Side]:
    """An engine as our generator builds it, and vLLM's own class in front of the same one."""
    from vllm import LLM, LLMEngine, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from workers.models.load import load_policy
    from workers.models.lora import trainable
    from workers.vllm_generator import VllmGenerator

    policy, sampling = PolicyOptions(), SamplingOptions(max_new_tokens=new_tokens)
    generator = VllmGenerator(policy, sampling, GeneratorOptions(backend="vllm"))
    generator.load(push_of(0, pack(trainable(load_policy(policy))), ObjectStore()))
    with mock.patch.object(LLMEngine, "from_engine_args", return_value=generator._engine):
        llm = LLM(model=str(fetch_model("stories15m")))
    common = {
        "temperature": 1.0,
        "max_tokens": new_tokens,
        "stop_token_ids": list(generator._endings.token_ids),
        "ignore_eos": True,
    }

    def direct(exact: bool = True, **parameters: Any) -> Side:
        def call(run_seed: int) -> list[Sequence[int]]:
            prompts, params = [], []
            for prompt in _prompts():
                for sample in range(SAMPLES):
                    own = dict(common, **parameters)
                    if exact:
                        seed = derive_seed(run_seed, "sampling", prompt.position, sample)
                        own |= {"seed": seed, "logprobs": 0}
                    prompts.append({"prompt_token_ids": prompt.ids.tolist()})
                    params.append(SamplingParams(**own))
            outputs = llm.generate(prompts, params, use_tqdm=False)
            return [output.outputs[0].token_ids for output in outputs]

        return call

    as_ours = {"flat_logprobs": True, "output_kind": RequestOutputKind.FINAL_ONLY}
    return {
        "ours": _sample(generator),
        "direct": direct(),
        "direct_ids": direct(detokenize=False, **as_ours),
        "direct_plain": direct(exact=False),
    }


def _show(speeds: dict[str, float], cpu_speeds: dict[str, float], threads: int) -> None:
    title = f"stories15M, batch {PROMPTS * SAMPLES}, {threads} thread(s)"
    table = Table("", "tokens/s", "ours to it", "tokens/CPU s", "ours to it", title=title)
    ratios, cpu_ratios = _ours_times(speeds), _ours_times(cpu_speeds)
    for side, speed in speeds.items():
        to_it = (f"{r[side]:.1%}" if side in r else "" for r in (ratios, cpu_ratios))
        table.add_row(side, f"{speed:.0f}", next(to_it), f"{cpu_speeds[side]:.0f}", next(to_it))
    Console(width=80).print(table)


if __name__ == "__main__":
    main()
