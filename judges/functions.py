"""Calling somebody's function: it may block, hang, or be asynchronous."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading
from collections.abc import Awaitable, Callable
from typing import Any


class TimedOut(Exception):  # noqa: N818
    """A function that had not answered by its deadline; what it answers later nobody hears."""


class Functions:
    """Calls functions, and knows which it had to leave behind.

    What a function awaits runs on one event loop that lasts, in a thread of its own: it may keep
    connections.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._left: list[concurrent.futures.Future[Any]] = []

    async def call(
        self, function: Callable[[], Any], *, timeout: float | None, threads: bool
    ) -> Any:
        """What the function returns, awaited if need be.

        It runs in a thread of its own with a ``timeout`` (seconds) or ``threads``, else on the
        caller's, where it may use signals. Raises TimedOut at the deadline.
        """
        deadline = asyncio.timeout(timeout)
        try:
            async with deadline:
                if timeout is None and not threads:
                    returned = function()
                else:
                    returned = await self._leaving(_in_thread(function))
                if not inspect.isawaitable(returned):
                    return returned
                loop = self._own_loop()
                running = asyncio.run_coroutine_threadsafe(_awaited(returned), loop)
                return await self._leaving(running)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise TimedOut(f"timed out after {timeout:g} s") from error

    async def _leaving(self, running: concurrent.futures.Future[Any]) -> Any:
        answer = asyncio.wrap_future(running)
        answer.add_done_callback(_hear_nothing)
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            running.cancel()
            self._left.append(running)
            raise

    def stuck(self, seconds: float) -> bool:
        """Whether a function that was left behind is still at it ``seconds`` from now."""
        if not self._left:
            return False
        left = [running for running in self._left if not running.done()]
        self._left = []
        if self._loop is not None:  # a coroutine that blocks it cannot be cancelled
            left.append(asyncio.run_coroutine_threadsafe(_nothing(), self._loop))
        _, still_running = concurrent.futures.wait(left, timeout=seconds)
        return bool(still_running)

    def _own_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="judge", daemon=True).start()
        return self._loop


def _in_thread(function: Callable[[], Any]) -> concurrent.futures.Future[Any]:
    """Run it in a daemon thread: one that hangs must not keep the process from ending."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001  raised where the result is asked for
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name="judge call", daemon=True).start()
    return future


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _hear_nothing(late: asyncio.Future[Any]) -> None:
    """Take an error that nobody waits for any more, lest asyncio complains of it."""
    if not late.cancelled():
        late.exception()


async def _nothing() -> None: ...
