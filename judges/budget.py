"""What a run may spend on its judge, and what it has spent: kept on disk, shared by actors."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from judges.cache import Database

_SCHEMA = """
CREATE TABLE IF NOT EXISTS spent (
    judge TEXT PRIMARY KEY,
    labels INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    usd REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS paid (
    judge TEXT NOT NULL,
    key TEXT NOT NULL,
    PRIMARY KEY (judge, key)
) WITHOUT ROWID
"""


class BudgetSpent(Exception):  # noqa: N818 (not an error: the run was told to stop there)
    """Asking on would exceed ``judge.budget.<limit>``; the message says what was spent."""

    def __init__(self, limit: str, value: float, spent: str) -> None:
        super().__init__(limit, value, spent)
        self.limit = limit
        self._told = f"judge.budget.{limit}={value:g}: {spent}"

    def __str__(self) -> str:
        return self._told


class BudgetOptions(BaseModel):
    """Where a run stops (exit 3, resumable): before its judge has cost more."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    labels: int | None = Field(
        default=None, ge=1, description="Scores or comparisons asked for; cached ones are free"
    )
    tokens: int | None = Field(
        default=None, ge=1, description="Tokens read and written by a judge that is asked over HTTP"
    )
    usd: float | None = Field(
        default=None, gt=0, description="Dollars, by the prices in judge.client"
    )


@dataclass(frozen=True, slots=True)
class Spent:
    """What a judge has cost so far."""

    labels: int = 0
    tokens: int = 0
    usd: float = 0.0


class Account:
    """Counts what one judge of a run costs, and refuses what its budget does not allow.

    Labels are counted before they are asked for. Of a process that is killed meanwhile those under
    way stay counted, so it errs by at most these, and never spends more than allowed. Tokens and
    dollars are known afterwards: requests under way when they run out are still paid for.
    """

    def __init__(self, path: Path, judge: str, budget: BudgetOptions) -> None:
        """Touches nothing: the file is made when something is spent."""
        self._database = Database(path, _SCHEMA, f"judge.budget: its file {path}")
        self._judge = judge
        self._budget = budget

    def spent(self) -> Spent:
        """So far, by every process."""
        with self._database.transaction() as connection:
            return self._read(connection)

    def order(self, labels: int) -> None:
        """Set aside so many labels. Raises BudgetSpent where fewer are left; then none are."""
        with self._database.transaction(write=True) as connection:
            spent = self._read(connection)
            limit = self._budget.labels
            if limit is not None and spent.labels + labels > limit:
                raise BudgetSpent(
                    "labels", limit, f"{spent.labels} are spent, and {labels} more are asked for"
                )
            self._refuse_spent(spent)
            self._add(connection, labels=labels)

    def give_back(self, labels: int) -> None:
        """Labels that were ordered and not had: their questions failed."""
        with self._database.transaction(write=True) as connection:
            self._add(connection, labels=-labels)

    def unpaid(self, keys: Iterable[str]) -> list[str]:
        """Those of the questions that were not paid for, each once: asking again is free."""
        with self._database.transaction() as connection:
            return [
                key
                for key in dict.fromkeys(keys)
                if not connection.execute(
                    "SELECT 1 FROM paid WHERE judge = ? AND key = ?", (self._judge, key)
                ).fetchone()
            ]

    def pay(self, keys: Iterable[str]) -> None:
        """Remember that these questions were ordered and had."""
        with self._database.transaction(write=True) as connection:
            connection.executemany(
                "INSERT OR IGNORE INTO paid VALUES (?, ?)", [(self._judge, key) for key in keys]
            )

    def check(self) -> None:
        """Raise BudgetSpent where tokens or money are used up."""
        self._refuse_spent(self.spent())

    def charge(self, tokens: int, usd: float) -> None:
        """Count what a request has cost."""
        with self._database.transaction(write=True) as connection:
            self._add(connection, tokens=tokens, usd=usd)

    def _refuse_spent(self, spent: Spent) -> None:
        tokens, usd = self._budget.tokens, self._budget.usd
        if tokens is not None and spent.tokens >= tokens:
            raise BudgetSpent("tokens", tokens, f"{spent.tokens} are spent")
        if usd is not None and spent.usd >= usd:
            raise BudgetSpent("usd", usd, f"{spent.usd:.4f} are spent")

    def _read(self, connection: sqlite3.Connection) -> Spent:
        row = connection.execute(
            "SELECT labels, tokens, usd FROM spent WHERE judge = ?", (self._judge,)
        ).fetchone()
        return Spent() if row is None else Spent(*row)

    def _add(
        self, connection: sqlite3.Connection, labels: int = 0, tokens: int = 0, usd: float = 0.0
    ) -> None:
        spent = self._read(connection)
        connection.execute(
            "INSERT OR REPLACE INTO spent VALUES (?, ?, ?, ?)",
            (self._judge, spent.labels + labels, spent.tokens + tokens, spent.usd + usd),
        )
