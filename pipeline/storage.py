"""Where a run's directory lasts: on a disk that every node sees, or in object storage.

With a URL the driver works in a directory of the cache, its working copy. What must last is put
in the storage at the moment it must be durable; what the storage holds is the truth.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from judges.errors import UserError
from pipeline.durable import sync_to_disk
from workers.places import (
    ObjectStore,
    StorageFailed,
    files_of,
    is_url,
    normalised,
    temporary_directory,
    working_copies,
)

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.learner import RemoteLearner

MARKER = ".marker"
"""The learner's machine reads it back before a run begins."""

LOCK = ".driver"
"""Held by the process that drives the run; it says which."""

KEPT_HERE = ("judge.sqlite*", "logs")
"""What of a working copy this machine's workers go on with: judges' answers, workers' logs."""

RECORDS = ("config.yaml", "files/", "metrics.jsonl", "policy/README.md")
"""What of a run its figures are read from; a policy's card says that the run is finished."""

PAIRS = ("config.yaml", "files/", "metrics.jsonl", "ledger/")
"""What of a run its pairs are read from."""

POLICY = "policy/"

NOT_FOR_THE_DRIVER = ("checkpoints/", "tensorboard/", "policy/", "logs/")
"""What the learner reads itself, and what is built again: not fetched by a resumed run."""


class Storage:
    """A run's directory on a disk that every node sees: what is there lasts."""

    def __init__(self, run_dir: Path) -> None:
        """Touches nothing."""
        self.run_dir = run_dir
        self.place = str(run_dir)
        self.lock = run_dir / LOCK

    def refuse_existing(self, unborn: frozenset[str]) -> None:
        """Raises UserError where more is there than these names, or where it cannot be told."""
        path = self.run_dir
        inside = {inside.name for inside in path.iterdir()} if path.is_dir() else {path.name}
        if path.exists() and not inside <= unborn:
            self._refuse()

    def prepare(self) -> None:
        """Make room here for a new run."""

    def fetch(self) -> None:
        """Let the run directory here be what lasts of it."""

    def bring(self, name: str) -> None:
        """Let what lasts under this name be in the run directory here, whatever else is."""

    def read(self, path: Path) -> str | None:
        """A file's text; None where there is none."""
        return path.read_text() if path.is_file() else None

    def replace(self, written: Path, final: Path) -> None:
        """Let a file that is written to its end appear, and last, under its name."""
        written.replace(final)

    def keep(self, path: Path) -> None:
        """Let a file, or all files of a directory and no others, last as they are now."""

    def forget(self, path: Path, last: str = "") -> None:
        """Remove a file, or a directory that the file named ``last`` makes whole.

        That goes last: what a process leaves that ended meanwhile is still found and removed.
        """
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    def seen_as(self, path: Path) -> str:
        """Where workers find what lasts of this path: a path or a URL."""
        return str(path)

    @contextmanager
    def appearing(self, final: Path, last: str) -> Iterator[tuple[Path, str]]:
        """A directory that appears whole or not at all when the block ends, and lasts.

        Gives where to write files here, and where a worker writes its own: a path or a URL. The
        file named ``last``, written here, makes it whole.
        """
        partial = final.with_name(f".partial-{final.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial, str(partial)
        for path in (*partial.rglob("*"), partial):
            sync_to_disk(path)
        os.replace(partial, final)
        sync_to_disk(final.parent)

    def whole(self, folder: Path, last: str) -> list[Path]:
        """The directories of a folder that have appeared."""
        if not folder.is_dir():
            return []
        return [path for path in folder.iterdir() if not path.name.startswith(".")]

    def check_seen_by(self, learner: RemoteLearner) -> None:
        """Raises UserError where the learner's machine does not see what is written here."""
        marker, text = self.run_dir / MARKER, uuid.uuid4().hex
        self.run_dir.mkdir(parents=True, exist_ok=True)
        marker.write_text(text)
        with as_mistake("run.dir="):
            self.keep(marker)
        host, found = learner.look(self.seen_as(marker))
        self.forget(marker)
        if found != text:
            raise UserError(
                f"run.dir={self.place}: the learner's machine ({host}) does not see it "
                f"({found}): {self._remedy}"
            )

    _remedy = "use a path that every node sees, or object storage (s3://BUCKET/NAME)"

    def _refuse(self) -> None:
        raise UserError(
            f"run.dir={self.place}: already exists; `freshpairs resume {self.place}` continues "
            "it, another run.name or run.dir starts a new one"
        )


class ObjectStorage(Storage):
    """A run's directory in object storage, with a working copy here."""

    def __init__(self, url: str) -> None:
        """Touches nothing. Raises UserError where its scheme's package is not installed."""
        super().__init__(working_copy(url))
        self.place = url
        self.lock = self.run_dir.with_name(LOCK)  # beside what is fetched and cleared
        self._store = ObjectStore(url)

    def refuse_existing(self, unborn: frozenset[str]) -> None:
        with as_mistake("run.dir="):
            inside = {name.partition("/")[0] for name in self._at_once().names()}
        if not inside <= unborn:
            self._refuse()

    def prepare(self) -> None:
        shutil.rmtree(self.run_dir, ignore_errors=True)  # of a run that is there no more

    def fetch(self) -> None:
        with as_mistake():
            names = self._at_once().names()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        for path in self.run_dir.iterdir():
            if not any(map(path.match, KEPT_HERE)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in names:
            if not name.startswith(NOT_FOR_THE_DRIVER):
                self._store.get(name, self.run_dir / name)

    def bring(self, name: str) -> None:
        for found in self._store.names(name):
            self._store.get(found, self.run_dir / found)

    def read(self, path: Path) -> str | None:
        with as_mistake():
            found = self._at_once().read(self._name(path))
        return None if found is None else found.decode()

    def replace(self, written: Path, final: Path) -> None:
        self._store.put(written, self._name(final))
        written.replace(final)

    def keep(self, path: Path) -> None:
        name = self._name(path)
        if path.is_file():
            self._store.put(path, name)
            return
        for file in files_of(path):
            self._store.put(file, self._name(file))
        mine = set(map(self._name, files_of(path)))
        self._store.remove([gone for gone in self._store.names(name) if gone not in mine])

    def forget(self, path: Path, last: str = "") -> None:
        names = self._store.names(self._name(path))
        self._store.remove(sorted(names, key=lambda name: name.endswith(f"/{last}")))
        if path.exists():
            super().forget(path)

    def seen_as(self, path: Path) -> str:
        return f"{self.place}/{self._name(path)}"

    @contextmanager
    def appearing(self, final: Path, last: str) -> Iterator[tuple[Path, str]]:
        self.forget(final, last)  # what a killed run has left
        name = self._name(final)
        with temporary_directory() as here:
            yield here, self.seen_as(final)
            for file in sorted(files_of(here), key=lambda file: file == here / last):
                self._store.put(file, f"{name}/{file.relative_to(here).as_posix()}")

    def whole(self, folder: Path, last: str) -> list[Path]:
        names = map(PurePosixPath, self._store.names(self._name(folder)))
        return [self.run_dir / name.parent for name in names if name.name == last]

    _remedy = "install there what reads it, and give it the same credentials"

    def _name(self, path: Path) -> str:
        name = path.relative_to(self.run_dir).as_posix()
        return "" if name == "." else name

    def _at_once(self) -> ObjectStore:
        """The same, where a person waits for the answer: what fails is not tried for minutes."""
        return ObjectStore(self.place, attempts=1)


def storage_at(run: str | Path) -> Storage:
    """Where this run's directory lasts: a path or a URL. Raises UserError for other schemes."""
    place = normalised(str(run))
    return ObjectStorage(place) if is_url(place) else Storage(Path(place))


def storage_of(cfg: Config) -> Storage:
    """Where the run's directory lasts."""
    return storage_at(cfg.run_place)


def working_copy(url: str) -> Path:
    """Where the driver of a run in object storage works: in the cache, under the run's name."""
    mark = hashlib.sha256(url.encode()).hexdigest()[:12]
    return working_copies() / mark / PurePosixPath(url).name


@contextmanager
def run_here(run: str, files: Sequence[str]) -> Iterator[Path]:
    """A run's directory to read: itself, or for a URL a temporary copy of these files.

    ``files`` are names, with a slash at the end those of directories; what runs inside the
    directory have of them is copied, too. Raises UserError where none is there.
    """
    place = normalised(run)
    if not is_url(place):
        yield Path(place)
        return
    with as_mistake():
        store = ObjectStore(place, attempts=1)
        names = [name for name in store.names() if any(_is_of(name, file) for file in files)]
        if not names:
            raise UserError(f"{place}: not a run directory (none of {', '.join(files)} is there)")
        with temporary_directory() as folder:
            directory = Path(folder, *place.partition("://")[2].split("/"))
            for name in names:
                store.get(name, directory / name)
            yield directory


def _is_of(name: str, file: str) -> bool:
    within, sought = f"/{name}", f"/{file}"
    return sought in within if file.endswith("/") else within.endswith(sought)


@contextmanager
def as_mistake(key: str = "") -> Iterator[None]:
    """Storage that fails when it is first asked is the user's to mend."""
    try:
        yield
    except StorageFailed as failure:
        raise UserError(f"{key}{failure}") from failure
