"""Asking a judge: what was asked before is known, the rest goes out in calls within limits."""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias, TypeVar, cast

from judges.budget import Account, BudgetSpent
from judges.build import Judge
from judges.cache import Cache, Keep, content_key
from judges.calls import CallFailed, CallLimits, Calls
from judges.errors import UserError
from judges.functions import Functions, TimedOut
from judges.interface import Score, Text, as_probability

T = TypeVar("T")

Hear: TypeAlias = Callable[[int, Sequence[Score]], None]
"""Is told the scores of each call as soon as it has ended, and the index of the first of them."""

LONGEST_REASON = 300
"""Characters that are told of an error."""


@dataclass(frozen=True, slots=True)
class Question:
    """A completion to score, or two to compare, with its prompt and the row's columns."""

    prompt: Text
    texts: tuple[Text, ...]
    columns: Mapping[str, Any]


class Asker:
    """One judge and everything around it: cache, budget, calls of so many questions, deadlines.

    ``batch_size`` None asks all questions in one call. ``limits`` None: the judge keeps limits by
    itself. ``cache`` None: nothing is remembered. ``counts`` has "asked", "cached", "calls",
    "retries", "timeouts", and of judges that ask in both orders "both_orders" and "flipped".
    """

    def __init__(
        self,
        judge: Judge,
        *,
        batch_size: int | None,
        limits: CallLimits | None,
        functions: Functions,
        cache: Cache | None,
        account: Account | None,
        counts: Counter[str],
    ) -> None:
        self.judge = judge
        self.counts = counts
        self._batch_size = batch_size
        self._limits = limits or CallLimits()
        # The deadline is that of a function, which cannot be cancelled as a request can.
        self._calls = None if limits is None else Calls(replace(limits, timeout=None), self.counts)
        self._functions = functions
        self._cache = cache
        self._account = account

    async def ask(self, questions: Sequence[Question]) -> list[Score]:
        """One score for each question, in order; what fails is INVALID with its reason.

        Raises UserError where the judge needs a column that no question has, BudgetSpent where the
        budget does not allow the questions that are not known yet.
        """
        if not questions:
            return []
        names = _names(questions)
        self.judge.require(names)
        # In one call or another, a question comes with the same columns.
        rows = [
            replace(q, columns={name: q.columns.get(name) for name in names}) for q in questions
        ]
        scores = await self._known_or_asked(rows)
        flipped = [score.flipped for score in scores if score.flipped is not None]
        self.counts.update({"both_orders": len(flipped), "flipped": sum(flipped)})
        return scores

    def stuck(self) -> bool:
        """Whether a call that was given up still runs, as long again after its deadline."""
        return self._functions.stuck()

    async def _known_or_asked(self, questions: Sequence[Question]) -> list[Score]:
        if self._cache is None:
            return await self._ordered(questions, lambda *_: None)

        async def ask(indices: list[int], keep: Keep) -> None:
            def hear(start: int, scores: Sequence[Score]) -> None:
                heard = dict(zip(indices[start : start + len(scores)], scores, strict=True))
                fresh.update(heard)
                keep({i: asdict(score) for i, score in heard.items() if score.value is not None})

            await self._ordered([questions[index] for index in indices], hear)

        fresh: dict[int, Score] = {}
        keys = [self._key(question) for question in questions]
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        answers = await self._cache.answers(keys, ask)
        self.counts["cached"] += sum(known for _, known in answers)
        return [
            fresh[first[key]] if answer is None else Score(**answer)
            for key, (answer, _) in zip(keys, answers, strict=True)
        ]

    def _key(self, question: Question) -> str:
        columns = {n: v for n, v in question.columns.items() if self.judge.reads(n)}
        return content_key(self.judge.identity, question.prompt, question.texts, columns)

    async def _ordered(self, questions: Sequence[Question], hear: Hear) -> list[Score]:
        if self._account is None:
            return await self._asked(questions, hear)
        keys = [self._key(question) for question in questions]
        ordered = set(self._account.unpaid(keys))
        had: set[str] = set()

        def count(start: int, scores: Sequence[Score]) -> None:
            said = zip(keys[start : start + len(scores)], scores, strict=True)
            had.update(key for key, score in said if score.value is not None)
            hear(start, scores)

        self._account.order(len(ordered))
        try:
            return await self._asked(questions, count)
        finally:
            self._account.pay(ordered & had)
            self._account.give_back(len(ordered - had))

    async def _asked(self, questions: Sequence[Question], hear: Hear) -> list[Score]:
        self.counts["asked"] += len(questions)
        size = self._batch_size or len(questions)

        async def ask(start: int) -> list[Score]:
            scores = await self._answered(questions[start : start + size])
            hear(start, scores)
            return scores

        answered = await gathered([ask(start) for start in range(0, len(questions), size)])
        return [score for scores in answered for score in scores]

    async def _answered(self, batch: Sequence[Question]) -> list[Score]:
        def ask() -> Any:
            columns = {name: [q.columns[name] for q in batch] for name in batch[0].columns}
            return self.judge.ask(columns, **_texts(self.judge.compares, batch))

        try:
            returned = await self._called(ask)
            unit = "comparisons" if self.judge.compares else "completions"
            scores = _read(returned, len(batch), unit)
            return [as_probability(s) for s in scores] if self.judge.compares else scores
        except (UserError, BudgetSpent):
            raise
        # A judge may fail in any way, and all are INVALID: it ends neither the run nor this task.
        except (Exception, SystemExit, GeneratorExit, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and _is_cancelled():
                raise
            reason = _text(error) if isinstance(error, CallFailed) else _told(error)
            return [Score(None, reason)] * len(batch)

    async def _left_behind(self) -> bool:
        """Whether a call that was given up runs on, as long again: one at a time was asked for."""
        wait = functools.partial(self._functions.stuck, self._limits.timeout or 0.0)
        return self._limits.timeout is not None and await asyncio.to_thread(wait)

    async def _called(self, ask: Callable[[], Any]) -> Any:
        if self._calls is None:
            returned = ask()
            return await returned if inspect.isawaitable(returned) else returned
        limits = self._limits

        async def call() -> Any:
            if limits.concurrency == 1 and await self._left_behind():
                raise CallFailed("not asked: the call before it still runs")
            try:
                return await self._functions.call(
                    ask, timeout=limits.timeout, threads=limits.concurrency > 1
                )
            except TimedOut as error:
                self.counts["timeouts"] += 1
                raise CallFailed(str(error)) from error

        try:
            return await self._calls.make(call)
        except CallFailed as failed:
            if isinstance(failed.__cause__, UserError | BudgetSpent):
                raise failed.__cause__ from None
            raise


async def gathered(asking: Iterable[Awaitable[T]]) -> list[T]:
    """All results, once all have ended; the first error is raised then."""
    results = await asyncio.gather(*asking, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return cast(list[T], results)


def _texts(compares: bool, batch: Sequence[Question]) -> dict[str, list[Text]]:
    prompts = [question.prompt for question in batch]
    if compares:
        first, second = ([q.texts[side] for q in batch] for side in (0, 1))
        return {"prompts": prompts, "first": first, "second": second}
    return {"prompts": prompts, "completions": [question.texts[0] for question in batch]}


def _names(questions: Sequence[Question]) -> list[str]:
    """The columns that any of the rows has."""
    return list(dict.fromkeys(name for question in questions for name in question.columns))


def _read(returned: Any, count: int, unit: str) -> list[Score]:
    """A score for each of ``count`` questions from what a judge returned for them."""
    kind = type(returned).__name__
    if hasattr(returned, "tolist") and not _is_time(returned):
        returned = returned.tolist()
    unfit = isinstance(returned, str | bytes | bytearray) or kind == "memoryview"
    if unfit or not isinstance(returned, Sequence):
        reason = f"returned a {kind} for {count} {unit}"
    elif len(elements := list(itertools.islice(returned, count + 1))) != count:
        reason = f"returned {len(returned)} values for {count} {unit}"
    else:
        return [_score(element) for element in elements]
    return [Score(None, reason)] * count


def _score(element: object) -> Score:
    """What ``Score.read`` makes of it, also of what it cannot read; a reason is a text."""
    try:
        if _is_time(element.value if isinstance(element, Score) else element):
            return Score(None, "returned a time")
        score = Score.read(element)
        if score.value is not None and not math.isfinite(score.value):
            return Score(None, f"returned {score.value}")
        flipped = score.flipped if isinstance(score.flipped, bool) else None
        reason = None if score.reason is None else _text(score.reason)
        return Score(score.value, reason, score.declined, flipped)
    except Exception as error:  # noqa: BLE001  it runs the element's own code
        return Score(None, f"returned what cannot be read ({_told(error)})")


def _is_time(value: object) -> bool:
    """Whether it is a date or a duration of numpy's, which turn into numbers."""
    return getattr(getattr(value, "dtype", None), "kind", None) in ("m", "M")


def _is_cancelled() -> bool:
    """Whether this task is, and not a judge's own."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _told(error: BaseException) -> str:
    """One line of any error, also of one that cannot tell."""
    try:
        said = f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001  it runs the error's own code
        said = "an error that cannot be told"
    return _text(" ".join(said.split())[:LONGEST_REASON])


def _text(said: object) -> str:
    """As it can be written to a file: without half characters."""
    return str(said).encode(errors="replace").decode()
