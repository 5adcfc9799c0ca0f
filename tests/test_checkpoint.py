"""Checkpoints appear whole or not at all, the newest are kept, and they give back what they got."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.checkpoint import Checkpoints, Cursor
from pipeline.learner import RemoteLearner
from pipeline.resampling import RoundPlan, Share


class Killed(BaseException):
    """Stands for a process that ends between two statements."""


class Done:
    def __init__(self, value: Any) -> None:
        self._value = value

    def result(self) -> Any:
        return self._value


class FakeLearner:
    """A learner that is nothing but its version, in two files."""

    def __init__(self, version: int = 0, *, dies_while_saving: bool = False) -> None:
        self.version = version
        self.dies_while_saving = dies_while_saving

    def submit(self, method: str, *args: Any) -> Done:
        return Done(getattr(self, method)(*args))

    def save(self, place: str) -> None:
        directory = Path(place)
        (directory / "learner.pt").write_text(str(self.version))
        if self.dies_while_saving:
            (directory / f"half-of-{self.version}").write_text("")
            raise Killed
        (directory / "optimizer.pt").write_text(str(self.version))

    def load(self, place: str) -> int:
        directory = Path(place)
        assert (directory / "optimizer.pt").read_text() == (directory / "learner.pt").read_text()
        self.version = int((directory / "learner.pt").read_text())
        return self.version


def save(checkpoints: Checkpoints, update: int, **fields: Any) -> Path:
    return checkpoints.save(RemoteLearner(FakeLearner(update)), Cursor(update, **fields))


def restored(checkpoints: Checkpoints) -> tuple[int, Cursor]:
    learner = RemoteLearner(FakeLearner(-1))
    cursor = checkpoints.restore(learner)
    return learner.version, cursor


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_run_without_checkpoints_begins_at_the_beginning(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=2, keep=2)
    assert checkpoints.all() == []
    assert checkpoints.latest_update() == 0
    assert restored(checkpoints) == (0, Cursor())
    assert Cursor() == Cursor(update=0, batch=0, metrics_bytes=0, rounds=(), dial=None, drift=None)


def test_the_cursor_comes_back_as_it_was(tmp_path):
    drift = {"start": -1.25, "spans": [[1, 2], [3, 4]], "seen": {"a": None}}
    mixed = RoundPlan(3, 4, 60, 12, (Share(3, 60, 12, 12), Share(2, 40, 20, 4)))
    cursor = Cursor(7, 2, 12345, (mixed, RoundPlan(4, 2, 72, 8)), {"start": 80}, drift, {"n": 1})
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=1, keep=1)
    final = checkpoints.save(RemoteLearner(FakeLearner(7)), cursor)
    assert final == tmp_path / "checkpoints" / "update-000007"
    assert names(final) == ["cursor.json", "learner.pt", "optimizer.pt"]
    assert restored(checkpoints) == (7, cursor)


def test_the_newest_are_kept_and_the_newest_is_restored(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=2, keep=2)
    for update, kept in ((2, [2]), (4, [2, 4]), (6, [4, 6]), (7, [6, 7])):
        save(checkpoints, update, batch=update // 2)
        assert names(tmp_path) == [f"update-{u:06d}" for u in kept]
        assert checkpoints.latest_update() == update
        assert restored(checkpoints) == (update, Cursor(update, batch=update // 2))


def test_the_newest_is_newest_by_number(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=1, keep=2)
    for update in (999_998, 999_999, 1_000_000):
        save(checkpoints, update)
    assert [path.name for path in checkpoints.all()] == ["update-999999", "update-1000000"]
    assert restored(checkpoints)[0] == checkpoints.latest_update() == 1_000_000


def test_due():
    checkpoints = Checkpoints(Path(), every=3, keep=1)
    assert [update for update in range(1, 10) if checkpoints.due(update)] == [3, 6, 9]


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=1, keep=1)
    final = save(checkpoints, 5, batch=1)
    before = (final / "learner.pt").stat().st_mtime_ns
    assert save(checkpoints, 5, batch=1) == final
    assert (final / "learner.pt").stat().st_mtime_ns == before


def test_a_half_written_checkpoint_is_ignored_and_replaced(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=2, keep=3)
    save(checkpoints, 2)
    with pytest.raises(Killed):
        checkpoints.save(RemoteLearner(FakeLearner(4, dies_while_saving=True)), Cursor(4))
    assert names(tmp_path) == [".partial-update-000004", "update-000002"]
    assert [path.name for path in checkpoints.all()] == ["update-000002"]
    assert checkpoints.latest_update() == 2
    assert restored(checkpoints) == (2, Cursor(2))

    save(checkpoints, 4)
    assert names(tmp_path) == ["update-000002", "update-000004"]
    assert names(tmp_path / "update-000004") == ["cursor.json", "learner.pt", "optimizer.pt"]
    assert restored(checkpoints) == (4, Cursor(4))


def test_killed_at_any_file_operation_the_last_whole_checkpoint_is_restored(tmp_path, monkeypatch):
    """Dies before the n-th flush, rename or removal, for every n; then the run goes on."""
    operations = [
        (storage.os, "fsync"),
        (storage.os, "replace"),
        (storage.shutil, "rmtree"),
    ]
    deaths = 0
    for fatal in range(1, 100):
        checkpoints = Checkpoints(tmp_path / str(fatal), every=2, keep=1)
        save(checkpoints, 2)
        done: list[str] = []

        def counted(name: str, original: Any, fatal: int = fatal, done: list[str] = done) -> Any:
            def operation(*args: Any, **kwargs: Any) -> Any:
                done.append(name)
                if len(done) == fatal:
                    raise Killed
                return original(*args, **kwargs)

            return operation

        with monkeypatch.context() as patch:
            for owner, name in operations:
                patch.setattr(owner, name, counted(name, getattr(owner, name)))
            try:
                save(checkpoints, 4)
            except Killed:
                deaths += 1
            else:
                break
        # Whole from the moment of the rename on, and every byte was flushed before it.
        appeared = "replace" in done[:-1]
        assert restored(checkpoints) == ((4, Cursor(4)) if appeared else (2, Cursor(2)))
        save(checkpoints, 4)
        save(checkpoints, 6)
        assert names(tmp_path / str(fatal)) == ["update-000006"]
    # Stale partial, three files and their directory, the rename, the directory, the old one.
    assert done == ["rmtree", *["fsync"] * 4, "replace", "fsync", "rmtree"]
    assert deaths == len(done)


def test_every_file_is_flushed_before_the_checkpoint_appears(tmp_path, monkeypatch):
    flushed: list[str] = []
    replace, fsync = os.replace, os.fsync

    def tell_fsync(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def tell_replace(source: Path, target: Path) -> None:
        flushed.append("renamed")
        replace(source, target)

    monkeypatch.setattr(storage.os, "fsync", tell_fsync)
    monkeypatch.setattr(storage.os, "replace", tell_replace)
    save(Checkpoints(tmp_path / "c", every=1, keep=1), 1)
    files, rest = flushed[:3], flushed[3:]
    assert sorted(files) == ["cursor.json", "learner.pt", "optimizer.pt"]
    assert rest == [".partial-update-000001", "renamed", "c"]
