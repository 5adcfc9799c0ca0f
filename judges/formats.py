"""How a prompt and its completion become what a reward model reads."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, TypeAlias

from judges.errors import UserError
from judges.interface import Message, Text, text_of
from judges.plugins import nearest

Format: TypeAlias = Literal["auto", "text", "chat", "pair"]
"""``text``: one after the other; ``chat``: messages through the chat template; ``pair``: the two
texts of a tokenizer's pair; ``auto``: the judge's own choice."""

FORMATS = ("auto", "text", "chat", "pair")


def is_chat(prompt: Text, completion: Text) -> bool:
    """Whether either is a conversation."""
    return not (isinstance(prompt, str) and isinstance(completion, str))


def joined(prompt: Text, completion: Text) -> str:
    """One text: the completion right after the prompt, or the words of chats by lines."""
    separator = "\n" if is_chat(prompt, completion) else ""
    return separator.join((text_of(prompt), text_of(completion)))


def conversation(prompt: Text, completion: Text) -> list[Message]:
    """The prompt's messages and the completion's: text is one of the user, and the assistant's."""
    return [*messages_of(prompt, "user"), *messages_of(completion, "assistant")]


def messages_of(content: Text, role: str) -> list[Message]:
    """A chat as it is; text as one message of ``role``."""
    return [{"role": role, "content": content}] if isinstance(content, str) else list(content)


def one_of(key: str, value: str, options: Collection[str]) -> str:
    """The value, if it is an option; else raises UserError."""
    if value not in options:
        raise UserError(
            f"{key}={value}: no such {key}{nearest(str(value), options)}: "
            f"write {', '.join(options)}"
        )
    return value
