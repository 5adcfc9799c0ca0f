"""Pretrained models that judge: loaded whole or refused, their chat templates, their batches."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from judges.errors import UserError
from judges.formats import one_of
from judges.interface import Message

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Unscorable(Exception):  # noqa: N818 (named for what it says of a sequence)
    """A sequence that gets no score; the message is the reason of its verdict."""


def batches_by_tokens(
    lengths: Sequence[int], tokens: int, most_rows: int = sys.maxsize
) -> Iterator[list[int]]:
    """Indices of sequences, longest first, in batches of at most ``tokens``, padding included.

    A longer sequence is a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) == most_rows or lengths[batch[0]] * (len(batch) + 1) > tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def load_tokenizer(model: str, *, key: str = "model") -> Any:
    """The model's tokenizer. Raises UserError where it cannot be had."""
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise _unavailable(key, model, error) from error


def load_model(family: Any, model: str, dtype: str, device: str, *, key: str = "model") -> Any:
    """The model, as ``family`` (an Auto class) reads it, ready to answer on its device.

    Raises UserError where it cannot be had, or where weights are missing: a language model without
    a trained head would answer at random.
    """
    precision = DTYPES[one_of("dtype", dtype, DTYPES)]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # no such name; torch was built without it
        raise UserError(
            f"device={device}: not to be had here: write auto, cpu, or cuda:N of a GPU that is"
        ) from error
    disable_progress_bar()
    try:
        loaded, info = family.from_pretrained(model, dtype=precision, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise _unavailable(key, model, error) from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{key}={model}: its weights lack {', '.join(missing[:3])}, which would be random: "
            "name a model that was trained as one of this kind"
        )
    loaded.config.use_cache = False
    return loaded.to(place).eval()


def positions_of(model: Any) -> int:
    """The tokens that the model has positions for; sys.maxsize if it counts without end."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not positions or positions < 0:
        return sys.maxsize
    for name, module in model.named_modules():
        table = name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding)
        if table and module.padding_idx is not None:
            return int(positions - module.padding_idx - 1)  # RoBERTa counts from behind the pad's
    return int(positions)


def vocabulary_of(model: Any) -> int:
    """How many token ids the model reads."""
    return int(model.get_input_embeddings().weight.shape[0])


def render_chat(
    tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> str:
    """The conversation as its template writes it.

    Raises UserError for a tokenizer without a template, Unscorable for messages that the template
    refuses.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template, and it was given a "
            "chat: save one with its tokenizer, or judge plain text prompts"
        )
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except TemplateError as error:
        raise Unscorable(f"the chat template refuses it: {error}") from error
    return text


def check_tokens(ids: Sequence[int], most: int, vocabulary: int) -> None:
    """Raise Unscorable for more tokens than ``most``, or one that is not in the vocabulary."""
    if len(ids) > most:
        raise Unscorable(f"{len(ids)} tokens: the model takes {most}")
    for token in (min(ids), max(ids)):
        if not 0 <= token < vocabulary:
            raise Unscorable(f"token {token}: the model knows {vocabulary}")


def _unavailable(key: str, model: str, error: Exception) -> UserError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return UserError(
        f"{key}={model}: cannot be loaded ({reason}): check the name "
        "and the network, or give a directory that save_pretrained wrote"
    )
