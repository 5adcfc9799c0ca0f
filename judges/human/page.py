"""The rating page: three files and five questions to the store, behind a secret address."""

from __future__ import annotations

import dataclasses
import hmac
import json
from collections.abc import Callable
from importlib import resources
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from judges.human.agreement import agreement
from judges.human.records import Choice, Item, Rating, first_is_left, rater_name
from judges.human.store import Store

MAX_BODY = 16_384
"""A question's body is no longer, in bytes."""

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
FILES = {
    "": ("page.html", "text/html"),
    "page.css": ("page.css", "text/css"),
    "page.js": ("page.js", "text/javascript"),
}
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

Quality = Annotated[int, Field(ge=1, le=5)]


class Asked(BaseModel):
    """Who asks."""

    model_config = ConfigDict(extra="forbid", strict=True)

    rater: Annotated[str, AfterValidator(rater_name)]


class Answered(Asked):
    """An answer, as it was seen; ``seconds`` are those of looking at the pair."""

    item: Annotated[int, Field(ge=1, lt=2**63)]
    verdict: Literal["left", "right", "tie", "skip"]
    left: Quality | None = None
    right: Quality | None = None
    seconds: float = Field(ge=0.0, le=86_400.0)


AskedT = TypeVar("AskedT", bound=Asked)


def application(store: Store, token: str, host: str = "127.0.0.1") -> Starlette:
    """The page of a store under ``/token/``; anything else is not there.

    Served on a loopback ``host``, it answers to loopback names only.
    """
    folder = resources.files("judges.human") / "static"
    routes: list[Route] = []
    for path, (name, media_type) in FILES.items():
        routes.append(Route(f"/{path}", _file((folder / name).read_bytes(), media_type)))

    def question(path: str, model: type[AskedT], answer: Callable[[AskedT], object]) -> None:
        async def endpoint(request: Request) -> Response:
            asked = await _read(request, model)
            return _json(await run_in_threadpool(answer, asked))

        routes.append(Route(f"/api/{path}", endpoint, methods=["POST"]))

    def rate(answered: Answered) -> object:
        try:
            _rate(store, answered)
        except KeyError as error:
            raise HTTPException(404, f"there is no pair {answered.item}") from error
        return _state(store, answered.rater)

    def undo(asked: Asked) -> object:
        withdrawn = store.undo(asked.rater)
        return _state(store, asked.rater, withdrawn)

    def agreed(_: Request) -> Response:
        return _json(dataclasses.asdict(agreement(store.ratings())))

    question("next", Asked, lambda asked: _state(store, asked.rater))
    question("rate", Answered, rate)
    question("undo", Asked, undo)
    question("progress", Asked, lambda asked: dataclasses.asdict(store.progress(asked.rater)))
    routes.append(Route("/api/agreement", agreed))
    names = LOOPBACK if host in LOOPBACK else None
    return Starlette(
        routes=[Mount(f"/{token}", routes=routes)],
        middleware=[Middleware(Guard, token=token, names=names)],
        exception_handlers={HTTPException: _refused},
    )


class Guard:
    """Lets through what knows the token and comes from our own page; adds the headers.

    ``names`` are the hosts that a request may name (against DNS rebinding), None any.
    """

    def __init__(self, app: ASGIApp, token: str, names: frozenset[str] | None) -> None:
        self._app = app
        self._token = token
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refused = self._refusal(scope)
        await (refused or self._app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._names is not None and _hostname(host) not in self._names:
            return PlainTextResponse("This page answers to localhost only.", 403)
        token, slash, _ = scope["path"][1:].partition("/")
        if not hmac.compare_digest(token.encode(), self._token.encode()):
            return PlainTextResponse("Open the whole address that the run has printed.", 404)
        if not slash:
            return RedirectResponse(f"/{token}/")
        if scope["method"] not in ("GET", "HEAD"):
            origin = headers.get("origin")
            if origin is not None and origin.partition("://")[2] != host:
                return PlainTextResponse("Another site's page may not ask this.", 403)
            if headers.get("sec-fetch-site", "same-origin") != "same-origin":
                return PlainTextResponse("Another site's page may not ask this.", 403)
        return None


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _file(content: bytes, media_type: str) -> Callable[[Request], Response]:
    return lambda _: Response(content, media_type=media_type)


async def _read(request: Request, model: type[AskedT]) -> AskedT:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "send application/json")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"send at most {MAX_BODY} bytes")
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise HTTPException(422, f"{where}: {first['msg']}") from error


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json({"error": error.detail}, error.status_code)


def _json(content: object, status: int = 200) -> Response:
    # ASCII: half a surrogate pair, as a model may write it, has no UTF-8.
    return Response(json.dumps(content), status, media_type="application/json")


def _rate(store: Store, answered: Answered) -> None:
    item = store.item(answered.item)
    first_left = first_is_left(item.key, answered.rater)
    sides = (answered.left, answered.right)
    quality_first, quality_second = sides if first_left else reversed(sides)
    store.rate(
        item.id,
        answered.rater,
        Choice.seen(answered.verdict, first_left),
        quality_first=quality_first,
        quality_second=quality_second,
        left=first_left,
        seconds=answered.seconds,
    )


def _state(store: Store, rater: str, withdrawn: Rating | None = None) -> dict[str, Any]:
    item = store.next_item(rater)
    return {
        "item": None if item is None else _shown(item, rater, withdrawn),
        "progress": dataclasses.asdict(store.progress(rater)),
    }


def _shown(item: Item, rater: str, withdrawn: Rating | None) -> dict[str, Any]:
    """What the rater sees: left and right, and no trace of which is first."""
    first_left = first_is_left(item.key, rater)
    left, right = (item.first, item.second) if first_left else (item.second, item.first)
    shown: dict[str, Any] = {"id": item.id, "prompt": _prompt(item), "left": left, "right": right}
    if withdrawn is not None and withdrawn.item == item.id:
        sides = (withdrawn.quality_first, withdrawn.quality_second)
        quality_left, quality_right = sides if first_left else reversed(sides)
        shown["withdrawn"] = {
            "verdict": withdrawn.choice.as_seen(first_left),
            "left": quality_left,
            "right": quality_right,
        }
    return shown


def _prompt(item: Item) -> str | list[dict[str, str]]:
    if isinstance(item.prompt, str):
        return item.prompt
    return [
        {"role": str(message.get("role", "")), "content": _content(message.get("content"))}
        for message in item.prompt
    ]


def _content(content: object) -> str:
    return content if isinstance(content, str) else json.dumps(content, indent=2)
