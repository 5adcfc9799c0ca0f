"""What judges have answered, on disk: a question that was asked before is not asked again."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import io
import json
import os
import pickle
import socket
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from judges.errors import UserError

POLL = 0.05
"""Seconds between two looks at a question that somebody else is asking."""

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

Keep: TypeAlias = Callable[[Mapping[int, Any]], None]
"""Takes answers (JSON, not None) by the index of their question."""


def content_key(*parts: Any) -> str:
    """The SHA-256 of the parts: the same for the same parts in any process, else another.

    Parts count by their JSON (a tuple is a list); what JSON has not (dates, arrays, an int as the
    key of a mapping) by its type and what pickle makes of it. Raises UserError where it cannot.
    """
    try:
        text = _json(_plain(parts))
    except Exception as error:
        raise UserError(
            f"judge.cache: a question cannot be told from others by its content ({error}): leave "
            "the column out, or set judge.cache=off"
        ) from error
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Cache:
    """Answers by content key in one SQLite file, shared by processes of one or several machines.

    A key that somebody is asking is left to them: who finds it so waits for their answer. An asker
    whose process has ended is waited for no more; one of another machine, after ``GIVEN_UP_AFTER``.
    """

    def __init__(self, path: Path) -> None:
        """Touches nothing: the file is made when something is asked."""
        self._database = Database(path, _SCHEMA, f"judge.cache={path}")

    async def answers(
        self, keys: Sequence[str], ask: Callable[[list[int], Keep], Awaitable[object]]
    ) -> list[tuple[Any, bool]]:
        """The answer to each key, None for what failed; and whether it was known.

        ``ask`` is given the indices of the questions to ask, each distinct question once, and what
        keeps answers, for all to see from then on. What it has not kept when it ends has failed,
        and may be asked anew. What it raises is raised here. Raises UserError for a file that will
        not do.
        """
        first: dict[str, int] = {}
        for index, key in enumerate(keys):
            first.setdefault(key, index)
        found: dict[str, Any] = {}
        known: set[str] = set()
        while missing := [key for key in first if key not in found]:
            answered, free = self._look(missing)
            found |= answered
            known |= set(answered)
            mine = self._claim(free)
            if mine:
                found |= await self._asked({first[key]: key for key in mine}, ask)
            elif len(answered) < len(missing):
                await asyncio.sleep(POLL)
        return [(found[key], key in known) for key in keys]

    async def _asked(
        self, mine: Mapping[int, str], ask: Callable[[list[int], Keep], Awaitable[object]]
    ) -> dict[str, Any]:
        had: dict[str, Any] = {}

        def keep(answers: Mapping[int, Any]) -> None:
            by_key = {mine[index]: answer for index, answer in answers.items()}
            self._keep(by_key)
            had.update(by_key)

        try:
            await ask(list(mine), keep)
        finally:
            self._free([key for key in mine.values() if key not in had])
        return dict.fromkeys(mine.values()) | had

    def _look(self, keys: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """What is answered, and what nobody is asking."""
        found, free = {}, []
        with self._database.transaction() as connection:
            for key in keys:
                answer, is_free = _state(connection, key)
                if answer is not None:
                    found[key] = json.loads(answer)
                elif is_free:
                    free.append(key)
        return found, free

    def _claim(self, keys: Sequence[str]) -> list[str]:
        """Those of the keys that are now ours to ask."""
        if not keys:
            return []
        with self._database.transaction(write=True) as connection:
            mine = [key for key in keys if _state(connection, key)[1]]
            connection.executemany(
                "INSERT OR REPLACE INTO answers VALUES (?, NULL, ?, ?)",
                [(key, _this_process(), time.time()) for key in mine],
            )
        return mine

    def _keep(self, answers: Mapping[str, Any]) -> None:
        rows = [(key, json.dumps(answer), time.time()) for key, answer in answers.items()]
        with self._database.transaction(write=True) as connection:
            connection.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, NULL, ?)", rows)

    def _free(self, keys: Sequence[str]) -> None:
        if not keys:
            return
        with self._database.transaction(write=True) as connection:
            connection.executemany(
                "DELETE FROM answers WHERE key = ? AND asked_by = ?",
                [(key, _this_process()) for key in keys],
            )


class Database:
    """An SQLite file of ours, made when it is first used; for threads and processes at once."""

    def __init__(self, path: Path, schema: str, name: str) -> None:
        """``name`` is what errors call it."""
        self._path = path
        self._schema = schema
        self._name = name
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def transaction(self, *, write: bool = False) -> Iterator[sqlite3.Connection]:
        """One writer at a time; all of it, durably, or nothing.

        Raises UserError for a file that cannot be used.
        """
        with self._lock:
            try:
                with _transaction(self._connection, write) as connection:
                    yield connection
            except (sqlite3.Error, OSError) as error:
                raise UserError(f"{self._name}: {_misfit(error)}") from error

    @functools.cached_property
    def _connection(self) -> sqlite3.Connection:
        """It waits up to a minute for others' transactions."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(
            self._path, timeout=60.0, isolation_level=None, check_same_thread=False
        )
        try:
            with _transaction(connection, write=True):
                [(ours,)] = connection.execute("PRAGMA application_id")
                [(tables,)] = connection.execute("SELECT count(*) FROM sqlite_master")
                if tables and ours != _OURS:
                    raise sqlite3.DatabaseError("an SQLite file of something else")
                if not tables:
                    connection.execute(f"PRAGMA application_id = {_OURS}")
                for statement in self._schema.split(";"):
                    connection.execute(statement)
        except BaseException:
            connection.close()
            raise
        return connection


_OURS = int.from_bytes(b"fpjd")
"""Marks the files of judges among those of SQLite."""


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, write: bool) -> Iterator[sqlite3.Connection]:
    connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
    try:
        yield connection
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _misfit(error: sqlite3.Error | OSError) -> str:
    match getattr(error, "sqlite_errorname", None):
        case "SQLITE_NOTADB":
            return "not an SQLite file: name another, or remove it"
        case "SQLITE_CORRUPT":
            return "a damaged SQLite file: name another, or remove it"
        case None if isinstance(error, sqlite3.DatabaseError):
            return f"{error}: name another"
    said = error.strerror if isinstance(error, OSError) else str(error)
    return f"{said}: it must be a file that can be read and written here"


def _state(connection: sqlite3.Connection, key: str) -> tuple[str | None, bool]:
    """A key's answer, and whether it may be asked: it has none, and nobody is asking it."""
    row = connection.execute(
        "SELECT answer, asked_by, asked_at FROM answers WHERE key = ?", (key,)
    ).fetchone()
    if row is None:
        return None, True
    answer, asker, asked_at = row
    return answer, answer is None and _has_ended(asker, asked_at)


def _this_process() -> str:
    return f"{socket.gethostname()}:{os.getpid()}:{_began(os.getpid())}"


def _has_ended(asker: str, asked_at: float) -> bool:
    """Whether the process that claimed a question ended; of another machine's, by its age."""
    host, pid, began = asker.rsplit(":", 2)
    if host != socket.gethostname():
        return time.time() - asked_at > GIVEN_UP_AFTER
    return _began(int(pid)) != began


def _began(pid: int) -> str:
    """When a process of this machine began, in clock ticks; empty where none runs."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes().decode(errors="replace")
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]  # a zombie's parent has yet to hear of its end


def _json(plain: Any) -> str:
    return json.dumps(plain, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _plain(value: Any) -> Any:
    """JSON that stands for this value alone: what JSON has not is a mapping with an empty key."""
    kind = type(value)
    if value is None or kind in (bool, str, float) or (kind is int and value.bit_length() < 1024):
        return value
    if kind in (list, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        if all(type(key) is str and key for key in value):
            return {key: _plain(item) for key, item in value.items()}
        items = sorted(_json([_plain(key), _plain(item)]) for key, item in value.items())
        return {"": ["mapping", *items]}
    if kind in (set, frozenset):
        return {"": [kind.__name__, *sorted(_json(_plain(item)) for item in value)]}
    return {"": [f"{kind.__module__}.{kind.__qualname__}", _pickled(value)]}


def _pickled(value: Any) -> str:
    """Its digest, without the memo: that tells which equal parts are one object."""
    written = io.BytesIO()
    pickler = pickle.Pickler(written, protocol=5)
    pickler.fast = True
    pickler.dump(value)
    return hashlib.sha256(written.getvalue()).hexdigest()
