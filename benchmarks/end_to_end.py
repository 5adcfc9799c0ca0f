"""Pairs per second of the whole loop, where its time goes, and TRL's OnlineDPOTrainer beside it.

`freshpairs train` and TRL do the quickstart's work in turns, each with all cores; medians are
quoted. What a run costs before its second update (start-up, first allocations) is not counted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from judges.lexicon import sentiment
from pipeline.config import Config, load_config
from pipeline.inputs import load_tokenizer
from pipeline.prompts import PromptEncoder, PromptStream
from pipeline.tracking import METRICS_FILE, metrics
from workers.messages import Prompt
from workers.models.resolve import resolve_model
from workers.threads import thread_environment

CHECKOUT = Path(__file__).resolve().parents[1]
CONFIG = CHECKOUT / "configs" / "quickstart.yaml"
STAGES = ("generate", "judge", "learn", "sync", "idle")
PROMPTS_PER_BATCH = (32, 16, 8)  # what TRL may choose from; gradients accumulate to an update
CORES = len(os.sched_getaffinity(0))
Measured = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side")
    parser.add_argument("--updates", type=int, default=4, help="of a run, the first uncounted (>1)")
    parser.add_argument("--trl-batch", type=int, help="prompts a batch of TRL (default: its best)")
    parser.add_argument("--side", choices=("trl", "machine"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(_trl(options) if options.side == "trl" else _machine(options)))
        return
    with_trl = importlib.util.find_spec("trl") is not None
    if not with_trl:
        print('TRL is not installed, so only Freshpairs is measured: pip install -e ".[bench]"')
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"this machine is not idle (load {load:.1f}): expect noise")

    batch, tried = options.trl_batch, {}
    if with_trl and batch is None:
        tried = {n: _child("trl", 2, n)["pairs_per_second"] for n in PROMPTS_PER_BATCH}
        batch = max(tried, key=lambda n: tried[n])
        print(f"TRL's pairs/s by prompts a batch: {tried}; it runs with {batch}", flush=True)
    machines: list[Measured] = []
    sides: dict[str, list[Measured]] = {"freshpairs": [], "trl": []}
    for repeat in range(options.repeats):
        machines.append(_child("machine", options.updates))
        sides["freshpairs"].append(_freshpairs(options.updates))
        if with_trl:
            sides["trl"].append(_child("trl", options.updates, batch))
        speeds = ", ".join(f"{s} {r[-1]['pairs_per_second']:.2f}" for s, r in sides.items() if r)
        print(f"run {repeat + 1} of {options.repeats}, pairs/s: {speeds}", flush=True)

    machine = {name: statistics.median(m[name] for m in machines) for name in machines[0]}
    results = {side: _summary(runs, machine) for side, runs in sides.items() if runs}
    _show(results, machine)
    ours, trl = results["freshpairs"], results.get("trl")
    if trl:
        trl |= {"prompts_per_batch": batch, "tried_pairs_per_second": tried}
    ratio = ours["pairs_per_second"] / trl["pairs_per_second"] if trl else None
    facts = {"benchmark": "end_to_end", "cores": CORES, "updates": options.updates} | machine
    print(json.dumps({**facts, "freshpairs": ours, "trl": trl, "times_trl": ratio}))


def _freshpairs(updates: int) -> Measured:
    """`freshpairs train` as users run it, timed from outside by the rounds it records."""
    rounds: list[dict[str, Any]] = []
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        command = [sys.executable, "-m", "pipeline.cli", "train", str(CONFIG), f"run.dir={run_dir}"]
        command += [f"run.updates={updates}", "evaluation.prompts=null", "checkpoint.every=1000"]
        with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.DEVNULL) as child:
            while child.poll() is None:
                time.sleep(0.02)
                records = metrics(run_dir) if (run_dir / METRICS_FILE).is_file() else ()
                rounds = [record for record in records if record["kind"] == "round"]
                ends += [time.perf_counter()] * (len(rounds) - len(ends))
        if child.returncode or len(ends) != updates:
            sys.exit(f"freshpairs train stopped (exit {child.returncode}) after round {len(ends)}")
    counted, wall = rounds[1:], ends[-1] - ends[0]
    spent = {stage: sum(r["seconds"][stage] for r in counted) for stage in STAGES[:-1]}
    tokens = sum(r["completions"] * r["length_mean"] for r in counted)
    return _measured(updates - 1, wall, sum(r["pairs"] for r in counted), tokens, spent)


def _child(side: str, updates: int, batch: int | None = None) -> Measured:
    """What this script measures in a fresh process, on all cores."""
    command = [sys.executable, __file__, f"--side={side}", f"--updates={updates}"]
    command += [f"--trl-batch={batch}"] if batch else []
    silent = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **thread_environment(CORES), **silent}
    done = subprocess.run(command, env=environment, cwd=CHECKOUT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _trl(options: argparse.Namespace) -> Measured:
    """TRL on the same prompts, timed from the end of its first update to the end of its last.

    Against its defaults: float32 as ours, no gradient checkpointing (it would turn the generation
    cache off), and BOS written into the prompts, which TRL tokenises without special tokens.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    from workers.models.load import load_policy

    cfg, prompts = _work(options.updates)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(cfg.policy.model))
    texts = [f"{tokenizer.bos_token}{prompt.content}" for prompt in prompts]
    if tokenizer(texts, add_special_tokens=False)["input_ids"] != [p.ids.tolist() for p in prompts]:
        sys.exit("TRL would be given other prompt tokens than Freshpairs")
    spent: defaultdict[str, float] = defaultdict(float)
    ends: list[float] = []

    class Trainer(OnlineDPOTrainer):  # type: ignore[misc]
        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            found = super()._generate(*args, **kwargs)
            spent["generate"] += time.perf_counter() - began
            spent["tokens"] += int(found[3].sum())
            return found

    class StepEnd(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if not ends:
                spent.clear()
            ends.append(time.perf_counter())

    def judge(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float | None]:
        began = time.perf_counter()
        scores = sentiment(prompts, completions)
        spent["judge"] += time.perf_counter() - began
        spent["pairs"] += len(scores) / 2  # ties too: TRL trains on them
        return scores

    with tempfile.TemporaryDirectory() as folder:
        trl_options = OnlineDPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_steps=options.updates,
            per_device_train_batch_size=options.trl_batch,
            gradient_accumulation_steps=cfg.sampling.prompts_per_update // options.trl_batch,
            max_new_tokens=cfg.sampling.max_new_tokens,
            temperature=cfg.sampling.temperature,
            top_k=0,
            beta=cfg.objective.beta,
            learning_rate=cfg.learner.learning_rate,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            report_to="none",
            save_strategy="no",
        )
        Trainer(
            model=load_policy(cfg.policy),
            reward_funcs=judge,
            args=trl_options,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            callbacks=[StepEnd()],
        ).train()
    wall = ends[-1] - ends[0]
    seconds = {"generate": spent["generate"], "judge": spent["judge"], "sync": 0.0}
    seconds["learn"] = wall - sum(seconds.values())
    return _measured(options.updates - 1, wall, spent["pairs"], spent["tokens"], seconds)


def _machine(options: argparse.Namespace) -> Measured:
    """The float32 GEMM ceiling, and the sizes that tell how much work an update is."""
    import torch
    from torch.utils.benchmark import Timer

    from workers.models.load import load_policy

    def gflops(size: int) -> float:
        a, b, out = torch.randn(3, size, size)
        scope = {"torch": torch, "a": a, "b": b, "out": out}
        timer = Timer("torch.mm(a, b, out=out)", globals=scope, num_threads=CORES)
        return float(2e-9 * size**3 / timer.blocked_autorange(min_run_time=1.0).median)

    cfg, prompts = _work(options.updates)
    model = load_policy(cfg.policy)
    head = model.get_output_embeddings().weight.numel()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    return {
        "gemm_gflops": max(gflops(1024), gflops(2048)),
        "body_parameters": linear - head,
        "head_parameters": head,
        "prompt_tokens": sum(len(prompt.ids) for prompt in prompts) / options.updates,
    }


def _work(updates: int) -> tuple[Config, list[Prompt]]:
    """The quickstart's config and the prompts that its first updates draw."""
    cfg = load_config(CONFIG)
    tokenizer, context = load_tokenizer(cfg.policy.model)
    encoder = PromptEncoder(tokenizer, context, cfg.sampling.max_new_tokens)
    stream = PromptStream(cfg.prompts, encoder, cfg.run.seed)
    return cfg, stream.take(0, updates * cfg.sampling.prompts_per_update)


def _measured(
    updates: int, wall: float, pairs: float, tokens: float, spent: Mapping[str, float]
) -> Measured:
    """One run without its first update; idle is what no stage explains."""
    seconds = {**spent, "idle": max(0.0, wall - sum(spent.values()))}
    means = {"seconds_per_update": wall, "tokens_per_update": tokens} | seconds
    return {"pairs_per_second": pairs / wall} | {n: m / updates for n, m in means.items()}


def _summary(runs: Sequence[Measured], machine: Measured) -> Measured:
    """Medians over the runs, shares of the time, and of the GEMM ceiling in that time.

    The work is what an update needs, counted alike for both sides: 2 FLOPs a parameter and token,
    backward twice that; the head at completion tokens only; a prompt once for its two completions
    in sampling, with each in learning. Attention's products (1 %) and what is done beyond need
    (recomputed heads, prompts prefilled twice, pads) are not in it.
    """
    median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    seconds, tokens = median["seconds_per_update"], median["tokens_per_update"]
    body, prompt = machine["body_parameters"], machine["prompt_tokens"]
    head_flops = 2 * machine["head_parameters"] * tokens
    generate = 2 * body * (prompt + tokens) + head_flops
    learn = 4 * (2 * body * (2 * prompt + tokens) + head_flops)  # reference, policy, backward
    done = {"generate": (generate, median["generate"]), "learn": (learn, median["learn"])}
    done["whole"] = (generate + learn, seconds)
    return median | {
        "runs": [run["pairs_per_second"] for run in runs],
        "shares": {stage: median[stage] / seconds for stage in STAGES},
        "gemm_shares": {s: w / t / machine["gemm_gflops"] / 1e9 for s, (w, t) in done.items()},
    }


def _show(results: Mapping[str, Measured], machine: Measured) -> None:
    title = f"{CONFIG.stem}, {CORES} cores, float32 GEMM {machine['gemm_gflops']:.0f} GFLOP/s"
    table = Table("", *results, title=title)
    for name in ("pairs_per_second", "seconds_per_update", "tokens_per_update"):
        table.add_row(name.replace("_", " "), *(f"{r[name]:.2f}" for r in results.values()))
    for stage in STAGES:
        cells = (f"{r[stage]:5.2f} s  {r['shares'][stage]:6.1%}" for r in results.values())
        table.add_row(f"  {stage}", *cells)
    for stage in ("generate", "learn", "whole"):
        cells = (f"{r['gemm_shares'][stage]:.1%}" for r in results.values())
        table.add_row(f"share of GEMM: {stage}", *cells)
    Console(width=80).print(table)


if __name__ == "__main__":
    main()
