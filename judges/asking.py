"""Asking a judge: what was asked before is known, the rest goes out in calls within limits."""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar, cast

from judges.budget import Account, BudgetSpent
from judges.build import Judge
from judges.cache import Cache, content_key
from judges.calls import CallFailed, CallLimits, Calls
from judges.errors import UserError
from judges.functions import Functions, TimedOut
from judges.interface import Score, Text

T = TypeVar("T")


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
        # The deadline is that of a function, which is not called again while it hangs.
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
        self.judge.require(_names(questions))
        scores = await self._known_or_asked(questions)
        flipped = [score.flipped for score in scores if score.flipped is not None]
        self.counts.update({"both_orders": len(flipped), "flipped": sum(flipped)})
        return scores

    def stuck(self) -> bool:
        """Whether a call that was given up still runs, as long again after its deadline."""
        return self._functions.stuck(self._limits.timeout or 0.0)

    async def _known_or_asked(self, questions: Sequence[Question]) -> list[Score]:
        if self._cache is None:
            return await self._ordered(questions)

        async def ask(indices: list[int]) -> list[dict[str, Any] | None]:
            scores = await self._ordered([questions[index] for index in indices])
            fresh.update(zip(indices, scores, strict=True))
            return [_as_json(score) for score in scores]

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

    async def _ordered(self, questions: Sequence[Question]) -> list[Score]:
        if self._account is None:
            return await self._asked(questions)
        self._account.order(len(questions))
        had = 0
        try:
            scores = await self._asked(questions)
            had = sum(score.value is not None for score in scores)
        finally:
            self._account.give_back(len(questions) - had)
        return scores

    async def _asked(self, questions: Sequence[Question]) -> list[Score]:
        self.counts["asked"] += len(questions)
        size = self._batch_size or len(questions)
        batches = [questions[start : start + size] for start in range(0, len(questions), size)]
        answered = await gathered([self._answered(batch) for batch in batches])
        return [score for scores in answered for score in scores]

    async def _answered(self, batch: Sequence[Question]) -> list[Score]:
        texts = _texts(self.judge.compares, batch)
        columns = {name: [q.columns.get(name) for q in batch] for name in _names(batch)}

        def ask() -> Any:
            return self.judge.ask(columns, **texts)

        try:
            returned = await self._called(ask)
        except (UserError, BudgetSpent):
            raise
        except CallFailed as failed:
            return [Score(None, str(failed))] * len(batch)
        except Exception as error:  # noqa: BLE001  a judge may fail in any way: all are INVALID
            return [Score(None, f"{type(error).__name__}: {error}")] * len(batch)
        return _read(returned, len(batch), "comparisons" if self.judge.compares else "completions")

    async def _called(self, ask: Callable[[], Any]) -> Any:
        if self._calls is None:
            returned = ask()
            return await returned if inspect.isawaitable(returned) else returned
        limits = self._limits

        async def call() -> Any:
            try:
                return await self._functions.call(
                    ask, timeout=limits.timeout, threads=limits.concurrency > 1
                )
            except TimedOut:
                self.counts["timeouts"] += 1
                raise

        try:
            return await self._calls.make(call)
        except CallFailed as failed:
            if isinstance(failed.__cause__, UserError):
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
    if hasattr(returned, "tolist"):
        returned = returned.tolist()
    if isinstance(returned, str | bytes) or not isinstance(returned, Sequence):
        reason = f"returned a {type(returned).__name__} for {count} {unit}"
    elif len(returned) != count:
        reason = f"returned {len(returned)} values for {count} {unit}"
    else:
        return [Score.read(element) for element in returned]
    return [Score(None, reason)] * count


def _as_json(score: Score) -> dict[str, Any] | None:
    """What the cache keeps: a valid score."""
    return None if score.value is None else asdict(score)
