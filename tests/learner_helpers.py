"""What the generator and learner tests share: workers of one model, and batches written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from workers.generator import SampleRequest, SamplingOptions
from workers.learner.learner import Learner
from workers.learner.options import LearnerOptions
from workers.learner.pairwise_options import DpoOptions, Options
from workers.messages import BatchCompletion, BatchPair, Completion, Prompt, UpdateBatch
from workers.options import PolicyOptions
from workers.transformers_generator import TransformersGenerator

BOS, EOS = 1, 2


def make_learner(
    model: Path,
    *,
    updates: int = 100,
    objective: Options | None = None,
    gap_clip: float | None = None,
    **options,
) -> Learner:
    return Learner(
        PolicyOptions(model=str(model)),
        LearnerOptions(**options),
        objective or DpoOptions(),
        updates,
        gap_clip=gap_clip,
    )


def make_generator(model: Path, **sampling) -> TransformersGenerator:
    return TransformersGenerator(PolicyOptions(model=str(model)), SamplingOptions(**sampling))


def plain_model(model: Path):
    """The model as transformers loads it, for another computation of the same numbers."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def plain_logits(model, prompt_ids, ids) -> Tensor:
    """Logits [T, V] that each completion token is drawn from: one row, no padding, no cache."""
    row = torch.tensor([[*prompt_ids, *ids]])
    return model(row, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]


def plain_logprobs(model, prompt_ids, ids) -> Tensor:
    """Log-probabilities [T] by log_softmax over the whole vocabulary."""
    logprobs = plain_logits(model, prompt_ids, ids).log_softmax(-1)
    return logprobs[torch.arange(len(ids)), torch.as_tensor(ids)]


def prompts_of(*ids: Sequence[int], first: int = 0) -> tuple[Prompt, ...]:
    """Prompts at the positions from ``first``."""
    return tuple(Prompt(first + i, np.array(p, np.int64), "") for i, p in enumerate(ids))


def sample_request(
    prompts: Sequence[Prompt], samples: int = 2, *, run_seed: int = 0, purpose: str = "sampling"
) -> SampleRequest:
    return SampleRequest(tuple(prompts), samples, run_seed, purpose)


def item(
    prompt_ids: Sequence[int],
    ids: Sequence[int],
    *,
    reference: Sequence[float] | float = 0.0,
    behaviour: Sequence[float] | float = 0.0,
    version: int = 0,
    learn: bool = True,
) -> BatchCompletion:
    """A completion written by hand; one number stands for every token's log-probability."""

    def per_token(value: Sequence[float] | float):
        return np.broadcast_to(np.array(value, np.float32), len(ids)).copy()

    completion = Completion(
        position=0,
        sample=0,
        seed=0,
        version=version,
        ids=np.array(ids, np.int64),
        logprobs=per_token(behaviour),
        sampling_logprobs=None,
        finished=ids[-1] == EOS,
        text="",
        reference_logprobs=per_token(reference),
    )
    return BatchCompletion(np.array(prompt_ids, np.int64), completion, learn)


def batch_of(
    completions: Sequence[BatchCompletion], *pairs: tuple[int, int] | tuple[int, int, float]
) -> UpdateBatch:
    """Pairs are (chosen, rejected) or (chosen, rejected, P(chosen is better))."""
    return UpdateBatch(
        tuple(completions), tuple(BatchPair(*p, *([1.0] if len(p) == 2 else [])) for p in pairs)
    )


def sampled_batch(generator: TransformersGenerator, prompts: Sequence[Prompt]) -> UpdateBatch:
    """Two completions of each prompt as the generator wrote them; the first is the chosen one."""
    unit = generator.sample(sample_request(prompts))
    items = [
        BatchCompletion(prompt.ids, completion)
        for prompt, group in zip(prompts, unit.completions, strict=True)
        for completion in group
    ]
    return batch_of(items, *((i, i + 1) for i in range(0, len(items), 2)))


def with_reference(learner: Learner, batch: UpdateBatch) -> UpdateBatch:
    """The batch with its reference log-probabilities, scored as a run scores them."""
    (scores,) = learner.score_reference([batch])
    completions = tuple(
        replace(c, completion=replace(c.completion, reference_logprobs=logprobs))
        for c, logprobs in zip(batch.completions, scores, strict=True)
    )
    return replace(batch, completions=completions)


def flat_weights(learner: Learner) -> Tensor:
    return torch.cat([p.detach().flatten() for p in learner._policy.parameters()])
