"""The store of pairs and ratings: who gets what, and that nothing said is lost."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from judges.errors import UserError
from judges.human.records import Choice, Progress, first_is_left, pair_key, rater_name
from judges.human.store import LEASE_S, PRESENT_S, Store

CHECKOUT = Path(__file__).resolve().parent.parent


class Clock:
    """A clock that stands until it is moved, in seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def pairs(count: int) -> list[tuple[str, str, str]]:
    return [(f"prompt {i}", f"one {i}", f"two {i}") for i in range(count)]


def test_a_pair_is_queued_once_whichever_way_round(tmp_path):
    store = Store(tmp_path / "s.sqlite")
    chat = [{"role": "user", "content": "a"}]
    asked = store.queue([("a", "x", "y"), ("a", "y", "x"), (chat, "x", "y"), ("b", "x", "y")])
    again = store.queue([("a", "y", "x"), (chat, "x", "y")])
    assert [question.swapped for question in asked] == [False, True, False, False]
    assert asked[0].key == asked[1].key == again[0].key
    assert (again[0].swapped, again[1]) == (True, asked[2])
    assert [(i.prompt, i.first, i.second) for i in store.items()] == [
        ("a", "x", "y"),
        (chat, "x", "y"),
        ("b", "x", "y"),
    ]


def test_keys_are_apart_where_joined_texts_are_not():
    keys = [pair_key("a", "b", "c"), pair_key("ab", "", "c"), pair_key("a", "bc", "")]
    assert len(set(keys)) == 3
    one, other = {"role": "user", "content": "x"}, {"content": "x", "role": "user"}
    assert pair_key([one], "b", "c") == pair_key([other], "c", "b")


@settings(max_examples=30, deadline=None)
@given(texts=st.tuples(*[st.text(st.characters(), max_size=8)] * 3))
@example(texts=("\ud800", "a\x00b", "\udc00\ud800"))
def test_any_text_comes_back_as_it_was(tmp_path_factory, texts):
    """Among them NUL, and halves of surrogate pairs, which have no UTF-8."""
    store = Store(tmp_path_factory.mktemp("text") / "s.sqlite")
    prompt, first, second = texts
    store.queue([([{"role": "user", "content": prompt}], first, second)])
    (item,) = store.items()
    assert (item.prompt[0]["content"], item.first, item.second) == texts


def test_two_at_once_get_different_items_and_one_keeps_theirs(tmp_path, clock):
    store = Store(tmp_path / "s.sqlite", 2, clock=clock)
    store.queue(pairs(3))
    assert store.next_item("ada").id == 1
    assert store.next_item("ben").id == 2
    assert store.next_item("ada").id == 1, "what one holds comes first"
    store.rate(1, "ada", Choice.TIE)
    assert store.next_item("ada").id == 3, "2 is in ben's hands, though it has a second seat"
    store.rate(2, "ben", Choice.FIRST)
    assert store.next_item("ben").id == 1, "an item is finished before a new one is begun"


def test_a_seat_is_free_again_when_its_lease_is_over_and_late_work_counts(tmp_path, clock):
    store = Store(tmp_path / "s.sqlite", clock=clock)
    (question,) = store.queue(pairs(1))
    assert store.next_item("ada").id == 1
    clock.now += LEASE_S - 1
    assert store.next_item("ben") is None
    clock.now += 1
    assert store.next_item("ben").id == 1
    assert store.next_item("ada") is None
    store.rate(1, "ada", Choice.FIRST)
    store.rate(1, "ben", Choice.SECOND)
    assert [r.rater for r in store.answers([question.key])[question.key].ratings] == ["ada", "ben"]


def test_what_was_asked_for_last_comes_first(tmp_path, clock):
    store = Store(tmp_path / "s.sqlite", clock=clock)
    store.queue(pairs(2))
    clock.now += 1
    store.queue([("new", "x", "y")])
    assert store.next_item("ada").prompt == "new"
    clock.now += 1
    store.queue(pairs(2)[1:])
    assert store.next_item("ben").prompt == "prompt 1"


def test_a_skip_is_for_its_rater_only(tmp_path, clock):
    store = Store(tmp_path / "s.sqlite", clock=clock)
    (question,) = store.queue(pairs(1))
    store.progress("ben")
    store.next_item("ada")
    store.rate(1, "ada", Choice.SKIP)
    assert store.next_item("ada") is None
    assert not store.answers([question.key])[question.key].settled, "ben is there to answer"
    assert store.next_item("ben").id == 1
    store.rate(1, "ben", Choice.SECOND)
    answers = store.answers([question.key])[question.key]
    assert [rating.choice for rating in answers.ratings] == [Choice.SKIP, Choice.SECOND]
    assert answers.settled


@pytest.mark.parametrize(
    ("seats", "choices", "waiting", "settled"),
    [
        (1, "", 0, False),
        (1, "f", 3, True),
        (1, "s", 0, True),
        (1, "s", 1, False),
        (2, "f", 0, False),
        (2, "s", 0, False),
        (2, "fs", 0, True),
        (2, "fs", 1, False),
        (2, "ss", 0, True),
        (2, "tf", 1, True),
        (3, "fss", 0, True),
        (3, "ff", 0, False),
    ],
)
def test_settled(tmp_path, clock, seats, choices, waiting, settled):
    """f, t and s: first, tie, skip, of a rater each; others wait who have not answered."""
    store = Store(tmp_path / "s.sqlite", seats, clock=clock)
    (question,) = store.queue(pairs(1))
    for i, letter in enumerate(choices):
        choice = {"f": Choice.FIRST, "t": Choice.TIE, "s": Choice.SKIP}[letter]
        store.rate(1, f"rater {i}", choice)
    for i in range(waiting):
        store.progress(f"waiting {i}")
    assert store.answers([question.key])[question.key].settled is settled


def test_nobody_waits_for_a_rater_who_has_left(tmp_path, clock):
    store = Store(tmp_path / "s.sqlite", clock=clock)
    (question,) = store.queue(pairs(1))
    store.progress("gone")
    store.rate(1, "ada", Choice.SKIP)
    clock.now += PRESENT_S - 1
    assert not store.answers([question.key])[question.key].settled
    clock.now += 1
    assert store.answers([question.key])[question.key].settled


def test_undo_withdraws_the_last_answer_and_gives_the_item_back(tmp_path, clock):
    store = Store(tmp_path / "s.sqlite", clock=clock)
    store.queue(pairs(3))
    for choice in (Choice.FIRST, Choice.SKIP):
        item = store.next_item("ada")
        store.rate(item.id, "ada", choice, quality_first=4, left=False, seconds=2.5)
        clock.now += 1
    assert store.next_item("ada").id == 3
    withdrawn = store.undo("ada")
    assert (withdrawn.item, withdrawn.choice, withdrawn.rated) == (2, Choice.SKIP, 1001.0)
    assert (withdrawn.quality_first, withdrawn.quality_second) == (4, None)
    assert (withdrawn.left, withdrawn.seconds) == (False, 2.5)
    assert [rating.item for rating in store.ratings()] == [1]
    assert store.next_item("ben").id == 3, "2 is hers again, what she held is free"
    assert store.next_item("ada").id == 2
    assert store.undo("ada").item == 1
    assert store.undo("ada") is None
    assert store.undo("ben") is None


def test_undo_is_of_the_last_answer_though_an_earlier_one_was_changed(tmp_path, clock):
    store = Store(tmp_path / "s.sqlite", clock=clock)
    store.queue(pairs(2))
    store.rate(1, "ada", Choice.FIRST)
    store.rate(2, "ada", Choice.FIRST)
    store.rate(1, "ada", Choice.SECOND)
    assert [(r.item, r.choice) for r in store.ratings()] == [(2, "first"), (1, "second")]
    assert store.undo("ada").item == 1


def test_progress_by_hand(tmp_path, clock):
    store = Store(tmp_path / "s.sqlite", 2, clock=clock)
    assert store.progress("ada") == Progress(items=0, finished=0, mine=0, remaining=0)
    store.queue(pairs(4))
    for item, rater, choice in [
        (1, "ben", Choice.TIE),
        (1, "eve", Choice.FIRST),
        (2, "ben", Choice.FIRST),
        (2, "ada", Choice.SKIP),
        (3, "ben", Choice.SKIP),
    ]:
        store.rate(item, rater, choice)
    assert store.progress("ada") == Progress(items=4, finished=1, mine=1, remaining=2)
    assert store.progress("ben") == Progress(items=4, finished=1, mine=3, remaining=1)


RATERS = ("ada", "ben", "eve")


@settings(max_examples=60, deadline=None)
@given(
    seats=st.integers(1, 2),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["next", "next", "rate", "rate", "skip", "undo", "wait", "queue"]),
            st.sampled_from(RATERS),
        ),
        max_size=40,
    ),
)
def test_hand_out_is_as_a_plain_model_has_it(tmp_path_factory, seats, steps):
    """What is handed out is the first, by the rule that ``next_item`` states, of what is open."""
    clock = Clock()
    store = Store(tmp_path_factory.mktemp("model") / "s.sqlite", seats, clock=clock)
    store.queue(pairs(3))
    asked = dict.fromkeys((1, 2, 3), clock.now)
    answers: dict[tuple[int, str], bool] = {}  # is it a verdict? in the order of rating
    leases: dict[tuple[int, str], float] = {}
    for step, rater in steps:
        clock.now += 1
        held = [i for (i, r), end in leases.items() if r == rater and end > clock.now]
        match step:
            case "next":
                taken = Counter(i for (i, r), end in leases.items() if end > clock.now)
                verdicts = Counter(i for (i, _), verdict in answers.items() if verdict)
                free = [
                    i for i in asked if (i, rater) not in answers and verdicts[i] + taken[i] < seats
                ]
                free.sort(key=lambda i: (-asked[i], taken[i], i))
                expected = next(iter(held + free), None)
                item = store.next_item(rater)
                assert (None if item is None else item.id) == expected
                if expected is not None:
                    leases[expected, rater] = clock.now + LEASE_S
            case "rate" | "skip" if held:
                store.rate(held[0], rater, Choice.TIE if step == "rate" else Choice.SKIP)
                answers[held[0], rater] = step == "rate"
                del leases[held[0], rater]
            case "undo":
                mine = [i for i, r in answers if r == rater]
                withdrawn = store.undo(rater)
                assert (withdrawn and withdrawn.item) == (mine[-1] if mine else None)
                if mine:
                    del answers[mine[-1], rater]
                    leases = {k: v for k, v in leases.items() if k[1] != rater}
                    leases[mine[-1], rater] = clock.now + LEASE_S
            case "wait":
                clock.now += LEASE_S / 2
            case "queue":
                store.queue(pairs(1))
                asked[1] = clock.now
                assert len(store.items()) == 3
        assert [(r.item, r.rater) for r in store.ratings()] == list(answers)


def test_sides_are_a_fair_coin_that_falls_the_same_each_time():
    keys = [pair_key(*pair) for pair in pairs(4000)]
    ada = [first_is_left(key, "ada") for key in keys]
    ben = [first_is_left(key, "ben") for key in keys]
    assert ada == [first_is_left(key, "ada") for key in keys]
    deviation = 4 * (4000 / 4) ** 0.5  # four standard deviations of a binomial count
    assert abs(sum(ada) - 2000) < deviation
    assert abs(sum(ben) - 2000) < deviation
    assert abs(sum(a == b for a, b in zip(ada, ben, strict=True)) - 2000) < deviation


@pytest.mark.parametrize("first_left", [True, False])
@pytest.mark.parametrize("choice", list(Choice))
def test_what_is_seen_and_what_is_meant_are_inverses(choice, first_left):
    seen = choice.as_seen(first_left)
    assert Choice.seen(seen, first_left) is choice
    if choice is Choice.FIRST:
        assert seen == ("left" if first_left else "right")


def test_names_are_made_one():
    assert rater_name("  Ada \t Lovelace ") == "Ada Lovelace"
    assert rater_name("Zoe\u0308") == "Zo\u00eb"
    for bad in ("", "  ", "x" * 61, "a\u0000b", "a\u202eb"):
        with pytest.raises(ValueError, match="1 to 60 printable"):
            rater_name(bad)


def test_the_file_is_its_owners(tmp_path):
    store = Store(tmp_path / "new" / "folder" / "s.sqlite")
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert len(store.token()) >= 24
    assert store.token() == Store(store.path).token()
    assert store.token() != Store(tmp_path / "other.sqlite").token()


def test_a_new_file_may_be_opened_by_many_at_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        for i in range(10):
            paths = [tmp_path / f"{i}.sqlite"] * 8
            stores = list(pool.map(Store, paths))
            assert len({store.token() for store in stores}) == 1


def test_other_files_are_refused(tmp_path):
    text, other, newer = (tmp_path / name for name in ("text", "other.sqlite", "newer.sqlite"))
    text.write_text("not a database, but long enough to be read as the header of one" * 20)
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE elsewhere (x)")
    Store(newer)
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    for path in (text, other, newer, tmp_path):
        with pytest.raises(UserError, match=rf"^judge\.args\.store={path}: .*name a"):
            Store(path)
    assert text.read_text().startswith("not a database")


def spawn(program: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, args)],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_killed_writer_loses_no_answer_that_it_has_acknowledged(tmp_path):
    store = Store(tmp_path / "s.sqlite")
    store.queue(pairs(2000))
    writer = spawn(
        """
        import sys
        from judges.human.records import Choice
        from judges.human.store import Store
        store = Store(sys.argv[1])
        while item := store.next_item("ada"):
            store.rate(item.id, "ada", Choice.FIRST, quality_first=1 + item.id % 5)
            print(item.id, flush=True)
        """,
        store.path,
    )
    assert writer.stdout is not None
    acknowledged = [int(writer.stdout.readline()) for _ in range(25)]
    os.kill(writer.pid, signal.SIGKILL)
    acknowledged += [int(line) for line in writer.stdout.read().splitlines()]
    assert writer.wait() == -signal.SIGKILL
    writer.stdout.close()
    kept = {rating.item: rating.quality_first for rating in Store(store.path).ratings()}
    assert {i: kept.get(i) for i in acknowledged} == {i: 1 + i % 5 for i in acknowledged}
    assert len(kept) <= len(acknowledged) + 1
    db = sqlite3.connect(store.path)
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    db.close()


def test_processes_at_once_fill_each_seat_once(tmp_path):
    store = Store(tmp_path / "s.sqlite", 2)
    store.queue(pairs(12))
    raters = [
        spawn(
            """
            import json, sys, time
            from judges.human.records import Choice
            from judges.human.store import Store
            _, path, rater = sys.argv
            store, done = Store(path, 2), []
            while store.progress(rater).remaining:
                if item := store.next_item(rater):
                    store.rate(item.id, rater, Choice.TIE)
                    done.append(item.id)
                else:
                    time.sleep(0.01)
            print(json.dumps(done))
            """,
            store.path,
            name,
        )
        for name in RATERS
    ]
    seats = defaultdict(list)
    for name, process in zip(RATERS, raters, strict=True):
        output, _ = process.communicate()
        assert process.returncode == 0
        for item in json.loads(output):
            seats[item].append(name)
    assert {item: len(names) for item, names in seats.items()} == dict.fromkeys(range(1, 13), 2)
    assert all(len(set(names)) == 2 for names in seats.values())
    assert Counter((r.item, r.rater) for r in store.ratings()) == Counter(
        (item, name) for item, names in seats.items() for name in names
    )
