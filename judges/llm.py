"""AI feedback: a language model compares or scores completions, in answer to a template."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from judges.completing import Ask, Complete, Reply
from judges.errors import UserError
from judges.interface import Score, Text
from judges.replies import (
    Unreadable,
    exact_answer,
    expected_number,
    last_line_number,
    log_odds,
    refuse_failure,
)
from judges.template import Template, canonical

FIRST, SECOND, TIE = "1", "2", "0"
"""The answers to a comparison."""

SCORE_LINE = re.compile(r"Score: ([0-5])")
"""Self-rewarding's last line."""


class Pairwise:
    """Which of two completions is better, asked in both orders (OAIF, arXiv:2402.04792).

    With log-probabilities, P(first better) = σ of the mean of both orders' log-odds, so that what
    a position adds to them cancels exactly; without them in either order, the mean of what the two
    texts say. A template with ``{tie}`` allows that answer. ``flipped``: each order prefers the
    completion that the other does not. INVALID where either order fails.
    """

    def __init__(
        self,
        complete: Complete,
        template: str | None = None,
        max_tokens: int = 8,
        top_logprobs: int = 20,
    ) -> None:
        """Raises UserError for a template that cannot be used.

        ``max_tokens`` is for a text that ends by itself after its answer, and must be larger for a
        model that thinks first; ``top_logprobs`` 0 reads the text.
        """
        self._complete = complete
        self._template = Template.load(template, "pairwise", data=("prompt", "first", "second"))
        self._max_tokens = at_least(1, "max_tokens", max_tokens)
        self._top_logprobs = at_least(0, "top_logprobs", top_logprobs)
        self._tie = TIE if "tie" in self._template.placeholders else None

    async def compare(
        self, prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text]
    ) -> list[Score]:
        """P(first better) of each pair.

        Equal completions are a tie without asking. The same two questions are asked of a pair and
        of the pair swapped.
        """
        pairs = [
            (prompt, *sorted((one, other), key=canonical))
            for prompt, one, other in zip(prompts, first, second, strict=True)
        ]
        asked = [pair for pair in pairs if canonical(pair[1]) != canonical(pair[2])]
        asks = [
            self._ask(prompt, *shown)
            for prompt, lesser, greater in asked
            for shown in ((lesser, greater), (greater, lesser))
        ]
        replies = await answered(self._complete, asks)
        answers = iter(zip(replies[::2], replies[1::2], strict=True))
        scores = []
        for (_, lesser, greater), one in zip(pairs, first, strict=True):
            if canonical(lesser) == canonical(greater):
                scores.append(Score(0.5, "equal completions"))
                continue
            score = self._verdict(*next(answers))
            scores.append(score if canonical(one) == canonical(lesser) else _swapped(score))
        return scores

    def _ask(self, prompt: Text, first: Text, second: Text) -> Ask:
        data = {"prompt": prompt, "first": first, "second": second}
        return Ask(
            self._template.filled(_spoken(data), {"tie": TIE}),
            max_tokens=self._max_tokens,
            top_logprobs=self._top_logprobs,
        )

    def _verdict(self, reply: Reply, reversed_reply: Reply) -> Score:
        """P(what the first reply was shown first is better)."""
        replies = (reply, reversed_reply)
        try:
            for each in replies:
                refuse_failure(each)
            if all(each.first_token is not None for each in replies):
                one, other = (log_odds(each, FIRST, SECOND, self._tie) for each in replies)
                # An additive preference for a position is in both, and cancels.
                return Score(_sigmoid((one - other) / 2.0), flipped=one * other > 0.0)
            meanings = {FIRST: 1.0, SECOND: 0.0} | ({self._tie: 0.5} if self._tie else {})
            said, reversed_said = (exact_answer(each, meanings) for each in replies)
        except Unreadable as reason:
            return Score(None, str(reason))
        return Score(
            (said + 1.0 - reversed_said) / 2.0, flipped=said == reversed_said and said != 0.5
        )


class Pointwise:
    """How good a completion is on a scale of whole numbers: the mean of the model's answer.

    From log-probabilities where every number of the scale is one digit, so that its first token
    tells it from the others (``10`` may begin as ``1`` does); else, and without them, the text.
    """

    def __init__(
        self,
        complete: Complete,
        template: str | None = None,
        low: int = 1,
        high: int = 9,
        max_tokens: int = 8,
        top_logprobs: int = 20,
    ) -> None:
        """Raises UserError for a scale or a template that cannot be used."""
        if not (isinstance(low, int) and isinstance(high, int) and low < high <= low + 1000):
            raise UserError(
                f"args.low={low}, args.high={high}: a scale goes from a whole number to a higher "
                "one, by at most 1000"
            )
        self._complete = complete
        self._template = Template.load(
            template, "pointwise", data=("prompt", "completion"), words=("low", "high")
        )
        self._low, self._high = low, high
        self._max_tokens = at_least(1, "max_tokens", max_tokens)
        self._top_logprobs = at_least(0, "top_logprobs", top_logprobs)
        if low < 0 or high > 9:
            self._top_logprobs = 0

    async def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[Score]:
        """A number from ``low`` to ``high`` for each completion."""
        scale = {"low": str(self._low), "high": str(self._high)}
        asks = [
            Ask(
                self._template.filled(_spoken({"prompt": prompt, "completion": text}), scale),
                max_tokens=self._max_tokens,
                top_logprobs=self._top_logprobs,
            )
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        return [self._read(reply) for reply in await answered(self._complete, asks)]

    def _read(self, reply: Reply) -> Score:
        try:
            if self._top_logprobs and reply.first_token is not None:
                return Score(expected_number(reply, self._low, self._high))
            numbers = {str(number): number for number in range(self._low, self._high + 1)}
            return Score(float(exact_answer(reply, numbers)))
        except Unreadable as reason:
            return Score(None, str(reason))


class SelfRewarding:
    """Self-rewarding's additive score from 0 to 5 (arXiv:2401.10020): reasons, then ``Score: N``.

    The model writes why and ends with that line; the score is the mean over ``samples`` replies.
    It is INVALID unless at least half of them can be read: a reply or two that were cut say little
    of the others, but a mean over a minority is one of those that happened to be easy to read.
    """

    def __init__(
        self,
        complete: Complete,
        template: str | None = None,
        samples: int = 1,
        temperature: float | None = None,
        max_tokens: int = 512,
    ) -> None:
        """``temperature`` None is 0 for one sample, 0.7 for several. Raises UserError."""
        self._complete = complete
        self._template = Template.load(template, "self_rewarding", data=("prompt", "completion"))
        self._samples = at_least(1, "samples", samples)
        self._max_tokens = at_least(1, "max_tokens", max_tokens)
        self._temperature = (0.0 if samples == 1 else 0.7) if temperature is None else temperature
        if not self._temperature >= 0.0 or (samples > 1 and self._temperature == 0.0):
            raise UserError(
                f"args.temperature={temperature}: {samples} samples differ at a temperature above 0"
            )

    async def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[Score]:
        """A number from 0 to 5 for each completion."""
        asks = [
            Ask(messages, self._max_tokens, temperature=self._temperature, sample=sample)
            for prompt, text in zip(prompts, completions, strict=True)
            for messages in [self._template.filled(_spoken({"prompt": prompt, "completion": text}))]
            for sample in range(self._samples)
        ]
        replies = await answered(self._complete, asks)
        return [
            self._mean(replies[start : start + self._samples])
            for start in range(0, len(replies), self._samples)
        ]

    def _mean(self, replies: Sequence[Reply]) -> Score:
        numbers, reasons = [], []
        for reply in replies:
            try:
                numbers.append(last_line_number(reply, SCORE_LINE))
            except Unreadable as reason:
                reasons.append(str(reason))
        if 2 * len(numbers) < len(replies):
            return Score(None, reasons[0])
        return Score(math.fsum(numbers) / len(numbers))


async def answered(complete: Complete, asks: Sequence[Ask]) -> list[Reply]:
    """One reply for each question. Raises ValueError where the client returned another number."""
    replies = await complete(asks) if asks else []
    if len(replies) != len(asks):
        raise ValueError(f"the client returned {len(replies)} replies to {len(asks)} questions")
    return replies


def at_least(lowest: int, name: str, value: int) -> int:
    """The arg of that name, a whole number of at least that. Raises UserError."""
    if not isinstance(value, int) or value < lowest:
        raise UserError(f"args.{name}={value}: a whole number of at least {lowest}")
    return value


def _spoken(data: dict[str, Text]) -> dict[str, Text]:
    """A completion of one message is shown as its text: who says it is known."""
    return {name: text if name == "prompt" else _words(text) for name, text in data.items()}


def _words(text: Text) -> Text:
    if isinstance(text, str) or len(text) != 1:
        return text
    content = text[0].get("content")
    return content if isinstance(content, str) else text


def _sigmoid(log_odds: float) -> float:
    """σ, with σ(−x) = 1 − σ(x) to the last bit."""
    likelier = 1.0 / (1.0 + math.exp(-abs(log_odds)))
    return likelier if log_odds >= 0.0 else 1.0 - likelier


def _swapped(score: Score) -> Score:
    if score.value is None:
        return score
    return Score(1.0 - score.value, score.reason, flipped=score.flipped)
