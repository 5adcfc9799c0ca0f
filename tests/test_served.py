"""Reward models behind HTTP: what a server does to one request is no other completion's affair."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from judges.build import build_judge
from judges.calls import CallLimits, Calls
from judges.errors import UserError
from judges.interface import Score
from judges.served import HttpReward, VllmReward

SECRET = "sk-7Vq2mN0tTh15K3y"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, dict(self.headers), body))
        self.server.answer(self, body)

    def reply(self, content: Any, status: int = 200, **headers: str) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content_Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def cut_off(self) -> None:
        """Half an answer, then the connection is gone."""
        self.send_response(200)
        self.send_header("Content-Length", "40")
        self.end_headers()
        self.wfile.write(b'{"scores": [')
        self.close_connection = True

    def hang(self) -> None:
        self.server.ending.wait()
        self.close_connection = True

    def drip(self) -> None:
        """A byte every now and then: no wait for the next one is ever long."""
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        try:
            while not self.server.ending.wait(0.02):
                self.wfile.write(b" ")
                self.wfile.flush()
        except OSError:
            pass
        self.close_connection = True

    def log_message(self, *_: Any) -> None: ...


class Server(ThreadingHTTPServer):
    """Answers as the test says; ``asked`` has each request's path, headers and body."""

    daemon_threads = True
    answer: Callable[[Handler, Any], None]

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/score"
        self.ending = threading.Event()
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.connections = 0
        self.answer = lengths

    def handle_error(self, *_: Any) -> None:
        """Clients hang up; that is their affair."""

    def in_turn(self, *answers: Callable[[Handler, Any], None]) -> None:
        left = iter(answers)
        self.answer = lambda handler, body: next(left)(handler, body)


@pytest.fixture
def server() -> Iterator[Server]:
    """Each test's own: a request that a test has left may come late."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.ending.set()
    server.shutdown()
    thread.join()
    server.server_close()


def lengths(handler: Handler, body: Any) -> None:
    """A well-behaved service: a completion's score is its length."""
    handler.reply({"scores": [float(len(c)) for c in body["completions"]]})


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)

    def calls(self, **limits: Any) -> Calls:
        options = {"timeout": 30.0, "retries": 2, "backoff": 0.5} | limits
        return Calls(CallLimits(**options), sleep=self.sleep, clock=lambda: self.now)


def calls(**limits: Any) -> Calls:
    return Clock().calls(**limits)


def score(
    judge: HttpReward | VllmReward, *completions: Any, prompts=None, **columns
) -> list[Score]:
    asked = ["p"] * len(completions) if prompts is None else prompts
    return asyncio.run(judge.score(asked, list(completions), **columns))


def reasons(judge: HttpReward | VllmReward, *completions: str) -> list[str | None]:
    scores = score(judge, *completions)
    assert all(score.value is None for score in scores if score.reason)
    return [score.reason for score in scores]


def test_prompts_completions_and_columns_go_in_batches_and_come_back_in_order(server):
    judge = HttpReward(calls(), server.url, batch_size=2)
    chat = [{"role": "user", "content": "é"}]
    scores = score(judge, "a", "bb", "ccc", prompts=["p", chat, "q"], answer=[1, None, "x"])
    assert scores == [Score(1.0), Score(2.0), Score(3.0)]
    bodies = sorted((body for _, _, body in server.asked), key=lambda body: -len(body["prompts"]))
    assert bodies == [
        {"answer": [1, None], "prompts": ["p", chat], "completions": ["a", "bb"]},
        {"answer": ["x"], "prompts": ["q"], "completions": ["ccc"]},
    ]
    assert {path for path, _, _ in server.asked} == {"/score"}


def test_nothing_asks_nothing(server):
    assert score(HttpReward(calls(), server.url)) == []
    assert score(VllmReward(calls(), server.url, "m")) == []
    assert server.asked == []


def test_numbers_null_and_what_is_neither(server):
    raw = b'{"scores": [1, -0.5, true, null, NaN, Infinity, "7", [1], 1e999]}'
    server.answer = lambda handler, _: handler.reply(raw)
    scores = score(HttpReward(calls(), server.url), *"abcdefghi")
    assert scores == [
        Score(1.0),
        Score(-0.5),
        Score(1.0),
        Score(None, "returned None"),
        Score(None, "returned NaN"),
        Score(None, "returned an infinite number"),
        Score(None, "returned text"),
        Score(None, "returned a list"),
        Score(None, "returned an infinite number"),
    ]


WRONG = {
    "html": (b"<html>Bad day</html>", "no JSON from {url} (text/html): <html>Bad day</html>"),
    "broken": (b'{"scores": [1.0', 'no JSON from {url} (text/html): {{"scores": [1.0'),
    "bytes": (b"\xff\xfe\x00", None),
    "empty": (b"", "no JSON from {url} (text/html): "),
    "deep": (b"[" * 100_000, f"no JSON from {{url}} (text/html): {'[' * 199}…"),
    "long": (b'["' + b"x" * 9_000, f'no JSON from {{url}} (text/html): ["{"x" * 197}…'),
    "long list": (b"[" + b"1, " * 9_000 + b"1]", None),
    "digits": (b'{"scores": [' + b"1" * 10_000 + b"]}", None),
    "few": (b'{"scores": []}', "answered 0 scores for 1 completions"),
    "many": (b'{"scores": [1, 2]}', "answered 2 scores for 1 completions"),
    "number": (b"0.7", "answered no list of scores: 0.7"),
    "null": (b"null", "answered no list of scores: null"),
    "bare": (b"[0.7]", "answered no list of scores: [0.7]"),
    "text": (b'{"scores": "7"}', 'answered no list of scores: {{"scores": "7"}}'),
    "other": (b'{"score": [7]}', 'answered no list of scores: {{"score": [7]}}'),
}


def test_a_wrong_answer_is_its_own_batch_s_alone_and_not_asked_again(server):
    def answer(handler: Handler, body: Any) -> None:
        [completion] = body["completions"]
        if completion in WRONG:
            handler.reply(WRONG[completion][0], Content_Type="text/html")
        else:
            lengths(handler, body)

    server.answer = answer
    completions = [*WRONG, "fine"]
    scores = score(HttpReward(calls(), server.url, batch_size=1), *completions)
    assert scores[-1] == Score(4.0)
    for said, (name, (_, reason)) in zip(scores[:-1], WRONG.items(), strict=True):
        assert said.value is None
        assert said.reason
        assert len(said.reason) < 320
        if reason is not None:
            assert said.reason.strip() == reason.format(url=server.url).strip(), name
    assert len(server.asked) == len(completions)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["scores", "data", "score", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
garbage = st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode())


def test_garbage_never_crashes_and_is_a_score_only_where_it_says_one(server):
    http = HttpReward(calls(), server.url)
    vllm = VllmReward(calls(), server.url, "m", label=0)
    with asyncio.Runner() as runner:

        @settings(max_examples=200, deadline=None)
        @given(garbage, st.sampled_from([http, vllm]))
        def check(raw, judge):
            server.answer = lambda handler, _: handler.reply(raw)
            [said] = runner.run(judge.score(["p"], ["a"]))
            read = Score.read(said)
            if read.value is None:
                assert read.reason
            else:
                assert math.isfinite(read.value)
                assert set(json.loads(raw)) & {"scores", "data"}

        check()


def test_a_server_that_is_busy_is_asked_again_when_it_said(server):
    server.in_turn(
        lambda handler, _: handler.reply({"error": "slow down"}, 429, Retry_After="7"), lengths
    )
    clock = Clock()
    limited = clock.calls()
    assert score(HttpReward(limited, server.url), "abc") == [Score(3.0)]
    assert len(server.asked) == 2
    assert clock.now >= 7.0
    assert limited.counts["retries"] == 1


def test_an_error_of_the_server_is_tried_again_and_then_told(server):
    down = lambda handler, _: handler.reply({"error": "out of memory"}, 503)  # noqa: E731
    server.in_turn(down, down, lengths)
    judge = HttpReward(calls(), server.url)
    assert score(judge, "abc") == [Score(3.0)]
    server.in_turn(down, down, down)
    reason = f'HTTP 503 from {server.url}: {{"error": "out of memory"}} (tried 3 times)'
    assert reasons(judge, "a", "b") == [reason, reason]


@pytest.mark.parametrize("status", [302, 400, 401, 404, 422])
def test_a_refusal_is_told_at_once(server, status):
    server.answer = lambda handler, _: handler.reply({"detail": "no"}, status, Location="/x")
    assert reasons(HttpReward(calls(), server.url), "a") == [
        f'HTTP {status} from {server.url}: {{"detail": "no"}}'
    ]
    assert len(server.asked) == 1


def test_a_connection_that_breaks_in_the_middle_is_tried_again(server):
    server.in_turn(lambda handler, _: handler.cut_off(), lengths)
    assert score(HttpReward(calls(), server.url), "abc") == [Score(3.0)]
    assert len(server.asked) == 2


def test_nobody_there():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but it does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/score?key={SECRET}"
        [reason] = reasons(HttpReward(calls(), url), "a")
    assert reason is not None
    assert reason.startswith(f"ConnectError at {url.partition('?')[0]}: ")
    assert reason.endswith("(tried 3 times)")


def test_a_server_that_hangs_or_drips_is_left_at_the_deadline(server):
    def answer(handler: Handler, body: Any) -> None:
        {"hang": handler.hang, "drip": handler.drip}.get(
            body["completions"][0], lambda: lengths(handler, body)
        )()

    server.answer = answer
    limited = calls(timeout=2.0, retries=0)
    scores = score(HttpReward(limited, server.url, batch_size=1), "hang", "fine", "drip")
    assert scores[1] == Score(4.0)
    for said in (scores[0], scores[2]):
        assert said.value is None
        assert "timed out after 2 s" in said.reason
    assert limited.counts["timeouts"] == 2


def test_a_connection_is_kept_and_a_new_event_loop_gets_its_own(server):
    judge = HttpReward(calls(concurrency=1), server.url)

    async def ask_thrice() -> None:
        for _ in range(3):
            assert await judge.score(["p"], ["abc"]) == [Score(3.0)]

    asyncio.run(ask_thrice())
    assert server.connections == 1
    asyncio.run(ask_thrice())
    assert server.connections == 2


@pytest.mark.parametrize("unsendable", [math.nan, {1, 2}, "\ud800"])
def test_what_json_cannot_say_is_its_own_batch_s_alone(server, unsendable):
    judge = HttpReward(calls(), server.url, batch_size=1)
    scores = score(judge, "a", "bb", column=[unsendable, 1])
    assert scores[0].value is None
    assert "Error at http://" in scores[0].reason
    assert scores[1] == Score(2.0)
    assert len(server.asked) == 1


def test_keys_come_from_the_environment_and_show_nowhere(server, monkeypatch, caplog):
    monkeypatch.setenv("TEST_REWARD_KEY", f" {SECRET}\n")
    monkeypatch.setenv("TEST_REWARD_TENANT", f'ab "quoted" {SECRET[::-1]}')
    keys = {"api_key_env": "TEST_REWARD_KEY", "headers_env": {"X-Tenant": "TEST_REWARD_TENANT"}}
    judge = HttpReward(calls(retries=0), server.url, batch_size=1, **keys)

    def answer(handler: Handler, body: Any) -> None:
        """Says back all that it was told, in every way there is."""
        told = f"{handler.headers['Authorization']} {handler.headers['X-Tenant']}"
        match body["completions"]:
            case ["refused"]:
                handler.reply({"error": told}, 401)
            case ["failed"]:
                handler.reply(told.encode(), 500)
            case ["html"]:
                handler.reply(told.encode() * 9, Content_Type=told)
            case ["bare"]:
                handler.reply([SECRET])
            case ["late"]:
                handler.reply(b"x" * 190 + told.encode())
            case _:
                handler.reply({"told": told})

    server.answer = answer
    with caplog.at_level(logging.INFO):
        said = reasons(judge, "refused", "failed", "html", "bare", "late", "other")
        vllm = VllmReward(calls(), server.url, "m", api_key_env="TEST_REWARD_KEY")
        server.answer = lambda handler, _: handler.reply({"told": handler.headers["Authorization"]})
        said += reasons(vllm, "a")
    assert all(said)
    for _, headers, _ in server.asked:
        assert headers["Authorization"] == f"Bearer {SECRET}"
    assert server.asked[0][1]["X-Tenant"] == f'ab "quoted" {SECRET[::-1]}'
    everything = " ".join([*map(str, said), caplog.text, repr(judge), repr(vllm)])
    for secret in (SECRET, SECRET[::-1], SECRET[:9], "quoted"):
        assert secret not in everything


def refused(make: Callable[..., Any], *args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        make(calls(), *args, **options)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    return str(caught.value)


def test_what_cannot_work_is_refused_in_a_line(server, monkeypatch):
    monkeypatch.delenv("TEST_REWARD_KEY", raising=False)
    missing = refused(HttpReward, server.url, api_key_env="TEST_REWARD_KEY")
    assert missing.startswith("api_key_env=TEST_REWARD_KEY: the environment has no such variable")
    by_mistake = refused(HttpReward, server.url, api_key_env=SECRET)
    assert by_mistake.startswith("api_key_env: the environment has no such variable")
    header = refused(HttpReward, server.url, headers_env={"X": "TEST_REWARD_KEY"})
    assert header.startswith("headers_env.X=TEST_REWARD_KEY: ")
    monkeypatch.setenv("TEST_REWARD_KEY", f"{SECRET}\n{SECRET}")
    assert "no header can carry" in refused(
        VllmReward, server.url, "m", api_key_env="TEST_REWARD_KEY"
    )
    assert "batch_size=0" in refused(HttpReward, server.url, batch_size=0)
    assert refused(HttpReward, f"http://me:{SECRET}@there/x").startswith("url: it holds a user")
    for url in ("there:8000/x", "ftp://there", "/x", "", "http://there:port"):
        assert refused(HttpReward, url).startswith("url")
    assert "write auto, text, chat, pair" in refused(VllmReward, server.url, "m", format="chatty")
    assert "write the label's index" in refused(VllmReward, server.url, "m", label="good")


def pooled(*outputs: Any) -> Callable[[Handler, Any], None]:
    """What vLLM's /pooling answers to one question after the other."""
    left = iter(outputs)

    def answer(handler: Handler, _: Any) -> None:
        data = [{"index": 0, "object": "pooling", "data": next(left)}]
        handler.reply({"id": "pooling-1", "object": "list", "model": "m", "data": data})

    return answer


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_vllm_is_asked_for_raw_outputs_of_texts_and_chats(server, suffix):
    server.answer = pooled([0.25], [-1.5])
    url = server.url.removesuffix("/score")
    judge = VllmReward(calls(concurrency=1), url + suffix, "m")
    chat = [{"role": "user", "content": "q"}]
    assert score(judge, "b", "c", prompts=["a ", chat]) == [Score(0.25), Score(-1.5)]
    always = {"model": "m", "use_activation": False}
    assert [(path, body) for path, _, body in server.asked] == [
        ("/pooling", {"input": "a b", **always}),
        ("/pooling", {"messages": [*chat, {"role": "assistant", "content": "c"}], **always}),
    ]


def test_vllm_formats(server):
    url = server.url.removesuffix("/score")
    chat = [{"role": "user", "content": "q"}]
    server.answer = pooled([1], [2])
    assert score(VllmReward(calls(), url, "m", format="chat"), "b") == [Score(1.0)]
    assert score(VllmReward(calls(), url, "m", format="text"), "b", prompts=[chat]) == [Score(2.0)]
    server.answer = lambda handler, _: handler.reply({"data": [{"index": 0, "score": 0.5}]})
    assert score(VllmReward(calls(), url, "m", format="pair"), "b", prompts=[chat]) == [Score(0.5)]
    asked = [(path, body) for path, _, body in server.asked]
    assert [path for path, _ in asked] == ["/pooling", "/pooling", "/score"]
    messages = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "b"}]
    assert asked[0][1]["messages"] == messages
    assert asked[1][1]["input"] == "q\nb"
    assert (asked[2][1]["text_1"], asked[2][1]["text_2"]) == ("q", "b")


def test_vllm_labels_and_models_that_score_every_token(server):
    url = server.url
    server.answer = pooled([1.0, 2.0, -1.0], [[0.1], [0.7]], [[5.0, 6.0], [1.0, 1.0 + math.log(3)]])
    [log_odds] = score(VllmReward(calls(), url, "m", label=1), "a")
    assert log_odds.value == pytest.approx(2.0 - math.log(math.exp(1.0) + math.exp(-1.0)))
    assert score(VllmReward(calls(), url, "m"), "a") == [Score(0.7)]
    [last] = score(VllmReward(calls(), url, "m", label=0), "a")
    assert last.value == pytest.approx(-math.log(3))


def test_vllm_logits_far_apart(server):
    server.answer = pooled([900.0, -900.0, -900.0], [-900.0, 900.0, 0.0])
    judge = VllmReward(calls(concurrency=1), server.url, "m", label=0)
    far, near = score(judge, "a", "b")
    assert far.value == pytest.approx(1800.0 - math.log(2))
    assert near.value == pytest.approx(-1800.0)


@pytest.mark.parametrize("label", [None, 2, -1])
def test_vllm_outputs_that_no_label_chooses(server, label):
    server.answer = lambda handler, _: handler.reply({"data": [{"data": [1.0, 2.0]}]})
    with pytest.raises(UserError, match=rf"label={label}: m has 2 outputs"):
        score(VllmReward(calls(), server.url, "m", label=label), "a", "b", "c")


@pytest.mark.parametrize(
    "output", [[], [[]], None, "1.0", ["1.0"], [None], [math.nan], [True], [10**400], {"a": 1}]
)
def test_vllm_outputs_that_are_no_numbers(server, output):
    server.answer = pooled(output)
    [reason] = reasons(VllmReward(calls(), server.url, "m"), "a")
    assert reason is not None
    assert reason.startswith("answered no finite numbers: ")


def test_vllm_answers_without_a_score(server):
    answers = [
        {},
        {"data": []},
        {"data": [{"data": [1]}, {"data": [1]}]},
        {"data": [{}]},
        [1],
        None,
    ]
    server.in_turn(*(lambda handler, _, a=answer: handler.reply(a) for answer in answers))
    judge = VllmReward(calls(concurrency=1), server.url, "m")
    said = reasons(judge, *"abcdef")
    assert said == [f"answered without a score: {json.dumps(answer)}" for answer in answers]


def test_vllm_refuses_one_completion(server):
    """As vLLM does for one that is too long; in its words."""
    words = "This model's maximum context length is 512 tokens."

    def answer(handler: Handler, body: Any) -> None:
        if "long" in body["input"]:
            handler.reply({"error": {"message": words, "code": 400}}, 400)
        else:
            pooled([1.0])(handler, body)

    server.answer = answer
    scores = score(VllmReward(calls(), server.url, "m"), "a", "long", "b")
    assert [s.value for s in scores] == [1.0, None, 1.0]
    assert words in scores[1].reason


def test_by_name(server):
    args = {"url": server.url, "batch_size": 2}
    judge = build_judge("http", args, offered={"calls": calls})
    asked = judge.ask({"answer": [7, 8]}, prompts=["p", "p"], completions=["a", "bb"])
    assert asyncio.run(asked) == [Score(1.0), Score(2.0)]
    assert server.asked[0][2]["answer"] == [7, 8]
    args = {"url": server.url, "model": "m", "label": 0}
    assert not build_judge("served_reward_model", args, offered={"calls": calls}).compares
