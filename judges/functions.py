"""Calling somebody's function: it may block, hang, or be asynchronous."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

Ended: TypeAlias = concurrent.futures.Future[tuple[Any, BaseException | None]]
"""Done once a function has ended, also one that was given up: what it returned, or raised."""


class TimedOut(Exception):  # noqa: N818
    """A function that had not answered by its deadline; what it answers later nobody hears."""


class Functions:
    """Calls functions, and knows which it had to leave behind.

    What a function awaits runs on one event loop that lasts, in a thread of its own: it may keep
    connections.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._left: list[Ended] = []
        self._longest = 0.0

    async def call(
        self, function: Callable[[], Any], *, timeout: float | None, threads: bool
    ) -> Any:
        """What the function returns, awaited if need be.

        It runs in a thread of its own with a ``timeout`` (seconds) or ``threads``, else on the
        caller's, where it may use signals and ``asyncio.run``. Raises TimedOut at the deadline:
        what it awaits is cancelled then.
        """
        self._longest = max(self._longest, timeout or 0.0)
        deadline = asyncio.timeout(timeout)
        try:
            async with deadline:
                if timeout is None and not threads:
                    returned = _outside_loops(function)
                else:
                    returned = await self._heard(_in_thread(function), give_up=_nothing)
                if not inspect.isawaitable(returned):
                    return returned
                return await self._heard(*self._on_own_loop(returned))
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise TimedOut(f"timed out after {timeout:g} s") from error

    def stuck(self, seconds: float | None = None) -> bool:
        """Whether a function that was left behind is still at it ``seconds`` from now.

        None: as many as the longest time that any was given.
        """
        patience = self._longest if seconds is None else seconds
        _, still_running = concurrent.futures.wait(self._left, timeout=patience)
        self._left = list(still_running)
        return bool(self._left)

    async def _heard(self, ended: Ended, give_up: Callable[[], object]) -> Any:
        try:
            result, error = await asyncio.wrap_future(ended)
        except asyncio.CancelledError:
            give_up()
            self._left.append(ended)
            raise
        if error is not None:
            raise error
        return result

    def _on_own_loop(self, awaitable: Awaitable[Any]) -> tuple[Ended, Callable[[], object]]:
        """Await it there; the second cancels that."""
        ended: Ended = concurrent.futures.Future()
        awaiting = asyncio.run_coroutine_threadsafe(_awaited(awaitable, ended), self._own_loop())
        return ended, lambda: ended.cancel() or awaiting.cancel()

    def _own_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            run = threading.Thread(target=_run, args=(self._loop,), name="judge", daemon=True)
            run.start()
        return self._loop


def _outside_loops(function: Callable[[], Any]) -> Any:
    """Call it as if no event loop ran in this thread."""
    running = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    try:
        return function()
    finally:
        asyncio._set_running_loop(running)


def _in_thread(function: Callable[[], Any]) -> Ended:
    """Run it in a daemon thread: one that hangs must not keep the process from ending."""
    ended: Ended = concurrent.futures.Future()
    ended.set_running_or_notify_cancel()

    def run() -> None:
        try:
            ended.set_result((function(), None))
        except BaseException as error:  # noqa: BLE001  raised where the result is asked for
            ended.set_result((None, error))

    threading.Thread(target=run, name="judge call", daemon=True).start()
    return ended


async def _awaited(awaitable: Awaitable[Any], ended: Ended) -> None:
    if not ended.set_running_or_notify_cancel():  # given up while the loop was busy
        if inspect.iscoroutine(awaitable):
            awaitable.close()
        return
    try:
        ended.set_result((await awaitable, None))
    except BaseException as error:  # noqa: BLE001  raised where the result is asked for
        ended.set_result((None, error))


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """For ever: what a task raises to end the program ends it in the caller's thread, if at all."""
    while True:
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            loop.run_forever()


def _nothing() -> None: ...
