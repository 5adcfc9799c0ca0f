"""``judge: {name: human}``: people compare, on a local web page."""

from __future__ import annotations

import asyncio
import functools
import math
import statistics
import time
from collections.abc import Iterable, Sequence

from judges.errors import UserError
from judges.human.records import Answers, Choice, Question, Rating
from judges.human.server import serve, stop
from judges.human.store import Store
from judges.interface import Score, Text, text_of

POLL_S = 0.5
UNKNOWN = "–"
WORTH = {Choice.FIRST: 1.0, Choice.TIE: 0.5, Choice.SECOND: 0.0}


class Human:
    """Compares by asking people.

    Pairs wait in the SQLite file ``store`` until ``raters_per_item`` people have answered each; a
    pair that was answered before, in either order, is not asked again. With ``serve`` the page is
    served on ``host`` and ``port`` (0: any free one) from the first open question on, by one of the
    processes that share the store. ``wait`` is for how many seconds ``compare`` waits for answers,
    None until all are there. Raises UserError for values that make no sense.
    """

    def __init__(
        self,
        store: str = "human.sqlite",
        raters_per_item: int = 1,
        port: int = 8321,
        host: str = "127.0.0.1",
        wait: float | None = None,
        serve: bool = True,
    ) -> None:
        if not isinstance(store, str) or not store:
            raise UserError(f"judge.args.store={store}: write the path of a file")
        if not _is_whole(raters_per_item) or raters_per_item < 1:
            raise UserError(f"judge.args.raters_per_item={raters_per_item}: write 1 or more")
        if not _is_whole(port) or not 0 <= port <= 65_535:
            raise UserError(f"judge.args.port={port}: write 0 (any free one) to 65535")
        if wait is not None and not (isinstance(wait, int | float) and 0 <= wait < math.inf):
            raise UserError(f"judge.args.wait={wait}: write seconds, or null to wait for all")
        self._path = store
        self._raters_per_item = raters_per_item
        self._port = port
        self._host = host
        self._wait = wait
        self._serve = serve

    @functools.cached_property
    def store(self) -> Store:
        """The queue: made when the first pair is asked about."""
        return Store(self._path, self._raters_per_item)

    async def compare(
        self, prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text]
    ) -> list[Score]:
        """P(first better): the mean over raters of 1 for first, 0.5 for a tie, 0 for second.

        A pair without its answers when ``wait`` is over, or that everybody skipped, is declined.
        The same completion twice is a tie, and nobody is asked. Raises UserError if the page
        cannot be served.
        """
        pairs = [
            (prompt, text_of(a), text_of(b))
            for prompt, a, b in zip(prompts, first, second, strict=True)
        ]
        different = [pair for pair in pairs if pair[1] != pair[2]]
        questions = await asyncio.to_thread(self.store.queue, different)
        scores = iter(await self._scores(questions))
        return [
            next(scores) if a != b else Score(0.5, "the same completion twice") for _, a, b in pairs
        ]

    def close(self) -> None:
        """Stop serving the page in this process."""
        stop(self.store)

    async def _scores(self, questions: Sequence[Question]) -> list[Score]:
        deadline = math.inf if self._wait is None else time.monotonic() + self._wait
        keys = list({question.key for question in questions})
        while True:
            answers = await asyncio.to_thread(self.store.answers, keys)
            if all(answer.settled for answer in answers.values()):
                break
            if self._serve:
                await asyncio.to_thread(serve, self.store, self._host, self._port)
            left = deadline - time.monotonic()
            if left <= 0:
                break
            await asyncio.sleep(min(POLL_S, left))
        return [self._score(question, answers[question.key]) for question in questions]

    def _score(self, question: Question, answers: Answers) -> Score:
        verdicts = [rating for rating in answers.ratings if rating.choice is not Choice.SKIP]
        if not answers.settled:
            have = f" ({len(verdicts)} of {self.store.raters_per_item} raters)" if verdicts else ""
            return Score(None, f"not labelled yet{have}", declined=True)
        if not verdicts:
            skipped = ", ".join(rating.rater for rating in answers.ratings)
            return Score(None, f"skipped by {skipped}", declined=True)
        stored = statistics.fmean(WORTH[rating.choice] for rating in verdicts)
        if question.swapped:
            swapped = [rating.swapped() for rating in answers.ratings]
            return Score(1.0 - stored, _reason(swapped))
        return Score(stored, _reason(answers.ratings))


def _reason(ratings: Sequence[Rating]) -> str:
    """``ada: first, ben: tie; quality 4.5 against 3``."""
    votes = ", ".join(f"{rating.rater}: {rating.choice.value}" for rating in ratings)
    verdicts = [rating for rating in ratings if rating.choice is not Choice.SKIP]
    first = _mean(rating.quality_first for rating in verdicts)
    second = _mean(rating.quality_second for rating in verdicts)
    return votes if first == second == UNKNOWN else f"{votes}; quality {first} against {second}"


def _mean(qualities: Iterable[int | None]) -> str:
    given = [quality for quality in qualities if quality is not None]
    return f"{statistics.fmean(given):.3g}" if given else UNKNOWN


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
