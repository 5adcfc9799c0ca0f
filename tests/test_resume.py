"""Going on with a run: by one process at a time, and with what may be told anew."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from judges.errors import UserError
from pipeline import job, run_directory
from pipeline.run_directory import driven, refuse_existing_run
from tests import tiny
from tests.interruption import Killed, kill_at_call
from tests.object_storage import in_memory, stored

DRIVER = """
import fcntl, os, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(f"process {os.getpid()} on elsewhere")
file.flush()
print("at it", flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["path", "URL"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("FRESHPAIRS_CACHE", str(tmp_path / "cache"))
    return f"{in_memory(monkeypatch)}/x" if request.param == "URL" else str(tmp_path / "run")


def test_a_run_is_driven_by_one_process(
    tiny_model: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one leaves it as it is, in its working copy, too."""
    cfg = tiny.config(tiny_model, tmp_path, run={"dir": place, "updates": 2})
    said = f"{place}: process {os.getpid()} on {socket.gethostname()} is at it: stop it first"
    with driven(cfg), pytest.raises(UserError) as caught:
        job.run(cfg, quiet=True)
    assert str(caught.value) == said
    refuse_existing_run(place)
    with monkeypatch.context() as patch:
        kill_at_call(patch, job, "write_policy", 1)
        with pytest.raises(Killed):
            job.run(cfg, quiet=True)
    (cfg.run_dir / "unkept").write_text("what the first process is about to store")
    config = (cfg.run_dir / "config.yaml").read_text()
    with driven(cfg), pytest.raises(UserError) as caught:
        job.resume(place, ["cluster.wait_minutes=3"], quiet=True)
    assert str(caught.value) == said
    assert (cfg.run_dir / "unkept").is_file()
    assert (cfg.run_dir / "config.yaml").read_text() == config
    job.resume(place, quiet=True)
    assert not list(tmp_path.rglob(".driver*"))
    if "://" in place:
        assert not any(".driver" in name for name in stored(place))


def test_a_process_that_died_drives_no_run(tiny_model: Path, tmp_path: Path, place: str) -> None:
    cfg = tiny.config(tiny_model, tmp_path, run={"dir": place})
    lock = run_directory.storage_of(cfg).lock
    lock.parent.mkdir(parents=True)
    command = [sys.executable, "-c", DRIVER, str(lock)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "at it\n"
        said = f"process {other.pid} on elsewhere is at it: stop it first"
        with pytest.raises(UserError, match=said), driven(cfg):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
        refuse_existing_run(place)  # though it has left its file
        assert lock.is_file()
        with driven(cfg) as notes:
            assert notes == []
        assert not lock.parent.exists()


def test_a_lock_that_the_process_before_removed_is_not_held(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends between this one's opening of the file and its locking it."""
    cfg = tiny.config(tiny_model, tmp_path)
    lock = run_directory.storage_of(cfg).lock
    flock = run_directory.fcntl.flock

    def late(file: object, how: int) -> None:
        if lock.exists() and not lock.with_name("once").exists():
            lock.unlink()
            lock.with_name("once").touch()
        flock(file, how)

    monkeypatch.setattr(run_directory.fcntl, "flock", late)
    with driven(cfg):
        assert lock.read_text().startswith(f"process {os.getpid()} ")
        with pytest.raises(UserError, match="is at it"), driven(cfg):
            pass


def test_a_disk_without_locks_is_said(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(file: object, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_directory.fcntl, "flock", none)
    with driven(tiny.config(tiny_model, tmp_path)) as (note,):
        assert note.startswith(f"{tmp_path}/run: its disk has no locks (Function not implemented)")


def test_a_run_goes_on_elsewhere(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny.config(tiny_model, tmp_path, run={"dir": str(tmp_path / "run"), "updates": 2})
    with monkeypatch.context() as patch:
        kill_at_call(patch, job, "write_policy", 1)
        with pytest.raises(Killed):
            job.run(cfg, quiet=True)
    for override in ("generator.replicas=2", "clusters.address=auto", "run.updates=3"):
        with pytest.raises(UserError, match=f"^{override}: a run goes on as it began; only"):
            job.resume(cfg.run_dir, [override], quiet=True)
    job.resume(cfg.run_dir, ["cluster.wait_minutes=3"], quiet=True)
    kept = yaml.safe_load((cfg.run_dir / "config.yaml").read_text())
    assert kept["cluster"]["wait_minutes"] == 3.0
    assert kept["cluster"]["address"] == "inline"
