"""A small hub of Hugging Face's protocol: what its client asks for a push, over real HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

TOKEN = "hf_right"
OWNER = "me"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})
    commits: list[str] = field(default_factory=lambda: ["0" * 40])

    def tags(self) -> list[str]:
        card = self.files.get("README.md", b"").decode()
        matter = card.split("---\n")[1] if card.startswith("---\n") else ""
        tags: list[str] = (yaml.safe_load(matter) or {}).get("tags", [])
        return tags


@dataclass
class Hub:
    """``repositories`` by kind and name; ``asked``: every request; ``fail``: path part → status.

    ``busy``: somebody commits to a repository whenever it was looked up.
    """

    url: str = ""
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    fail: dict[str, int] = field(default_factory=dict)
    busy: bool = False

    def model(self, name: str) -> Repository:
        return self.repositories["model", name]

    def dataset(self, name: str) -> Repository:
        return self.repositories["dataset", name]

    async def answer(self, request: Request) -> Response:
        path = request.url.path
        self.asked.append(f"{request.method} {path}")
        for part, status in self.fail.items():
            if part in path:
                return JSONResponse({"error": "so it is said"}, status)
        blob = path.startswith("/blobs/")  # its address is all that it takes
        if not blob and request.headers.get("authorization") != f"Bearer {TOKEN}":
            return JSONResponse({"error": "Invalid credentials"}, 401)
        body = await request.body()
        if blob:
            self.blobs[path.removeprefix("/blobs/")] = body
            return Response()
        sent = json.loads(body) if body and not path.endswith("/commit/main") else body
        match path.strip("/").split("/"):
            case ["api", "whoami-v2"]:
                return JSONResponse({"name": OWNER, "type": "user"})
            case ["api", "validate-yaml"]:
                return JSONResponse({"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                return self.create(sent)
            case ["api", kinds, owner, name, *rest]:
                key = (kinds.removesuffix("s"), f"{owner}/{name}")
                if key not in self.repositories:
                    missing = {"X-Error-Code": "RepoNotFound"}
                    return JSONResponse({"error": "Repository not found"}, 404, missing)
                return self.of_repository(key, rest, sent)
            case [*_, "info", "lfs", "objects", "batch"]:
                return JSONResponse({"objects": [self.upload(found) for found in sent["objects"]]})
        return JSONResponse({"error": "no such thing here"}, 404)

    def create(self, sent: dict[str, Any]) -> Response:
        key = (sent.get("type", "model"), f"{sent['organization']}/{sent['name']}")
        if sent["organization"] != OWNER:
            return JSONResponse({"error": f"You don't own {sent['organization']}"}, 403)
        assert key not in self.repositories
        self.repositories[key] = Repository(sent.get("visibility") == "private")
        return JSONResponse({"url": f"{self.url}/{key[1]}"})

    def of_repository(self, key: tuple[str, str], rest: list[str], sent: Any) -> Response:
        repository = self.repositories[key]
        if not rest:
            last = repository.commits[-1]
            if self.busy:
                repository.commits.append("1" * 40)
            return JSONResponse(
                {
                    "id": key[1],
                    "sha": last,
                    "private": repository.private,
                    "siblings": [{"rfilename": path} for path in repository.files],
                    "cardData": {"tags": repository.tags()},
                }
            )
        if rest[0] == "preupload":
            heavy = (".safetensors", ".parquet")
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(heavy) else "regular",
                    "shouldIgnore": False,
                }
                for file in sent["files"]
            ]
            return JSONResponse({"files": files})
        if rest != ["commit", "main"]:  # xet-write-token: a hub without Xet
            return JSONResponse({"error": "no such thing here"}, 404)
        return self.commit(key, [json.loads(line) for line in sent.splitlines()])

    def upload(self, found: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.url}/blobs/{found['oid']}"
        return {**found, "actions": {"upload": {"href": href}}}

    def commit(self, key: tuple[str, str], lines: list[dict[str, Any]]) -> Response:
        repository = self.repositories[key]
        parent = lines[0]["value"].get("parentCommit")
        if parent not in (None, repository.commits[-1]):
            return JSONResponse({"error": "main is elsewhere"}, 412)
        files = dict(repository.files)
        for line in lines[1:]:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    content = self.blobs[value["oid"]]
                    assert hashlib.sha256(content).hexdigest() == value["oid"]
                    files[value["path"]] = content
                case "deletedFile":
                    del files[value["path"]]
        repository.files = files
        oid = hashlib.sha1(repr((lines, repository.commits)).encode()).hexdigest()
        repository.commits.append(oid)
        return JSONResponse({"commitUrl": f"{self.url}/{key[1]}/commit/{oid}", "commitOid": oid})


@contextmanager
def fake_hub() -> Iterator[Hub]:
    """A hub on a port of this machine, for as long as the context lasts."""
    hub = Hub()
    methods = ["GET", "POST", "PUT", "HEAD"]
    app = Starlette(routes=[Route("/{path:path}", hub.answer, methods=methods)])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
        assert thread.is_alive()
    hub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join(10)
