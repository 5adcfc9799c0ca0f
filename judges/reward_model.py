"""Reward models: any Hugging Face sequence classifier, asked for a logit or a label's log-odds."""

from __future__ import annotations

import inspect
import logging
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification

from judges.errors import UserError
from judges.formats import FORMATS, Format, conversation, is_chat, joined, one_of
from judges.interface import Score, Text, text_of
from judges.plugins import nearest
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

Encoded: TypeAlias = Mapping[str, list[int]]
"""One sequence as its tokenizer made it: input_ids and, for some models, token_type_ids."""

_PROBES = ("a", "b a", "c b a c b")


class RewardModel:
    """Scores completions by a sequence classifier (a directory or a Hugging Face hub id).

    ``format`` auto takes the chat template for chats, and for text if the tokenizer has one.

    With one output, the score is that logit. With more, ``label`` (name or index) is needed, and
    the score is its log-odds: log p − log (1 − p); where the outputs are independent (multi-label
    or regression) that output itself. ``tokens_per_batch`` bounds a batch, padding included;
    ``max_length`` (tokens) stands for the tokenizer's own maximum; ``device`` auto is cuda where
    there is one.

    A score is what the model says of the one sequence, whatever it is batched with. Sequences are
    padded on the right with the id by which the model tells padding; a model without one gets, for
    each batch, an id that no sequence in it ends with. A model whose answers padding would change
    (a probe tells) is given one sequence at a time.

    Raises UserError for a model that cannot be had or has no trained head, a label it lacks, or an
    unknown format, dtype or device.
    """

    def __init__(
        self,
        model: str,
        label: str | int | None = None,
        format: Format = "auto",
        dtype: str = "float32",
        tokens_per_batch: int = 8192,
        max_length: int | None = None,
        device: str = "auto",
    ) -> None:
        self._format = one_of("format", format, FORMATS)
        self._tokenizer = load_tokenizer(model)
        loaded = load_model(AutoModelForSequenceClassification, model, dtype, device)
        self._model = loaded
        self._label = _label_index(loaded.config, label, model)
        kind = getattr(loaded.config, "problem_type", None)
        self._independent = loaded.config.num_labels == 1 or kind in (
            "multi_label_classification",
            "regression",
        )
        self._reads_types = "token_type_ids" in inspect.signature(loaded.forward).parameters
        self._vocabulary = vocabulary_of(loaded)
        self._pad_id = _pad_id(loaded)
        self._most_tokens = min(
            positions_of(loaded), max_length or self._tokenizer.model_max_length
        )
        self._tokens_per_batch = tokens_per_batch
        self._lock = threading.Lock()
        self._batches = self._padding_is_harmless()
        if not self._batches:
            logging.getLogger(__name__).warning(
                "%s: its scores change with padding, or that cannot be told: "
                "sequences are scored one at a time",
                model,
            )

    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[Score]:
        """One score a completion; a sequence that the model cannot take is INVALID, never cut.

        Raises UserError for a chat where the tokenizer has no chat template.
        """
        with self._lock:  # what a batch borrows and how the tokenizer is set belong to one thread
            scores = [Score(None)] * len(prompts)
            rows: dict[int, Encoded] = {}
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
                try:
                    rows[i] = self._encode(prompt, completion)
                except Unscorable as why:
                    scores[i] = Score(None, str(why))
            for batch in self._split(rows):
                values = self._values([rows[i] for i in batch]).tolist()
                for i, value in zip(batch, values, strict=True):
                    scores[i] = Score(value)
            return scores

    def _encode(self, prompt: Text, completion: Text) -> Encoded:
        """Raises Unscorable for a sequence that the model cannot take."""
        format = self._format
        if format == "auto":
            templated = is_chat(prompt, completion) or self._tokenizer.chat_template
            format = "chat" if templated else "text"
        if format == "pair":
            encoded = self._tokenizer(text_of(prompt), text_of(completion), verbose=False)
        elif format == "text":
            encoded = self._tokenizer(joined(prompt, completion), verbose=False)
        else:
            text = render_chat(self._tokenizer, conversation(prompt, completion))
            # The template writes a BOS where the model wants one.
            encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)
        ids: list[int] = encoded["input_ids"]
        if not ids:
            raise Unscorable("no tokens")
        check_tokens(ids, self._most_tokens, self._vocabulary)
        return encoded  # type: ignore[no-any-return]

    def _split(self, rows: Mapping[int, Encoded]) -> Iterator[list[int]]:
        indices = list(rows)
        lengths = [len(rows[i]["input_ids"]) for i in indices]
        if not self._batches:
            most_rows = 1
        elif self._pad_id is None:
            most_rows = max(1, self._vocabulary - 1)  # one id is left over to pad with
        else:
            most_rows = sys.maxsize
        for batch in batches_by_tokens(lengths, self._tokens_per_batch, most_rows):
            yield [indices[i] for i in batch]

    def _values(self, rows: Sequence[Encoded]) -> Tensor:
        """[B] scores."""
        logits_BL = self._logits(rows).double()
        mine_B = logits_BL[:, self._label]
        if self._independent:
            return mine_B
        others = [i for i in range(logits_BL.shape[1]) if i != self._label]
        return mine_B - torch.logsumexp(logits_BL[:, others], -1)

    @torch.inference_mode()
    def _logits(self, rows: Sequence[Encoded]) -> Tensor:
        """[B, labels] on the CPU."""
        pad = self._pad_id
        if pad is None:
            pad = _borrow_pad(self._model, {row["input_ids"][-1] for row in rows})
        inputs = {
            "input_ids": _padded([row["input_ids"] for row in rows], pad),
            "attention_mask": _padded([[1] * len(row["input_ids"]) for row in rows], 0),
        }
        if self._reads_types and "token_type_ids" in rows[0]:
            inputs["token_type_ids"] = _padded([row["token_type_ids"] for row in rows], 0)
        inputs = {name: tensor.to(self._model.device) for name, tensor in inputs.items()}
        logits: Tensor = self._model(**inputs).logits
        return logits.float().cpu()

    def _padding_is_harmless(self) -> bool:
        """Whether sequences padded together score what each scores alone.

        Not where a model reads the last position, padding or not (XLNet), or finds its place by
        counting EOS tokens, which texts may hold (encoder-decoders).
        """
        if self._model.config.is_encoder_decoder:
            return False
        try:
            rows = [self._encode(probe, probe) for probe in _PROBES]
        except Unscorable:
            return False
        together = self._logits(rows)
        alone = torch.cat([self._logits([row]) for row in rows])
        tolerance = 1e-4 if self._model.dtype == torch.float32 else 5e-2
        return torch.allclose(together, alone, rtol=tolerance, atol=tolerance, equal_nan=True)


def _label_index(config: Any, label: str | int | None, model: str) -> int:
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    if label is None and len(names) == 1:
        return 0
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, int) and 0 <= label < len(names):
        return label
    raise UserError(
        f"label={label}: {model} has the labels {', '.join(names)}"
        f"{nearest(str(label), names)}: name the one whose log-odds are the score"
    )


def _pad_id(model: Any) -> int | None:
    """The id by which the model tells padding; None where no token has it."""
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    return pad if pad is not None and 0 <= pad < vocabulary_of(model) else None


def _borrow_pad(model: Any, last_tokens: set[int]) -> int:
    """Let an id that ends none of a batch's sequences tell padding, and nothing else."""
    pad = next(i for i in range(vocabulary_of(model)) if i not in last_tokens)
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad
    return pad


def _padded(rows: Sequence[list[int]], value: int) -> Tensor:
    """[B, T], filled up on the right."""
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value)
