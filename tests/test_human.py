"""People as the judge: what they answer over HTTP is what is learned from."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from judges.build import build_judge
from judges.errors import UserError
from judges.human import judge as human
from judges.human.judge import Human
from judges.human.page import HEADERS, MAX_BODY
from judges.human.records import Choice
from judges.human.server import serve, stop
from judges.human.store import Store
from judges.interface import Score
from judges.options import AskOptions
from pipeline.human_pages import announced

CHECKOUT = Path(__file__).resolve().parent.parent
Pairs = Sequence[tuple[str, str, str]]
PAIRS = [(f"prompt {i}", f"one {i}", f"two {i}") for i in range(6)]


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch):
    monkeypatch.setattr(human, "POLL_S", 0.01)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "s.sqlite"


@contextmanager
def judge(path: Path, **args: object) -> Iterator[Human]:
    made = Human(store=str(path), port=0, **args)
    try:
        yield made
    finally:
        made.close()


def compare(made: Human, pairs: Pairs) -> list[Score]:
    prompts, first, second = (list(texts) for texts in zip(*pairs, strict=True))
    return asyncio.run(made.compare(prompts, first, second))


def page_of(path: Path) -> httpx.Client:
    """A client of a store's page, as soon as there is one."""
    file = path.with_name(f"{path.name}.url")
    while not file.exists():
        time.sleep(0.01)
    return httpx.Client(base_url=file.read_text().strip(), trust_env=False, timeout=60)


def rate_all(
    path: Path, rater: str, count: int, verdict: Callable[[dict[str, str]], dict[str, object]]
) -> None:
    """Answer ``count`` items; ``verdict`` gets what the rater sees."""
    with page_of(path) as page:
        state = page.post("api/next", json={"rater": rater}).json()
        while count:
            if item := state["item"]:
                answer = {"rater": rater, "item": item["id"], "seconds": 1.5, **verdict(item)}
                state = page.post("api/rate", json=answer).raise_for_status().json()
                count -= 1
            else:
                time.sleep(0.01)
                state = page.post("api/next", json={"rater": rater}).json()


def prefers(text: str, **qualities: int) -> Callable[[dict[str, str]], dict[str, object]]:
    """Prefers the completion that starts with the text, and gives qualities by first words."""

    def verdict(item: dict[str, str]) -> dict[str, object]:
        side = "left" if item["left"].startswith(text) else "right"
        given = {s: qualities.get(item[s].split()[0]) for s in ("left", "right")}
        return {"verdict": side, **given}

    return verdict


def says(verdict: str) -> Callable[[dict[str, str]], dict[str, object]]:
    return lambda _: {"verdict": verdict}


def test_answers_over_http_become_probabilities(path):
    with judge(path) as made, ThreadPoolExecutor() as pool:
        rater = pool.submit(rate_all, path, "ada", 6, prefers("one", one=4, two=2))
        scores = compare(made, PAIRS)
        rater.result()
    assert scores == [Score(1.0, "ada: first; quality 4 against 2")] * 6
    stored = made.store.ratings()
    assert {(r.quality_first, r.quality_second, r.seconds) for r in stored} == {(4, 2, 1.5)}
    assert {r.left for r in stored} == {True, False}, "first was on both sides"


def test_two_raters_at_once(path):
    """Ada prefers one, ben says tie, and a third verdict is not waited for."""
    with judge(path, raters_per_item=2) as made, ThreadPoolExecutor() as pool:
        ada = pool.submit(rate_all, path, "ada", 6, prefers("one", one=5))
        ben = pool.submit(rate_all, path, "ben", 6, says("tie"))
        scores = compare(made, PAIRS)
        ada.result(), ben.result()
    assert {score.value for score in scores} == {0.75}
    reasons = {score.reason for score in scores}
    assert reasons <= {
        "ada: first, ben: tie; quality 5 against –",
        "ben: tie, ada: first; quality 5 against –",
    }


def test_waiting_leaves_the_loop_free_and_can_be_cancelled(path, monkeypatch):
    """It looks again after an hour: a loop that it blocked would not come back before."""
    monkeypatch.setattr(human, "POLL_S", 3600.0)

    async def ask_for_a_moment(made: Human) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(made.compare(["p"], ["a"], ["b"]), timeout=1.0)

    made = Human(store=str(path), serve=False)
    asyncio.run(ask_for_a_moment(made))
    assert [item.prompt for item in made.store.items()] == ["p"]


def test_swapped_pairs_find_the_same_item_and_the_complement(path):
    store = Store(path, 3)
    store.queue(PAIRS[:1])
    for rater, choice, quality in [("a", "first", 5), ("b", "first", 4), ("c", "tie", 4)]:
        store.rate(1, rater, Choice(choice), quality_first=quality, quality_second=1)
    made = Human(store=str(path), raters_per_item=3, wait=0, serve=False)
    prompt, one, two = PAIRS[0]
    asked, turned, chat = compare(
        made,
        [PAIRS[0], (prompt, two, one), (prompt, [{"content": two}], [{"content": one}])],
    )
    assert asked == Score(2.5 / 3, "a: first, b: first, c: tie; quality 4.33 against 1")
    assert turned.value == 1.0 - asked.value
    assert turned.reason == "a: second, b: second, c: tie; quality 1 against 4.33"
    assert chat == turned
    assert len(store.items()) == 1


def test_what_is_not_answered_in_time_is_declined_and_read_when_it_is(path):
    made = Human(store=str(path), raters_per_item=2, wait=0.05, serve=False)
    made.store.queue(PAIRS[:1])
    made.store.rate(1, "ada", Choice.SECOND)
    declined = compare(made, PAIRS[:2])
    assert declined == [
        Score(None, "not labelled yet (1 of 2 raters)", declined=True),
        Score(None, "not labelled yet", declined=True),
    ]
    assert [Score.read(score) for score in declined] == declined
    for item in (1, 2):
        made.store.rate(item, "ben", Choice.SECOND)
    made.store.rate(2, "ada", Choice.FIRST)
    assert [score.value for score in compare(made, PAIRS[:2])] == [0.0, 0.5]


def test_what_everybody_skips_is_declined(path):
    with judge(path) as made, ThreadPoolExecutor() as pool:
        rater = pool.submit(rate_all, path, "ada", 2, says("skip"))
        scores = compare(made, PAIRS[:2])
        rater.result()
    assert scores == [Score(None, "skipped by ada", declined=True)] * 2


def test_the_same_completion_twice_is_a_tie_and_nobody_is_asked(path):
    made = Human(store=str(path), wait=0, serve=False)
    same, other = compare(made, [("p", "x", "x"), ("p", "x", "y")])
    assert same == Score(0.5, "the same completion twice")
    assert other.declined
    assert [item.second for item in made.store.items()] == ["y"]


def test_answered_pairs_are_not_served_again(path):
    store = Store(path)
    store.queue(PAIRS[:1])
    store.rate(1, "ada", Choice.FIRST)
    with judge(path) as made:
        assert compare(made, PAIRS[:1])[0].value == 1.0
        assert not path.with_name("s.sqlite.url").exists()


def test_the_address_is_announced_kept_secret_and_taken_away(path, capsys):
    store = Store(path)
    server = serve(store, "127.0.0.1", 0)
    assert serve(Store(path), "127.0.0.1", 0) is server, "one server for one store"
    assert server.url_file == path.with_name("s.sqlite.url")
    assert server.url_file.read_text() == f"{server.url}\n"
    assert stat.S_IMODE(server.url_file.stat().st_mode) == 0o600
    announced = capsys.readouterr()
    assert announced.out == ""
    assert announced.err.splitlines() == [f"human judge: pairs are waiting for you at {server.url}"]
    assert store.token() in server.url
    stop(store)
    assert "human-judge" not in {thread.name for thread in threading.enumerate()}
    assert not server.url_file.exists()
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url, trust_env=False)
    again = serve(store, "127.0.0.1", 0)
    stop(store)
    assert again.url.split("/")[3] == server.url.split("/")[3], "a bookmark outlives a restart"


def test_one_process_serves_a_store_and_another_takes_over(path):
    program = (
        "import sys; from judges.human.server import serve; from judges.human.store import Store; "
        "print(serve(Store(sys.argv[1]), '127.0.0.1', 0).url, flush=True); sys.stdin.read()"
    )
    store = Store(path)
    first = subprocess.Popen(
        [sys.executable, "-c", program, path],
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    url = first.stdout.readline().strip()
    port = httpx.URL(url).port
    assert serve(store, "127.0.0.1", port) is None
    assert serve(store, "127.0.0.1", 0) is None
    other = Store(path.with_name("other.sqlite"))
    with pytest.raises(UserError, match=f"port={port}"):
        serve(other, "127.0.0.1", port)
    path.with_name("other.sqlite.url").write_text(url)
    assert serve(other, "127.0.0.1", 0).url != url, "that is another store's page"
    stop(other)
    first.kill()
    first.communicate()
    assert path.with_name("s.sqlite.url").read_text().strip() == url, "it could not clean up"
    assert serve(store, "127.0.0.1", port).url == url
    stop(store)


def test_a_taken_port_is_the_users_to_mend(path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        made = Human(store=str(path), port=port)
        with pytest.raises(
            UserError, match=rf"^judge\.args\.port={port}: .*or 0 for any"
        ) as raised:
            compare(made, PAIRS)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"^judge\.args\.host=no\.such\.host\.invalid: "):
        compare(Human(store=str(path), host="no.such.host.invalid"), PAIRS)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ({"raters_per_item": 0}, "judge.args.raters_per_item=0: write 1 or more"),
        ({"raters_per_item": True}, "judge.args.raters_per_item=True: write 1 or more"),
        ({"port": 70000}, "judge.args.port=70000: write 0 (any free one) to 65535"),
        ({"wait": -1}, "judge.args.wait=-1: write seconds, or null to wait for all"),
        ({"wait": float("nan")}, "judge.args.wait=nan: write seconds, or null to wait for all"),
    ],
)
def test_senseless_args_are_refused(path, args, line):
    with pytest.raises(UserError) as raised:
        Human(store=str(path), **args)
    assert str(raised.value) == line


def test_it_is_built_by_its_name(path):
    built = build_judge("human", {"store": str(path), "wait": 0, "serve": False})
    assert (built.compares, built.needs) == (True, ())
    (score,) = asyncio.run(built.ask({}, prompts=["p"], first=["a"], second=["b"]))
    assert score.declined


@pytest.fixture
def page(path) -> Iterator[httpx.Client]:
    """A client of a page with one pair, whose first completion comes to the left of ada."""
    store = Store(path)
    store.queue([(f"p{i}", "one", "two") for i in range(8)])
    serve(store, "127.0.0.1", 0)
    with page_of(path) as client:
        yield client
    stop(store)


ADA = {"rater": "ada"}


def test_every_answer_carries_the_headers_that_keep_the_page_shut(page):
    root = page.base_url.join("/")
    answers = [page.get(""), page.get("page.js"), page.get(root), page.post("api/next", json={})]
    assert [answer.status_code for answer in answers] == [200, 200, 404, 422]
    for answer in answers:
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    policy = HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
    assert "unsafe" not in policy
    kinds = [answer.headers["content-type"].split(";")[0] for answer in answers[:2]]
    assert kinds == ["text/html", "text/javascript"]


def test_the_page_asks_nothing_of_other_machines():
    folder = Path(human.__file__).parent / "static"
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["page.css", "page.html", "page.js"]
    for file in files:
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "//" not in text.replace("// ", ""), file.name
        assert "innerHTML" not in text


def test_without_the_token_there_is_nothing(page):
    for url in ("/", "/page.js", "/api/agreement", "/wrong/", "/wrong/api/agreement"):
        assert page.get(page.base_url.join(url)).status_code == 404
    assert page.post(page.base_url.join("/wrong/api/next"), json=ADA).status_code == 404
    bare = page.get(str(page.base_url).rstrip("/"))
    assert (bare.status_code, bare.headers["location"]) == (307, page.base_url.path)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:9999"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Host": "localhost:9999", "Origin": "http://localhost:9999"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
    ],
)
def test_only_our_own_page_may_ask(page, headers, status):
    headers = {"Content-Type": "application/json", **headers}
    assert page.post("api/next", content=json.dumps(ADA), headers=headers).status_code == status


GOOD = {"rater": "ada", "item": 1, "verdict": "left", "left": 5, "right": None, "seconds": 1.0}


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, 200),
        ({"verdict": "first"}, 422),
        ({"left": 0}, 422),
        ({"right": 6}, 422),
        ({"left": "5"}, 422),
        ({"left": 4.5}, 422),
        ({"seconds": -1}, 422),
        ({"seconds": 1e9}, 422),
        ({"rater": " "}, 422),
        ({"rater": "x" * 61}, 422),
        ({"more": 1}, 422),
        ({"item": 99}, 404),
        ({"item": 2**70}, 422),
        ({"rater": "x" * MAX_BODY}, 413),
    ],
)
def test_only_answers_that_make_sense_are_stored(page, path, change, status):
    answer = page.post("api/rate", json=GOOD | change)
    assert answer.status_code == status
    assert len(Store(path).ratings()) == (status == 200)
    if status != 200:
        assert list(answer.json()) == ["error"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"rater": 1}', b"null"])
def test_garbage_is_refused(page, body):
    answer = page.post("api/next", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, list(answer.json())) == (422, ["error"])


def test_answers_are_posted_only(page, path):
    for question in ("next", "rate", "undo", "progress"):
        assert page.get(f"api/{question}").status_code == 405
    assert Store(path).ratings() == []


def test_an_answer_is_stored_as_it_was_meant_and_can_be_withdrawn(page, path):
    state = page.post("api/next", json=ADA).json()
    assert state["progress"] == {"items": 8, "finished": 0, "mine": 0, "remaining": 8}
    for done in range(8):
        item = state["item"]
        assert set(item) == {"id", "prompt", "left", "right"}, "no trace of which is first"
        answer = GOOD | {"item": item["id"], "verdict": "right", "left": 1, "right": 4}
        state = page.post("api/rate", json=answer).json()
        rating = Store(path).ratings()[-1]
        assert rating.left == (item["left"] == "one")
        assert rating.choice == ("second" if rating.left else "first")
        assert (rating.quality_first, rating.quality_second) == ((1, 4) if rating.left else (4, 1))
        assert state["progress"]["mine"] == done + 1
    assert len({rating.left for rating in Store(path).ratings()}) == 2
    assert state["item"] is None
    undone = page.post("api/undo", json=ADA).json()
    assert undone["item"] == item | {"withdrawn": {"verdict": "right", "left": 1, "right": 4}}
    assert len(Store(path).ratings()) == 7
    assert "withdrawn" not in page.post("api/next", json=ADA).json()["item"]


def test_half_a_surrogate_pair_is_shown_all_the_same(path):
    store = Store(path)
    store.queue([([{"role": "user", "content": None}, {"content": ["x"]}], "a\ud800", "b")])
    serve(store, "127.0.0.1", 0)
    with page_of(path) as client:
        item = json.loads(client.post("api/next", json=ADA).text)["item"]
    stop(store)
    assert {item["left"], item["right"]} == {"a\ud800", "b"}
    assert [turn["content"] for turn in item["prompt"]] == ["null", '[\n  "x"\n]']


def test_agreement_over_http(page, path):
    store = Store(path)
    for item, rater, choice in [(1, "ada", "first"), (1, "ben", "tie"), (2, "ada", "first")]:
        store.rate(item, rater, Choice(choice))
    agreed = page.get("api/agreement").json()
    assert (agreed["items"], agreed["shared"], agreed["preference"]) == (2, 1, 0.0)
    assert [(r["rater"], r["tie_rate"]) for r in agreed["raters"]] == [("ada", 0.0), ("ben", 1.0)]


def test_many_at_once_are_all_heard(page, path):
    names = [f"rater {i}" for i in range(8)]
    gate = threading.Barrier(len(names))

    def answer(name: str) -> int:
        gate.wait()
        item = page.post("api/next", json={"rater": name}).json()["item"]
        gate.wait()  # the reply to an answer hands out the next item
        page.post("api/rate", json=GOOD | {"rater": name, "item": item["id"]}).raise_for_status()
        return item["id"]

    with ThreadPoolExecutor(len(names)) as pool:
        items = list(pool.map(answer, names))
    assert sorted(items) == list(range(1, 9)), "each had an item of their own"
    assert {(r.item, r.rater) for r in Store(path).ratings()} == set(zip(items, names, strict=True))


def test_a_page_is_announced_also_for_a_member_of_a_vote(tmp_path):
    said: list[str] = []
    members = ["sentiment", {"name": "human", "alias": "us", "args": {"port": 0}}]
    judges = {"vote": AskOptions(name="vote", args={"members": members})}
    (tmp_path / "us.sqlite.url").write_text("http://127.0.0.1:1/token/\n")
    with announced(judges, tmp_path, said.append):
        deadline = time.monotonic() + 30
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
    assert said == ["people are asked to judge at http://127.0.0.1:1/token/"]
