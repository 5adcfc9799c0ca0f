"""The policy as its own reward model: β times how much likelier than under its reference."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from judges.errors import UserError
from judges.formats import messages_of
from judges.interface import Score, Text
from judges.pretrained import (
    Unscorable,
    batches_by_tokens,
    check_tokens,
    load_model,
    load_tokenizer,
    positions_of,
    render_chat,
    vocabulary_of,
)

_POSITIONS = 512
"""Positions whose logits, [positions, vocabulary], exist at one time."""


@dataclass(frozen=True, slots=True)
class _Row:
    prompt: list[int]
    completion: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


class ImplicitReward:
    """Scores by β Σ_t (log π(y_t) − log π_ref(y_t)), in nats times β, over a completion's tokens.

    Rafailov et al., "Direct Preference Optimization: your language model is secretly a reward
    model", arXiv:2305.18290, Eq. 5 without its term of the prompt alone: scores compare the
    completions of one prompt. As a judge: DICE, arXiv:2406.09760.

    ``policy`` and ``reference`` are directories or hub ids of two causal language models that
    share a tokenizer. ``tokens_per_batch`` bounds a batch, padding included. Raises UserError for
    a model that cannot be had, vocabularies that differ, or beta not above 0.
    """

    def __init__(
        self,
        policy: str,
        reference: str,
        beta: float = 0.1,
        tokens_per_batch: int = 8192,
        dtype: str = "float32",
        device: str = "auto",
    ) -> None:
        if not beta > 0:
            raise UserError(f"beta={beta}: must be above 0")
        self._tokenizer = load_tokenizer(policy, key="policy")
        if self._tokenizer.eos_token_id is None:
            raise UserError(
                f"policy={policy}: its tokenizer has no end-of-sequence token, so no completion "
                "could end: set eos_token in its tokenizer_config.json"
            )
        _require_one_vocabulary(self._tokenizer, load_tokenizer(reference, key="reference"))
        self._models = [
            load_model(AutoModelForCausalLM, model, dtype, device, key=key)
            for key, model in (("policy", policy), ("reference", reference))
        ]
        self._scorers = [_TokenLogprobs(model) for model in self._models]
        self._most_tokens = min(map(positions_of, self._models))
        self._vocabulary = min(map(vocabulary_of, self._models))
        self._beta = beta
        self._tokens_per_batch = tokens_per_batch
        self._lock = threading.Lock()

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        prompt_ids: Sequence[Sequence[int] | None] | None = None,
        completion_ids: Sequence[Sequence[int] | None] | None = None,
    ) -> list[Score]:
        """One score a completion; what has no tokens, or too many, is INVALID.

        ``prompt_ids`` and ``completion_ids`` are taken as they are, where they are given. Otherwise
        a text prompt is tokenised with its special tokens, a chat through its template up to where
        the assistant speaks, and a completion as one that ended: with an EOS after its words.
        Raises UserError for a chat where the tokenizer has no chat template.
        """
        nothing = [None] * len(prompts)
        items = zip(
            prompts,
            completions,
            nothing if prompt_ids is None else prompt_ids,
            nothing if completion_ids is None else completion_ids,
            strict=True,
        )
        scores = [Score(None)] * len(prompts)
        rows: dict[int, _Row] = {}
        with self._lock:  # a tokenizer belongs to one thread, and so does the memory of a batch
            for i, item in enumerate(items):
                try:
                    rows[i] = self._row(*item)
                except Unscorable as why:
                    scores[i] = Score(None, str(why))
            indices = list(rows)
            lengths = [len(rows[i]) for i in indices]
            for batch in batches_by_tokens(lengths, self._tokens_per_batch):
                chosen = [indices[b] for b in batch]
                for i, reward in zip(chosen, self._rewards([rows[i] for i in chosen]), strict=True):
                    scores[i] = Score(reward)
        return scores

    def _row(
        self,
        prompt: Text,
        completion: Text,
        prompt_ids: Sequence[int] | None,
        completion_ids: Sequence[int] | None,
    ) -> _Row:
        """Raises Unscorable for a sequence that the models cannot take."""
        row = _Row(
            self._encode_prompt(prompt) if prompt_ids is None else list(prompt_ids),
            self._encode_completion(completion) if completion_ids is None else list(completion_ids),
        )
        if not row.completion:
            raise Unscorable("the completion has no tokens")
        if not row.prompt:
            raise Unscorable("the prompt has no tokens: nothing tells how likely the first one is")
        check_tokens([*row.prompt, *row.completion], self._most_tokens, self._vocabulary)
        return row

    def _encode_prompt(self, prompt: Text) -> list[int]:
        if isinstance(prompt, str):
            return list(self._tokenizer(prompt, verbose=False)["input_ids"])
        return self._encode(render_chat(self._tokenizer, prompt, add_generation_prompt=True))

    def _encode_completion(self, completion: Text) -> list[int]:
        messages = messages_of(completion, "assistant")
        if len(messages) != 1:
            raise Unscorable(
                f"a completion of {len(messages)} messages: an implicit reward takes one"
            )
        return [*self._encode(str(messages[0]["content"])), self._tokenizer.eos_token_id]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _rewards(self, rows: Sequence[_Row]) -> list[float]:
        policy, reference = (scorer(rows) for scorer in self._scorers)
        pairs = zip(policy, reference, strict=True)
        return [self._beta * float((mine - theirs).sum()) for mine, theirs in pairs]


class _TokenLogprobs:
    """Log-probabilities of completion tokens under one model, without [batch, time, vocabulary].

    Where a model's logits are its head applied to its last hidden state (checked once), only the
    completions' positions pass the head, some at a time; else (scaled or capped logits) its own
    logits are taken, of one sequence at a time.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._head = model.get_output_embeddings()
        self._linear = isinstance(self._head, torch.nn.Linear) and self._is_head_applied_to_hidden()

    @torch.inference_mode()
    def _is_head_applied_to_hidden(self) -> bool:
        ids_T = torch.arange(min(24, positions_of(self._model)), device=self._model.device)
        ids_1T = (ids_T * 7919 + 3).remainder(vocabulary_of(self._model))[None]
        logits = self._head(self._model.base_model(ids_1T).last_hidden_state)
        expected = self._model(ids_1T).logits
        found, wanted = (torch.log_softmax(each.float(), -1) for each in (logits, expected))
        return torch.allclose(found, wanted, rtol=0.0, atol=1e-4)

    @torch.inference_mode()
    def __call__(self, rows: Sequence[_Row]) -> list[Tensor]:
        """For each row [tokens of its completion] in nats, float64 on the CPU."""
        if not self._linear:
            return [self._of_logits(row) for row in rows]
        sequences = [torch.tensor([*row.prompt, *row.completion]) for row in rows]
        ids_BT = pad_sequence(sequences, batch_first=True).to(self._model.device)
        mask_BT = pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True)
        states_BTD = self._model.base_model(
            ids_BT, attention_mask=mask_BT.to(self._model.device)
        ).last_hidden_state
        # The state before a token is what tells how likely the token is.
        states_ND = torch.cat(
            [states_BTD[b, len(r.prompt) - 1 : len(r) - 1] for b, r in enumerate(rows)]
        )
        targets_N = torch.cat([ids_BT[b, len(r.prompt) : len(r)] for b, r in enumerate(rows)])
        logprobs_N = self._in_parts(states_ND, targets_N, self._head)
        return list(torch.split(logprobs_N, [len(row.completion) for row in rows]))

    def _of_logits(self, row: _Row) -> Tensor:
        ids_T = torch.tensor([*row.prompt, *row.completion], device=self._model.device)
        logits_TV = self._model(ids_T[None]).logits[0, len(row.prompt) - 1 : -1]
        return self._in_parts(logits_TV, ids_T[len(row.prompt) :], lambda logits: logits)

    def _in_parts(
        self, states_N: Tensor, targets_N: Tensor, logits_of: Callable[[Tensor], Tensor]
    ) -> Tensor:
        parts = zip(
            torch.split(states_N, _POSITIONS), torch.split(targets_N, _POSITIONS), strict=True
        )
        return torch.cat([_picked(logits_of(states), targets) for states, targets in parts])


def _picked(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """log softmax(logits)[target]."""
    logits_NV = logits_NV.float()
    picked_N = logits_NV.gather(-1, targets_N[:, None])[:, 0] - logits_NV.logsumexp(-1)
    return picked_N.double().cpu()


def _require_one_vocabulary(policy: Any, reference: Any) -> None:
    """Raise UserError where a token of one tokenizer is not the other's of the same id."""
    mine, theirs = policy.get_vocab(), reference.get_vocab()
    differing = sorted(mine.items() ^ theirs.items(), key=lambda item: item[1])
    if differing:
        word, index = differing[0]
        raise UserError(
            f"reference={reference.name_or_path}: its vocabulary is not that of "
            f"policy={policy.name_or_path}: they differ in token {index}, {word!r}: "
            "name two models that share a tokenizer"
        )
