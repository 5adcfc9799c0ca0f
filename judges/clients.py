"""A model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import openai

from judges.calls import CallFailed, Calls, TemporaryFailure, is_temporary, retry_after, status_of
from judges.client_options import OpenAIOptions
from judges.completing import Ask, Reply
from judges.errors import UserError
from judges.replies import log_sum

_KEY_LIKE = re.compile(r"(?i)\bbearer\s+[^\s'\"]+|\bsk-[\w*-]+")


@dataclass(slots=True)
class Usage:
    """What was paid for: tokens read and written, and dollars by the prices in the options."""

    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0


class OpenAIClient:
    """Asks a served model, within the limits of ``calls``: a ``Complete``.

    ``before`` is called before each request; ``charge`` after each reply that was paid for, with
    its tokens read and written and its price in dollars (0 where the options name none). Both may
    raise: no further request is made then, those on their way are awaited, and the error is
    raised. ``usage`` is the sum of what was charged, ``logprobs`` turns False when the server
    refuses log-probabilities.

    The key is read here, once, from the environment. Raises UserError where there is none.
    """

    def __init__(
        self,
        options: OpenAIOptions,
        calls: Calls,
        *,
        before: Callable[[], object] | None = None,
        charge: Callable[[int, int, float], object] | None = None,
    ) -> None:
        self.usage = Usage()
        self.logprobs = options.logprobs
        self._options = options
        self._calls = calls
        self._before = before
        self._charge = charge
        self._key = _key(options)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, asks: Sequence[Ask]) -> list[Reply]:
        """One reply for each question, in order; equal questions are asked once.

        Raises what ``before`` or ``charge`` raised, nothing else: what fails is a reply without a
        text that says why, in one line and without the key.
        """
        distinct = {_content(ask): ask for ask in asks}
        stopped: list[Exception] = []
        outcomes = await asyncio.gather(
            *(self._answer(ask, stopped) for ask in distinct.values()), return_exceptions=True
        )
        for error in [*stopped, *outcomes]:
            if isinstance(error, BaseException):
                raise error
        replies = dict(zip(distinct, outcomes, strict=True))
        return [replies[_content(ask)] for ask in asks]  # type: ignore[misc]

    async def _answer(self, ask: Ask, stopped: list[Exception]) -> Reply:
        top = ask.top_logprobs if self.logprobs else 0
        try:
            reply = await self._calls.make(functools.partial(self._attempt, ask, top, stopped))
            if reply is None:
                reply = await self._calls.make(functools.partial(self._attempt, ask, 0, stopped))
                assert reply is not None
                self._do_without_logprobs()
        except CallFailed as failed:
            return Reply(None, failure=str(failed))
        return reply

    async def _attempt(self, ask: Ask, top: int, stopped: list[Exception]) -> Reply | None:
        """The reply, or None where the server gives no log-probabilities."""
        if stopped:
            raise CallFailed("not asked: the judge was stopped")
        if self._before is not None:
            self._heeding(stopped, self._before)
        said = await self._said(ask, top, stopped)
        if isinstance(said, Exception):
            raise said
        return said

    async def _said(
        self, ask: Ask, top: int, stopped: list[Exception]
    ) -> Reply | TemporaryFailure | CallFailed | None:
        """As ``_attempt``; what is to be raised is returned.

        Raised here, it would have openai's error in its context: that knows the request, and the
        key in it.
        """
        try:
            answered = await self._connected().chat.completions.with_raw_response.create(
                model=self._options.model,
                messages=[dict(message) for message in ask.messages],  # type: ignore[misc]
                extra_body=self._parameters(ask, top),
            )
            body = answered.text
        except Exception as error:  # noqa: BLE001  it fails in many ways, and none may pass
            return None if top and _refuses_logprobs(error) else self._told(error)
        try:
            payload = json.loads(body)
        except (ValueError, RecursionError):
            beginning = self._redacted(body[:1000])[:80]
            return TemporaryFailure(f"the reply is no JSON: {beginning!r}")
        self._pay(ask, payload, stopped)
        try:
            return read_reply(payload)
        except (TemporaryFailure, CallFailed) as failure:
            return type(failure)(self._redacted(str(failure)))

    def _parameters(self, ask: Ask, top: int) -> dict[str, Any]:
        parameters: dict[str, Any] = {
            self._options.max_tokens_parameter: ask.max_tokens,
            "temperature": ask.temperature,
        }
        if top:
            parameters |= {"logprobs": True, "top_logprobs": top}
        parameters |= self._options.extra_body
        return {name: value for name, value in parameters.items() if value is not None}

    def _connected(self) -> openai.AsyncOpenAI:
        """Connections belong to an event loop, and whoever calls ``asyncio.run`` twice has two."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            self._openai = openai.AsyncOpenAI(
                api_key=self._key,
                base_url=self._options.url,
                max_retries=0,  # retries and deadlines are those of Calls
                timeout=None,
                # openai's own closes itself on whatever loop runs when it is forgotten.
                http_client=openai.DefaultAsyncHttpxClient(timeout=None),
            )
        return self._openai

    def _heeding(self, stopped: list[Exception], hook: Callable[[], object]) -> None:
        try:
            hook()
        except Exception as error:  # noqa: BLE001  raised to the caller when all have ended
            stopped.append(error)
            raise CallFailed("the judge was stopped") from None

    def _pay(self, ask: Ask, payload: object, stopped: list[Exception]) -> None:
        tokens = _tokens(ask, payload)
        if tokens is None:
            return
        read, written = tokens
        usd = (
            read * (self._options.usd_per_million_input or 0.0)
            + written * (self._options.usd_per_million_output or 0.0)
        ) / 1e6
        self.usage.input_tokens += read
        self.usage.output_tokens += written
        self.usage.usd += usd
        if self._charge is not None:
            self._heeding(stopped, functools.partial(self._charge, read, written, usd))

    def _told(self, error: Exception) -> TemporaryFailure | CallFailed:
        status = status_of(error)
        named = type(error).__name__ if status is None else f"HTTP {status}"
        reason = self._redacted(f"{named}: {str(error).removeprefix(f'Error code: {status} - ')}")
        spent = getattr(error, "code", None) == "insufficient_quota"  # a 429 that stays one
        if is_temporary(error) and not spent:
            return TemporaryFailure(reason, retry_after(error))
        return CallFailed(reason)

    def _redacted(self, text: str) -> str:
        """Without keys, nor half characters, which cannot be written to a file."""
        if self._key != NO_KEY:
            text = text.replace(self._key, "[key]")
        return _KEY_LIKE.sub("[key]", text).encode(errors="replace").decode()

    def _do_without_logprobs(self) -> None:
        if self.logprobs:
            logging.getLogger(__name__).warning(
                "client.model=%s: the server refuses log-probabilities, so answers are read from "
                "the text (client.logprobs=false says the same)",
                self._options.model,
            )
        self.logprobs = False


NO_KEY = "none"
"""What a server without keys is sent, as the header cannot be empty."""


def read_reply(payload: object) -> Reply:
    """What a chat completion says, in JSON as the server sent it.

    Raises TemporaryFailure where asking again may help, CallFailed where it will not.
    """
    match payload:
        case {"choices": [{"message": dict(message)} as choice, *_]}:
            pass
        case {"error": error}:
            raise TemporaryFailure(f"the server says: {error}")
        case _:
            raise TemporaryFailure("the server's reply has no choices")
    ended = choice.get("finish_reason")
    if refusal := message.get("refusal"):
        raise CallFailed(f"the model refused: {refusal}")
    if ended == "content_filter":
        raise CallFailed("the server's content filter held the answer back")
    if ended in ("abort", "error"):
        raise TemporaryFailure(f"the server gave up: finish_reason={ended}")
    text = message.get("content")
    if not isinstance(text, str):
        if ended == "length":
            raise CallFailed("max_tokens were spent before the answer began")
        raise TemporaryFailure("the server's reply has no text")
    thought = message.get("reasoning_content") or message.get("reasoning")
    first_token = None if thought else _first_token(choice.get("logprobs"))
    return Reply(text, first_token=first_token, finished=ended != "length")


def _first_token(logprobs: object) -> dict[str, float] | None:
    """The distribution of the first token that is not blank; what decodes alike is summed.

    Tokenizers that write a number after a space of its own make the first one say nothing.
    """
    positions = logprobs.get("content") if isinstance(logprobs, dict) else None
    for position in positions if isinstance(positions, list) else []:
        if not isinstance(position, dict) or not isinstance(position.get("token"), str):
            return None
        if position["token"].strip():
            return _distribution(position)
    return None


def _distribution(position: dict[str, Any]) -> dict[str, float] | None:
    alike: dict[str, list[float]] = {}
    listed = position.get("top_logprobs")
    for entry in listed if isinstance(listed, list) else []:
        match entry:
            case {"token": str(token), "logprob": float() | int() as logprob}:
                alike.setdefault(token, []).append(float(logprob))
            case _:
                return None
    if position["token"] not in alike and isinstance(position.get("logprob"), float | int):
        alike[position["token"]] = [float(position["logprob"])]
    return {token: log_sum(values) for token, values in alike.items()}


def _tokens(ask: Ask, payload: object) -> tuple[int, int] | None:
    """Read and written; the most that it can have been where the server does not say.

    A token stands for at least one byte. None for what is no completion: it was not paid for.
    """
    match payload:
        case {"usage": {"prompt_tokens": int(read), "completion_tokens": int(written)}}:
            return max(0, read), max(0, written)
        case {"choices": [_, *_]}:
            return len(_content(ask)), ask.max_tokens
    return None


def _content(ask: Ask) -> str:
    """The question as ASCII: equal for equal questions."""
    messages = [dict(message) for message in ask.messages]
    how = (ask.max_tokens, ask.temperature, ask.top_logprobs, ask.sample)
    return json.dumps([messages, how], sort_keys=True, default=str)


def _refuses_logprobs(error: Exception) -> bool:
    return status_of(error) in (400, 422, 501) and "logprobs" in str(error)


def _key(options: OpenAIOptions) -> str:
    name = options.api_key_env
    key = os.environ.get(name, "").strip()
    if not key and not options.is_near:
        raise UserError(
            f"client.api_key_env={name}: the environment has no {name}, and {options.url} wants a "
            f"key: export {name}=…"
        )
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"client.api_key_env={name}: {name} holds what no key does: copy it anew")
    return key or NO_KEY
