"""What the tests of given preference sets share: a chat tokenizer of words, and files of rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from pipeline.given_pairs import GivenPairs
from tests import tiny
from workers.messages import PromptGroup

# A word is a token: <s> 1, </s> 2, a 3, b 4, … u 23. The user's turns begin with u, the
# assistant's with t, the system's with s; the assistant's end in </s>, and a line of "r" follows.
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}t {{ m.content }} </s> r "
    "{% else %}{{ 'u' if m.role == 'user' else 's' }} {{ m.content }} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}t {% endif %}"
)
EOS = 2


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of ``tiny``, with a chat template or without."""
    found = tiny.tokenizer()
    found.chat_template = template
    return found


def ids_of(words: str) -> list[int]:
    """The ids of words, </s> among them."""
    return [tiny.WORDS.index(word) for word in words.split()]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def given(
    path: Path,
    rows: Sequence[Mapping[str, Any]] | None = None,
    template: str | None = None,
    **options: Any,
) -> GivenPairs:
    """The set of these rows (of the file, where none are given), in the order of the file."""
    if rows is not None:
        path = write(path / "set.jsonl", rows)
    defaults: dict[str, Any] = {
        "chat": None,
        "order": "file",
        "too_long": "error",
        "max_tokens": 64,
        "run_seed": 0,
    }
    return GivenPairs(str(path), tokenizer(template), **{**defaults, **options})


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def only(groups: Sequence[PromptGroup]) -> PromptGroup:
    """The one group, after its parts were seen to be of one position."""
    (group,) = groups
    position = group.prompt.position
    places = [group.judgement.position, *(c.position for c in group.completions)]
    places += [part.position for part in (*group.pairs, *group.labels)]
    assert set(places) == {position}
    assert [c.sample for c in group.completions] == list(range(len(group.completions)))
    return group


def tokens(group: PromptGroup) -> list[list[int]]:
    """Its ids: of the prompt, then of each completion."""
    return [group.prompt.ids.tolist(), *(c.ids.tolist() for c in group.completions)]
