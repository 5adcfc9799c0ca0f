"""Judges are asked in calls of so many questions, within deadlines, and anything may come back."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import decimal
import enum
import itertools
import random
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch

from judges.asking import Asker, Question, gathered
from judges.budget import Account, BudgetOptions, BudgetSpent
from judges.build import Judge
from judges.cache import Cache
from judges.calls import CallLimits, TemporaryFailure
from judges.errors import UserError
from judges.functions import Functions
from judges.interface import Score
from workers.judge_worker import JudgeWorker
from workers.messages import Completion, Prompt

NAN = float("nan")

PATIENCE = 60.0
"""Seconds for what takes none, on a busy machine."""

SOON = 0.1
"""A deadline in seconds that is meant to be missed."""

LATER = 3.0
"""A deadline in seconds that others, beside one who misses it, are meant to meet."""


def asker(
    function: Callable[..., Any],
    *,
    compares: bool = False,
    accepts: frozenset[str] | None = None,
    needs: tuple[str, ...] = (),
    batch_size: int | None = None,
    asks_itself: bool = False,
    cache: Cache | None = None,
    account: Account | None = None,
    **limits: Any,
) -> Asker:
    judge = Judge(
        name="mine",
        compares=compares,
        function=function,
        accepts=accepts,
        needs=needs,
        bound=frozenset(),
        key="judge.name",
        took=frozenset(),
        identity=("mine",),
    )
    chosen = {"concurrency": 1, "timeout": None, "retries": 0, "backoff": 0.0} | limits
    return Asker(
        judge,
        batch_size=batch_size,
        limits=None if asks_itself else CallLimits(**chosen),
        functions=Functions(),
        cache=cache,
        account=account,
        counts=Counter(),
    )


def questions(*texts: str, **columns: Any) -> list[Question]:
    return [Question("prompt", (text,), columns) for text in texts]


def ask(mine: Asker, asked: Sequence[Question]) -> list[Score]:
    return asyncio.run(asyncio.wait_for(mine.ask(asked), PATIENCE))


def values(mine: Asker, *texts: str) -> list[float | None]:
    return [score.value for score in ask(mine, questions(*texts))]


def reasons(mine: Asker, *texts: str) -> list[str | None]:
    return [score.reason for score in ask(mine, questions(*texts))]


def length(text: str) -> float:
    return float(len(text))


# --- calls of so many questions


@pytest.mark.parametrize(
    ("batch_size", "calls"),
    [
        (None, ["abcde"]),
        (1, ["a", "b", "c", "d", "e"]),
        (2, ["ab", "cd", "e"]),
        (3, ["abc", "de"]),
        (5, ["abcde"]),
        (9, ["abcde"]),
    ],
)
def test_batch_size_cuts_and_keeps_the_order(tmp_path, batch_size, calls):
    def judge(prompts, completions, number):
        assert prompts == ["prompt"] * len(completions)
        assert number == ["abcde".index(text) for text in completions]
        seen.append("".join(completions))
        return [ord(text) for text in completions]

    for cache in (None, Cache(tmp_path / "answers.sqlite")):
        seen: list[str] = []
        mine = asker(judge, batch_size=batch_size, cache=cache)
        asked = [Question("prompt", (text,), {"number": i}) for i, text in enumerate("abcde")]
        assert [score.value for score in ask(mine, asked)] == [97, 98, 99, 100, 101]
        assert seen == calls
        assert (mine.counts["asked"], mine.counts["calls"]) == (5, len(calls))
    assert ask(mine, []) == []


def test_calls_at_once(tmp_path):
    def judge(completions, **_):
        if len(completions) == 2:
            together.wait(PATIENCE)  # only three at once get past
        return [length(text) for text in completions]

    together = threading.Barrier(3)
    mine = asker(judge, batch_size=2, concurrency=3)
    assert values(mine, "a", "bb", "ccc", "d", "ee", "fff", "g") == [1, 2, 3, 1, 2, 3, 1]


def test_one_call_at_a_time():
    def judge(completions, **_):
        running.append(1)
        most.append(len(running))
        time.sleep(0.001)
        running.pop()
        return [1.0]

    running: list[int] = []
    most: list[int] = []
    ask(asker(judge, batch_size=1, concurrency=1, timeout=PATIENCE), questions(*"abcdefgh"))
    assert most == [1] * 8


def test_a_column_of_some_rows_is_none_in_the_others_whatever_the_call(tmp_path):
    def judge(completions, answer):
        seen.append(answer)
        return [1.0] * len(completions)

    seen: list[list[Any]] = []
    asked = [
        Question("prompt", ("a",), {}),
        Question("prompt", ("b",), {"answer": 4}),
        Question("prompt", ("c",), {"other": 5}),
    ]
    cache = Cache(tmp_path / "answers.sqlite")
    mine = asker(
        judge,
        batch_size=1,
        cache=cache,
        accepts=frozenset({"completions", "answer"}),
        needs=("answer",),
    )
    assert [score.value for score in ask(mine, asked)] == [1.0] * 3
    assert seen == [[None], [4], [None]]
    with pytest.raises(UserError, match="needs the column answer"):
        ask(mine, [asked[0], asked[2]])


def test_a_default_is_another_question_than_none(tmp_path):
    def judge(completions, answer="default"):
        return [float(answer == "default")] * len(completions)

    mine = asker(
        judge,
        cache=Cache(tmp_path / "answers.sqlite"),
        accepts=frozenset({"completions", "answer"}),
    )
    lacking = Question("prompt", ("a",), {})
    other = Question("prompt", ("b",), {"answer": 4})
    assert [score.value for score in ask(mine, [lacking])] == [1.0]
    assert [score.value for score in ask(mine, [lacking, other])] == [0.0, 0.0]
    assert [score.value for score in ask(mine, [lacking])] == [1.0]


def test_columns_that_the_judge_does_not_read_do_not_change_the_question(tmp_path):
    def judge(completions, answer):
        return [length(text) for text in completions]

    mine = asker(
        judge,
        cache=Cache(tmp_path / "answers.sqlite"),
        accepts=frozenset({"completions", "answer"}),
    )
    ask(mine, questions("a", answer=1, row=1))
    ask(mine, questions("a", answer=1, row=2))
    assert (mine.counts["asked"], mine.counts["cached"]) == (1, 1)
    ask(mine, questions("a", answer=2, row=2))
    assert (mine.counts["asked"], mine.counts["cached"]) == (2, 1)


def test_who_asks_again_sees_what_was_asked():
    def judge(completions, **_):
        seen.append(list(completions))
        completions.clear()
        raise ConnectionError

    seen: list[list[str]] = []
    ask(asker(judge, retries=1), questions("a", "b"))
    assert seen == [["a", "b"], ["a", "b"]]


# --- asked again


@pytest.mark.parametrize(
    ("error", "calls"),
    [
        (ConnectionError("lost"), 3),
        (TimeoutError("theirs"), 3),
        (TemporaryFailure("busy"), 3),
        (httpx.ConnectError("refused"), 3),
        (ValueError("wrong"), 1),
        (KeyError("wrong"), 1),
        (MemoryError(), 1),
        (SystemExit(3), 1),
    ],
)
def test_only_what_passes_is_asked_again(error, calls):
    def judge(completions, **_):
        made.append(1)
        raise error

    made: list[int] = []
    mine = asker(judge, retries=2)
    [score] = ask(mine, questions("a"))
    assert score.value is None
    assert (len(made), mine.counts["calls"], mine.counts["retries"]) == (calls, calls, calls - 1)
    assert ("(tried 3 times)" in str(score.reason)) == (calls == 3)


def test_what_passed_is_an_answer():
    def judge(completions, **_):
        made.append(1)
        if len(made) < 3:
            raise ConnectionError
        return [7.0]

    made: list[int] = []
    assert values(asker(judge, retries=2), "a") == [7.0]


# --- deadlines


class Hang:
    """Hangs until it is released."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.ended = threading.Event()

    def __call__(self) -> None:
        self.event.wait(PATIENCE)
        self.ended.set()

    def release(self) -> None:
        self.event.set()
        assert self.ended.wait(PATIENCE)


@pytest.fixture
def hang() -> Iterator[Hang]:
    hang = Hang()
    yield hang
    hang.event.set()


def sync(hang: Hang) -> Callable[..., Any]:
    def judge(completions, **_):
        hang()
        return [1.0] * len(completions)

    return judge


def blocking_async(hang: Hang) -> Callable[..., Any]:
    async def judge(completions, **_):
        hang()
        return [1.0] * len(completions)

    return judge


def deaf_async(hang: Hang) -> Callable[..., Any]:
    async def judge(completions, **_):
        while not hang.event.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)
        hang()
        return [1.0] * len(completions)

    return judge


def polite_async(hang: Hang) -> Callable[..., Any]:
    async def judge(completions, **_):
        await asyncio.Event().wait()

    return judge


@pytest.mark.parametrize("kind", [sync, blocking_async, deaf_async])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_what_hangs_is_invalid_and_stuck_while_it_hangs(hang, kind, concurrency):
    mine = asker(kind(hang), timeout=SOON, concurrency=concurrency, retries=3)
    assert reasons(mine, "a", "b") == ["timed out after 0.1 s"] * 2
    assert (mine.counts["timeouts"], mine.counts["calls"], mine.counts["retries"]) == (1, 1, 0)
    assert mine.stuck()
    assert mine.stuck()  # whoever asks next is told, too
    hang.release()
    assert ended(mine)


def ended(mine: Asker) -> bool:
    """Whether it is not stuck, once a thread had the time to end."""
    return any(not mine.stuck() for _ in range(int(PATIENCE / SOON)))


def test_what_is_cancelled_in_time_is_not_stuck(hang):
    mine = asker(polite_async(hang), timeout=SOON)
    assert reasons(mine, "a") == ["timed out after 0.1 s"]
    assert ended(mine)


def test_what_ended_meanwhile_is_not_stuck(hang):
    mine = asker(sync(hang), timeout=SOON)
    assert reasons(mine, "a") == ["timed out after 0.1 s"]
    hang.release()
    assert ended(mine)
    assert not asker(sync(hang), timeout=SOON).stuck()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_late_answer_is_not_heard_though_others_are_asked(hang, kind):
    def answer(text: str) -> list[float]:
        if text == "late":
            hang()
            return [666.0]
        return [length(text)]

    async def answer_async(text: str) -> list[float]:
        return await asyncio.to_thread(answer, text)

    def judge(completions, **_):
        return (answer if kind == "sync" else answer_async)(completions[0])

    mine = asker(judge, batch_size=1, timeout=LATER)
    assert values(mine, "late") == [None]
    hang.release()  # the late answer comes now
    assert values(mine, "a", "bb") == [1.0, 2.0]
    assert mine.counts["timeouts"] == 1
    assert values(mine, "ccc", "dddd") == [3.0, 4.0]
    assert ended(mine)


def test_only_its_own_call_is_invalid(hang):
    def judge(completions, **_):
        if "late" in completions:
            hang()
        return [length(text) for text in completions]

    mine = asker(judge, batch_size=2, timeout=LATER, concurrency=3)
    assert values(mine, "a", "bb", "ccc", "late", "e", "ff") == [1, 2, None, None, 1, 2]


def test_a_loop_that_was_blocked_does_not_begin_what_was_given_up(hang):
    begun = []

    async def judge(completions, **_):
        begun.extend(completions)
        hang()
        return [1.0]

    mine = asker(judge, batch_size=1, timeout=SOON)
    unasked = "not asked: the call before it still runs"
    assert reasons(mine, "a", "b", "c") == ["timed out after 0.1 s", unasked, unasked]
    hang.release()
    assert ended(mine)
    assert begun == ["a"]


def test_a_deadline_of_the_judges_own_is_not_ours():
    async def judge(completions, **_):
        async with asyncio.timeout(0.0):
            await asyncio.sleep(PATIENCE)

    mine = asker(judge, timeout=PATIENCE)
    assert reasons(mine, "a") == ["TimeoutError:"]
    assert mine.counts["timeouts"] == 0
    assert not mine._functions._left


# --- where it runs


def test_without_a_deadline_it_runs_where_it_is_called():
    def judge(completions, **_):
        def alarm(*_: object) -> None:
            raise InterruptedError("by the judge's own alarm")

        before = signal.signal(signal.SIGVTALRM, alarm)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.01)
        try:
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline:
                pass
        finally:
            signal.signal(signal.SIGVTALRM, before)

    assert reasons(asker(judge), "a") == ["InterruptedError: by the judge's own alarm"]


@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_a_function_may_use_asyncio_itself(timeout):
    async def one(text: str) -> float:
        await asyncio.sleep(0.0)
        return length(text)

    def judge(completions, **_):
        return [asyncio.run(one(text)) for text in completions]

    mine = asker(judge, timeout=timeout, batch_size=2)
    assert values(mine, "a", "bb", "ccc") == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_asynchronous_judges_keep_one_loop(timeout):
    class Service:
        """Answers on the loop on which it was first asked, as a client with connections does."""

        def __init__(self) -> None:
            self.requests: asyncio.Queue[Any] | None = None

        async def serve(self, requests: asyncio.Queue[Any]) -> None:
            while True:
                text, answer = await requests.get()
                answer.set_result(length(text))

        async def __call__(self, completions, **_):
            if self.requests is None:
                self.requests = asyncio.Queue()
                self.serving = asyncio.create_task(self.serve(self.requests))
            answers = [asyncio.get_running_loop().create_future() for _ in completions]
            for request in zip(completions, answers, strict=True):
                self.requests.put_nowait(request)
            return await asyncio.gather(*answers)

    mine = asker(Service(), timeout=timeout, batch_size=1)
    assert values(mine, "a", "bb") == [1.0, 2.0]
    assert values(mine, "ccc", "dddd") == [3.0, 4.0]  # on another loop of ours


def test_a_task_that_would_end_the_program_does_not_end_the_loop():
    async def leave() -> None:
        raise SystemExit(3)

    async def judge(completions, **_):
        if completions == ["leave"]:
            await asyncio.gather(leave())
        return [1.0]

    mine = asker(judge, batch_size=1)
    assert reasons(mine, "leave", "a") == ["SystemExit: 3", None]
    assert values(mine, "b") == [1.0]


@pytest.mark.parametrize(
    ("make", "asks_itself"),
    [
        ("function", False),
        ("function", True),
        ("async", False),
        ("async", True),
        ("async in a task", False),  # judges of ours alone ask by themselves, and make none
    ],
)
@pytest.mark.parametrize("timeout", [None, PATIENCE])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SystemExit(0), "SystemExit: 0"),
        (asyncio.CancelledError("mine"), "CancelledError:"),
        (GeneratorExit(), "GeneratorExit:"),
        (StopIteration(), ("StopIteration:", "RuntimeError: coroutine raised StopIteration")),
    ],
)
def test_nothing_that_it_raises_ends_the_run(make, timeout, asks_itself, error, reason):
    async def nested(error: BaseException) -> None:
        raise error

    async def raising(error: BaseException) -> None:
        if make == "async":
            raise error
        await asyncio.ensure_future(nested(error))

    def judge(completions, **_):
        if completions != ["raises"]:
            return [1.0]
        if make == "function":
            raise error
        return raising(error)

    mine = asker(judge, batch_size=1, timeout=timeout, asks_itself=asks_itself)
    scores = ask(mine, questions("raises", "a"))
    assert [score.value for score in scores] == [None, 1.0]
    assert str(scores[0].reason).startswith(reason)


def test_who_is_cancelled_is_cancelled(hang):
    async def stop() -> None:
        asking = asyncio.create_task(mine.ask(questions("a", "b")))
        await asyncio.sleep(SOON)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)
        await asking

    for function in (sync(hang), polite_async(hang)):
        mine = asker(function, timeout=PATIENCE, batch_size=1)
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(stop())


def test_in_a_running_loop():
    async def main() -> tuple[Any, Any]:
        return judged(mine, "a", "bb"), judged(mine, "ccc")

    async def asynchronous(completions, **_):
        await asyncio.sleep(0.0)
        return [length(text) for text in completions]

    def plain(completions, **_):
        return [length(text) for text in completions]

    for function in (asynchronous, plain):
        mine = JudgeWorker(asker(function))
        assert asyncio.run(main()) == ([1.0, 2.0], [3.0])
        assert judged(mine, "dddd") == [4.0]


def judged(worker: JudgeWorker, *texts: str) -> list[float]:
    prompt = Prompt(0, np.array([1]), "p", {})
    [judgement] = worker.judge([prompt], [[completion(text) for text in texts]], chat=False)
    assert all(reason is None for reason in judgement.reasons)
    return judgement.scores.tolist()


def completion(text: str) -> Completion:
    return Completion(0, 0, 0, 0, np.array([1]), np.zeros(1, np.float32), None, True, text)


@pytest.mark.parametrize("error", [UserError("judge.args: wrong"), BudgetSpent("usd", 1.0, "all")])
@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_what_is_meant_for_the_user_is_raised_when_all_have_ended(error, timeout):
    def judge(completions, **_):
        seen.extend(completions)
        if completions == ["b"]:
            raise error
        return [1.0]

    seen: list[str] = []
    with pytest.raises(type(error)) as caught:
        ask(asker(judge, batch_size=1, timeout=timeout), questions("a", "b", "c"))
    assert caught.value is error
    assert seen == ["a", "b", "c"]


# --- what comes back


class Level(enum.IntEnum):
    HIGH = 3


@dataclasses.dataclass
class Number:
    value: float = 1.0


def generated() -> Iterator[float]:
    yield 1.0
    yield 1.0


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ([1, 2.5], [1.0, 2.5]),
        ((1, 2), [1.0, 2.0]),
        (range(2), [0.0, 1.0]),
        (deque([1, 2]), [1.0, 2.0]),
        ([True, False], [1.0, 0.0]),
        ([np.float32(0.5), np.int8(-3)], [0.5, -3.0]),
        ([np.bool_(True), np.array(2.5)], [1.0, 2.5]),
        ([torch.tensor(1.5), torch.tensor(True)], [1.5, 1.0]),
        (np.array([1, 2], np.uint8), [1.0, 2.0]),
        (np.array([True, False]), [1.0, 0.0]),
        (torch.tensor([1.5, 2.5], dtype=torch.bfloat16), [1.5, 2.5]),
        (torch.tensor([1.5, 2.5], requires_grad=True), [1.5, 2.5]),
        ([Score(1), Score(np.float64(2.0))], [1.0, 2.0]),
        ([10**300, -(10**300)], [1e300, -1e300]),
        ([Level.HIGH, -0.0], [3.0, -0.0]),
    ],
)
def test_numbers(returned, expected):
    scores = ask(asker(lambda completions, **_: returned), questions("a", "b"))
    assert [score.value for score in scores] == expected
    assert all(type(score.value) is float and score.reason is None for score in scores)


@pytest.mark.parametrize(
    ("element", "reason"),
    [
        (None, "returned None"),
        (NAN, "returned NaN"),
        (np.float32("nan"), "returned NaN"),
        (float("inf"), "returned an infinite number"),
        (-float("inf"), "returned an infinite number"),
        (torch.tensor(float("inf")), "returned an infinite number"),
        (10**400, "returned an infinite number"),
        (Score(10**400), "returned an infinite number"),
        ("1.0", "returned text"),
        (b"1.0", "returned a bytes"),
        (np.str_("1.0"), "returned text"),
        ([1.0], "returned a list"),
        ((1.0,), "returned a tuple"),
        ({"score": 1.0}, "returned a dict"),
        (np.array([1.0]), "returned a ndarray"),
        (torch.tensor([1.0]), "returned a Tensor"),
        (1j, "returned a complex"),
        (np.complex64(1.0), "returned a complex"),
        (decimal.Decimal("1.0"), "returned a Decimal"),
        (Fraction(1, 2), "returned a Fraction"),
        (Number(), "returned a Number"),
        (ValueError("1.0"), "returned a ValueError"),
        (float, "returned a type"),
        (np.datetime64("2024-01-02", "ns"), "returned a time"),
        (np.timedelta64(5, "ns"), "returned a time"),
        (Score(np.timedelta64(5, "ns")), "returned a time"),  # type: ignore[arg-type]
        (Score(None, "refused"), "refused"),
        (Score(NAN, "refused"), "refused"),
        (Score(1.0, "skipped", declined=True), "skipped"),
        (Score(None, 7), "7"),  # type: ignore[arg-type]
        (Score(None, "half \ud800"), "half ?"),
    ],
)
def test_what_is_no_number_is_invalid_alone(element, reason):
    scores = ask(asker(lambda completions, **_: [1.0, element, 2.0]), questions("a", "b", "c"))
    assert [score.value for score in scores] == [1.0, None, 2.0]
    assert [score.reason for score in scores] == [None, reason, None]
    assert [score.declined for score in scores] == [False, reason == "skipped", False]


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (1.0, "returned a float for 2 completions"),
        (None, "returned a NoneType for 2 completions"),
        ("ab", "returned a str for 2 completions"),
        (b"ab", "returned a bytes for 2 completions"),
        (bytearray(b"ab"), "returned a bytearray for 2 completions"),
        (memoryview(b"ab"), "returned a memoryview for 2 completions"),
        ({0: 1.0, 1: 2.0}, "returned a dict for 2 completions"),
        ({1.0, 2.0}, "returned a set for 2 completions"),
        (Score(1.0), "returned a Score for 2 completions"),
        (np.array(1.0), "returned a ndarray for 2 completions"),
        (torch.tensor(1.0), "returned a Tensor for 2 completions"),
        (np.array([1, 2], "datetime64[ns]"), "returned a ndarray for 2 completions"),
        (np.array([1, 2], "timedelta64[ns]"), "returned a ndarray for 2 completions"),
        (map(float, "12"), "returned a map for 2 completions"),
        ([], "returned 0 values for 2 completions"),
        ([1.0], "returned 1 values for 2 completions"),
        ([1.0, 2.0, 3.0], "returned 3 values for 2 completions"),
        (np.zeros((1, 2)), "returned 1 values for 2 completions"),
        (np.zeros((2, 1)), "returned a list"),
    ],
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_no_list_of_answers_is_invalid(returned, reason, asynchronous):
    async def awaited(completions, **_):
        return returned

    def judge(completions, **_):
        return returned

    mine = asker(awaited if asynchronous else judge)
    assert ask(mine, questions("a", "b")) == [Score(None, reason)] * 2


def test_generators_are_no_lists():
    def judge(completions, **_):
        return generated()

    async def streaming(completions, **_):
        yield 1.0

    assert reasons(asker(judge), "a", "b") == ["returned a generator for 2 completions"] * 2
    assert reasons(asker(streaming), "a") == ["returned a async_generator for 1 completions"]


@pytest.mark.parametrize("asks_itself", [False, True])
def test_a_failed_call_is_invalid_alone(asks_itself):
    def judge(completions, **_):
        match completions:
            case ["raises", _]:
                raise ValueError("some\nlines \ud800 " + "x" * 1000)
            case ["few", _]:
                return [1.0]
        return [length(text) for text in completions]

    mine = asker(judge, batch_size=2, asks_itself=asks_itself)
    scores = ask(mine, questions("raises", "a", "bb", "ccc", "few", "d", "e", "ff"))
    assert [score.value for score in scores] == [None, None, 2.0, 3.0, None, None, 1.0, 2.0]
    [raised] = {score.reason for score in scores[:2]}
    assert raised is not None
    assert raised.startswith("ValueError: some lines ? xxx")
    assert len(raised) == 300


def test_a_comparison_says_so():
    def judge(prompts, first, second):
        assert (prompts, first, second) == (["p", "p"], ["a", "c"], ["b", "d"])
        return [0.25]

    asked = [Question("p", ("a", "b"), {}), Question("p", ("c", "d"), {})]
    reason = "returned 1 values for 2 comparisons"
    assert ask(asker(judge, compares=True), asked) == [Score(None, reason)] * 2


# --- what is counted


def test_counts(tmp_path):
    def judge(completions, **_):
        return [Score(length(t), flipped=len(t) > 1) if t != "none" else None for t in completions]

    account = Account(tmp_path / "judge.sqlite", "mine", BudgetOptions())
    mine = asker(
        judge, batch_size=2, cache=Cache(tmp_path / "judge.sqlite"), account=account, retries=1
    )
    ask(mine, questions("a", "bb", "none", "a"))
    # Three distinct questions in two calls; the answers are four, of which two have an order.
    expected = {"asked": 3, "cached": 0, "calls": 2, "both_orders": 3, "flipped": 1}
    assert {name: mine.counts[name] for name in expected} == expected
    assert account.spent().labels == 2
    ask(mine, questions("bb", "none", "ccc"))
    expected = {"asked": 5, "cached": 1, "calls": 3, "both_orders": 5, "flipped": 3}
    assert {name: mine.counts[name] for name in expected} == expected
    assert account.spent().labels == 3


def test_a_known_score_is_the_score(tmp_path):
    given = [Score(0.1 + 0.2, "why\n\ud800é", flipped=True), Score(-0.0), Score(5e-324)]
    told = [Score(0.1 + 0.2, "why\n?é", flipped=True), Score(-0.0), Score(5e-324)]
    mine = asker(lambda completions, **_: given, cache=Cache(tmp_path / "a.sqlite"))
    for _ in range(2):
        assert str(ask(mine, questions("a", "b", "c"))) == str(told)
    assert mine.counts["cached"] == 3


def test_all_end_before_the_first_error_is_raised():
    async def one(seconds: float, error: Exception | None = None) -> int:
        await asyncio.sleep(seconds)
        done.append(seconds)
        if error is not None:
            raise error
        return int(seconds)

    done: list[float] = []
    first, second = ValueError("first"), ValueError("second")
    asking: list[Awaitable[int]] = [one(0.02, first), one(0.01, second), one(0.05)]
    with pytest.raises(ValueError, match="first"):
        asyncio.run(gathered(asking))
    assert done == [0.01, 0.02, 0.05]
    assert asyncio.run(gathered([])) == []


# --- anything at all


class BrokenError(Exception):
    pass


def broken(*_: object) -> Any:
    raise BrokenError


class NoLength(list):
    __len__ = broken


class NoIteration(list):
    __iter__ = broken


class LongerThanItSays(list):
    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[float]:
        return itertools.repeat(1.0)


class NoAttributes:
    __getattr__ = broken


class NoClass:
    __class__ = property(broken)  # type: ignore[assignment]


class NoToList:
    tolist = broken


class OddToList:
    def __init__(self, given: object) -> None:
        self.given = given

    def tolist(self) -> object:
        return self.given


class NoScalar:
    ndim = 0
    item = broken


class OddScalar:
    ndim = 0

    def __init__(self, given: object) -> None:
        self.given = given

    def item(self) -> object:
        return self.given


class NoEquality:
    __eq__ = broken  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


class OddDimensions:
    ndim = NoEquality()


class NoFloat(float):
    __float__ = broken
    __abs__ = broken


class InfiniteAfterAll(float):
    def __float__(self) -> float:
        return float("inf")


class NoInt(int):
    __float__ = broken


class NoBool:
    __bool__ = broken
    __str__ = broken
    __repr__ = broken


class NoValue(Score):
    __getattribute__ = broken


class NoWordsError(Exception):
    __str__ = broken
    __repr__ = broken


class NoName(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise BrokenError


class Nameless(metaclass=NoName):
    pass


class NamelessError(Exception, metaclass=NoName):
    pass


def closed() -> Any:
    async def coroutine() -> float:
        return 1.0

    made = coroutine()
    made.close()
    return made


ELEMENTS: Sequence[Callable[[random.Random], object]] = (
    lambda _: None,
    lambda _: NAN,
    lambda r: r.choice([-1, 1]) * float("inf"),
    lambda r: r.choice([-1, 1]) * 10 ** r.randint(309, 6000),
    lambda r: complex(r.random(), r.random()),
    lambda r: decimal.Decimal(r.random()),
    lambda r: Fraction(r.randint(0, 9), 7),
    lambda r: "".join(chr(r.choice([0, 49, 0xD800, 0x1F600])) for _ in range(r.randint(0, 5))),
    lambda r: r.randbytes(3),
    lambda r: bytearray(r.randbytes(3)),
    lambda r: {r.random(): r.random()},
    lambda r: {r.random()},
    lambda r: [r.random() for _ in range(r.randint(0, 3))],
    lambda r: (r.random(),),
    lambda r: np.array([r.random()]),
    lambda r: torch.tensor([[r.random()]]),
    lambda _: np.datetime64("2024-01-02", "ns"),
    lambda _: np.float64("nan"),
    lambda _: torch.tensor(float("-inf")),
    lambda r: np.complex128(r.random()),
    lambda r: Number(r.random()),
    lambda r: ValueError(r.random()),
    lambda _: NoWordsError(),
    lambda _: generated(),
    lambda _: closed(),
    lambda _: (x for x in (1.0, 2.0)),
    lambda _: object(),
    lambda _: float,
    lambda _: Nameless,
    lambda _: Nameless(),
    lambda _: NoAttributes(),
    lambda _: NoClass(),
    lambda _: NoToList(),
    lambda _: NoScalar(),
    lambda _: OddDimensions(),
    lambda _: OddScalar(None),
    lambda _: OddScalar([0.5]),
    lambda _: NoFloat(0.5),
    lambda _: InfiniteAfterAll(0.5),
    lambda _: NoInt(1),
    lambda _: NoBool(),
    lambda _: NoValue(0.5),
    lambda _: Score(None),
    lambda _: Score(NAN, "\ud800"),
    lambda _: Score(0.5, "declined", declined=True),
    lambda _: Score(0.5, declined=NoBool()),  # type: ignore[arg-type]
    lambda _: Score(None, NoBool()),  # type: ignore[arg-type]
    lambda _: Score(0.5, NoBool()),  # type: ignore[arg-type]
    lambda _: Score(Score(0.5)),  # type: ignore[arg-type]
    lambda _: Score("0.5"),  # type: ignore[arg-type]
    lambda r: Score([r.random()], "why"),  # type: ignore[arg-type]
)
"""Each makes what is no number."""

NUMBERS: Sequence[Callable[[float], object]] = (
    float,
    np.float64,
    lambda x: np.array(x),
    lambda x: torch.tensor(x, dtype=torch.float64),
    Score,
    lambda x: Score(x, ["no text", "\udfff"], flipped="perhaps"),  # type: ignore[arg-type]
    lambda x: Score(np.float64(x), "why", flipped=np.True_),  # type: ignore[arg-type]
    lambda x: OddScalar(x),
)
"""Each makes one that is."""

WHOLE: Sequence[Callable[[random.Random, list[Any]], object]] = (
    lambda _, given: dict(enumerate(given)),
    lambda _, given: iter(given),
    lambda _, given: (x for x in given),
    lambda _, given: NoLength(given[:-1]),
    lambda _, given: NoIteration(given),
    lambda _, given: LongerThanItSays(given),
    lambda _, given: given[:-1],
    lambda _, given: [*given, 0.5],
    lambda _, given: [given],
    lambda _, given: OddToList(0.5),
    lambda _, given: OddToList(given[1:]),
    lambda _, given: OddToList(OddToList(given)),
    lambda _, given: Score(0.5),
    lambda _, given: closed(),
    lambda r, given: r.choice(ELEMENTS[:1] + ELEMENTS[4:])(r),
)
"""Each makes what is no list of three answers, or is none of numbers."""

RAISED: Sequence[Callable[[], BaseException]] = (
    ValueError,
    lambda: ValueError("\ud800 " * 1000),
    NoWordsError,
    NamelessError,
    StopIteration,
    StopAsyncIteration,
    SystemExit,
    GeneratorExit,
    asyncio.CancelledError,
    MemoryError,
    RecursionError,
    lambda: ExceptionGroup("several", [NoWordsError(), ValueError()]),
    lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"),
)


def anything(r: random.Random) -> tuple[Callable[[], Any], list[float]]:
    """What a judge does for three questions, and the numbers that it has really said."""
    nothing = [NAN] * 3
    match r.randint(0, 5):
        case 0:
            error = r.choice(RAISED)()
            return lambda: broken_by(error), nothing
        case 1:
            made = r.choice(WHOLE)(r, [r.random() for _ in range(3)])
            return lambda: made, nothing
    said = [r.random() if r.random() < 0.5 else NAN for _ in range(3)]
    given = [r.choice(ELEMENTS)(r) if number != number else number for number in said]
    given = [r.choice(NUMBERS)(g) if type(g) is float and 0 <= g <= 1 else g for g in given]
    whole = r.choice((list, tuple, deque, OddToList))(given)
    return lambda: whole, said


def broken_by(error: BaseException) -> Any:
    raise error


@contextlib.contextmanager
def judging(compares: bool, asynchronous: bool) -> Iterator[tuple[JudgeWorker, list[Any]]]:
    """A worker whose judge does what is in the list."""
    doing: list[Any] = []

    def scores(completions, **_):
        return doing[0]()

    def comparisons(prompts, first, second, **_):
        return doing[0]()

    async def scores_later(completions, **_):
        return doing[0]()

    async def comparisons_later(prompts, first, second, **_):
        return doing[0]()

    functions = ((scores, comparisons), (scores_later, comparisons_later))
    yield JudgeWorker(asker(functions[asynchronous][compares], compares=compares)), doing


@pytest.mark.parametrize("compares", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_garbage_never_becomes_a_label(compares, asynchronous):
    prompt = Prompt(0, np.array([1]), "p", {})
    texts = [completion(text) for text in "abc"]
    failed: list[str | None] = []
    with judging(compares, asynchronous) as (worker, doing):
        for seed in range(2_500):
            do, said = anything(random.Random(seed))
            doing[:] = [do]
            [judgement] = worker.judge([prompt], [texts], chat=False)
            found = judgement.scores
            if compares:
                assert judgement.wins is not None
                found = judgement.wins[np.triu_indices(3, 1)]
                assert not (judgement.wins < 0.0).any()
                assert not (judgement.wins > 1.0).any()
            np.testing.assert_array_equal(found, said, err_msg=f"seed {seed}")
            failed += judgement.reasons
    pa.array(failed, pa.string()).validate(full=True)


def test_the_ten_thousand_are_varied():
    said = [anything(random.Random(seed))[1] for seed in range(2_500)]
    counts = Counter(sum(number == number for number in numbers) for numbers in said)
    assert all(counts[valid] > 100 for valid in range(4))


def test_a_file_that_fails_is_no_answer(tmp_path: Path):
    path = tmp_path / "answers.sqlite"
    path.write_text("no database" * 100)
    mine = asker(lambda completions, **_: [1.0], cache=Cache(path))
    with pytest.raises(UserError, match="not an SQLite file"):
        ask(mine, questions("a"))
