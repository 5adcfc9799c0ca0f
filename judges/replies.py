"""Reading a model's answer: from its first token's distribution, or from its text word by word."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from judges.completing import Reply

T = TypeVar("T")

BLANKS = " \t\r\n"
"""What may stand around an answer. No other blank of Unicode's: an answer is plain."""

LEAST_MASS = 0.5
"""Less than this probability on all labels together is no answer to the question."""

LOGPROB_FLOOR = -30.0
"""Nats: float32 tells no smaller probabilities apart."""

_ROUNDING = 1e-3
_TOKEN_MARKS = BLANKS + "ĠĊ▁"
"""How tokenizers write the space or newline that a token begins with."""


class Unreadable(Exception):  # noqa: N818 (the judge failed, not we)
    """A reply that says nothing; the message is one line for an INVALID verdict's reason."""


@dataclass(frozen=True, slots=True)
class Labels:
    """Log-probabilities (nats) of the labels that are listed among the likeliest first tokens.

    ``least`` is the lowest probability listed, which no unlisted token exceeds; ``left`` is what
    all listed ones leave of 1.
    """

    logprobs: Mapping[str, float]
    least: float
    left: float

    @classmethod
    def read(cls, first_token: Mapping[str, float], labels: Sequence[str]) -> Labels:
        """The labels among these tokens; a label's variants (" 1", "1", "Ġ1") count together.

        Raises Unreadable for numbers that are no log-probabilities, and where the labels have less
        than ``LEAST_MASS``.
        """
        found: dict[str, list[float]] = {}
        listed: list[float] = []
        for token, value in first_token.items():
            if not isinstance(value, float | int) or not value <= _ROUNDING:
                named = repr(value) if isinstance(value, float) else type(value).__name__
                raise Unreadable(f"the first token has a log-probability of {named}")
            logprob = float(max(value, -1e4))
            listed.append(math.exp(logprob))
            if (word := str(token).strip(_TOKEN_MARKS)) in labels:
                found.setdefault(word, []).append(logprob)
        total = math.fsum(listed)
        if total > 1.0 + _ROUNDING:
            raise Unreadable(f"the first token's probabilities sum to {total:g}")
        logprobs = {word: log_sum(values) for word, values in found.items()}
        mass = math.fsum(math.exp(value) for value in logprobs.values())
        if mass < LEAST_MASS:
            raise Unreadable(f"{', '.join(labels)} have probability {mass:.2g} together")
        return cls(logprobs, least=min(listed), left=max(0.0, 1.0 - total))

    def unlisted(self, count: int) -> float:
        """The most probability that so many unlisted tokens can have together."""
        return min(count * self.least, self.left)

    def logprob(self, label: str) -> float:
        """Of a label (nats): its own, or the most that an unlisted one can have.

        So a comparison with an unlisted label is understated and its sign is kept.
        """
        if label in self.logprobs:
            return max(self.logprobs[label], LOGPROB_FLOOR)
        return math.log(max(self.unlisted(1), math.exp(LOGPROB_FLOOR)))


def log_odds(reply: Reply, label: str, other: str, tie: str | None = None) -> float:
    """Nats by which the label is likelier than the other; a tie is half of each.

    Raises Unreadable.
    """
    refuse_failure(reply)
    assert reply.first_token is not None
    words = [label, other, *([tie] if tie else [])]
    labels = Labels.read(reply.first_token, words)
    half = [labels.logprobs[tie] - math.log(2.0)] if tie in labels.logprobs and tie else []
    return log_sum([labels.logprob(label), *half]) - log_sum([labels.logprob(other), *half])


def expected_number(reply: Reply, low: int, high: int) -> float:
    """The mean of the one-digit numbers from low to high under the first token's distribution.

    Raises Unreadable also where the numbers that are not listed could move it by more than a half.
    """
    refuse_failure(reply)
    assert reply.first_token is not None
    numbers = {str(number): number for number in range(low, high + 1)}
    labels = Labels.read(reply.first_token, list(numbers))
    weights = {numbers[word]: math.exp(value) for word, value in labels.logprobs.items()}
    mass = math.fsum(weights.values())
    missing = labels.unlisted(len(numbers) - len(weights))
    if missing / (mass + missing) * (high - low) > 0.5:
        raise Unreadable(f"up to {missing:.2g} of the probability is on numbers not listed")
    return math.fsum(number * weight for number, weight in weights.items()) / mass


def exact_answer(reply: Reply, answers: Mapping[str, T]) -> T:
    """What the whole text means, which must be one of the answers and nothing else.

    Raises Unreadable.
    """
    word = _finished(reply).strip(BLANKS)
    if word not in answers:
        raise Unreadable(f"unparseable: {shown(word)}")
    return answers[word]


def last_line_number(reply: Reply, pattern: re.Pattern[str]) -> int:
    """The number in the last line of the text, all of which must match. Raises Unreadable."""
    line = _finished(reply).strip(BLANKS).rpartition("\n")[2].strip(BLANKS)
    match = pattern.fullmatch(line)
    if match is None:
        raise Unreadable(f"unparseable last line: {shown(line)}")
    return int(match[1])


def refuse_failure(reply: Reply) -> None:
    """Raise Unreadable, with the reason, where the client had no answer."""
    if reply.failure is not None or reply.text is None:
        raise Unreadable(reply.failure or "no reply")


def log_sum(values: Sequence[float]) -> float:
    """log Σ exp(v), and −∞ for a sum of nothing; NaN where a value is."""
    highest = max(values, default=-math.inf)
    if math.isinf(highest):
        return highest
    return highest + math.log(math.fsum(math.exp(value - highest) for value in values))


def shown(text: str) -> str:
    """Its beginning, quoted in one line of printable characters."""
    return repr(text[:80])


def _finished(reply: Reply) -> str:
    refuse_failure(reply)
    assert reply.text is not None
    if not reply.finished:
        raise Unreadable(f"cut at max_tokens: {shown(reply.text[-80:])}")
    return reply.text
