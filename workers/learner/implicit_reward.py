"""The policy as a judge: its implicit reward, log π − log π_ref (arXiv:2305.18290, Sec. 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from workers.generator import SampledUnit
from workers.messages import BatchCompletion, DoubleArray, FloatArray, Prompt, UpdateBatch

ScoreBatch = Callable[[UpdateBatch], Sequence[FloatArray | None]]


def implicit_rewards(
    prompts: Sequence[Prompt], sampled: SampledUnit, policy: ScoreBatch, reference: ScoreBatch
) -> list[DoubleArray]:
    """Σ_t (log π − log π_ref) of each prompt's completions, [n] each, in nats.

    ``policy`` and ``reference`` give the log-probabilities [tokens] of a batch's completions.
    """
    items = tuple(
        BatchCompletion(prompt.ids, completion)
        for prompt, group in zip(prompts, sampled.completions, strict=True)
        for completion in group
    )
    batch = UpdateBatch(items, ())
    sums = iter(
        [
            float(np.subtract(mine, theirs, dtype=np.float64).sum())
            for mine, theirs in zip(policy(batch), reference(batch), strict=True)
            if mine is not None and theirs is not None
        ]
    )
    return [np.array([next(sums) for _ in group], np.float64) for group in sampled.completions]
