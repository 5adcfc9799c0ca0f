"""The rating page's web server, in a thread of the judge's process."""

from __future__ import annotations

import atexit
import contextlib
import http.client
import os
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path

import uvicorn

from judges.errors import UserError
from judges.human.page import HEADERS, LOOPBACK, application
from judges.human.store import Store

HEAD_START_S = 0.5

_SERVERS: dict[Path, PageServer] = {}
_LOCK = threading.Lock()


class PageServer:
    """Serves a store's page until it is closed, or its process ends.

    ``url`` is the address with its token; it is also in the file ``<store>.url``, readable by its
    owner only, as long as the page is served. Raises UserError if the address cannot be had.
    """

    def __init__(self, store: Store, host: str, port: int) -> None:
        token = store.token()
        self._listener = _listen(host, port)
        self.url = f"http://{_name(host)}:{self._listener.getsockname()[1]}/{token}/"
        self.url_file = _url_file(store)
        self._server = uvicorn.Server(
            uvicorn.Config(
                application(store, token, host),
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                loop="asyncio",
                http="h11",
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=1,
            )
        )
        self._thread = threading.Thread(
            target=self._server.run, args=([self._listener],), name="human-judge", daemon=True
        )
        self._thread.start()
        _write_private(self.url_file, f"{self.url}\n")
        print(f"human judge: pairs are waiting for you at {self.url}", file=sys.stderr, flush=True)
        atexit.register(self.close)

    def close(self) -> None:
        """Stop serving and take the address file away."""
        atexit.unregister(self.close)
        self._server.should_exit = True
        self._thread.join(timeout=5.0)
        self._listener.close()  # the server leaves it open when it ends before it has begun
        with contextlib.suppress(OSError):
            if self.url_file.read_text().strip() == self.url:
                self.url_file.unlink()


def serve(store: Store, host: str, port: int) -> PageServer | None:
    """The one server of this store, started if there is none; None if another process has it.

    When that process ends, whoever calls this next takes over. Raises UserError if the address
    cannot be had.
    """
    with _LOCK:
        key = store.path.resolve()
        if key in _SERVERS:
            return _SERVERS[key]
        if _served_elsewhere(store):
            return None
        try:
            _SERVERS[key] = PageServer(store, host, port)
        except UserError:
            # Another process may have been a moment faster.
            time.sleep(HEAD_START_S)
            if _served_elsewhere(store):
                return None
            raise
        return _SERVERS[key]


def stop(store: Store) -> None:
    """Close the server of this store in this process, if there is one."""
    with _LOCK:
        server = _SERVERS.pop(store.path.resolve(), None)
    if server is not None:
        server.close()


def _url_file(store: Store) -> Path:
    return store.path.with_name(f"{store.path.name}.url")


def _served_elsewhere(store: Store) -> bool:
    """Whether the address in the file ``<store>.url`` shows this store's page."""
    policy = "Content-Security-Policy"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        url = _url_file(store).read_text().strip()
        with opener.open(url, timeout=5.0) as answer:
            return store.token() in url and answer.headers.get(policy) == HEADERS[policy]
    except (OSError, ValueError, http.client.HTTPException):
        return False


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UserError(
            f"judge.args.host={host}: no address of this machine ({error}): write 127.0.0.1"
        ) from error
    listener = socket.socket(family, kind)
    try:
        # A port that was in use a moment ago is free; one that is listened on is not.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise UserError(
            f"judge.args.port={port}: cannot listen there on {host} "
            f"({error.strerror or error}): give another port, or 0 for any that is free"
        ) from error
    return listener


def _name(host: str) -> str:
    if host in LOOPBACK:
        return f"[{host}]" if ":" in host else host
    return socket.gethostname() if host in ("0.0.0.0", "::") else host


def _write_private(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(partial, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    partial.replace(path)
