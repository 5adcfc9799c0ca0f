"""Object storage for tests: a local server of the S3 protocol, or the memory of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest

from workers import places
from workers.places import ObjectStore

BUCKET = "runs"


@contextmanager
def s3_server(patch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server with an empty bucket; inside, the environment leads there. Yields its endpoint."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    S3FileSystem.clear_instance_cache()
    try:
        S3FileSystem().mkdir(BUCKET)
        yield f"http://{host}:{port}"
    finally:
        server.stop()
        S3FileSystem.clear_instance_cache()


def in_memory(patch: pytest.MonkeyPatch) -> str:
    """An empty place in this process's memory that URLs may name; its URL."""
    patch.setitem(places.SCHEMES, "memory", "fsspec")
    fsspec.filesystem("memory").store.clear()
    return "memory://runs"


def count_writes(patch: pytest.MonkeyPatch, before: Callable[[int, str], object]) -> list[str]:
    """Calls ``before`` with the number and name of each object to be written or removed."""
    done: list[str] = []

    def counted(method: str) -> None:
        original: Callable[..., Any] = getattr(ObjectStore, method)

        def write(store: ObjectStore, *args: Any) -> Any:
            name = args[-1]
            if str(name).startswith("logs/"):  # put there by threads of their own
                return original(store, *args)
            done.append(name if method == "put" else f"- {name}")
            before(len(done), name)
            return original(store, *args)

        patch.setattr(ObjectStore, method, write)

    counted("put")
    counted("_remove")
    return done


def stored(url: str) -> dict[str, bytes]:
    """Everything under a URL, by name."""
    store = ObjectStore(url)
    return {name: store.read(name) or b"" for name in store.names()}


def fetched(url: str, directory: Path) -> Path:
    """A copy of everything under a URL."""
    for name, content in stored(url).items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory
