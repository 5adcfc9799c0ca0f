"""Calls within limits, on an event loop whose time is made up: nothing here waits."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from judges.calls import (
    LONGEST_BACKOFF,
    LONGEST_WAIT,
    CallFailed,
    CallLimits,
    Calls,
    TemporaryFailure,
    is_temporary,
    retry_after,
)

NOON = 1_445_412_480.0
"""Wed, 21 Oct 2015 07:28:00 GMT, in seconds since 1970."""


class MadeUpTime(asyncio.SelectorEventLoop):
    """A loop that jumps to its next timer as soon as nothing else is to be done."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self.now = max(self.now, self._scheduled[0].when())
        super()._run_once()


def run(main: Callable[[MadeUpTime], Coroutine[Any, Any, Any]]) -> Any:
    with asyncio.Runner(loop_factory=MadeUpTime) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, MadeUpTime)
        return runner.run(main(loop))


def refusal(status: int, **headers: str) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "http://judge/")
    response = httpx.Response(status, headers=headers, request=request)
    return httpx.HTTPStatusError(f"status {status}", request=request, response=response)


class Server:
    """Takes a second for each call, and answers with what it was given, in order, then "done"."""

    def __init__(self, loop: MadeUpTime, *answers: object, seconds: float = 1.0) -> None:
        self.loop = loop
        self.answers = list(answers)
        self.seconds = seconds
        self.starts: list[float] = []
        self.at_once = self.most_at_once = 0

    async def __call__(self) -> object:
        self.starts.append(self.loop.now)
        answer = self.answers.pop(0) if self.answers else "done"
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.at_once -= 1
        if isinstance(answer, BaseException):
            raise answer
        return answer


def calls_on(loop: MadeUpTime, **limits: Any) -> Calls:
    return Calls(CallLimits(**limits), clock=loop.time)


def test_no_more_than_so_many_at_once():
    async def main(loop):
        server = Server(loop)
        calls = calls_on(loop, concurrency=3)
        assert await asyncio.gather(*(calls.make(server) for _ in range(10))) == ["done"] * 10
        assert server.most_at_once == 3
        assert server.starts == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
        assert calls.counts == {"calls": 10}

    run(main)


def test_calls_begin_evenly_spaced_and_an_idle_time_is_not_made_up_for():
    async def main(loop):
        server = Server(loop)
        calls = calls_on(loop, calls_per_minute=120)
        await asyncio.gather(*(calls.make(server) for _ in range(5)))
        await asyncio.sleep(60)
        resumed = loop.now
        await asyncio.gather(*(calls.make(server) for _ in range(3)))
        assert server.starts[:5] == pytest.approx([0, 0.5, 1, 1.5, 2])
        assert server.starts[5:] == pytest.approx([resumed, resumed + 0.5, resumed + 1])

    run(main)


def test_retries_keep_the_rate():
    async def main(loop):
        server = Server(loop, *[refusal(500)] * 8, seconds=0.1)
        calls = calls_on(loop, calls_per_minute=60)
        await asyncio.gather(*(calls.make(server) for _ in range(6)))
        assert len(server.starts) == 14
        gaps = [b - a for a, b in zip(server.starts, server.starts[1:], strict=False)]
        assert min(gaps) >= 1 - 1e-9
        assert calls.counts == {"calls": 14, "retries": 8}

    run(main)


def test_a_slot_is_free_while_a_call_waits_for_its_retry():
    async def main(loop):
        server = Server(loop, TemporaryFailure("busy"))
        calls = calls_on(loop, concurrency=1, backoff=50.0)
        calls._random = random.Random(0)  # its first wait is 42 s
        results = await asyncio.gather(calls.make(server), calls.make(server))
        assert results == ["done"] * 2
        assert server.starts[:2] == [0, 1]
        assert server.starts[2] > 2

    run(main)


def test_all_wait_as_long_as_the_server_asked_one_of_them_to():
    async def main(loop):
        server = Server(loop, refusal(429, **{"Retry-After": "30"}))
        calls = calls_on(loop, concurrency=1, backoff=2.0)
        await asyncio.gather(*(calls.make(server) for _ in range(4)))
        first, *others = sorted(server.starts)
        assert first == 0
        assert len(others) == 4
        assert all(start >= 31 for start in others)  # refused at 1 s, for 30 s
        assert others[0] <= 31 + 2

    run(main)


def test_a_call_that_waits_for_its_turn_waits_longer_when_told_to():
    """It knows when its turn comes, and meanwhile another is told to wait beyond that."""

    async def main(loop):
        server = Server(loop, refusal(503, **{"Retry-After": "100"}), seconds=0.25)
        calls = calls_on(loop, calls_per_minute=60)
        await asyncio.gather(calls.make(server), calls.make(server))
        assert server.starts[0] == 0
        assert min(server.starts[1:]) >= 100.25

    run(main)


def test_the_last_attempt_makes_the_others_wait_too():
    async def main(loop):
        server = Server(loop, refusal(429, **{"Retry-After": "30"}))
        calls = calls_on(loop, concurrency=1, retries=0)
        failed, done = await asyncio.gather(
            calls.make(server), calls.make(server), return_exceptions=True
        )
        assert isinstance(failed, CallFailed)
        assert done == "done"
        assert server.starts == [0, 31]

    run(main)


def test_a_temporary_failure_says_how_long_to_wait():
    async def main(loop):
        server = Server(loop, TemporaryFailure("busy", 7.0))
        calls = calls_on(loop, backoff=0.0)
        assert await calls.make(server) == "done"
        assert server.starts == [0, 8]

    run(main)


def test_those_that_were_told_to_wait_do_not_come_back_all_at_once():
    async def main(loop):
        server = Server(loop, *[refusal(429, **{"Retry-After": "30"})] * 20)
        calls = calls_on(loop, concurrency=20, backoff=4.0)
        await asyncio.gather(*(calls.make(server) for _ in range(20)))
        again = server.starts[20:]
        assert len(again) == 20
        assert 31 <= min(again) < max(again) <= 35
        assert max(again) - min(again) > 1
        assert len(set(again)) == 20

    run(main)


def test_a_server_that_asks_for_too_long_a_wait_is_down():
    async def main(loop):
        server = Server(loop, refusal(429, **{"Retry-After": str(LONGEST_WAIT + 1)}))
        calls = calls_on(loop)
        with pytest.raises(CallFailed, match=r"status 429$"):
            await calls.make(server)
        assert await calls.make(server) == "done"
        assert server.starts == [0, 1]

    run(main)


def test_waits_grow_are_drawn_anew_and_stay_within_their_bounds():
    async def main(loop):
        waits: dict[int, list[float]] = {}
        for _ in range(200):
            server = Server(loop, *[refusal(500)] * 9, seconds=0.0)
            calls = calls_on(loop, retries=9, backoff=0.5)
            await calls.make(server)
            gaps = [b - a for a, b in zip(server.starts, server.starts[1:], strict=False)]
            for attempt, gap in enumerate(gaps):
                waits.setdefault(attempt, []).append(gap)
        bounds = [0.5, 1, 2, 4, 8, 16, 32, LONGEST_BACKOFF, LONGEST_BACKOFF]
        assert sorted(waits) == list(range(9))
        for attempt, bound in enumerate(bounds):
            drawn = waits[attempt]
            assert 0 <= min(drawn) < bound / 4
            assert bound / 2 < max(drawn) <= bound * (1 + 1e-9)
            assert len(set(drawn)) > 100

    run(main)


def test_the_jitter_leaves_the_judges_own_random_numbers_alone():
    async def main(loop):
        random.seed(0)
        before = random.getstate()
        await calls_on(loop).make(Server(loop, refusal(500), refusal(429, **{"Retry-After": "1"})))
        assert random.getstate() == before

    run(main)


def test_a_call_that_hangs_is_cancelled_at_its_deadline_and_made_again():
    async def main(loop):
        cancelled = []

        async def hangs_once() -> str:
            if cancelled:
                return "done"
            try:
                await asyncio.sleep(10_000)
            except asyncio.CancelledError:
                cancelled.append(loop.now)
                raise
            return "late"

        calls = calls_on(loop, timeout=5.0, backoff=0.0)
        assert await calls.make(hangs_once) == "done"
        assert cancelled == [5]
        assert calls.counts == {"calls": 2, "retries": 1, "timeouts": 1}

    run(main)


@pytest.mark.parametrize("answer", ["late", ValueError("late")])
def test_what_is_said_after_the_deadline_is_not_heard(answer):
    async def stubborn() -> object:
        try:
            await asyncio.sleep(10_000)
        except asyncio.CancelledError:
            await asyncio.sleep(3)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def main(loop):
        calls = calls_on(loop, timeout=5.0, retries=2, backoff=0.0)
        with pytest.raises(CallFailed) as caught:
            await calls.make(stubborn)
        assert str(caught.value) == "TimeoutError: timed out after 5 s (tried 3 times)"
        assert calls.counts == {"calls": 3, "retries": 2, "timeouts": 3}

    run(main)


def test_a_time_out_of_the_calls_own_is_no_deadline_of_ours():
    async def main(loop):
        calls = calls_on(loop, timeout=5.0, retries=1, backoff=0.0)
        with pytest.raises(CallFailed, match=r"^TimeoutError: inner \(tried 2 times\)$"):
            await calls.make(Server(loop, TimeoutError("inner"), TimeoutError("inner")))
        assert calls.counts == {"calls": 2, "retries": 1}

    run(main)


def test_without_a_deadline_a_call_may_take_for_ever():
    async def main(loop):
        calls = calls_on(loop, timeout=None)
        assert await calls.make(Server(loop, seconds=1e6)) == "done"

    run(main)


def test_waiting_for_a_turn_does_not_count_towards_the_deadline():
    async def main(loop):
        server = Server(loop)
        calls = calls_on(loop, calls_per_minute=1, timeout=5.0)
        assert await asyncio.gather(*(calls.make(server) for _ in range(3))) == ["done"] * 3
        assert server.starts == [0, 60, 120]

    run(main)


def test_a_caller_that_gives_up_ends_its_call_and_frees_its_slot():
    async def main(loop):
        hanging = Server(loop, seconds=1e6)
        calls = calls_on(loop, concurrency=1, timeout=None)
        given_up = asyncio.create_task(calls.make(hanging))
        await asyncio.sleep(1)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        assert hanging.at_once == 0
        assert await calls.make(Server(loop)) == "done"
        assert calls.counts == {"calls": 2}

    run(main)


def test_a_caller_that_gives_up_its_turn_leaves_it_to_the_next():
    async def main(loop):
        server = Server(loop, refusal(429, **{"Retry-After": "50"}))
        calls = calls_on(loop, retries=0)
        with pytest.raises(CallFailed):
            await calls.make(server)
        waiting = [asyncio.create_task(calls.make(server)) for _ in range(2)]
        await asyncio.sleep(10)
        waiting[0].cancel()
        assert await waiting[1] == "done"
        assert server.starts == [0, 51]

    run(main)


@pytest.mark.parametrize(
    ("error", "attempts", "reason"),
    [
        (refusal(500), 3, "HTTPStatusError: status 500 (tried 3 times)"),
        (refusal(400), 1, "HTTPStatusError: status 400"),
        (ConnectionResetError("gone"), 3, "ConnectionResetError: gone (tried 3 times)"),
        (TemporaryFailure("not\n  now"), 3, "not now (tried 3 times)"),
        (CallFailed("never"), 1, "never"),
        (KeyError("choices"), 1, "KeyError: 'choices'"),
        (ValueError("x" * 999), 1, "ValueError: " + "x" * 288),
        (TemporaryFailure("x" * 999), 3, "x" * 300 + " (tried 3 times)"),
    ],
)
def test_a_failed_call_says_why_in_one_line(error, attempts, reason):
    async def main(loop):
        server = Server(loop, *[error] * 5)
        calls = calls_on(loop, retries=2)
        with pytest.raises(CallFailed) as caught:
            await calls.make(server)
        assert str(caught.value) == reason
        assert caught.value.__cause__ is error
        assert len(server.starts) == attempts == calls.counts["calls"]

    run(main)


def test_the_reason_is_the_last_attempts():
    async def main(loop):
        with pytest.raises(CallFailed, match=r"^HTTPStatusError: status 401$"):
            await calls_on(loop).make(Server(loop, refusal(500), refusal(401)))

    run(main)


REQUEST = httpx.Request("POST", "http://judge/")


def openai_error(status: int) -> openai.APIStatusError:
    response: Any = httpx.Response(status, request=REQUEST)
    return openai.APIStatusError("said no", response=response, body=None)


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        *[(refusal(status), True) for status in (408, 409, 425, 429, 500, 502, 503, 504, 529)],
        *[(refusal(status), False) for status in (400, 401, 403, 404, 413, 422)],
        (openai_error(429), True),
        (openai_error(500), True),
        (openai_error(404), False),
        (openai.APIConnectionError(request=REQUEST), True),  # type: ignore[arg-type]
        (openai.APITimeoutError(request=REQUEST), True),  # type: ignore[arg-type]
        (httpx.ConnectError("refused"), True),
        (httpx.RemoteProtocolError("server disconnected"), True),
        (httpx.ReadTimeout("slow"), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (ValueError(), False),
        (asyncio.CancelledError(), False),
        (KeyboardInterrupt(), False),
        (TemporaryFailure("busy"), True),
        (TemporaryFailure("busy", LONGEST_WAIT), True),
        (TemporaryFailure("busy", LONGEST_WAIT + 1), False),
        (refusal(503, **{"Retry-After": "1e9"}), False),
    ],
)
def test_what_may_pass(error, passing):
    assert is_temporary(error) is passing


@pytest.fixture
def new_york(monkeypatch):
    """A machine whose clock is not in GMT."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TZ", "EST5EDT,M3.2.0,M11.1.0")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0),
        ("17", 17),
        ("1.5", 1.5),
        ("-3", 0),
        ("inf", float("inf")),
        ("nan", None),
        ("", None),
        ("soon", None),
        ("Wed, 21 Oct 2015 07:28:30 GMT", 30),
        ("Wed, 21 Oct 2015 07:28:30 -0000", 30),
        ("Wednesday, 21-Oct-15 07:28:30 GMT", 30),
        ("Wed Oct 21 07:28:30 2015", 30),
        ("Wed, 21 Oct 2015 09:28:30 +0200", 30),
        ("Wed, 21 Oct 2015 07:27:30 GMT", 0),
        ("Wed, 99 Oct 2015 07:28:30 GMT", None),
        ("Wed, 21 Oct 99999999999999999999 07:28:30 GMT", None),
        ("Wed, 21 Oct 2015 07:28:30 +99999999999", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value, seconds, new_york, monkeypatch):
    monkeypatch.setattr("judges.calls.time.time", lambda: NOON)
    assert retry_after(refusal(429, **{"Retry-After": value})) == seconds


def test_without_the_header_nothing_is_asked():
    assert retry_after(refusal(429)) is None
    assert retry_after(ValueError()) is None
    assert retry_after(None) is None


class OddError(Exception):
    """With a header that a real one could not have."""

    def __init__(self, value: str) -> None:
        self.response = httpx.Response(429)
        self.response.headers = {"retry-after": value}  # type: ignore[assignment]


@settings(max_examples=500, deadline=None)
@given(
    st.text(max_size=40)
    | st.builds(
        "{}, {} {} {} {}:{}:{} {}".format,
        st.sampled_from(["Wed", "Mon", ""]),
        *[st.integers(0, 99)],
        st.sampled_from(["Oct", "Feb", "x"]),
        st.integers(0, 10**12),
        *[st.integers(0, 99)] * 3,
        st.sampled_from(["GMT", "-0000", "+9999", "EST", "", "+1e9"]),
    )
)
def test_no_retry_after_is_too_odd_to_read(value):
    seconds = retry_after(OddError(value))
    assert seconds is None or seconds >= 0


def test_a_second_event_loop_finds_the_locks_free():
    """Two calls at once on each of two loops: the second of each has to wait for the first."""
    shared: list[Calls] = []

    async def main(loop):
        if not shared:
            shared.append(calls_on(loop, concurrency=1, calls_per_minute=60))
        calls = shared[0]
        calls._clock = loop.time
        server = Server(loop)
        return await asyncio.gather(*(calls.make(server) for _ in range(3)))

    assert run(main) == ["done"] * 3
    assert run(main) == ["done"] * 3
    assert shared[0].counts == {"calls": 6}


def test_counts_may_be_shared():
    async def main(loop):
        counts = Counter({"asked": 3})
        calls = Calls(CallLimits(backoff=0.0), counts, clock=loop.time)
        await calls.make(Server(loop, refusal(500)))
        assert counts == {"asked": 3, "calls": 2, "retries": 1}

    run(main)


def test_replicas_keep_the_limits_together():
    limits = CallLimits(concurrency=16, calls_per_minute=90, timeout=7, retries=2, backoff=3)
    assert limits.shared_by(3) == CallLimits(5, 30, 7, 2, 3)
    assert limits.shared_by(1) == limits
    assert CallLimits(concurrency=2).shared_by(3).concurrency == 1


@pytest.mark.parametrize(
    "limits",
    [
        {"concurrency": 0},
        {"retries": -1},
        {"backoff": -1.0},
        {"backoff": float("nan")},
        {"calls_per_minute": 0.0},
        {"timeout": 0.0},
        {"timeout": float("nan")},
    ],
)
def test_limits_within_which_nothing_could_be_called_are_refused(limits):
    ((name, value),) = limits.items()
    with pytest.raises(ValueError, match=rf"^{name}={value}: must be "):
        CallLimits(**limits)
