"""The embedded generator: a transformers model, its cache and our own sampling loop."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer

from workers.generator import SampledUnit, SampleRequest, SamplingOptions
from workers.messages import Completion, IntArray, Prompt, probe_completion
from workers.models.load import load_policy
from workers.models.resolve import resolve_model
from workers.options import PolicyOptions
from workers.sampler import draw, logprobs_of, request_uniforms
from workers.seeds import derive_seed
from workers.weight_sync.buckets import Receipt, WeightPush, receipt_of, unpack_into


class _PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer that writes in place; transformers' own copies all of itself every token."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        batch, heads, _, width = key_states.shape
        self._keys = key_states.new_empty(batch, heads, self._capacity, width)
        self._values = value_states.new_empty(batch, heads, self._capacity, value_states.shape[-1])
        self._show()

    def _show(self) -> None:
        self.keys = self._keys[:, :, : self._length]
        self.values = self._values[:, :, : self._length]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self._length + key_states.shape[-2]
        self._keys[:, :, self._length : end] = key_states
        self._values[:, :, self._length : end] = value_states
        self._length = end
        self._show()
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self._keys, self._values = self._keys[indices], self._values[indices]
        self._show()

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._keys = self._keys.repeat_interleave(repeats, dim=0)
        self._values = self._values.repeat_interleave(repeats, dim=0)
        self._show()


def preallocated_cache(config: Any, capacity: int) -> DynamicCache:
    """A cache for ``capacity`` tokens; layers of other kinds (sliding windows) stay as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [
        _PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer
        for layer in cache.layers
    ]
    return cache


@dataclass(slots=True)
class _Row:
    """One completion while it grows."""

    prompt: Prompt
    sample: int
    seed: int
    ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    finished: bool = False


class TransformersGenerator:
    """Samples with transformers on this machine; ``version`` is that of the last weights loaded."""

    def __init__(self, policy: PolicyOptions, sampling: SamplingOptions) -> None:
        self.version = -1
        self._sampling = sampling
        self._model = load_policy(policy).requires_grad_(False)
        self._tokenizer = AutoTokenizer.from_pretrained(resolve_model(policy.model))
        self._eos = torch.tensor(eos_ids(self._model, self._tokenizer))

    def load(self, push: WeightPush) -> Receipt:
        """Copy the weights in and checksum what now stands in the model.

        Raises SyncError if they arrived corrupted or do not fit; the version is then unchanged.
        """
        began = time.perf_counter()
        tensors = dict(self._model.named_parameters())
        unpack_into(push, tensors)
        self.version = push.version
        receipt = receipt_of(tensors, push)
        return replace(receipt, seconds=time.perf_counter() - began)

    @torch.inference_mode()
    def sample(self, request: SampleRequest) -> SampledUnit:
        """Draw ``request.samples`` completions of each prompt; they share its prefill."""
        began = time.perf_counter()
        rows = [
            _Row(prompt, sample, self._seed(request, prompt, sample), [], [], [])
            for prompt in request.prompts
            for sample in range(request.samples)
        ]
        self._decode(request, rows)
        done = [self._completion(row) for row in rows]
        n = request.samples
        grouped = tuple(tuple(done[i : i + n]) for i in range(0, len(done), n))
        return SampledUnit(grouped, time.perf_counter() - began)

    @staticmethod
    def _seed(request: SampleRequest, prompt: Prompt, sample: int) -> int:
        return derive_seed(request.run_seed, request.purpose, prompt.position, sample)

    def _decode(self, request: SampleRequest, rows: list[_Row]) -> None:
        limit = self._sampling.max_new_tokens
        options = self._sampling
        uniforms = torch.from_numpy(
            np.stack([request_uniforms(row.seed, limit) for row in rows], axis=1)
        )
        forward = _CachedForward(self._model, [p.ids for p in request.prompts], limit)
        logits = forward.prefill().repeat_interleave(request.samples, dim=0)
        forward.repeat(request.samples)
        alive = torch.arange(len(rows))
        for step in range(limit):
            drawn = draw(
                logits,
                uniforms[step, alive],
                options.temperature,
                options.top_k,
                options.top_p,
            )
            ended = torch.isin(drawn.ids_B, self._eos)
            columns = zip(
                alive.tolist(), *(column.tolist() for column in (*drawn, ended)), strict=True
            )
            for index, token, logprob, sampling_logprob, is_end in columns:
                row = rows[index]
                row.ids.append(token)
                row.logprobs.append(logprob)
                row.sampling_logprobs.append(sampling_logprob)
                row.finished = is_end
            if step + 1 == limit or bool(ended.all()):
                return
            keep = (~ended).nonzero().squeeze(-1)
            next_ids = drawn.ids_B
            if len(keep) < len(alive):
                alive, next_ids = alive[keep], next_ids[keep]
                forward.keep(keep)
            logits = forward.step(next_ids)

    def _completion(self, row: _Row) -> Completion:
        logprobs = np.array(row.logprobs, np.float32)
        sampling = np.array(row.sampling_logprobs, np.float32)
        return Completion(
            position=row.prompt.position,
            sample=row.sample,
            seed=row.seed,
            version=self.version,
            ids=np.array(row.ids, np.int64),
            logprobs=logprobs,
            sampling_logprobs=sampling if self._reshapes() else None,
            finished=row.finished,
            text=self._text(row.prompt.ids, row.ids),
        )

    def _text(self, prompt_ids: IntArray, ids: list[int]) -> str:
        """The completion as it stands after its prompt: decoded alone it may lose a first space."""
        before = self._tokenizer.decode(prompt_ids, skip_special_tokens=True)
        both = self._tokenizer.decode([*prompt_ids.tolist(), *ids], skip_special_tokens=True)
        if both.startswith(before):
            return str(both[len(before) :])
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _reshapes(self) -> bool:
        options = self._sampling
        return options.temperature != 1.0 or options.top_p < 1.0 or options.top_k is not None

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


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a completion: the generation config's, the model's, the tokenizer's."""
    found: set[int] = set()
    for source in (model.generation_config, model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            found |= set(ids) if isinstance(ids, list | tuple) else {int(ids)}
    return sorted(found)
