"""What a question to people and an answer of theirs consist of."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from judges.interface import Text

NAME_LENGTH = 60
"""A rater's name is no longer than this, in characters."""


class Choice(enum.StrEnum):
    """What a rater says of a pair; a skip is no verdict."""

    FIRST = "first"
    SECOND = "second"
    TIE = "tie"
    SKIP = "skip"

    @classmethod
    def seen(cls, answer: str, first_left: bool) -> Choice:
        """The choice behind left, right, tie or skip, as one saw the pair."""
        if answer in ("left", "right"):
            return cls.FIRST if (answer == "left") == first_left else cls.SECOND
        return cls(answer)

    def as_seen(self, first_left: bool) -> str:
        """The inverse of ``seen``."""
        if self in (Choice.FIRST, Choice.SECOND):
            return "left" if (self is Choice.FIRST) == first_left else "right"
        return self.value


@dataclass(frozen=True, slots=True)
class Item:
    """A pair in the store; ``first`` is the one that was first when it was queued first."""

    id: int
    key: str
    prompt: Text
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Rating:
    """One rater's answer to one item.

    Qualities are 1 (worst) to 5, or None where none was given. ``left`` says whether first stood on
    the left. ``seconds`` are those the rater looked at the pair, ``rated`` is in Unix seconds.
    """

    item: int
    rater: str
    choice: Choice
    quality_first: int | None
    quality_second: int | None
    left: bool
    seconds: float
    rated: float

    def swapped(self) -> Rating:
        """The same rating of the pair with first and second exchanged."""
        exchanged = {Choice.FIRST: Choice.SECOND, Choice.SECOND: Choice.FIRST}
        return dataclasses.replace(
            self,
            choice=exchanged.get(self.choice, self.choice),
            quality_first=self.quality_second,
            quality_second=self.quality_first,
            left=not self.left,
        )


@dataclass(frozen=True, slots=True)
class Question:
    """A queued pair: its key, and whether the store holds it the other way round."""

    key: str
    swapped: bool


@dataclass(frozen=True, slots=True)
class Answers:
    """What raters said of an item; ``settled`` when nothing more is to be waited for."""

    ratings: tuple[Rating, ...]
    settled: bool


@dataclass(frozen=True, slots=True)
class Progress:
    """Counts of items: all, finished, answered by the rater, still open to the rater."""

    items: int
    finished: int
    mine: int
    remaining: int


def pair_key(prompt: Text, first: str, second: str) -> str:
    """SHA-256 over the contents, as hex; the same for (first, second) and (second, first)."""
    contents = json.dumps([_plain(prompt), *sorted((first, second))], sort_keys=True, default=str)
    return hashlib.sha256(contents.encode()).hexdigest()


def prompt_json(prompt: Text) -> str:
    """The prompt as it is stored: text, or a list of messages."""
    return json.dumps(_plain(prompt), default=str)


def first_is_left(key: str, rater: str) -> bool:
    """Where a rater sees an item's first completion: a fair coin, the same whenever it is asked."""
    return hashlib.sha256(f"{key}\n{rater}".encode()).digest()[0] % 2 == 0


def rater_name(given: str) -> str:
    """A name with its spaces and its Unicode form made one. Raises ValueError if none is left."""
    name = " ".join(unicodedata.normalize("NFC", given).split())
    if not name or not name.isprintable() or len(name) > NAME_LENGTH:
        raise ValueError(f"a rater's name has 1 to {NAME_LENGTH} printable characters")
    return name


def _plain(prompt: Text) -> str | list[dict[str, Any]]:
    if isinstance(prompt, str):
        return prompt
    return [dict(message) if isinstance(message, Mapping) else message for message in prompt]
