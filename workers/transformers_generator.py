"""The embedded generator: a transformers model, its cache and our own sampling loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from workers.detokenizer import completion_text
from workers.endings import endings_of
from workers.generator import SampledUnit, SampleRequest, SamplingOptions
from workers.kv_cache import preallocated_cache
from workers.messages import Completion, IntArray, Prompt, probe_completion
from workers.models.load import load_policy
from workers.models.lora import frozen_copy, trainable
from workers.models.resolve import resolve_model
from workers.options import PolicyOptions
from workers.sampler import draw, geometric_mixture, logprobs_of, request_uniforms
from workers.weight_sync.buckets import (
    Receipt,
    WeightPush,
    receipt_of,
    unpack_into,
)
from workers.weight_sync.proof import Proof, Standing


@dataclass(slots=True)
class _Row:
    """One completion while it grows."""

    prompt: Prompt
    sample: int
    seed: int
    share: float
    ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    finished: bool = False


class TransformersGenerator:
    """Samples with transformers on this machine; ``version`` is that of the last weights loaded.

    With ``reference`` it also holds the starting model, which no push touches, and can draw from
    the geometric mixture of the two.
    """

    def __init__(
        self, policy: PolicyOptions, sampling: SamplingOptions, reference: bool = False
    ) -> None:
        self.version = -1
        self._standing = Standing()
        self._sampling = sampling
        self._model = load_policy(policy).requires_grad_(False)
        self._reference = frozen_copy(self._model) if reference else None
        location = resolve_model(policy.model)
        self._tokenizer = AutoTokenizer.from_pretrained(location)
        self._endings = endings_of(location, self._tokenizer, sampling)

    def load(self, push: WeightPush) -> Receipt:
        """Copy the weights in and checksum what now stands in the model.

        Raises SyncError if they arrived corrupted or do not fit: nothing is sampled then until a
        later push.
        """
        began = time.perf_counter()
        with self._standing.receiving():
            tensors = trainable(self._model)
            unpack_into(push, tensors)
        self.version = push.version
        receipt = receipt_of(tensors, push)
        self._standing.received = replace(receipt, seconds=time.perf_counter() - began)
        return self._standing.received

    def prove(
        self, prompt_ids: IntArray, sent: Receipt, expected: Completion, limit: float
    ) -> Proof:
        """Show that the last push is what is sampled: its receipt and a greedy continuation.

        Raises SyncError if either is not what the learner says; nothing is sampled then until a
        later push is proved.
        """
        return self._standing.prove(
            sent, lambda: self.probe(prompt_ids, len(expected.ids)), expected, limit
        )

    def rest(self) -> None:
        """Nothing: a model on the CPU has no memory to give back."""

    @torch.inference_mode()
    def sample(self, request: SampleRequest) -> SampledUnit:
        """Draw ``request.samples`` completions of each prompt.

        Those of one prompt and one reference share have their prefill in common. Raises ValueError
        for reference shares that are not one in [0, 1] a sample, or that need a reference where
        this generator has none, SyncError where the last push did not arrive or was refuted.
        """
        began = time.perf_counter()
        self._standing.check()
        shares = self._shares(request)
        rows = [
            _Row(prompt, sample, request.seed(prompt, sample), share, [], [], [])
            for prompt in request.prompts
            for sample, share in enumerate(shares)
        ]
        sampling = request.sampling or self._sampling
        for share in sorted(set(shares)):
            of_share = [row for row in rows if row.share == share]
            self._decode(request.prompts, of_share, share, sampling)
        done = [self._completion(row, sampling) for row in rows]
        return request.answer(done, time.perf_counter() - began)

    def _shares(self, request: SampleRequest) -> tuple[float, ...]:
        """μ of each sample, checked."""
        shares = request.reference_shares or (0.0,) * request.samples
        if len(shares) != request.samples:
            raise ValueError(
                f"reference_shares={shares}: {len(shares)} for samples={request.samples}; "
                "give one for each sample, or none to draw all from the policy"
            )
        for sample, share in enumerate(shares):
            if not 0.0 <= share <= 1.0:
                raise ValueError(
                    f"reference_shares[{sample}]={share}: must be from 0 (policy) to 1 (reference)"
                )
            if share > 0.0 and self._reference is None:
                raise ValueError(
                    f"reference_shares[{sample}]={share}: this generator holds no reference; "
                    "build it with reference=True, or draw with share 0"
                )
        return shares

    def _decode(
        self, prompts: Sequence[Prompt], rows: list[_Row], share: float, options: SamplingOptions
    ) -> None:
        """Grow the completions of one share: each prompt's in turn, as many for every prompt."""
        limit = options.max_new_tokens
        uniforms = torch.from_numpy(
            np.stack([request_uniforms(row.seed, limit) for row in rows], axis=1)
        )
        models = [self._model, self._reference] if share > 0.0 else [self._model]
        forward = _MixedForward(models, share, [p.ids for p in prompts], limit)
        logits, mixed = forward.prefill(len(rows) // len(prompts))
        alive = torch.arange(len(rows))
        for step in range(limit):
            drawn = draw(
                logits,
                uniforms[step, alive],
                options.temperature,
                options.top_k,
                options.top_p,
                mixed,
                options.min_p,
            )
            columns = zip(alive.tolist(), *(column.tolist() for column in drawn), strict=True)
            for index, token, logprob, sampling_logprob in columns:
                row = rows[index]
                row.ids.append(token)
                row.logprobs.append(logprob)
                row.sampling_logprobs.append(sampling_logprob)
                row.finished = self._ends(row)
            ended = torch.tensor([rows[index].finished for index in alive.tolist()])
            if step + 1 == limit or bool(ended.all()):
                return
            keep = (~ended).nonzero().squeeze(-1)
            next_ids = drawn.ids_B
            if len(keep) < len(alive):
                alive, next_ids = alive[keep], next_ids[keep]
                forward.keep(keep)
            logits, mixed = forward.step(next_ids)

    def _ends(self, row: _Row) -> bool:
        if row.ids[-1] in self._endings.token_ids:
            return True
        if not self._endings.strings:
            return False
        text = completion_text(self._tokenizer, row.prompt.ids, row.ids)
        return any(string in text for string in self._endings.strings)

    def _completion(self, row: _Row, options: SamplingOptions) -> Completion:
        logprobs = np.array(row.logprobs, np.float32)
        sampling = np.array(row.sampling_logprobs, np.float32)
        return Completion(
            position=row.prompt.position,
            sample=row.sample,
            seed=row.seed,
            version=self.version,
            ids=np.array(row.ids, np.int64),
            logprobs=logprobs,
            sampling_logprobs=sampling if options.reshapes or row.share > 0.0 else None,
            finished=row.finished,
            text=completion_text(self._tokenizer, row.prompt.ids, row.ids),
            reference_share=row.share,
        )

    @torch.inference_mode()
    def next_tokens(self, prompts: Sequence[IntArray], top: int) -> list[dict[int, float]]:
        """The ``top`` most likely next tokens of each prompt and their log-probabilities, nats."""
        self._standing.check()
        logits = _CachedForward(self._model, list(prompts), 1).prefill()
        best = torch.log_softmax(logits.float(), -1).topk(min(top, logits.shape[-1]))
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [dict(zip(ids, logprobs, strict=True)) for ids, logprobs in rows]

    @torch.inference_mode()
    def probe(self, prompt_ids: IntArray, new_tokens: int) -> Completion:
        """Greedy continuation of the probe, past any EOS, with its log-probabilities."""
        forward = _CachedForward(self._model, [prompt_ids], new_tokens)
        logits = forward.prefill()
        ids: list[int] = []
        logprobs: list[float] = []
        for step in range(new_tokens):
            token = logits.argmax(-1)
            ids.append(int(token))
            logprobs.append(float(logprobs_of(logits, token)))
            if step + 1 < new_tokens:
                logits = forward.step(token)
        return probe_completion(self.version, ids, logprobs)


class _CachedForward:
    """The model, one token a row and call, over prompts padded on the left."""

    def __init__(self, model: Any, prompts: list[IntArray], new_tokens: int) -> None:
        self._model = model
        width = max(map(len, prompts))
        self._ids = torch.zeros(len(prompts), width, dtype=torch.long)
        self._mask = torch.zeros(len(prompts), width + new_tokens, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            self._ids[row, width - len(prompt) :] = torch.from_numpy(prompt)
            self._mask[row, width - len(prompt) :] = 1
        self._length = width
        self._cache = preallocated_cache(model.config, width + new_tokens)

    def prefill(self) -> Tensor:
        """Logits [B, V] after the prompts."""
        mask = self._mask[:, : self._length]
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        self._positions = positions[:, -1:]
        return self._forward(self._ids, mask, positions)

    def step(self, ids_B: Tensor) -> Tensor:
        """Logits [B, V] after one more token a row."""
        self._length += 1
        self._positions = self._positions + 1
        return self._forward(ids_B[:, None], self._mask[:, : self._length], self._positions)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits

    def repeat(self, times: int) -> None:
        """Turn each row into ``times`` equal rows, next to each other."""
        self._mask = self._mask.repeat_interleave(times, dim=0)
        self._positions = self._positions.repeat_interleave(times, dim=0)
        self._cache.batch_repeat_interleave(times)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self._mask, self._positions = self._mask[rows], self._positions[rows]
        self._cache.batch_select_indices(rows)


class _MixedForward:
    """The policy and, for a share μ > 0, the reference beside it, reading the same tokens.

    Logits [B, V] come as the policy's and the mixture's; None for the latter is the policy alone.
    """

    def __init__(
        self, models: Sequence[Any], share: float, prompts: list[IntArray], new_tokens: int
    ) -> None:
        self._forwards = [_CachedForward(model, prompts, new_tokens) for model in models]
        self._share = share

    def prefill(self, samples: int) -> tuple[Tensor, Tensor | None]:
        """Logits after the prompts, each turned into ``samples`` equal rows."""
        logits = [f.prefill().repeat_interleave(samples, dim=0) for f in self._forwards]
        for forward in self._forwards:
            forward.repeat(samples)
        return self._mix(*logits)

    def step(self, ids_B: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits after one more token a row."""
        return self._mix(*(forward.step(ids_B) for forward in self._forwards))

    def _mix(
        self, policy_BV: Tensor, reference_BV: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if reference_BV is None:
            return policy_BV, None
        return policy_BV, geometric_mixture(policy_BV, reference_BV, self._share)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        for forward in self._forwards:
            forward.keep(rows)
