"""Calls that may fail: how many at once and a minute, how long each may take, how often again."""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import tenacity

T = TypeVar("T")

LONGEST_WAIT = 300.0
"""Seconds: a server that asks to wait longer is as good as down."""

PASSING = frozenset({408, 409, 425, 429})
"""HTTP statuses that a later call may not meet, beside those from 500."""


class TemporaryFailure(Exception):  # noqa: N818 (named for what it is to the caller)
    """What a call may raise to be made again, after ``retry_after`` seconds if it is known."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class CallFailed(Exception):  # noqa: N818
    """A call that failed for good; the message is one line for a verdict's reason."""


@dataclass(frozen=True, slots=True)
class CallLimits:
    """``concurrency`` calls at once, ``calls_per_minute`` begun evenly spaced (None: no limit).

    An attempt may take ``timeout`` seconds (None: for ever); one that failed for a passing reason
    is made again up to ``retries`` times, after ``backoff`` seconds, twice as long each time, with
    jitter, or after what the server's Retry-After says.
    """

    concurrency: int = 16
    calls_per_minute: float | None = None
    timeout: float | None = 60.0
    retries: int = 4
    backoff: float = 1.0

    def shared_by(self, replicas: int) -> CallLimits:
        """The part of one of so many replicas: together they keep the limits."""
        rate = self.calls_per_minute
        return CallLimits(
            concurrency=max(1, self.concurrency // replicas),
            calls_per_minute=None if rate is None else rate / replicas,
            timeout=self.timeout,
            retries=self.retries,
            backoff=self.backoff,
        )


class Calls:
    """Makes calls within limits, all of them on one event loop.

    ``counts`` has "calls" (attempts), "retries" and "timeouts" since it was built.
    """

    def __init__(
        self,
        limits: CallLimits,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self.counts: Counter[str] = Counter()
        self._sleep = sleep
        self._clock = clock
        self._slots = asyncio.Semaphore(limits.concurrency)
        self._next_start = 0.0

    async def make(self, call: Callable[[], Awaitable[T]]) -> T:
        """The call's result, after as many attempts as it took.

        An attempt that outlasts its deadline is cancelled, so nobody hears a late answer. Raises
        CallFailed when the last attempt failed or the failure will not pass.
        """
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

    async def _attempt(self, call: Callable[[], Awaitable[T]]) -> T:
        async with self._slots:
            await self._turn()
            self.counts["calls"] += 1
            deadline = asyncio.timeout(self.limits.timeout)
            try:
                async with deadline:
                    return await call()
            except TimeoutError as error:
                if not deadline.expired():
                    raise
                self.counts["timeouts"] += 1
                raise TimeoutError(f"timed out after {self.limits.timeout:g} s") from error

    async def _turn(self) -> None:
        """Wait until this call may begin."""
        now = self._clock()
        start = max(now, self._next_start)
        spacing = 60.0 / self.limits.calls_per_minute if self.limits.calls_per_minute else 0.0
        self._next_start = start + spacing
        if start > now:
            await self._sleep(start - now)

    def _wait(self, state: tenacity.RetryCallState) -> float:
        assert state.outcome is not None
        asked = retry_after(state.outcome.exception())
        jittered = tenacity.wait_random_exponential(multiplier=self.limits.backoff, max=60.0)
        if asked is None:
            return jittered(state)
        self._next_start = max(self._next_start, self._clock() + asked)  # the others wait, too
        return asked

    def _note_retry(self, state: tenacity.RetryCallState) -> None:
        self.counts["retries"] += 1

    def _reason(self, error: Exception) -> str:
        text = " ".join(f"{type(error).__name__}: {error}".split())
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
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if seconds == seconds else None


def _is_transport(error: BaseException) -> bool:
    """httpx's and openai's errors of connections that were refused, lost or timed out."""
    return any(c.__name__ in ("TransportError", "APIConnectionError") for c in type(error).__mro__)
