"""What a judge may cost is never exceeded: not by a process, nor by several, nor after a crash."""

from __future__ import annotations

import asyncio
import pickle
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from judges.asking import Asker, Question
from judges.budget import Account, BudgetOptions, BudgetSpent, Spent
from judges.build import Judge
from judges.cache import Cache
from judges.calls import CallLimits
from judges.errors import UserError
from judges.functions import Functions

PATIENCE = 60.0
"""Seconds for what takes none, on a busy machine."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "judge.sqlite"


def account(path: Path, judge: str = "mine", **limits: Any) -> Account:
    return Account(path, judge, BudgetOptions(**limits))


def test_labels_are_refused_exactly_past_the_limit_and_none_is_taken_then(path):
    mine = account(path, labels=10)
    mine.order(7)
    with pytest.raises(BudgetSpent) as caught:
        mine.order(4)
    assert str(caught.value) == "judge.budget.labels=10: 7 are spent, and 4 more are asked for"
    assert caught.value.limit == "labels"
    assert mine.spent() == Spent(labels=7)
    mine.order(3)
    assert mine.spent() == Spent(labels=10)
    with pytest.raises(BudgetSpent):
        mine.order(1)


def test_what_is_given_back_can_be_ordered_again(path):
    mine = account(path, labels=10)
    mine.order(10)
    mine.give_back(4)
    assert mine.spent() == Spent(labels=6)
    mine.order(4)
    with pytest.raises(BudgetSpent):
        mine.order(1)


@pytest.mark.parametrize(
    ("limit", "under", "rest", "said"),
    [
        ({"tokens": 100}, (99, 5.0), (1, 0.0), "judge.budget.tokens=100: 100 are spent"),
        ({"usd": 0.5}, (9, 0.25), (0, 0.25), "judge.budget.usd=0.5: 0.5000 are spent"),
    ],
)
def test_tokens_and_dollars_stop_what_comes_after_them(path, limit, under, rest, said):
    mine = account(path, labels=10, **limit)
    mine.charge(*under)
    mine.check()
    mine.order(2)
    mine.charge(*rest)
    for ask in (mine.check, lambda: mine.order(1)):
        with pytest.raises(BudgetSpent) as caught:
            ask()
        assert str(caught.value) == said
    tokens, usd = under[0] + rest[0], under[1] + rest[1]
    assert mine.spent() == Spent(labels=2, tokens=tokens, usd=usd)


def test_without_limits_everything_is_counted_and_allowed(path):
    mine = account(path)
    mine.order(10**6)
    mine.charge(10**12, 1e6)
    mine.check()
    mine.order(1)
    assert mine.spent() == Spent(10**6 + 1, 10**12, 1e6)


def test_it_survives_a_restart_and_knows_the_judges_apart(path):
    account(path, labels=3).order(2)
    account(path).charge(5, 0.125)
    other = account(path, judge="other", labels=3)
    assert other.spent() == Spent()
    other.order(3)
    again = account(path, labels=3)
    assert again.spent() == Spent(2, 5, 0.125)
    with pytest.raises(BudgetSpent, match="2 are spent, and 2 more"):
        again.order(2)
    raised = account(path, labels=4)
    raised.order(2)
    assert raised.spent().labels == 4


def test_it_shares_its_file_with_answers(path):
    async def ask(indices: list[int], keep: Callable[[Any], None]) -> None:
        keep(dict.fromkeys(indices, 1))

    account(path).order(1)
    assert asyncio.run(Cache(path).answers(["a"], ask)) == [(1, False)]
    assert account(path).spent() == Spent(labels=1)


def test_nothing_is_made_before_something_is_spent(path):
    account(path, labels=1)
    assert not path.parent.exists()


def test_a_file_that_will_not_do_is_told_in_one_line(tmp_path):
    path = tmp_path / "judge.sqlite"
    path.write_text("no database" * 100)
    with pytest.raises(UserError) as caught:
        account(path, labels=1).order(1)
    assert str(caught.value) == (
        f"judge.budget: its file {path}: not an SQLite file: name another, or remove it"
    )


def test_a_failed_write_takes_nothing_and_leaves_the_account_usable(path):
    mine = account(path, labels=10)
    mine.order(1)
    with sqlite3.connect(path) as connection:
        connection.execute(
            "CREATE TRIGGER full BEFORE INSERT ON spent WHEN NEW.labels > 5 "
            "BEGIN SELECT RAISE(ABORT, 'no space'); END"
        )
    connection.close()
    with pytest.raises(UserError, match=r"judge\.budget: its file .*: no space"):
        mine.order(7)
    mine.order(2)
    assert mine.spent() == Spent(labels=3)


def test_limits_are_above_nothing():
    for limit in ({"labels": 0}, {"tokens": 0}, {"usd": 0.0}, {"usd": float("nan")}, {"euro": 1}):
        with pytest.raises(ValidationError):
            BudgetOptions(**limit)


def test_the_refusal_travels_between_processes():
    spent = pickle.loads(pickle.dumps(BudgetSpent("usd", 0.5, "0.5000 are spent")))
    assert (spent.limit, str(spent)) == ("usd", "judge.budget.usd=0.5: 0.5000 are spent")


# --- several at once

ORDERS = """
import itertools, sys, time
from pathlib import Path
from judges.budget import Account, BudgetOptions, BudgetSpent

folder, me, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
account = Account(folder / "judge.sqlite", "mine", BudgetOptions(labels=40))
(folder / f"ready-{me}").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
had = 0
try:
    for at in itertools.count():
        account.order(size)
        had += size
        account.charge(3, 0.25)
        if at % 3 == 2:
            account.give_back(1)
            had -= 1
except BudgetSpent:
    print(had)
"""


def test_processes_share_it(tmp_path):
    running = [
        subprocess.Popen(
            [sys.executable, "-c", ORDERS, str(tmp_path), str(me), str(size)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for me, size in enumerate((1, 2, 3, 5))
    ]
    try:
        while len(list(tmp_path.glob("ready-*"))) < len(running):
            assert all(each.poll() is None for each in running)
            time.sleep(0.01)
        (tmp_path / "go").touch()
        had = [int(each.communicate(timeout=PATIENCE)[0]) for each in running]
    finally:
        for each in running:
            each.kill()
            each.communicate()
    spent = account(tmp_path / "judge.sqlite").spent()
    assert spent.labels == sum(had) <= 40
    assert sum(had) > 40 - 5  # each was refused at last, also the one that orders five
    assert spent.usd == spent.tokens / 3 * 0.25


def test_threads_share_it(path):
    def order() -> None:
        try:
            while True:
                mine.order(1)
                had.append(1)
        except BudgetSpent:
            pass

    mine = account(path, labels=40)
    had: list[int] = []
    threads = [threading.Thread(target=order) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(had) == 40 == mine.spent().labels


# --- what is asked and what is counted


def asker(function: Callable[..., Any], path: Path, cached: bool = True, **limits: Any) -> Asker:
    judge = Judge(
        name="mine",
        compares=False,
        function=function,
        accepts=frozenset({"completions"}),
        needs=(),
        bound=frozenset(),
        key="judge.name",
        took=frozenset(),
        identity=("mine",),
    )
    return Asker(
        judge,
        batch_size=1,
        limits=CallLimits(concurrency=1, timeout=None, retries=0),
        functions=Functions(),
        cache=Cache(path) if cached else None,
        account=account(path, **limits),
        counts=Counter(),
    )


def questions(*texts: str) -> list[Question]:
    return [Question("prompt", (text,), {}) for text in texts]


def lengths(completions: list[str]) -> list[float]:
    if completions == ["fails"]:
        raise ValueError("it fails")
    if completions == ["spent"]:
        raise BudgetSpent("tokens", 1, "1 are spent")
    return [float(len(text)) for text in completions]


def test_failed_and_known_questions_are_free(path):
    mine = asker(lengths, path, labels=4)
    first = asyncio.run(mine.ask(questions("a", "fails", "bb", "a")))
    assert [score.value for score in first] == [1.0, None, 2.0, 1.0]
    assert account(path).spent() == Spent(labels=2)  # "a" was asked once
    again = asyncio.run(mine.ask(questions("bb", "ccc", "a")))
    assert [score.value for score in again] == [2.0, 3.0, 1.0]
    assert account(path).spent() == Spent(labels=3)
    with pytest.raises(BudgetSpent, match="3 are spent, and 2 more"):
        asyncio.run(mine.ask(questions("a", "dddd", "eeeee")))
    assert account(path).spent() == Spent(labels=3)
    assert asyncio.run(mine.ask(questions("a", "dddd")))[1].value == 4.0
    assert asyncio.run(mine.ask(questions("dddd", "bb")))[0].value == 4.0


def test_without_a_cache_a_question_counts_once_all_the_same(path):
    mine = asker(lengths, path, cached=False, labels=2)
    asyncio.run(mine.ask(questions("a", "fails", "a")))
    assert account(path).spent() == Spent(labels=1)
    asyncio.run(asker(lengths, path, cached=False, labels=2).ask(questions("a", "a", "bb")))
    with pytest.raises(BudgetSpent):
        asyncio.run(mine.ask(questions("c")))
    assert account(path).spent() == Spent(labels=2)


def test_what_was_had_before_the_end_is_kept_and_counted(path):
    with pytest.raises(BudgetSpent, match="tokens"):
        asyncio.run(asker(lengths, path).ask(questions("a", "bb", "spent", "fails")))
    assert account(path).spent() == Spent(labels=2)
    again = asker(lengths, path)
    known = asyncio.run(again.ask(questions("a", "bb")))
    assert [score.value for score in known] == [1.0, 2.0]
    assert (again.counts["cached"], again.counts["asked"]) == (2, 0)


KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from tests.test_budget import asker, questions

def judge(completions):
    if completions == ["text 3"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return [7.0]

asyncio.run(asker(judge, Path(sys.argv[1])).ask(questions(*[f"text {i}" for i in range(10)])))
"""


def test_a_killed_process_has_spent_what_it_asked_for_and_no_more(path):
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(path)])
    assert killed.returncode == -signal.SIGKILL
    # Three were had, ten were ordered: it errs by the seven that were under way.
    assert account(path).spent() == Spent(labels=10)
    again = asker(lengths, path, labels=17)
    scores = asyncio.run(again.ask(questions(*[f"text {i}" for i in range(10)])))
    assert [score.value for score in scores] == [7.0] * 3 + [6.0] * 7
    assert again.counts["cached"] == 3
    assert account(path).spent() == Spent(labels=17)
