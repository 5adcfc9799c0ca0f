"""A worker's log in object storage: put there every now and then, by a thread of its own."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

from judges.errors import UserError
from workers.places import ObjectStore, StorageFailed

EVERY = 15.0
"""Seconds between two looks at whether there are new lines."""


class LogUpload:
    """Keeps an object like a file that grows; the last seconds may be missing from it.

    Nothing is put where the object ``born`` is not: a run that could not begin leaves no trace.
    Where the object holds more, another machine's, the file begins with that: a resumed run writes
    on. What fails is said once on stderr, and tried again with the next lines.
    """

    def __init__(self, path: Path, url: str, name: str, born: str) -> None:
        self._path = path
        self._store = ObjectStore(url, attempts=1)
        self._name = name
        self._born = born
        self._told = False
        self._written = threading.Event()
        self._continue()
        threading.Thread(target=self._run, daemon=True, name="log-upload").start()

    def written(self) -> None:
        """There are new lines."""
        self._written.set()

    def put(self) -> None:
        """Let the object hold what the file does."""
        self._written.clear()

        def put() -> None:
            if self._store.read(self._born) is not None:
                self._store.put(self._path, self._name)

        self._try(put)

    def _continue(self) -> None:
        def bring() -> None:
            there = self._store.read(self._name) or b""
            if len(there) > (self._path.stat().st_size if self._path.exists() else 0):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.write_bytes(there)

        self._try(bring)

    def _run(self) -> None:
        while True:
            self._written.wait()
            self.put()
            threading.Event().wait(EVERY)

    def _try(self, operation: Callable[[], None]) -> None:
        try:
            operation()
        except (StorageFailed, UserError, OSError) as error:
            if not self._told:
                print(f"{self._name}: not kept ({error}); the run goes on", file=sys.stderr)
            self._told = True
