"""What judges have answered, on disk: a question that was asked before is not asked again."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

POLL = 0.05
"""Seconds between two looks at a question that another process is asking."""

GIVEN_UP_AFTER = 3600.0
"""Seconds after which a question that another machine's process is asking is asked again."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY,
    answer TEXT,
    asked_by TEXT,
    asked_at REAL
) WITHOUT ROWID
"""


def content_key(*parts: Any) -> str:
    """The SHA-256 of the parts as canonical JSON: what is the same has the same key."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Cache:
    """Answers by content key in one SQLite file, shared by processes of one or several machines.

    A key that somebody is asking is left to them: who finds it so waits for their answer. An asker
    whose process has ended is asked no more.
    """

    def __init__(self, path: Path) -> None:
        """Touches nothing: the file is made when something is asked."""
        self._path = path
        self._lock = threading.Lock()
        self._me = f"{socket.gethostname()}:{os.getpid()}:{_began(os.getpid())}"

    @functools.cached_property
    def _connection(self) -> sqlite3.Connection:
        return connect(self._path, _SCHEMA)

    async def answers(
        self,
        keys: Sequence[str],
        ask: Callable[[list[int]], Awaitable[Sequence[Any]]],
    ) -> list[tuple[Any, bool]]:
        """The answer to each key, and whether it was known.

        ``ask`` is given the indices of the questions to ask, each distinct question once, and
        returns an answer for each (JSON), or None for what failed: that is not kept. What ``ask``
        raises is raised here, and everything it claimed is free again.
        """
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        found: dict[str, Any] = self._read(first)
        known = set(found)
        while missing := [key for key in first if key not in found]:
            mine = self._claim(missing)
            if mine:
                answers: Sequence[Any] = [None] * len(mine)
                try:
                    answers = await ask([first[key] for key in mine])
                finally:
                    self._keep(dict(zip(mine, answers, strict=True)))
                found |= dict(zip(mine, answers, strict=True))
            if len(mine) < len(missing):
                await asyncio.sleep(POLL)
                others = self._read(key for key in missing if key not in found)
                found |= others
                known |= set(others)
        return [(found[key], key in known) for key in keys]

    def _read(self, keys: Iterable[str]) -> dict[str, Any]:
        found = {}
        with self._lock:
            for key in keys:
                row = self._connection.execute(
                    "SELECT answer FROM answers WHERE key = ? AND answer IS NOT NULL", (key,)
                ).fetchone()
                if row is not None:
                    found[key] = json.loads(row[0])
        return found

    def _claim(self, keys: Sequence[str]) -> list[str]:
        """Those of the keys that are now ours to ask."""
        mine = []
        with self._lock, transaction(self._connection) as connection:
            for key in keys:
                row = connection.execute(
                    "SELECT answer, asked_by, asked_at FROM answers WHERE key = ?", (key,)
                ).fetchone()
                if row is None or (row[0] is None and _has_ended(row[1], row[2])):
                    connection.execute(
                        "INSERT OR REPLACE INTO answers VALUES (?, NULL, ?, ?)",
                        (key, self._me, time.time()),
                    )
                    mine.append(key)
        return mine

    def _keep(self, answers: Mapping[str, Any]) -> None:
        with self._lock, transaction(self._connection) as connection:
            for key, answer in answers.items():
                if answer is None:
                    connection.execute(
                        "DELETE FROM answers WHERE key = ? AND answer IS NULL", (key,)
                    )
                else:
                    connection.execute(
                        "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)",
                        (key, json.dumps(answer), self._me, time.time()),
                    )


def connect(path: Path, schema: str) -> sqlite3.Connection:
    """A connection that waits for others' transactions and commits durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=60.0, isolation_level=None, check_same_thread=False)
    connection.execute(schema)
    return connection


class transaction:  # noqa: N801  reads as a statement
    """One writer at a time; all of it or nothing."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> sqlite3.Connection:
        self._connection.execute("BEGIN IMMEDIATE")
        return self._connection

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._connection.execute("COMMIT" if kind is None else "ROLLBACK")


def _has_ended(asker: str, asked_at: float) -> bool:
    """Whether the process that claimed a question ended; of another machine's, by its age."""
    host, pid, began = asker.rsplit(":", 2)
    if host != socket.gethostname():
        return time.time() - asked_at > GIVEN_UP_AFTER
    return _began(int(pid)) != began


def _began(pid: int) -> str:
    """When a process of this machine began, in clock ticks; empty where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]
