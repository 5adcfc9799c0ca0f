"""Reward models that are served elsewhere, over HTTP: by vLLM, or by anything that speaks JSON."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import sys
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from judges.calls import CallFailed, Calls, TemporaryFailure, is_temporary, retry_after
from judges.errors import UserError
from judges.formats import FORMATS, Format, conversation, is_chat, joined, one_of
from judges.interface import Score, Text, text_of

T = TypeVar("T")


class VllmReward:
    """Scores completions by a sequence classifier or reward model that ``vllm serve`` serves.

    ``url`` is the server's address, ``model`` the name it serves the model by. Raw outputs are
    asked for: the score is the logit, or the log-odds of the output with index ``label`` where
    there are several; of a model that scores every token, the last token's. ``format`` pair asks
    ``/score`` (query, document); all else ``/pooling``, which serves what ``/classify`` does: chats
    as messages, through the served model's chat template, and text as it is; with ``format`` chat
    text goes as messages, too. ``api_key_env`` names the environment variable that holds the key.

    One request a completion: the server batches, and a failure is that completion's alone. Raises
    UserError for an unknown format, a variable that is not set or an unfit address.
    """

    def __init__(
        self,
        calls: Calls,
        url: str,
        model: str,
        format: Format = "auto",
        label: int | None = None,
        api_key_env: str | None = None,
    ) -> None:
        self._format = one_of("format", format, FORMATS)
        if not (label is None or isinstance(label, int)):
            raise UserError(f"label={label}: vLLM names no outputs: write the label's index")
        base = url.rstrip("/").removesuffix("/v1")
        path = "score" if self._format == "pair" else "pooling"
        self._server = _Server(calls, f"{base}/{path}", _headers(api_key_env, {}))
        self._model = model
        self._label = label

    async def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[Score]:
        """One score a completion; what fails is INVALID with its reason.

        Raises UserError where the model has several outputs and ``label`` names none of them.
        """
        pairs = zip(prompts, completions, strict=True)
        return await _all(self._score(prompt, completion) for prompt, completion in pairs)

    async def _score(self, prompt: Text, completion: Text) -> Score:
        question = self._question(prompt, completion)
        try:
            answer = await self._server.ask(
                {"model": self._model, "use_activation": False, **question}
            )
        except CallFailed as failed:
            return Score(None, str(failed))
        match answer.content:
            case {"data": [{"score": output}]} | {"data": [{"data": output}]}:
                return self._read(output, answer)
        return Score(None, f"answered without a score: {answer.excerpt}")

    def _question(self, prompt: Text, completion: Text) -> dict[str, Any]:
        chat = is_chat(prompt, completion)
        if self._format == "pair":
            return {"text_1": text_of(prompt), "text_2": text_of(completion)}
        if self._format == "chat" or (self._format == "auto" and chat):
            return {"messages": [dict(m) for m in conversation(prompt, completion)]}
        return {"input": joined(prompt, completion)}

    def _read(self, output: Any, answer: _Answer) -> Score:
        while isinstance(output, list) and output and isinstance(output[-1], list):
            output = output[-1]  # of [tokens, outputs] the last token's
        logits = output if isinstance(output, list) else [output]
        if not logits or not all(map(_is_finite, logits)):
            return Score(None, f"answered no finite numbers: {answer.excerpt}")
        label = 0 if self._label is None and len(logits) == 1 else self._label
        if label is None or not 0 <= label < len(logits):
            raise UserError(
                f"label={label}: {self._model} has {len(logits)} outputs: "
                "write the index of the one whose log-odds are the score"
            )
        others = [float(logit) for i, logit in enumerate(logits) if i != label]
        return Score(float(logits[label]) - (_log_sum_exp(others) if others else 0.0))


class HttpReward:
    """Scores completions by a service of one's own.

    ``url`` is sent POST ``{"prompts": […], "completions": […], …}``, at most ``batch_size``
    completions at a time, with every column of the prompts as a list beside them; it answers
    ``{"scores": […]}``, a number or null for each. ``headers_env`` names, for each header, the
    environment variable that holds its value; ``api_key_env`` one that is sent as a bearer token.

    A request that fails makes only its own completions INVALID. Raises UserError for a variable
    that is not set, an unfit address or ``batch_size`` below 1.
    """

    def __init__(
        self,
        calls: Calls,
        url: str,
        batch_size: int = 16,
        headers_env: Mapping[str, str] | None = None,
        api_key_env: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: must be at least 1")
        self._server = _Server(calls, url, _headers(api_key_env, headers_env or {}))
        self._batch_size = batch_size

    async def score(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Sequence[Any]
    ) -> list[Score]:
        """One score a completion; what fails is INVALID with its reason."""
        question = {"prompts": prompts, "completions": completions, **columns}
        size = self._batch_size
        batches = [
            {name: list(values[start : start + size]) for name, values in question.items()}
            for start in range(0, len(completions), size)
        ]
        return [score for scores in await _all(map(self._score, batches)) for score in scores]

    async def _score(self, batch: Mapping[str, list[Any]]) -> list[Score]:
        count = len(batch["completions"])
        try:
            answer = await self._server.ask(batch)
        except CallFailed as failed:
            return [Score(None, str(failed))] * count
        match answer.content:
            case {"scores": [*scores]} if len(scores) == count:
                return [Score.read(score) for score in scores]
            case {"scores": [*scores]}:
                reason = f"answered {len(scores)} scores for {count} completions"
            case _:
                reason = f"answered no list of scores: {answer.excerpt}"
        return [Score(None, reason)] * count


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a server said: any JSON, and how it reads in a reason."""

    content: Any
    excerpt: str


class _Server:
    """One address, asked in JSON within the limits of ``calls``.

    Connections are kept for as long as the event loop lasts that asks. What the headers hold is in
    no reason: it is struck out of everything that the server says.
    """

    def __init__(self, calls: Calls, url: str, headers: Mapping[str, str]) -> None:
        self._calls = calls
        self._url = _address(url)
        self._named = str(self._url.copy_with(query=None, fragment=None))
        self._headers = headers
        self._secrets = _spellings(headers.values())
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: httpx.AsyncClient | None = None

    async def ask(self, question: Mapping[str, Any]) -> _Answer:
        """Raises CallFailed, with the reason, where there is no answer in JSON."""
        return await self._calls.make(lambda: self._attempt(question))

    async def _attempt(self, question: Mapping[str, Any]) -> _Answer:
        try:
            response = await self._connected().post(self._url, json=question)
        except (httpx.HTTPError, TypeError, ValueError) as error:  # or the question is not JSON
            reason = self._plain(f"{type(error).__name__} at {self._named}: {error}")
            raise (TemporaryFailure if is_temporary(error) else CallFailed)(reason) from None
        said = self._plain(response.text)
        if not response.is_success:
            reason = f"HTTP {response.status_code} from {self._named}: {said}"
            failure = httpx.HTTPStatusError(reason, request=response.request, response=response)
            if is_temporary(failure):
                raise TemporaryFailure(reason, retry_after(failure))
            raise CallFailed(reason)
        try:
            return _Answer(json.loads(response.content), said)
        except (ValueError, RecursionError):
            kind = self._plain(response.headers.get("content-type", "of no type"))
            raise CallFailed(f"no JSON from {self._named} ({kind}): {said}") from None

    def _connected(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        if self._client is None or loop is not self._loop:
            kept = self._calls.limits.concurrency
            self._client = httpx.AsyncClient(
                headers=self._headers,
                timeout=None,  # the deadline of a call is that of all its parts
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=kept),
            )
            self._loop = loop
        return self._client

    def _plain(self, text: str) -> str:
        """One line of at most 200 characters, without the headers' secrets."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        line = " ".join(text.split())
        return line if len(line) <= 200 else f"{line[:199]}…"


async def _all(asking: Iterable[Awaitable[T]]) -> list[T]:
    """All results; when one fails the others are not waited for."""
    tasks = [asyncio.ensure_future(each) for each in asking]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _address(url: str) -> httpx.URL:
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UserError(f"url: {error}: write http://host:port/path") from None
    if address.userinfo:
        raise UserError("url: it holds a user or password: name a variable with api_key_env")
    if address.scheme not in ("http", "https") or not address.host:
        raise UserError(f"url={url}: no address of a server: write http://host:port/path")
    return address


def _headers(api_key_env: str | None, headers_env: Mapping[str, str]) -> dict[str, str]:
    """The values of the variables; never in a message, not even where one was written by mistake.

    Raises UserError for a variable that is not set, or whose value no header can carry.
    """
    headers = {name: _variable(f"headers_env.{name}", env) for name, env in headers_env.items()}
    if api_key_env is not None:
        headers["Authorization"] = f"Bearer {_variable('api_key_env', api_key_env)}"
    return headers


def _variable(key: str, name: str) -> str:
    value = os.environ.get(name, "").strip()
    named = f"{key}={name}" if re.fullmatch("[A-Z][A-Z0-9_]*", name) else key
    if not value:
        raise UserError(
            f"{named}: the environment has no such variable: write the name of one that holds the "
            "key, and set it where the judge runs"
        )
    if not (value.isascii() and value.isprintable()):
        raise UserError(f"{named}: its value has characters that no header can carry: set it anew")
    return value


def _spellings(values: Iterable[str]) -> list[str]:
    """What to strike out: whole values and their longer words, as they are and as JSON has them."""
    words = {word for value in values for word in (value, *value.split()) if len(word) >= 6}
    return sorted(words | {json.dumps(word)[1:-1] for word in words}, key=len, reverse=True)


def _is_finite(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def _log_sum_exp(values: Sequence[float]) -> float:
    highest = max(values)
    return highest + math.log(sum(math.exp(value - highest) for value in values))
