"""Judges built as a run builds them, without a run."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from judges.completing import Complete
from judges.desk import Desk
from judges.options import JudgeOptions
from workers.judge_worker import JudgeWorker, asker_of


def desk(folder: Path | None = None, complete: Complete | None = None) -> Desk:
    """A desk whose AI judges ask ``complete``, whatever their client."""

    def build(*_: object) -> Complete:
        assert complete is not None
        return complete

    return Desk(build, folder)


def worker_of(
    folder: Path | None = None, complete: Complete | None = None, **options: Any
) -> JudgeWorker:
    """A worker of the judge with these options."""
    return JudgeWorker(asker_of(JudgeOptions(**options), desk(folder, complete)))


class _Answering(BaseHTTPRequestHandler):
    """A chat model whose answer is a function of the question: 1 or 2 with log-probabilities, or a
    last line with a score."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        drawn = hashlib.sha256(json.dumps(body["messages"]).encode()).digest()
        first = (1 + drawn[0]) / 258
        text, logprobs = f"Because.\nScore: {drawn[0] % 6}", None
        if body.get("logprobs"):
            text = "1" if first > 0.5 else "2"
            top = [
                {"token": token, "logprob": math.log(p), "bytes": None}
                for token, p in (("1", first), ("2", 1.0 - first))
            ]
            logprobs = {"content": [{**top[0], "top_logprobs": top}]}
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": "stop"}
        usage = {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11}
        reply = {
            "id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [choice], "usage": usage,
        }  # fmt: skip
        payload = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: object) -> None: ...


@contextmanager
def served_model() -> Iterator[str]:
    """The base URL of an OpenAI-compatible server with such a model."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answering)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
