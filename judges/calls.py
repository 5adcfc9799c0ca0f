"""Calls that may fail: how many at once and a minute, how long each may take, how often again."""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import tenacity

T = TypeVar("T")

LONGEST_WAIT = 300.0
"""Seconds: a server that asks to wait longer is as good as down."""

LONGEST_BACKOFF = 60.0
"""Seconds between two attempts where the server does not say how long to wait."""

PASSING = frozenset({408, 409, 425, 429})
"""HTTP statuses that a later call may not meet, beside those from 500."""


class TemporaryFailure(Exception):  # noqa: N818 (named for what it is to the caller)
    """What a call may raise to be made again, after ``retry_after`` seconds if it is known.

    The message is one line for a verdict's reason, as CallFailed's is.
    """

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class CallFailed(Exception):  # noqa: N818
    """A call that failed for good; the message is one line for a verdict's reason.

    A call may raise it itself: it is not made again.
    """


@dataclass(frozen=True, slots=True)
class CallLimits:
    """``concurrency`` calls at once, ``calls_per_minute`` begun evenly spaced (None: no limit).

    An attempt may take ``timeout`` seconds (None: for ever); one that failed for a passing reason
    is made again up to ``retries`` times. It waits between 0 and ``backoff`` seconds, twice as
    long each time, at most ``LONGEST_BACKOFF``; or what the server's Retry-After says, and up to
    ``backoff`` seconds more. Raises ValueError for limits within which nothing could be called.
    """

    concurrency: int = 16
    calls_per_minute: float | None = None
    timeout: float | None = 60.0
    retries: int = 4
    backoff: float = 1.0

    def __post_init__(self) -> None:
        for name, lowest in (("concurrency", 1), ("retries", 0), ("backoff", 0)):
            if not getattr(self, name) >= lowest:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {lowest}")
        for name in ("calls_per_minute", "timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: must be above 0, or null for no limit")

    def shared_by(self, replicas: int) -> CallLimits:
        """The part of one of so many replicas: together they keep the limits.

        Each may make at least one call at once, even if there are more replicas than calls.
        """
        rate = self.calls_per_minute
        return replace(
            self,
            concurrency=max(1, self.concurrency // replicas),
            calls_per_minute=None if rate is None else rate / replicas,
        )


class Calls:
    """Makes calls within limits, on one event loop at a time.

    It adds "calls" (attempts), "retries" and "timeouts" to ``counts``, if given to those of others.
    """

    def __init__(
        self,
        limits: CallLimits,
        counts: Counter[str] | None = None,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self.counts: Counter[str] = Counter() if counts is None else counts
        self._sleep = sleep
        self._clock = clock
        self._random = random.Random()  # not the module's: a judge may have seeded that one
        self._loop: asyncio.AbstractEventLoop | None = None
        self._next_start = -math.inf
        self._paused_until = -math.inf

    async def make(self, call: Callable[[], Awaitable[T]]) -> T:
        """The call's result, after as many attempts as it took.

        An attempt that outlasts its deadline is cancelled, and what it may still say is not heard.
        Raises CallFailed when the last attempt failed or the failure will not pass.
        """
        self._enter_loop()
        attempts = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(is_temporary),
            stop=tenacity.stop_after_attempt(self.limits.retries + 1),
            wait=self._wait,
            sleep=self._sleep,
            before_sleep=self._note_retry,
            reraise=True,
        )
        try:
            return await attempts(self._attempt, call)
        except Exception as error:
            raise CallFailed(self._reason(error)) from error

    def _enter_loop(self) -> None:
        """Locks wait on one loop only, and whoever calls ``asyncio.run`` twice has two."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            self._slots = asyncio.Semaphore(self.limits.concurrency)
            self._gate = asyncio.Lock()

    async def _attempt(self, call: Callable[[], Awaitable[T]]) -> T:
        async with self._slots:
            await self._turn()
            self.counts["calls"] += 1
            deadline = asyncio.timeout(self.limits.timeout)
            try:
                async with deadline:
                    result = await call()
            except Exception as error:
                if deadline.expired():
                    raise self._timed_out() from error
                self._pause(retry_after(error))
                raise
            if deadline.expired():  # it caught its cancellation and answered all the same
                raise self._timed_out()
            return result

    async def _turn(self) -> None:
        """Wait until this call may begin, behind those that wait already."""
        async with self._gate:
            while (wait := max(self._next_start, self._paused_until) - self._clock()) > 0:
                await self._sleep(wait)
            if self.limits.calls_per_minute is not None:
                self._next_start = self._clock() + 60.0 / self.limits.calls_per_minute

    def _pause(self, asked: float | None) -> None:
        """The server asked one call to wait: so do all."""
        if asked is not None and asked <= LONGEST_WAIT:
            self._paused_until = max(self._paused_until, self._clock() + asked)

    def _timed_out(self) -> TimeoutError:
        self.counts["timeouts"] += 1
        return TimeoutError(f"timed out after {self.limits.timeout:g} s")

    def _wait(self, state: tenacity.RetryCallState) -> float:
        assert state.outcome is not None
        asked = retry_after(state.outcome.exception())
        if asked is not None:
            return asked + self._random.uniform(0.0, self.limits.backoff)
        doubled = self.limits.backoff * 2.0 ** min(state.attempt_number - 1, 60)
        return self._random.uniform(0.0, min(doubled, LONGEST_BACKOFF))

    def _note_retry(self, state: tenacity.RetryCallState) -> None:
        self.counts["retries"] += 1

    def _reason(self, error: Exception) -> str:
        stated = isinstance(error, TemporaryFailure | CallFailed)
        text = " ".join((str(error) if stated else f"{type(error).__name__}: {error}").split())
        again = self.limits.retries if is_temporary(error) else 0
        return f"{text[:300]} (tried {again + 1} times)" if again else text[:300]


def is_temporary(error: BaseException) -> bool:
    """Whether the same call may succeed later: time-outs, lost connections, 429 and 5xx.

    Not where the server asks to wait longer than ``LONGEST_WAIT``.
    """
    if isinstance(error, TemporaryFailure):
        passing = True
    elif (status := status_of(error)) is not None:
        passing = status in PASSING or status >= 500
    else:
        passing = isinstance(error, TimeoutError | ConnectionError) or _is_transport(error)
    return passing and (retry_after(error) or 0.0) <= LONGEST_WAIT


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an httpx or openai error carries."""
    for holder in (error, getattr(error, "response", None)):
        status = getattr(holder, "status_code", None)
        if isinstance(status, int):
            return status
    return None


def retry_after(error: BaseException | None) -> float | None:
    """Seconds that the server asked to wait: a number or an HTTP date in Retry-After."""
    if isinstance(error, TemporaryFailure):
        return error.retry_after
    headers: Any = getattr(getattr(error, "response", None), "headers", None)
    value = headers.get("retry-after") if headers is not None else None
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = _seconds_until(value)
    return None if math.isnan(seconds) else max(0.0, seconds)


def _seconds_until(http_date: str) -> float:
    try:
        then = email.utils.parsedate_to_datetime(http_date)
        if then.tzinfo is None:
            then = then.replace(tzinfo=datetime.UTC)  # RFC 9110, 5.6.7: all dates are in GMT
        return then.timestamp() - time.time()
    except (ValueError, OverflowError):
        return math.nan


def _is_transport(error: BaseException) -> bool:
    """httpx's and openai's errors of connections that were refused, lost or timed out."""
    return any(c.__name__ in ("TransportError", "APIConnectionError") for c in type(error).__mro__)
