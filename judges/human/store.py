"""The SQLite file in which pairs wait for raters and answers for whoever asked."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from judges.errors import UserError
from judges.human.records import (
    Answers,
    Choice,
    Item,
    Progress,
    Question,
    Rating,
    pair_key,
    prompt_json,
)
from judges.human.schema import SCHEMA, VERSION
from judges.interface import Text

LEASE_S = 300.0
"""For so long a pair that was handed out keeps its rater's seat."""

PRESENT_S = 120.0
"""A rater whose page has been silent for longer has left: nobody waits for them."""

VERDICTS = "(SELECT count(*) FROM ratings r WHERE r.item = i.id AND r.choice != 'skip')"
TAKEN = "(SELECT count(*) FROM leases l WHERE l.item = i.id)"
OPEN_TO_RATER = (
    "NOT EXISTS (SELECT 1 FROM ratings r WHERE r.item = i.id AND r.rater = :rater)"
    f" AND {VERDICTS} < :seats"
)
RATING = "item, rater, choice, quality_first, quality_second, first_left, seconds, rated"


class Store:
    """Pairs and ratings in one file, for any number of threads and processes at once.

    An item is finished when ``raters_per_item`` verdicts (no skips) are in. Whatever a method has
    returned from is on disk: a killed process loses nothing. The file is readable by its owner
    only. Raises UserError for a file that is no such store.
    """

    def __init__(
        self,
        path: str | Path,
        raters_per_item: int = 1,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = Path(path).absolute()
        self.raters_per_item = raters_per_item
        self._clock = clock
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            with self._transaction() as db:
                self._create(db)
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"judge.args.store={self.path}: cannot be opened as an SQLite file ({error}): "
                "name another path"
            ) from error

    def queue(self, pairs: Sequence[tuple[Text, str, str]]) -> list[Question]:
        """Ask for (prompt, first, second); a pair that is known in either order is not new."""
        now = self._clock()
        questions = []
        with self._transaction() as db:
            for prompt, first, second in pairs:
                key, stored = pair_key(prompt, first, second), json.dumps(first)
                db.execute(
                    "INSERT INTO items (key, prompt, first, second, queued, asked)"
                    " VALUES (?, ?, ?, ?, ?, ?)"
                    " ON CONFLICT (key) DO UPDATE SET asked = excluded.asked",
                    (key, prompt_json(prompt), stored, json.dumps(second), now, now),
                )
                known = db.execute("SELECT first FROM items WHERE key = ?", (key,)).fetchone()
                questions.append(Question(key, swapped=known[0] != stored))
        return questions

    def answers(self, keys: Sequence[str]) -> dict[str, Answers]:
        """The answers to each of these items, by key; an unknown key is left out.

        Settled are finished items, and those with as many answers, skips among them, to which
        every rater who is present has answered.
        """
        wanted = json.dumps(list(keys))
        with self._transaction(write=False) as db:
            present = {
                name
                for (name,) in db.execute(
                    "SELECT name FROM raters WHERE seen > ?", (self._clock() - PRESENT_S,)
                )
            }
            ids = dict(
                db.execute(
                    "SELECT id, key FROM items WHERE key IN (SELECT value FROM json_each(?))",
                    (wanted,),
                ).fetchall()
            )
            rows = db.execute(
                f"SELECT {RATING} FROM ratings WHERE item IN (SELECT id FROM items"
                " WHERE key IN (SELECT value FROM json_each(?))) ORDER BY id",
                (wanted,),
            ).fetchall()
        ratings: dict[str, list[Rating]] = {key: [] for key in ids.values()}
        for row in rows:
            ratings[ids[row[0]]].append(_rating(row))
        return {key: Answers(tuple(r), self._settled(r, present)) for key, r in ratings.items()}

    def next_item(self, rater: str) -> Item | None:
        """An item for this rater to answer, theirs for ``LEASE_S`` seconds; None if none is open.

        What they already hold comes first, then what was asked for last, then what the fewest
        others hold: people who work at once work on different items.
        """
        now = self._clock()
        values = {"rater": rater, "seats": self.raters_per_item}
        with self._transaction() as db:
            _seen(db, rater, now)
            db.execute("DELETE FROM leases WHERE expires <= ?", (now,))
            row = db.execute(
                "SELECT i.id, i.key, i.prompt, i.first, i.second"
                " FROM items i JOIN leases l ON l.item = i.id AND l.rater = :rater"
                " ORDER BY i.id LIMIT 1",
                values,
            ).fetchone()
            if row is None:
                row = db.execute(
                    "SELECT i.id, i.key, i.prompt, i.first, i.second FROM items i"
                    f" WHERE {OPEN_TO_RATER} AND {VERDICTS} + {TAKEN} < :seats"
                    f" ORDER BY i.asked DESC, {TAKEN}, i.id LIMIT 1",
                    values,
                ).fetchone()
            if row is None:
                return None
            _lease(db, row[0], rater, now)
        return _item(row)

    def item(self, number: int) -> Item:
        """Raises KeyError for an item that is not there."""
        with self._transaction(write=False) as db:
            row = db.execute(
                "SELECT id, key, prompt, first, second FROM items WHERE id = ?", (number,)
            ).fetchone()
        if row is None:
            raise KeyError(number)
        return _item(row)

    def rate(
        self,
        item: int,
        rater: str,
        choice: Choice,
        *,
        quality_first: int | None = None,
        quality_second: int | None = None,
        left: bool = True,
        seconds: float = 0.0,
    ) -> None:
        """Store a rating (see ``Rating``); a rater's second answer to an item replaces the first.

        It is taken even when the rater's lease is over: work that was done is not thrown away.
        """
        now = self._clock()
        answer = (item, rater, choice.value, quality_first, quality_second, left, seconds, now)
        with self._transaction() as db:
            _seen(db, rater, now)
            db.execute(f"REPLACE INTO ratings ({RATING}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", answer)
            db.execute("DELETE FROM leases WHERE item = ? AND rater = ?", (item, rater))

    def undo(self, rater: str) -> Rating | None:
        """Withdraw the rater's last answer and return it; None if there is none.

        Its item is handed out to them again, in place of whatever they held.
        """
        now = self._clock()
        with self._transaction() as db:
            _seen(db, rater, now)
            row = db.execute(
                f"SELECT {RATING} FROM ratings WHERE rater = ? ORDER BY id DESC LIMIT 1", (rater,)
            ).fetchone()
            if row is None:
                return None
            db.execute("DELETE FROM ratings WHERE item = ? AND rater = ?", (row[0], rater))
            db.execute("DELETE FROM leases WHERE rater = ?", (rater,))
            _lease(db, row[0], rater, now)
        return _rating(row)

    def progress(self, rater: str) -> Progress:
        """How far this rater and all have come; it also notes that the rater is present."""
        now = self._clock()
        values = {"rater": rater, "seats": self.raters_per_item}
        with self._transaction() as db:
            _seen(db, rater, now)
            return Progress(
                *db.execute(
                    f"SELECT count(*), coalesce(sum({VERDICTS} >= :seats), 0),"
                    " (SELECT count(*) FROM ratings WHERE rater = :rater),"
                    f" coalesce(sum({OPEN_TO_RATER}), 0) FROM items i",
                    values,
                ).fetchone()
            )

    def items(self) -> list[Item]:
        """Every item, in the order in which they were queued."""
        with self._transaction(write=False) as db:
            rows = db.execute("SELECT id, key, prompt, first, second FROM items ORDER BY id")
            return [_item(row) for row in rows]

    def ratings(self) -> list[Rating]:
        """Every rating, the oldest first."""
        with self._transaction(write=False) as db:
            return [_rating(row) for row in db.execute(f"SELECT {RATING} FROM ratings ORDER BY id")]

    def token(self) -> str:
        """The secret part of the page's address, drawn once per store."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO facts VALUES ('token', ?)", (secrets.token_urlsafe(18),)
            )
            token: str = db.execute("SELECT value FROM facts WHERE name = 'token'").fetchone()[0]
        return token

    def _create(self, db: sqlite3.Connection) -> None:
        if db.execute("PRAGMA user_version").fetchone()[0] == VERSION:
            return
        if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise UserError(
                f"judge.args.store={self.path}: an SQLite file, but not of this version of the "
                "human judge: name a new file"
            )
        for statement in SCHEMA.split(";\n"):
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {VERSION}")

    def _settled(self, ratings: Sequence[Rating], present: set[str]) -> bool:
        verdicts = sum(rating.choice is not Choice.SKIP for rating in ratings)
        if verdicts >= self.raters_per_item:
            return True
        answered = {rating.rater for rating in ratings}
        return len(answered) >= self.raters_per_item and present <= answered

    @contextlib.contextmanager
    def _transaction(self, *, write: bool = True) -> Iterator[sqlite3.Connection]:
        # A connection each time: threads and forked processes may not share one.
        db = sqlite3.connect(self.path, timeout=60.0, isolation_level=None)
        with contextlib.closing(db):
            db.execute("PRAGMA synchronous = EXTRA")
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            with db:
                yield db


def _seen(db: sqlite3.Connection, rater: str, now: float) -> None:
    db.execute("REPLACE INTO raters VALUES (?, ?)", (rater, now))


def _lease(db: sqlite3.Connection, item: int, rater: str, now: float) -> None:
    db.execute("REPLACE INTO leases VALUES (?, ?, ?)", (item, rater, now + LEASE_S))


def _item(row: Sequence[Any]) -> Item:
    number, key, *texts = row
    return Item(number, key, *(json.loads(text) for text in texts))


def _rating(row: Sequence[Any]) -> Rating:
    item, rater, choice, quality_first, quality_second, left, seconds, rated = row
    return Rating(
        item, rater, Choice(choice), quality_first, quality_second, bool(left), seconds, rated
    )
