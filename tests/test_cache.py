"""A question that was asked is never asked again, whoever asks and whatever ended in between."""

from __future__ import annotations

import asyncio
import datetime
import decimal
import hashlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from judges.budget import BudgetSpent
from judges.cache import GIVEN_UP_AFTER, Cache, content_key
from judges.completing import Ask, Reply
from judges.errors import UserError
from judges.kept_replies import KeptReplies

PATIENCE = 60.0
"""Seconds for what takes none, on a busy machine."""

LONG = 1.0
"""Seconds in which somebody who does not wait would have asked."""


class Asked:
    """Answers each question with its number, and counts how often each was asked."""

    def __init__(
        self, keys: Sequence[str], seconds: float = 0.0, fails: Sequence[str] = ()
    ) -> None:
        self.keys = keys
        self.seconds = seconds
        self.fails = fails
        self.asked: list[str] = []

    async def __call__(self, indices: list[int], keep: Callable[[Mapping[int, Any]], None]) -> None:
        keys = [self.keys[index] for index in indices]
        self.asked += keys
        await asyncio.sleep(self.seconds)
        keep({i: f"to {self.keys[i]}" for i in indices if self.keys[i] not in self.fails})


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, PATIENCE))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "answers.sqlite"


# --- keys


def test_the_key_is_the_digest_of_canonical_json():
    # Written out: a key that changed would ask everything anew.
    canonical = '["judge",[1,2.5,true,null],{"a":"é\\n","b":[]}]'
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    assert content_key("judge", (1, 2.5, True, None), {"b": [], "a": "é\n"}) == digest


DISTINCT = [
    ("a", "bc"),
    ("ab", "c"),
    ("abc",),
    ("a", "b", "c"),
    (["a", "bc"],),
    (["a"], "bc"),
    ("",),
    (),
    ("", ""),
    ([],),
    ({},),
    (None,),
    ("null",),
    (True,),
    (1,),
    (1.0,),
    ("1",),
    ({1: "a"},),
    ({"1": "a"},),
    ({"": "a"},),
    ({"": ["mapping", '["","a"]']},),
    ({None: 1},),
    ({"null": 1},),
    (np.int64(3), "3"),
    ("3", np.int64(3)),
    (3, "3"),
    ("3", 3),
    (np.int32(3), "3"),
    (np.float32(0.5),),
    (np.float64(0.5),),
    (0.5,),
    (np.arange(5000),),
    (np.arange(5000) + (np.arange(5000) == 2500),),  # printed alike: 0 1 2 ... 4999
    (np.zeros((2, 3)),),
    (np.zeros((3, 2)),),
    (np.zeros(6, np.float32),),
    (b"a",),
    ("b'a'",),
    (bytearray(b"a"),),
    (datetime.date(2024, 1, 2),),
    (datetime.datetime(2024, 1, 2),),
    ("2024-01-02",),
    ("2024-01-02 00:00:00",),
    (datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC),),
    (datetime.timedelta(1),),
    (decimal.Decimal("1.0"),),
    (decimal.Decimal("1.00"),),
    ({"x", "y"},),
    (frozenset(("x", "y")),),
    (["x", "y"],),
    (10**5000,),
    (10**5000 + 1,),
    ("\ud83d",),
    ("\ud83d\ude00",),
    ("😀",),
    ("\ufffd",),
    ("é",),
    ("e\u0301",),
    ("x" * 2_000_000,),
    ("x" * 2_000_001,),
    (float("nan"),),
    (float("inf"),),
    (-0.0,),
    (0.0,),
]


def test_distinct_questions_have_distinct_keys():
    keys = {content_key(*parts): parts for parts in DISTINCT}
    assert len(keys) == len(DISTINCT)


def test_keys_are_the_same_in_another_process():
    # Sets, and the identity of equal strings, differ between processes.
    source = """
        import datetime, decimal, sys
        import numpy as np
        from judges.cache import content_key
        one = "".join(["a", "b"])
        other = one if sys.argv[1] == "shared" else "".join(["a", "b"])
        class Row(dict): pass
        print(content_key(
            {"x", "y", "z", "w"}, frozenset("abcdef"), np.arange(3.0), np.int64(2), 2**2000,
            datetime.date(2024, 1, 2), decimal.Decimal("1.5"), "\\ud800", {3: "c", "b": 1},
            np.array([one, other], dtype=object), slice(one, other),
        ))
    """
    printed = set()
    for seed, how in (("1", "shared"), ("2", "apart"), ("3", "shared")):
        command = [sys.executable, "-c", textwrap.dedent(source), how]
        env = os.environ | {"PYTHONHASHSEED": seed}
        printed.add(subprocess.run(command, env=env, capture_output=True, check=True).stdout)
    assert len(printed) == 1


FOREIGN = [np.int64(1), np.float64(1.0), np.str_("a"), datetime.date(2024, 1, 2), b"a", b""]
TEXTS = ["", "a", "b", "ab", "1", "null", "[]", '","', "\ud800", "2024-01-02", "mapping"]
NUMBERS = [0, 1, True, None, 1.0, float("nan"), 2**2000]
LEAVES = st.sampled_from([*FOREIGN, *TEXTS, *NUMBERS]) | st.text(max_size=3)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from(["", "a", "1", 1, b"a", None]), inner, max_size=2)
    ),
    max_leaves=6,
)


def same(one: Any, other: Any) -> bool:
    """Whether a judge is asked the same, defined anew."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return repr(one) == repr(other)


@settings(max_examples=500, deadline=None)
@given(VALUES, VALUES)
def test_keys_are_equal_where_questions_are(one: Any, other: Any):
    assert (content_key(one) == content_key(other)) == same(one, other)
    assert (content_key(one, other) == content_key(other, one)) == same(one, other)
    assert content_key(one) == content_key(one)


def test_what_has_no_content_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"judge\.cache: a question cannot be told .*cache=off"):
        content_key({"column": threading.Lock()})
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(UserError, match=r"judge\.cache"):
        content_key(endless)


# --- asked once


def test_once_in_one_call(path):
    keys = ["a", "b", "a", "c", "a"]
    asked = Asked(keys)
    answers = run(Cache(path).answers(keys, asked))
    assert asked.asked == ["a", "b", "c"]
    assert [answer for answer, _ in answers] == ["to a", "to b", "to a", "to c", "to a"]
    assert not any(known for _, known in answers)


def test_once_in_two_calls_on_one_loop(path):
    async def both() -> Any:
        calls = (cache.answers(["a", "b"], one), cache.answers(["b", "c"], other))
        return await asyncio.gather(*calls)

    cache = Cache(path)
    one, other = Asked(["a", "b"], seconds=0.2), Asked(["b", "c"], seconds=0.2)
    answers = run(both())
    assert one.asked == ["a", "b"]
    assert other.asked == ["c"]
    assert answers == [
        [("to a", False), ("to b", False)],
        [("to b", True), ("to c", False)],
    ]


@pytest.mark.parametrize("shared", [True, False])
def test_once_in_threads_with_loops_of_their_own(path, shared):
    def ask(at: int) -> None:
        barrier.wait()
        cache = caches[0 if shared else at]
        found[at] = run(cache.answers(keys, asked[at]))

    keys = ["a", "b", "c"]
    caches = [Cache(path) for _ in range(4)]
    asked = [Asked(keys, seconds=0.2) for _ in caches]
    found: dict[int, Any] = {}
    barrier = threading.Barrier(len(caches))
    threads = [threading.Thread(target=ask, args=(at,)) for at in range(len(caches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(key for one in asked for key in one.asked) == keys
    for answers in found.values():
        assert [answer for answer, _ in answers] == ["to a", "to b", "to c"]


PROCESS = """
import asyncio, os, sys, time
from pathlib import Path
from judges.cache import Cache

folder, me, keys = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")

async def ask(indices, keep):
    with open(folder / "asked", "a") as file:
        file.write("".join(f"{keys[i]}\\n" for i in indices))
    if me == "hangs":
        print("claimed", flush=True)
        time.sleep(600)
    for index in indices:
        await asyncio.sleep(0.01)
        keep({index: f"to {keys[index]}"})

(folder / f"ready-{me}").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
answers = asyncio.run(Cache(folder / "answers.sqlite").answers(keys, ask))
assert [answer for answer, _ in answers] == [f"to {key}" for key in keys], answers
"""


def process(folder: Path, me: str, keys: Sequence[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(folder), me, ",".join(keys)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_once_in_several_processes_at_once(tmp_path):
    keys = [f"key {number}" for number in range(30)]
    # Each its own order, so that they meet in the middle.
    orders = (keys, keys[::-1], keys[15:] + keys[:15])
    running = [process(tmp_path, str(me), order) for me, order in enumerate(orders)]
    try:
        while len(list(tmp_path.glob("ready-*"))) < len(orders):
            assert all(each.poll() is None for each in running)
            time.sleep(0.01)
        (tmp_path / "go").touch()
        assert [each.wait(PATIENCE) for each in running] == [0, 0, 0]
    finally:
        for each in running:
            each.kill()
            each.communicate()
    assert sorted((tmp_path / "asked").read_text().splitlines()) == sorted(keys)


def test_a_restart_knows_the_answers(path):
    run(Cache(path).answers(["a", "b"], Asked(["a", "b"])))
    asked = Asked(["b", "c", "a"])
    answers = run(Cache(path).answers(["b", "c", "a"], asked))
    assert asked.asked == ["c"]
    assert answers == [("to b", True), ("to c", False), ("to a", True)]


def test_unusual_texts_come_back_as_they_were(path):
    async def ask(indices: list[int], keep: Callable[[Mapping[int, Any]], None]) -> None:
        keep(dict.fromkeys(indices, told))

    told = {"reason": "\ud800 \0 é" + "x" * 1_000_000, "value": 0.1 + 0.2}
    keys = [content_key(""), content_key("\ud800"), ""]
    run(Cache(path).answers(keys, ask))
    assert run(Cache(path).answers(keys, Asked(keys))) == [(told, True)] * 3


def test_nothing_is_made_before_something_is_asked(path):
    cache = Cache(path)
    assert run(cache.answers([], Asked([]))) == []
    assert not path.parent.exists()


# --- askers that end


@contextmanager
def holding(folder: Path, keys: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that has claimed the keys, and hangs."""
    (folder / "go").touch()
    holder = process(folder, "hangs", keys)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "claimed\n"
        yield holder
    finally:
        holder.kill()
        holder.communicate()


def claims(path: Path, **changes: object) -> None:
    """Change what the file says of who is asking."""
    with sqlite3.connect(path) as connection:
        for column, value in changes.items():
            connection.execute(f"UPDATE answers SET {column} = ? WHERE answer IS NULL", (value,))
    connection.close()


def asker_of(path: Path) -> str:
    with sqlite3.connect(path) as connection:
        [(asker,)] = connection.execute("SELECT DISTINCT asked_by FROM answers").fetchall()
    connection.close()
    return str(asker)


@pytest.mark.parametrize("reaped", [True, False])
def test_who_was_killed_is_waited_for_no_more(tmp_path, reaped):
    async def ask_while_it_lives_and_dies() -> Any:
        asking = asyncio.create_task(Cache(tmp_path / "answers.sqlite").answers(keys, asked))
        await asyncio.sleep(LONG)
        assert asked.asked == ["c"]
        assert not asking.done()
        holder.send_signal(signal.SIGKILL)
        if reaped:
            holder.wait()
        return await asking

    keys = ["a", "b", "c"]
    asked = Asked(keys)
    with holding(tmp_path, ["a", "b"]) as holder:
        began = time.monotonic()
        answers = run(ask_while_it_lives_and_dies())
    assert sorted(asked.asked) == keys
    assert answers == [("to a", False), ("to b", False), ("to c", False)]
    assert time.monotonic() - began < PATIENCE < GIVEN_UP_AFTER


def test_another_process_of_that_number_is_not_the_asker(tmp_path):
    path = tmp_path / "answers.sqlite"
    asked = Asked(["a"])
    with holding(tmp_path, ["a"]):
        host, _, began = asker_of(path).rsplit(":", 2)
        assert host == socket.gethostname()
        claims(path, asked_by=f"{host}:{os.getpid()}:{began}")  # this one runs, and began later
        assert run(Cache(path).answers(["a"], asked)) == [("to a", False)]
    assert asked.asked == ["a"]


def test_who_asks_on_another_machine_is_given_an_hour(tmp_path):
    async def ask() -> Any:
        asking = asyncio.create_task(Cache(path).answers(["a"], asked))
        await asyncio.sleep(LONG)
        assert not asked.asked
        claims(path, asked_at=time.time() - GIVEN_UP_AFTER - 1.0)
        return await asking

    path = tmp_path / "answers.sqlite"
    asked = Asked(["a"])
    with holding(tmp_path, ["a"]) as holder:
        pass
    assert holder.returncode == -signal.SIGKILL
    claims(path, asked_by=f"not-{socket.gethostname()}:{os.getpid()}:1")
    assert run(ask()) == [("to a", False)]


def test_failures_are_not_kept(path):
    keys = ["a", "b", "c"]
    asked = Asked(keys, fails=["b"])
    answers = run(Cache(path).answers(keys, asked))
    assert answers == [("to a", False), (None, False), ("to c", False)]
    again = Asked(keys)
    assert run(Cache(path).answers(keys, again))[1] == ("to b", False)
    assert again.asked == ["b"]


def test_what_fails_elsewhere_is_asked_by_who_waits(path):
    async def both() -> Any:
        return await asyncio.gather(cache.answers(["a"], fails), cache.answers(["a"], asked))

    cache = Cache(path)
    fails, asked = Asked(["a"], seconds=0.2, fails=["a"]), Asked(["a"])
    assert run(both()) == [[(None, False)], [("to a", False)]]
    assert (fails.asked, asked.asked) == (["a"], ["a"])


@pytest.mark.parametrize("cancelled", [True, False])
def test_what_was_not_answered_is_free_again_and_the_rest_is_kept(path, cancelled):
    async def ask(indices: list[int], keep: Callable[[Mapping[int, Any]], None]) -> None:
        keep({indices[1]: "early"})
        if cancelled:
            stopping.set()
            await asyncio.sleep(600)
        raise ZeroDivisionError

    async def stop() -> None:
        asking = asyncio.create_task(cache.answers(keys, ask))
        if cancelled:
            await stopping.wait()
            asking.cancel()
        await asking

    keys = ["a", "b", "c"]
    cache = Cache(path)
    stopping = asyncio.Event()
    with pytest.raises(asyncio.CancelledError if cancelled else ZeroDivisionError):
        run(stop())
    for again in (cache, Cache(path)):
        asked = Asked(keys)
        expected = [("to a", again is not cache), ("early", True), ("to c", again is not cache)]
        assert run(again.answers(keys, asked)) == expected
        assert asked.asked == (["a", "c"] if again is cache else [])


def test_what_is_no_json_frees_its_question(path):
    async def ask(indices: list[int], keep: Callable[[Mapping[int, Any]], None]) -> None:
        keep(dict.fromkeys(indices, object()))

    cache = Cache(path)
    with pytest.raises(TypeError, match="JSON"):
        run(cache.answers(["a"], ask))
    assert run(cache.answers(["a"], Asked(["a"]))) == [("to a", False)]


# --- files that will not do


def garbage(path: Path) -> None:
    path.write_bytes(b"not a database, but a text that is long enough to be read as one" * 100)


def damaged(path: Path) -> None:
    keys = [f"{number:0100}" for number in range(500)]
    run(Cache(path).answers(keys, Asked(keys)))
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE answers (question TEXT, answer TEXT)")
    connection.close()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (garbage, "not an SQLite file: name another, or remove it"),
        (damaged, "a damaged SQLite file: name another, or remove it"),
        (foreign, "an SQLite file of something else: name another"),
        (Path.mkdir, "unable to open database file: it must be a file that can be read and"),
    ],
)
def test_a_file_that_is_no_cache(tmp_path, spoil, said):
    path = tmp_path / "answers.sqlite"
    spoil(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(UserError) as caught:
        run(Cache(path).answers(["a"], Asked(["a"])))
    assert str(caught.value).startswith(f"judge.cache={path}: {said}")
    assert "\n" not in str(caught.value)
    assert before == (path.read_bytes() if path.is_file() else None)


def test_a_place_where_no_file_can_be(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "answers.sqlite", Path("/proc/none/answers.sqlite")):
        with pytest.raises(UserError, match=rf"judge\.cache={path}: .* can be read and written"):
            run(Cache(path).answers(["a"], Asked(["a"])))


def test_an_empty_file_is_a_new_one(tmp_path):
    path = tmp_path / "answers.sqlite"
    path.touch()
    assert run(Cache(path).answers(["a"], Asked(["a"]))) == [("to a", False)]


# --- a model's replies


class Model:
    """Replies with the number of the request, fails where it is told to, and stops at a budget."""

    def __init__(self, fails: Sequence[str] = (), budget: int = 1_000) -> None:
        self.asked: list[list[str]] = []
        self.fails = fails
        self.budget = budget

    async def __call__(self, asks: Sequence[Ask]) -> list[Reply]:
        texts = [str(ask.messages[0]["content"]) for ask in asks]
        self.asked.append(texts)
        spent = len(self.asked) > self.budget
        await asyncio.sleep(0.0)
        if spent:
            raise BudgetSpent("tokens", 1, "1 are spent")
        return [
            Reply(None, failure="HTTP 500")
            if text in self.fails
            else Reply(f"re {text}", {"1": -0.5}, finished=False)
            for text in texts
        ]


def questions(*texts: str) -> list[Ask]:
    return [Ask(({"role": "user", "content": text},), max_tokens=8) for text in texts]


def reply(text: str) -> Reply:
    return Reply(f"re {text}", {"1": -0.5}, finished=False)


def test_replies_are_kept_and_failures_are_not(path):
    model = Model(fails=["b"])
    replies = run(KeptReplies(model, Cache(path), {"model": "m"})(questions("a", "b", "a", "b")))
    assert replies == [reply("a"), Reply(None, failure="HTTP 500")] * 2
    assert model.asked == [["a", "b"]]
    model = Model()
    kept = KeptReplies(model, Cache(path), {"model": "m"})
    assert run(kept(questions("b", "a"))) == [reply("b"), reply("a")]
    assert run(kept([])) == []
    assert model.asked == [["b"]]


def test_replies_are_those_of_one_model_and_one_question(path):
    model = Model()
    [ask] = questions("a")
    others = [
        Ask(ask.messages, max_tokens=9),
        Ask(ask.messages, 8, temperature=1.0),
        Ask(ask.messages, 8, top_logprobs=5),
        Ask(ask.messages, 8, sample=1),
    ]
    for identity in ({"model": "m"}, {"model": "n"}):
        run(KeptReplies(model, Cache(path), identity)([ask, *others]))
    assert model.asked == [["a"] * 5] * 2


def test_a_budget_that_ends_loses_one_batch_of_replies(path):
    texts = [f"question {number}" for number in range(10)]
    model = Model(budget=3)
    with pytest.raises(BudgetSpent):
        run(KeptReplies(model, Cache(path), "m", together=3)(questions(*texts)))
    assert model.asked == [texts[:3], texts[3:6], texts[6:9], texts[9:]]
    model = Model()
    replies = run(KeptReplies(model, Cache(path), "m", together=3)(questions(*texts)))
    assert replies == [reply(text) for text in texts]
    assert model.asked == [texts[9:]]
