"""What ends a completion: tokens, and strings in its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from judges.errors import UserError
from workers.generator import SamplingOptions


@dataclass(frozen=True, slots=True)
class Endings:
    """A completion ends with any of these tokens, or once its text holds any of these strings.

    What ended it stays: the token as its last id, the tokens that spelled the string.
    """

    token_ids: tuple[int, ...]
    strings: tuple[str, ...]


def endings_of(model: Path | str, tokenizer: Any, sampling: SamplingOptions) -> Endings:
    """The EOS of the model's generation config, config and tokenizer, and ``sampling.stop*``.

    ``model`` is what ``resolve_model`` gives; no weights are loaded. Raises UserError for a stop
    token that tokenizer or model do not have, and for a special token among the strings.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    size = int(config.get_text_config().vocab_size)
    ids = {_stop_token(token, tokenizer, size, model) for token in sampling.stop_tokens}
    for source in (_generation_config(model), config, tokenizer):
        ends = getattr(source, "eos_token_id", None)
        if ends is not None:
            ids |= set(ends) if isinstance(ends, list | tuple) else {int(ends)}
    _check_strings(sampling.stop, tokenizer)
    return Endings(tuple(sorted(ids)), tuple(sampling.stop))


def _generation_config(model: Path | str) -> Any:
    """The model's generation config; None where it has none."""
    from transformers import GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME, cached_file

    found = cached_file(
        str(model), GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False
    )
    return None if found is None else GenerationConfig.from_pretrained(model)


def _stop_token(token: int | str, tokenizer: Any, size: int, model: Path | str) -> int:
    """Its id. Strings are looked up: a tokenizer asked to convert them may answer with <unk>."""
    found = tokenizer.get_vocab().get(token) if isinstance(token, str) else token
    if found is None:
        raise UserError(
            f"sampling.stop_tokens: {token!r} is not a token of {model}: give a token's exact "
            "string or its id, or put text into sampling.stop"
        )
    if not 0 <= found < size:
        raise UserError(
            f"sampling.stop_tokens: {token!r} is outside the vocabulary of {model}: ids go from 0 "
            f"to {size - 1}"
        )
    return int(found)


def _check_strings(strings: Sequence[str], tokenizer: Any) -> None:
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    for string in strings:
        if string in special:
            raise UserError(
                f"sampling.stop: {string!r} is a special token, which no completion's text shows: "
                "put it into sampling.stop_tokens"
            )
