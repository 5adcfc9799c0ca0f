"""A completion's text, for judges and people: training never reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workers.messages import IntArray


def completion_text(tokenizer: Any, prompt_ids: IntArray, ids: Sequence[int]) -> str:
    """The completion as it stands after its prompt: decoded alone it may lose a first space."""
    before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    both = tokenizer.decode([*prompt_ids.tolist(), *ids], skip_special_tokens=True)
    if both.startswith(before):
        return str(both[len(before) :])
    return str(tokenizer.decode(ids, skip_special_tokens=True))
