"""The OpenAI-compatible client against a real HTTP server that misbehaves on request."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import math
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from judges.calls import CallFailed, CallLimits, Calls, TemporaryFailure
from judges.client_options import OpenAIOptions
from judges.clients import OpenAIClient, Usage, read_reply
from judges.completing import Ask, Reply
from judges.errors import UserError
from judges.llm import Pairwise

KEY = "5f0c2b7e91d34a86b0e7-no-form-gives-it-away"
COST = {"prompt_tokens": 100, "completion_tokens": 3, "total_tokens": 103}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "*")


class SkippingLoop(asyncio.SelectorEventLoop):
    """Its clock can be put forward from another thread, so that a deadline needs no waiting."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead

    def skip(self, seconds: float) -> None:
        def put_forward() -> None:
            self.ahead += seconds

        self.call_soon_threadsafe(put_forward)


class Clock:
    """Time between calls, which passes at once."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        question = body["messages"][-1]["content"]
        with server.lock:
            server.requests.append(body)
            server.headers.append(dict(self.headers))
            server.paths.append(self.path)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
            faults = server.faults[question]
            behave = faults.pop(0) if faults else server.default
        try:
            with contextlib.suppress(ConnectionError):
                behave(self, body)
        finally:
            with server.lock:
                server.at_once -= 1

    def log_message(self, format: str, *args: object) -> None: ...

    def send(
        self, payload: object, status: int = 200, kind: str = "application/json", **headers: str
    ) -> None:
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


Behaviour = Callable[[Handler, Any], None]


class Server(ThreadingHTTPServer):
    """Answers "echo: QUESTION"; before that, with a question's faults, one a request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.faults: defaultdict[str, list[Behaviour]] = defaultdict(list)
        self.default: Behaviour = answer
        self.at_once = self.most_at_once = 0
        self.loop: SkippingLoop | None = None
        self.hung_up = threading.Event()
        self.closing = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up: that is what is tested."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


def completion(text: object, **choice: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {"choices": [{"message": message, "finish_reason": "stop", **choice}], "usage": COST}


def position(token: str, **top: float) -> dict[str, Any]:
    listed = [{"token": token, "logprob": logprob} for token, logprob in top.items()]
    return {"token": token, "logprob": top.get(token, -1.0), "top_logprobs": listed}


def answer(handler: Handler, body: Any) -> None:
    logprobs = {"content": [position("echo", echo=-0.1, other=-2.5), position(":", a=-1.0)]}
    asked = body.get("logprobs") is True
    text = f"echo: {body['messages'][-1]['content']}"
    handler.send(completion(text, logprobs=logprobs if asked else None))


def sends(payload: object, status: int = 200, **rest: str) -> Behaviour:
    return lambda handler, body: handler.send(payload, status, **rest)


def hangs(handler: Handler, body: Any) -> None:
    assert handler.server.loop is not None
    handler.server.loop.skip(1000)
    handler.server.closing.wait()


def drips(handler: Handler, body: Any) -> None:
    """A byte at a time, for ever: the client's clock is put forward while it reads."""
    assert handler.server.loop is not None
    handler.send(b" ", Content_Length="1000000")
    handler.server.loop.skip(1000)
    try:
        while not handler.server.closing.wait(0.01):
            handler.wfile.write(b" ")
    except ConnectionError:
        handler.server.hung_up.set()


def resets(handler: Handler, body: Any) -> None:
    linger_not = struct.pack("ii", 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_not)
    handler.connection.close()
    handler.close_connection = True


def breaks_off(handler: Handler, body: Any) -> None:
    handler.close_connection = True
    handler.send(b'{"choices": [', Content_Length="500")


PASSING: dict[str, Behaviour] = {
    "429": sends({"error": {"message": "slow down"}}, 429, Retry_After="7"),
    "500": sends({"error": {"message": "oops"}}, 500),
    "502 in HTML": sends(b"<html>Bad gateway</html>", 502, kind="text/html"),
    "truncated JSON": sends(b'{"choices": [{"message": {"content": "1'),
    "fewer bytes than promised": breaks_off,
    "connection reset": resets,
    "200 in HTML": sends(b"<html>Log in, please</html>", kind="text/html"),
    "JSON as another type": sends(b'{"ok": 1}', kind="application/octet-stream"),
    "nothing": sends(b""),
    "deep JSON": sends(b"[" * 100_000),
    "not UTF-8": sends(b"\xff\xfe"),
    "a number": sends(7),
    "no choices": sends({"choices": []}),
    "choices of another kind": sends({"choices": {"0": "x"}}),
    "no message": sends({"choices": [{"text": "1"}]}),
    "null": sends(completion(None)),
    "parts": sends(completion([{"text": "1"}])),
    "error with 200": sends({"error": {"message": "upstream is down"}}),
    "given up": sends(completion("1", finish_reason="abort")),
    "hang": hangs,
    "slow drip": drips,
}
LASTING: dict[str, tuple[Behaviour, str]] = {
    "400": (sends({"error": {"message": "too long"}}, 400), "HTTP 400: "),
    "401": (sends({"error": {"message": "who?"}}, 401), "HTTP 401: "),
    "404": (sends({"error": {"message": "no such model"}}, 404), "no such model"),
    "no money": (
        sends({"error": {"message": "pay", "code": "insufficient_quota"}}, 429),
        "HTTP 429: ",
    ),
    "down for long": (sends({}, 503, Retry_After="86400"), "HTTP 503"),
    "filtered": (sends(completion("", finish_reason="content_filter")), "content filter held"),
    "refused": (
        sends(completion(None) | {"choices": [{"message": {"refusal": "I\nwon't"}}]}),
        "the model refused: I won't",
    ),
    "thought too long": (
        sends(completion(None, finish_reason="length")),
        "max_tokens were spent before the answer began",
    ),
}


def client_of(server: Server, clock: Clock | None = None, **rest: Any) -> OpenAIClient:
    hooks = {name: rest.pop(name) for name in ("before", "charge") if name in rest}
    limits = {name: rest.pop(name) for name in ("concurrency", "retries") if name in rest}
    clock = clock or Clock()
    calls = Calls(CallLimits(timeout=600, **limits), sleep=clock.sleep, clock=clock)
    options = OpenAIOptions(kind="openai", model="m", base_url=server.url, **rest)
    return OpenAIClient(options, calls, **hooks)


def ask(text: str, **fields: Any) -> Ask:
    return Ask(({"role": "user", "content": text},), max_tokens=16, **fields)


def complete(server: Server, client: OpenAIClient, *asks: Ask) -> list[Reply]:
    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, SkippingLoop)
        server.loop = loop
        return runner.run(client(asks))


# What is asked and heard --------------------------------------------------------------------


def test_a_question_and_its_reply(server):
    client = client_of(server)
    question = Ask(
        ({"role": "system", "content": "s"}, {"role": "user", "content": "é\u2028"}),
        max_tokens=9,
        temperature=0.5,
        top_logprobs=5,
    )
    assert complete(server, client, question) == [
        Reply("echo: é\u2028", {"echo": -0.1, "other": -2.5}, finished=True)
    ]
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert server.requests == [
        {
            "model": "m",
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "é\u2028"},
            ],
            "max_completion_tokens": 9,
            "temperature": 0.5,
            "logprobs": True,
            "top_logprobs": 5,
        }
    ]


def test_what_the_options_add_and_take_away(server):
    extra = {"seed": 7, "temperature": None, "top_logprobs": 3}
    client = client_of(server, extra_body=extra, max_tokens_parameter="max_tokens")
    complete(server, client, ask("a", top_logprobs=20))
    quiet = client_of(server, logprobs=False)
    (reply,) = complete(server, quiet, ask("b", top_logprobs=20))
    assert reply.first_token is None
    told = [{k: v for k, v in body.items() if k != "messages"} for body in server.requests]
    assert told == [
        {"model": "m", "max_tokens": 16, "logprobs": True, "top_logprobs": 3, "seed": 7},
        {"model": "m", "max_completion_tokens": 16, "temperature": 0.0},
    ]


def test_equal_questions_are_asked_once(server):
    asks = [ask("a"), ask("b"), ask("a"), ask("a", sample=1), ask("a", temperature=1.0), ask("a")]
    replies = complete(server, client_of(server), *asks)
    assert [reply.text for reply in replies] == [f"echo: {c}" for c in "abaaaa"]
    assert sorted(body["messages"][0]["content"] for body in server.requests) == list("aaab")


def test_nothing_is_asked_about_nothing(server):
    assert complete(server, client_of(server)) == []
    assert server.requests == []


def test_a_text_that_was_cut_says_so(server):
    server.faults["a"] = [sends(completion("So far", finish_reason="length"))]
    assert complete(server, client_of(server), ask("a")) == [Reply("So far", finished=False)]


def test_it_outlives_an_event_loop(server, caplog):
    client = client_of(server, concurrency=1)
    for _ in range(3):
        replies = complete(server, client, ask("a"), ask("b"), ask("c"))
        assert [reply.text for reply in replies] == ["echo: a", "echo: b", "echo: c"]
        gc.collect()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


# What goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_asked_again(server, fault):
    server.faults["a"] = [PASSING[fault]]
    clock = Clock()
    client = client_of(server, clock)
    (reply,) = complete(server, client, ask("a", top_logprobs=2))
    assert reply == Reply("echo: a", {"echo": -0.1, "other": -2.5})
    assert len(server.requests) == 2
    timeouts = {"timeouts": 1} if fault in ("hang", "slow drip") else {}
    assert client._calls.counts == {"calls": 2, "retries": 1, **timeouts}
    assert sum(clock.slept) >= (7 if fault == "429" else 0)
    if fault == "slow drip":
        assert server.hung_up.wait(30)


@pytest.mark.parametrize("fault", PASSING)
def test_what_does_not_pass_after_all_is_a_failure(server, fault):
    server.faults["a"] = [PASSING[fault]] * 3
    client = client_of(server, retries=2)
    (reply,) = complete(server, client, ask("a"))
    assert reply.text is None
    assert reply.failure is not None
    assert reply.failure.endswith("(tried 3 times)")
    assert reply.failure.isprintable()
    assert len(server.requests) == 3


@pytest.mark.parametrize("fault", LASTING)
def test_what_does_not_pass_is_asked_once(server, fault):
    behaviour, reason = LASTING[fault]
    server.faults["a"] = [behaviour]
    (reply,) = complete(server, client_of(server), ask("a", top_logprobs=2))
    assert reply.text is None
    assert reply.failure is not None
    assert reason in reply.failure
    assert reply.failure.isprintable()
    assert len(server.requests) == 1


def test_no_server_at_all_is_a_failure():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        clock = Clock()
        calls = Calls(CallLimits(retries=2), sleep=clock.sleep, clock=clock)
        client = OpenAIClient(OpenAIOptions(kind="openai", model="m", base_url=url), calls)
        (reply,) = asyncio.run(client([ask("a")]))
    assert reply.failure == "APIConnectionError: Connection error. (tried 3 times)"


def test_a_question_that_cannot_be_sent_is_a_failure(server):
    (bad, good) = complete(server, client_of(server), ask("\ud800"), ask("a"))
    assert bad.failure is not None
    assert "UnicodeEncodeError" in bad.failure
    assert bad.failure.isprintable()
    assert good.text == "echo: a"


def test_many_questions_among_many_faults(server):
    """Each comes right, in its place, and not one request more is made than the faults cost."""
    faults = [PASSING[name] for name in PASSING if name not in ("hang", "slow drip")]
    texts = [f"question {i}" for i in range(40)]
    for i, text in enumerate(texts):
        server.faults[text] = [faults[(i + k) % len(faults)] for k in range(i % 4)]
    expected_requests = 40 + sum(i % 4 for i in range(40))
    charges: list[tuple[int, int, float]] = []
    client = client_of(server, concurrency=4, charge=lambda *paid: charges.append(paid), retries=4)
    replies = complete(server, client, *map(ask, texts))
    assert [reply.text for reply in replies] == [f"echo: {text}" for text in texts]
    assert len(server.requests) == expected_requests
    assert client._calls.counts == {
        "calls": expected_requests,
        "retries": expected_requests - 40,
    }
    assert server.most_at_once <= 4
    assert client.usage.output_tokens == sum(written for _, written, _ in charges)


def test_half_a_character_in_an_error_is_replaced(server):
    server.faults["a"] = [sends(b'{"error": {"message": "bad \\ud800"}}', 400)]
    (reply,) = complete(server, client_of(server), ask("a"))
    assert reply.failure is not None
    reply.failure.encode()


# Log-probabilities --------------------------------------------------------------------------


def refuse_logprobs(handler: Handler, body: Any) -> None:
    if "logprobs" in body:
        handler.send({"error": {"message": "logprobs are not supported"}}, 400)
    else:
        answer(handler, body)


def test_a_server_without_logprobs_is_asked_for_none_again(server, caplog):
    server.default = refuse_logprobs
    client = client_of(server)
    assert complete(server, client, ask("a", top_logprobs=5)) == [Reply("echo: a")]
    assert complete(server, client, ask("b", top_logprobs=5)) == [Reply("echo: b")]
    assert ["logprobs" in body for body in server.requests] == [True, False, False]
    assert [record.message for record in caplog.records if record.name == "judges.clients"] == [
        "client.model=m: the server refuses log-probabilities, so answers are read from the text "
        "(client.logprobs=false says the same)"
    ]


def test_an_error_that_only_mentions_logprobs_takes_none_away(server):
    """A server that quotes the request in its error refuses the same request without them, too."""
    quotes = sends({"error": {"message": 'too long: {"logprobs": true}'}}, 400)
    server.faults["long"] = [quotes, quotes]
    client = client_of(server)
    (reply,) = complete(server, client, ask("long", top_logprobs=5))
    assert reply.failure is not None
    (reply,) = complete(server, client, ask("a", top_logprobs=5))
    assert reply.first_token == {"echo": -0.1, "other": -2.5}
    assert ["logprobs" in body for body in server.requests] == [True, False, True]


def first_token(*positions: Any, **message: Any) -> Any:
    payload = completion("7", logprobs={"content": list(positions)})
    payload["choices"][0]["message"] |= message
    return read_reply(payload).first_token


def test_tokens_that_decode_alike_are_summed_and_the_sampled_one_counts():
    tokens = [("1", math.log(0.5)), ("1", math.log(0.25)), ("2", -3.0)]
    listed = [{"token": token, "logprob": logprob} for token, logprob in tokens]
    found = first_token({"token": "1", "logprob": math.log(0.5), "top_logprobs": listed})
    assert found == {"1": pytest.approx(math.log(0.75)), "2": -3.0}
    assert first_token({"token": "1", "logprob": -0.5, "top_logprobs": []}) == {"1": -0.5}
    assert first_token({"token": "1", "logprob": -0.5}) == {"1": -0.5}
    assert first_token({"token": "9", "logprob": -0.5, "top_logprobs": listed[2:]}) == {
        "9": -0.5,
        "2": -3.0,
    }


def test_the_first_token_that_is_not_blank_counts():
    blank = {"token": " ", "logprob": 0.0, "top_logprobs": []}
    assert first_token(blank, blank, position("7", **{"7": -0.2, "8": -2.0})) == {
        "7": -0.2,
        "8": -2.0,
    }
    assert first_token(blank) is None
    assert first_token() is None


def test_a_thoughts_first_token_is_not_the_answers():
    token = position("Hm", Hm=-0.1)
    assert first_token(token) == {"Hm": -0.1}
    assert first_token(token, reasoning_content="Hm, …") is None
    assert first_token(token, reasoning="Hm, …") is None
    assert first_token(token, reasoning_content=None) == {"Hm": -0.1}


FIELDS = [
    *["choices", "message", "content", "logprobs", "top_logprobs", "token", "logprob"],
    *["finish_reason", "error", "usage", "refusal", "reasoning", "prompt_tokens"],
]
json_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(FIELDS),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=500, deadline=None)
@given(
    json_values
    | st.builds(
        lambda inner, c: {"choices": [{"message": inner, "logprobs": c}]}, json_values, json_values
    )
    | st.builds(lambda inner: completion("1", logprobs={"content": [inner]}), json_values)
    | st.builds(
        lambda tops: completion("1", logprobs={"content": [{"token": "1", "top_logprobs": tops}]}),
        json_values,
    )
)
def test_any_json_is_a_reply_or_a_failure(payload):
    try:
        reply = read_reply(payload)
    except (TemporaryFailure, CallFailed):
        return
    assert isinstance(reply.text, str)
    for token, logprob in (reply.first_token or {}).items():
        assert isinstance(token, str)
        assert isinstance(logprob, float)


# What it costs ------------------------------------------------------------------------------


def test_every_reply_that_was_paid_for_is_charged(server):
    """Also one that says nothing; not what failed before there was a reply."""
    server.faults["a"] = [sends(completion(None)), sends({"error": {"message": "down"}}, 500)]
    charges: list[tuple[int, int, float]] = []
    client = client_of(
        server,
        charge=lambda *paid: charges.append(paid),
        usd_per_million_input=2.0,
        usd_per_million_output=10.0,
    )
    complete(server, client, ask("a"), ask("b"))
    assert len(server.requests) == 4
    price = pytest.approx(100 * 2e-6 + 3 * 10e-6)
    assert charges == [(100, 3, price)] * 3
    assert client.usage == Usage(300, 9, pytest.approx(3 * 230e-6))


def test_without_prices_tokens_are_counted(server):
    client = client_of(server)
    complete(server, client, ask("a"))
    assert client.usage == Usage(100, 3, 0.0)


def test_what_is_no_completion_costs_nothing(server):
    server.faults["a"] = [sends({"choices": []}), sends({"error": {}}), sends(b"{")]
    client = client_of(server)
    complete(server, client, ask("a"))
    assert client.usage == Usage(100, 3, 0.0)


def test_a_server_that_does_not_say_is_charged_the_most_it_can_have_been(server):
    text = "é" * 50
    free_of_usage = completion("1")
    del free_of_usage["usage"]
    server.faults[text] = [sends(free_of_usage)]
    client = client_of(server)
    complete(server, client, ask(text))
    assert client.usage.output_tokens == 16
    assert 100 <= client.usage.input_tokens <= 1000


class SpentError(Exception):
    """What a budget raises."""


def test_a_budget_is_asked_before_each_request(server):
    """It allows three; the fourth question and all after it are not asked."""
    allowed = iter(range(3))

    def before() -> None:
        if next(allowed, None) is None:
            raise SpentError

    server.faults["a"] = [PASSING["500"]]
    client = client_of(server, concurrency=1, before=before)
    with pytest.raises(SpentError):
        complete(server, client, *map(ask, "abcdef"))
    assert len(server.requests) == 3
    assert server.at_once == 0


def test_what_a_charge_raises_waits_for_the_requests_on_their_way(server):
    """Four at once: all four are answered and charged, and no other is made."""
    together = threading.Barrier(4)

    def all_four(handler: Handler, body: Any) -> None:
        together.wait(60)
        answer(handler, body)

    charges: list[int] = []

    def charge(read: int, written: int, usd: float) -> None:
        charges.append(read)
        raise SpentError(len(charges))

    server.default = all_four
    client = client_of(server, concurrency=4, charge=charge)
    with pytest.raises(SpentError) as caught:
        complete(server, client, *map(ask, "abcdefghij"))
    assert caught.value.args == (1,)
    assert charges == [100] * 4
    assert len(server.requests) == 4
    assert client.usage.input_tokens == 400


def test_a_hook_that_fails_as_a_server_does_is_not_tried_again(server):
    def before() -> None:
        raise ConnectionError("the budget's own")

    with pytest.raises(ConnectionError, match="the budget's own"):
        complete(server, client_of(server, before=before), ask("a"))
    assert server.requests == []


# The key ------------------------------------------------------------------------------------


def echo_key(status: int, form: Callable[[str], object]) -> Behaviour:
    def behave(handler: Handler, body: Any) -> None:
        handler.send(form(handler.headers["Authorization"]), status)

    return behave


@pytest.mark.parametrize("padding", [0, 230, 250, 270, 285])
@pytest.mark.parametrize("status", [200, 401, 429, 500])
def test_the_key_is_nowhere_even_if_the_server_repeats_it(server, caplog, capfd, status, padding):
    """Not in reasons, however they are cut, nor in logs, output, reprs or exceptions."""
    caplog.set_level(logging.DEBUG)
    seen: list[str] = []
    forms: list[Callable[[str], object]] = [
        lambda header: {"error": {"message": "x" * padding + f" header {header}"}},
        lambda header: {"error": {"message": f"{'x' * padding}{header.removeprefix('Bearer ')}"}},
        lambda header: f"{'x' * (padding // 4)}{header}".encode(),
        lambda header: completion(None) | {"choices": [{"message": {"refusal": header}}]},
    ]
    for index, form in enumerate(forms):
        server.faults[f"q{index}"] = [echo_key(status, form)] * 2
    client = client_of(server, retries=1)
    replies = complete(server, client, *(ask(f"q{index}") for index in range(len(forms))))
    assert all(reply.text is None for reply in replies)
    seen += [repr(reply) for reply in replies]
    seen += [repr(client), str(client), repr(client._options), repr(client._calls)]
    seen += [client._options.model_dump_json(), repr(client.usage)]
    seen += [record.getMessage() + repr(record.args) for record in caplog.records]
    seen += [caplog.text, *capfd.readouterr()]
    assert all(KEY[:12] not in text for text in seen)
    assert padding > 230 or any("[key]" in repr(reply) for reply in replies)


def test_other_keys_that_a_server_tells_are_nobodys_business(server):
    told = {"error": {"message": "Bearer abc.def= is not sk-proj-12*****89, nor 'bearer  x_y'"}}
    server.faults["a"] = [sends(told, 400)]
    (reply,) = complete(server, client_of(server), ask("a"))
    assert reply.failure is not None
    assert "[key] is not [key], nor '[key]" in reply.failure


def test_no_exception_that_is_raised_knows_the_key(server, monkeypatch):
    """openai's errors hold the request, so none of them may be in the chain of one of ours."""
    chains: list[str] = []
    reason = Calls._reason

    def keep(self: Calls, error: Exception) -> str:
        chains.append("".join(traceback.format_exception(error)))
        linked: list[BaseException | None] = [error]
        while (last := linked[-1]) is not None:
            chains.append(f"{last!r} {vars(last)!r} {type(last).__module__}")
            linked.append(last.__cause__ or last.__context__)
        return reason(self, error)

    monkeypatch.setattr(Calls, "_reason", keep)
    for status in (401, 500):
        server.faults["a"] = [echo_key(status, lambda header: {"error": {"message": header}})]
        complete(server, client_of(server, retries=0), ask("a"))
    assert len(chains) >= 4
    assert all(KEY not in text for text in chains)
    assert all("openai" not in text.rpartition(" ")[2] for text in chains)


def test_a_key_is_needed_but_near(monkeypatch):
    calls = Calls(CallLimits())

    def build(**options: Any) -> OpenAIClient:
        return OpenAIClient(OpenAIOptions(kind="openai", model="m", **options), calls)

    monkeypatch.delenv("OPENAI_API_KEY")
    for near in ("http://localhost:8000/v1", "http://127.0.0.1/v1", "http://[::1]:1/v1"):
        build(base_url=near)
    build(base_url="http://10.1.2.3:8000/v1")
    for far in ({}, {"base_url": "https://judge.example/v1"}, {"base_url": "https://8.8.8.8/v1"}):
        with pytest.raises(UserError) as caught:
            build(**far, api_key_env="JUDGE_KEY")
        message = str(caught.value)
        assert message.startswith("client.api_key_env=JUDGE_KEY: the environment has no JUDGE_KEY")
        assert message.endswith("export JUDGE_KEY=…")
        assert "\n" not in message
    monkeypatch.setenv("JUDGE_KEY", " \n")
    with pytest.raises(UserError, match="has no JUDGE_KEY"):
        build(api_key_env="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "sk-first\nsk-second")
    with pytest.raises(UserError) as caught:
        build(api_key_env="JUDGE_KEY")
    assert "sk-" not in str(caught.value)


def test_the_key_is_that_of_the_named_variable(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", " another \n")
    complete(server, client_of(server, api_key_env="JUDGE_KEY"), ask("a"))
    monkeypatch.delenv("JUDGE_KEY")
    complete(server, client_of(server, api_key_env="JUDGE_KEY"), ask("a"))
    sent = [headers["authorization"] for headers in server.headers]
    assert sent == ["Bearer another", "Bearer none"]
    server.faults["b"] = [sends({"error": {"message": "none of these"}}, 400)]
    (reply,) = complete(server, client_of(server, api_key_env="JUDGE_KEY"), ask("b"))
    assert reply.failure == "HTTP 400: none of these"


# The options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("base_url", "localhost:8000", "must be an address"),
        ("base_url", "ftp://judge/v1", "must be an address"),
        ("base_url", "http://", "must be an address"),
        ("base_url", "http://judge:port/v1", "must be an address"),
        ("base_url", "https://me:secret@judge/v1", "must hold no key"),
        ("base_url", "https://judge/v1?key=secret", "must hold no key"),
        ("extra_body", {"messages": [], "seed": 1, "n": 2}, "must not set messages, n"),
        ("usd_per_million_input", -1.0, "greater than or equal to 0"),
        ("usd_per_million_output", math.nan, "finite"),
        ("model", "", "at least 1 character"),
        ("api_key", "sk-1", "Extra inputs are not permitted"),
        ("kind", "anthropic", "Input should be 'openai'"),
    ],
)
def test_options_that_cannot_be_used(field, value, part):
    with pytest.raises(ValidationError) as caught:
        OpenAIOptions(**{"kind": "openai", "model": "m", field: value})
    assert part in str(caught.value)


def test_reading_options_loads_no_client():
    program = (
        "import sys, judges.client_options, judges.llm; "
        "print({'openai', 'httpx', 'httpx2', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "set()\n"


# With a judge -------------------------------------------------------------------------------


def test_a_judge_over_http(server):
    """By hand: log-odds ln 9 for the good one when first, and ln 3 when second."""

    def judge(handler: Handler, body: Any) -> None:
        user = body["messages"][-1]["content"]
        p = 0.9 if user.index("good") < user.index("bad") else 0.25
        top = {"1": math.log(p), "2": math.log(1 - p)}
        handler.send(completion("1", logprobs={"content": [position("1", **top)]}))

    server.default = judge
    client = client_of(server)

    async def compare(first: Sequence[str], second: Sequence[str]) -> list[Any]:
        return await Pairwise(client).compare(["p"] * len(first), first, second)

    forth, back, again = asyncio.run(compare(["good", "bad", "good"], ["bad", "good", "bad"]))
    assert forth.value == pytest.approx(1 / (1 + 27**-0.5), abs=1e-15)
    assert back.value == 1 - forth.value
    assert again == forth
    assert len(server.requests) == 2
