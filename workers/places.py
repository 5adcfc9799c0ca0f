"""Places that every machine sees: a path of a shared disk, or a URL of object storage (fsspec)."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from judges.errors import UserError
from workers.models.cache import models_directory

FILE = "file://"

SCHEMES = {"s3": "s3fs", "gs": "gcsfs"}
"""What reads and writes each scheme; freshpairs has an extra of the scheme's name."""

ATTEMPTS = 5
LONGEST_WAIT = 30.0
"""Seconds, between two attempts; the first wait is one second, each other twice the one before."""

CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile",
    "gs": "`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS",
}
"""Where each scheme's package finds credentials."""

ResultT = TypeVar("ResultT")


class StorageFailed(Exception):  # noqa: N818 (what failed, as JudgeFailed)
    """Object storage that did not do as it was asked, however often it was asked."""


def is_url(place: str) -> bool:
    """Whether this is a URL of object storage, not a path."""
    return "://" in place and not place.startswith(FILE)


def normalised(place: str) -> str:
    """A path for ``file:///…``; a URL without a slash at its end.

    Raises UserError for a scheme that nothing here writes to and for a URL without a bucket.
    """
    if place.startswith(FILE):
        if not place.startswith(f"{FILE}/"):
            raise UserError(f"{place}: a file's URL has three slashes: file:///shared/runs/x")
        return place.removeprefix(FILE)
    scheme, divided, rest = place.partition("://")
    if not divided:
        return place
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UserError(f"{place}: no storage of this kind is known: use a path, or one of {known}")
    if not rest.strip("/"):
        raise UserError(f"{place}: names no bucket: {scheme}://BUCKET/NAME")
    return place.rstrip("/")


class ObjectStore:
    """The objects under a URL, by the rest of their names.

    An object appears whole or not at all, and once ``put`` returns it lasts. What fails for a
    moment is asked ``attempts`` times, with growing waits; then StorageFailed is raised. Raises
    UserError where the scheme's package is not installed.
    """

    def __init__(self, url: str, attempts: int = ATTEMPTS) -> None:
        self.url = url
        scheme = url.partition("://")[0]
        package = SCHEMES[scheme]
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f'{url}: {package} is not installed: pip install "freshpairs[{scheme}]"'
            )
        self._scheme = scheme
        self._attempts = attempts
        self._files: Any = None
        self._root = ""

    def put(self, source: Path, name: str) -> None:
        """Let an object of this name hold the file's bytes."""
        self._ask(lambda files: files.put_file(str(source), self._path(name)))

    def get(self, name: str, target: Path) -> None:
        """Write the object's bytes to a file, whole or not at all; its folder is made."""
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial")
        self._ask(lambda files: files.get_file(self._path(name), str(partial)))
        os.replace(partial, target)

    def read(self, name: str) -> bytes | None:
        """The object's bytes; None where there is no such object."""

        def read(files: Any) -> bytes | None:
            try:
                found: bytes = files.cat_file(self._path(name))
                return found
            except FileNotFoundError:
                files.find(self._root)  # raises where it is the bucket that is missing
                return None

        return self._ask(read)

    def names(self, under: str = "") -> list[str]:
        """The names of all objects, or of those under a name and a slash; in order."""
        found = self._ask(lambda files: files.find(self._path(under)))
        return sorted(str(path)[len(self._root) :].lstrip("/") for path in found)

    def remove(self, names: Sequence[str]) -> None:
        """Remove objects, one after another."""
        for name in names:
            self._remove(name)

    def _remove(self, name: str) -> None:
        self._ask(lambda files: files.rm_file(self._path(name)))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _ask(self, operation: Callable[[Any], ResultT]) -> ResultT:
        asking = Retrying(
            stop=stop_after_attempt(self._attempts),
            wait=wait_exponential(multiplier=1.0, max=LONGEST_WAIT),
            retry=retry_if_exception(_may_pass),
            reraise=True,
        )
        try:
            return asking(lambda: operation(self._connected()))
        except Exception as error:
            raise StorageFailed(f"{self.url}: {self._told(error)}") from error

    def _connected(self) -> Any:
        if self._files is None:
            from fsspec.core import url_to_fs  # here: a package per scheme

            self._files, root = url_to_fs(self.url, use_listings_cache=False)
            self._root = root.rstrip("/")
        return self._files

    def _told(self, error: Exception) -> str:
        """What went wrong, and the remedy, in a line."""
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        credentials = CREDENTIALS.get(self._scheme, "")
        if isinstance(error, PermissionError):
            return f"refused ({reason}): check the credentials ({credentials}) and what they allow"
        if "Credentials" in type(error).__name__:  # botocore's, google.auth's
            return f"no credentials ({reason}): give {credentials}"
        if isinstance(error, FileNotFoundError):
            return f"not there ({reason}): make the bucket, or name another"
        endpoint = "AWS_ENDPOINT_URL and " if self._scheme == "s3" else ""
        return f"does not answer as it should ({reason}): check {endpoint}the network"


def _may_pass(error: BaseException) -> bool:
    """Whether asking again may help."""
    final = PermissionError | FileNotFoundError | ImportError
    return isinstance(error, Exception) and not isinstance(error, final)


def working_copies() -> Path:
    """Where this machine keeps copies of what is in object storage: in the cache."""
    return models_directory().with_name("runs")


@contextmanager
def temporary_directory() -> Iterator[Path]:
    """An empty directory on the cache's disk: a checkpoint is too large for many a /tmp."""
    parent = working_copies()
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=parent) as folder:
        yield Path(folder)


@contextmanager
def to_write(place: str) -> Iterator[Path]:
    """The path to write a file or a directory to, for it to stand at the place in the end.

    That is the place itself where it is a path; the folder for a file is there, a directory itself
    may be. For a URL it is a temporary one, whose files are put there one after another.
    """
    if not is_url(place):
        yield Path(place)
        return
    parent, _, name = place.rpartition("/")
    with temporary_directory() as folder:
        path = folder / name
        yield path
        store = ObjectStore(parent)
        for file in [path] if path.is_file() else files_of(path):
            store.put(file, file.relative_to(folder).as_posix())


@contextmanager
def to_read(place: str) -> Iterator[Path]:
    """The path to read a file or a directory from: the place itself, or a temporary copy of it.

    Raises StorageFailed where a URL holds nothing.
    """
    if not is_url(place):
        yield Path(place)
        return
    parent, _, name = place.rpartition("/")
    store = ObjectStore(parent)
    with temporary_directory() as folder:
        for found in store.names(name) or [name]:
            store.get(found, folder / found)
        yield folder / name


def files_of(directory: Path) -> list[Path]:
    """All files under a directory, in order."""
    return sorted(path for path in directory.rglob("*") if path.is_file())
