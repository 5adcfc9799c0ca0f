"""What an update costs under each kind of objective, as a ratio to DPO's.

stories15M, 32 prompts × 2 completions of 64 tokens (rankings: 16 × 4), AdamW included, two threads.
All objectives learn from the same completions, in turns; medians are compared. The last line is one
JSON object.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from workers.learner.learner import Learner
from workers.learner.objective_options import ObjectiveOptions
from workers.learner.options import LearnerOptions
from workers.learner.pairwise_options import Options
from workers.messages import (
    BatchCompletion,
    BatchExample,
    BatchLabel,
    BatchPair,
    BatchRanking,
    BatchSample,
    Completion,
    UpdateBatch,
)
from workers.models.fetch import fetch_model
from workers.options import PolicyOptions

THREADS, RUNS = 2, 5
PROMPT, TOKENS, COUNT = 16, 64, 64


def completions(random: np.random.Generator, count: int) -> tuple[BatchCompletion, ...]:
    """Random ids: an update costs the same whatever they say."""

    def one() -> BatchCompletion:
        logprobs = random.normal(-2.0, 1.0, TOKENS).astype(np.float32)
        completion = Completion(
            position=0,
            sample=0,
            seed=0,
            version=0,
            ids=random.integers(3, 32000, TOKENS),
            logprobs=logprobs,
            sampling_logprobs=None,
            finished=True,
            text="",
            reference_logprobs=logprobs,
        )
        return BatchCompletion(random.integers(3, 32000, PROMPT), completion)

    return tuple(one() for _ in range(count))


def pairs() -> list[BatchExample]:
    return [BatchPair(i, i + 1, 1.0) for i in range(0, COUNT, 2)]


def labels() -> list[BatchExample]:
    return [BatchLabel(i, i % 2 == 0, "") for i in range(COUNT)]


def rankings() -> list[BatchExample]:
    return [BatchRanking((i, i + 1, i + 2, i + 3)) for i in range(0, COUNT, 4)]


def samples() -> list[BatchExample]:
    return [BatchSample(i, 0.75) for i in range(COUNT // 2)]


CASES: dict[str, tuple[dict[str, Any], Callable[[], list[BatchExample]]]] = {
    "dpo": ({}, pairs),
    "dpo, wpo": ({"wpo": True}, pairs),
    "simpo": ({"name": "simpo"}, pairs),
    "pdpo, self-normalised": ({"name": "pdpo", "weights": "self_normalized"}, pairs),
    "bco": ({"name": "bco"}, labels),
    "kto": ({"name": "kto"}, labels),
    "plackett_luce": ({"name": "plackett_luce"}, rankings),
    "nash_md": ({"name": "nash_md"}, samples),
}


def main() -> None:
    torch.set_num_threads(THREADS)
    model = PolicyOptions(model=str(fetch_model("stories15m")))
    adapter: TypeAdapter[Options] = TypeAdapter(ObjectiveOptions)
    random = np.random.default_rng(0)
    rows, mismatched = completions(random, COUNT), completions(random, COUNT)
    work: dict[str, tuple[Learner, UpdateBatch]] = {}
    for name, (options, examples) in CASES.items():
        learner = Learner(
            model, LearnerOptions(learning_rate=1e-7), adapter.validate_python(options), 99
        )
        other = mismatched if learner._loss.needs.mismatched else ()
        own = rows[: COUNT // 2] if name == "nash_md" else rows  # it does not score opponents
        work[name] = (learner, UpdateBatch(own, tuple(examples()), other))
        learner.update(work[name][1])
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(RUNS):
        for name, (learner, batch) in work.items():
            began = time.perf_counter()
            learner.update(batch)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    table = Table("objective", "seconds an update", "ratio to dpo")
    for name, value in medians.items():
        table.add_row(name, f"{value:.2f}", f"{value / medians['dpo']:.2f}")
    Console().print(table)
    ratios = {name: round(value / medians["dpo"], 3) for name, value in medians.items()}
    print(json.dumps({"benchmark": "objectives", "threads": THREADS, "ratio_to_dpo": ratios}))


if __name__ == "__main__":
    main()
