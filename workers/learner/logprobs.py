"""Token log-probabilities straight from hidden states, never holding [tokens, vocabulary]."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.learner.batching import micro_batches, pad_rows
from workers.messages import FloatArray, UpdateBatch

TOKENS, WORDS = 1024, 2000
"""Positions × vocabulary entries whose logits exist at one time.

Measured on CPU: tiles of 256 × 32000 are a fifth slower; they leave the cache, and the weight's
gradient is added up more often.
"""


class _ChunkedLogprobs(torch.autograd.Function):
    """log softmax(h Wᵀ + b)[target] in tiles of logits, each computed again in backward.

    If asked also log Σ_v p_v² [N], from the same tiles and without a gradient; else None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        collisions: bool,
    ) -> tuple[Tensor, Tensor | None]:
        precise = torch.promote_types(hidden_NH.dtype, torch.float32)
        log_normalizer_N = hidden_NH.new_empty(target_N.shape, dtype=precise)
        log_collisions_N = torch.empty_like(log_normalizer_N) if collisions else None
        for tokens in _tiles(len(target_N), TOKENS):
            highest = log_normalizer_N[tokens].fill_(-torch.inf)
            mass, squares = torch.zeros_like(highest), torch.zeros_like(highest)
            for words in _tiles(len(weight_VH), WORDS):
                logits = _logits(hidden_NH[tokens], weight_VH, bias_V, words)
                higher = torch.maximum(highest, logits.amax(-1))
                shrunk = torch.exp(highest - higher)
                mass.mul_(shrunk)
                mass += logits.sub_(higher[:, None]).exp_().sum(-1)
                if collisions:
                    squares.mul_(shrunk).mul_(shrunk)
                    squares += logits.square_().sum(-1)
                highest.copy_(higher)
            highest += mass.log()
            if log_collisions_N is not None:
                log_collisions_N[tokens] = squares.log() - 2.0 * mass.log()
        picked_N = (hidden_NH.to(precise) * weight_VH[target_N].to(precise)).sum(-1)
        if bias_V is not None:
            picked_N += bias_V[target_N]
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, target_N, log_normalizer_N)
        if log_collisions_N is not None:
            ctx.mark_non_differentiable(log_collisions_N)
        return picked_N - log_normalizer_N, log_collisions_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient_N = gradients[0]
        hidden_NH, weight_VH, bias_V, target_N, log_normalizer_N = ctx.saved_tensors
        gradient_N1 = gradient_N[:, None].to(hidden_NH.dtype)
        # d logp / d logits = onehot − softmax: the softmax part in tiles, with the incoming
        # gradient multiplied into the small factor of each product; then the onehot part.
        expected_NH = torch.zeros_like(hidden_NH)
        scaled_NH = hidden_NH * -gradient_N1
        weight_gradient = torch.zeros_like(weight_VH)
        bias_gradient = None if bias_V is None else torch.zeros_like(bias_V)
        for words in _tiles(len(weight_VH), WORDS):
            for tokens in _tiles(len(target_N), TOKENS):
                logits = _logits(hidden_NH[tokens], weight_VH, bias_V, words)
                softmax = logits.sub_(log_normalizer_N[tokens, None]).exp_().to(hidden_NH.dtype)
                expected_NH[tokens].addmm_(softmax, weight_VH[words])
                weight_gradient[words].addmm_(softmax.T, scaled_NH[tokens])
                if bias_gradient is not None:
                    bias_gradient[words] -= softmax.T @ gradient_N1[tokens, 0]
        hidden_gradient = (weight_VH[target_N] - expected_NH) * gradient_N1
        weight_gradient.index_add_(0, target_N, hidden_NH * gradient_N1)
        if bias_gradient is not None:
            bias_gradient.index_add_(0, target_N, gradient_N1[:, 0])
        return hidden_gradient, weight_gradient, bias_gradient, None, None


def _tiles(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, words: slice) -> Tensor:
    part = weight[words]
    logits = hidden @ part.T if bias is None else torch.addmm(bias[words], hidden, part.T)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def chunked_logprobs(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_N: Tensor
) -> Tensor:
    """Log-probability [N] of each target token under ``softmax(hidden Wᵀ + b)``, temperature 1."""
    logprobs: Tensor
    logprobs, _ = _ChunkedLogprobs.apply(hidden_NH, weight_VH, bias_V, target_N, False)  # type: ignore[no-untyped-call]
    return logprobs


def chunked_logprobs_and_collisions(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_N: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, and log Σ_v p_v² [N], the chance that two draws agree, without a gradient."""
    found: tuple[Tensor, Tensor]
    found = _ChunkedLogprobs.apply(hidden_NH, weight_VH, bias_V, target_N, True)  # type: ignore[no-untyped-call]
    return found


class CompletionScorer:
    """Scores completion tokens under a causal language model.

    Where the model's logits are its head applied to its last hidden state (checked once, on a
    probe), only completion positions pass the head, in chunks; otherwise (scaled or capped logits)
    the model's own logits are taken, and ``plain`` is True.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._head = model.get_output_embeddings()
        self.plain = not self._head_is_linear()

    @torch.no_grad()
    def _head_is_linear(self) -> bool:
        if not isinstance(self._head, torch.nn.Linear):
            return False
        vocabulary = self._head.weight.shape[0]
        ids = (torch.arange(24, device=self._head.weight.device) * 7919 + 3).remainder(vocabulary)
        expected = torch.log_softmax(self._model(ids[None], use_cache=False).logits[0].float(), -1)
        hidden = self._hidden(ids[None])[0]
        rows = torch.log_softmax(
            _logits(hidden, self._head.weight, self._head.bias, slice(None)), -1
        )
        return bool(torch.allclose(rows, expected, atol=1e-3, rtol=0.0))

    def _hidden(self, ids_BT: Tensor) -> Tensor:
        hidden: Tensor = self._model.base_model(ids_BT, use_cache=False).last_hidden_state
        return hidden

    def __call__(self, ids_BT: Tensor, starts_B: Tensor, lengths_B: Tensor) -> list[Tensor]:
        """Log-probabilities of each row's completion tokens, at temperature 1.

        ``ids_BT`` are prompt and completion, padded on the right with any token: attention is
        causal, so no real position ever sees a pad. Row b's completion is
        ``ids[b, starts[b] : starts[b] + lengths[b]]``. Returns B tensors [lengths[b]]. What is
        given and returned is on the CPU, wherever the model is: all that objectives compute is
        small.
        """
        states_N, targets_N = self._states(ids_BT, starts_B, lengths_B)
        return list(torch.split(self._logprobs(states_N, targets_N).cpu(), lengths_B.tolist()))

    def with_collisions(
        self, ids_BT: Tensor, starts_B: Tensor, lengths_B: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The same, and log Σ_v p_v² of the distribution at each token, without a gradient."""
        states_N, targets_N = self._states(ids_BT, starts_B, lengths_B)
        if self.plain:
            logprobs_N = self._logprobs(states_N, targets_N)
            log_p = torch.log_softmax(states_N.detach(), -1)
            collisions_N = torch.logsumexp(2.0 * log_p, -1)
        else:
            weight, bias = self._head.weight, self._head.bias
            logprobs_N, collisions_N = chunked_logprobs_and_collisions(
                states_N, weight, bias, targets_N
            )
        lengths = lengths_B.tolist()
        logprobs, collisions = logprobs_N.cpu(), collisions_N.cpu()
        return list(torch.split(logprobs, lengths)), list(torch.split(collisions, lengths))

    def _states(self, ids_BT: Tensor, starts_B: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """What predicts each completion token (logits [N, V] if plain, else hidden states [N, H]),
        and the tokens [N]."""
        device = next(self._model.parameters()).device
        rows, columns = (x.to(device) for x in _completion_positions(starts_B, lengths_B))
        ids_BT = ids_BT.to(device)
        if self.plain:
            states_N = self._model(ids_BT, use_cache=False).logits[rows, columns - 1].float()
        else:
            states_N = self._hidden(ids_BT)[rows, columns - 1]
        return states_N, ids_BT[rows, columns]

    def _logprobs(self, states_N: Tensor, targets_N: Tensor) -> Tensor:
        if self.plain:
            return torch.log_softmax(states_N, -1).gather(-1, targets_N[:, None]).squeeze(-1)
        return chunked_logprobs(states_N, self._head.weight, self._head.bias, targets_N)


@torch.no_grad()
def score_batch(
    scorer: CompletionScorer, batch: UpdateBatch, tokens_per_micro_batch: int
) -> list[FloatArray]:
    """Log-probabilities of every completion of a batch, [tokens] each, in its micro-batches."""
    scores: list[FloatArray] = [np.empty(0, np.float32)] * len(batch.completions)
    for rows, _ in micro_batches(batch, tokens_per_micro_batch):
        padded = pad_rows([batch.completions[row] for row in rows])
        found = scorer(padded.ids_BT, padded.starts_B, padded.lengths_B)
        for row, logprobs in zip(rows, found, strict=True):
            scores[row] = logprobs.numpy()
    return scores


def _completion_positions(starts_B: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column [N] of every completion token, row by row."""
    rows = torch.repeat_interleave(torch.arange(len(lengths_B)), lengths_B)
    first = torch.cumsum(lengths_B, 0) - lengths_B
    columns = torch.arange(len(rows)) - first[rows] + starts_B[rows]
    return rows, columns
