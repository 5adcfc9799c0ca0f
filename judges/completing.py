"""How a judge asks a language model: messages in, text and the first token's distribution out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from judges.interface import Message


@dataclass(frozen=True, slots=True)
class Ask:
    """One question to a model: a conversation that its next message continues.

    ``top_logprobs`` > 0 asks for the log-probabilities of that many most likely first tokens.
    ``sample`` counts questions that are otherwise the same: each is drawn anew.
    """

    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float = 0.0
    top_logprobs: int = 0
    sample: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back: text, or the reason why there is none.

    ``first_token`` has log-probabilities (nats) of the most likely first tokens, None where the
    client cannot tell. ``finished`` is False for a text that was cut at ``max_tokens``.
    """

    text: str | None
    first_token: Mapping[str, float] | None = None
    finished: bool = True
    failure: str | None = None


Complete: TypeAlias = Callable[[Sequence[Ask]], Awaitable[list[Reply]]]
"""Asks a model: one reply for each question, in order. It raises nothing for a question's sake."""
