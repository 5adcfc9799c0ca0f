"""The run directory: made once, never overwritten, and all that resume needs to know."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import yaml

from judges.errors import UserError
from pipeline.config import Config, apply_overrides, parse_config
from pipeline.shipped_files import (
    FILES,
    copy_files,
    keep_files,
    named_within,
    renamed,
    shipped_revision,
)
from pipeline.storage import LOCK, MARKER, storage_at, storage_of

CONFIG_FILE = "config.yaml"
PARTIAL_CONFIG = ".config.yaml"
UNBORN = frozenset({PARTIAL_CONFIG, FILES, MARKER, LOCK})
"""What a process leaves that ended before its run began."""
LIBRARIES = ("torch", "transformers", "peft", "ray", "datasets", "vllm", "numpy")


def refuse_existing_run(run: str | Path) -> None:
    """Raises UserError if the directory (a path or a URL) holds anything: none is overwritten."""
    storage_at(run).refuse_existing(UNBORN)


def create_run_directory(cfg: Config, threads: dict[str, int]) -> Path:
    """Make the directory with its config.yaml; raises UserError where one is already there."""
    refuse_existing_run(cfg.run_place)
    cfg.run_dir.mkdir(parents=True, exist_ok=True)
    kept, files = renamed(cfg)
    copy_files(files, cfg.run_dir)
    if files or keep_files(cfg.run_dir):
        storage_of(cfg).keep(cfg.run_dir / FILES)
    write_run_config(kept, environment(threads))
    return cfg.run_dir


@contextmanager
def driven(cfg: Config) -> Iterator[Sequence[str]]:
    """Be the only process at a run until the block, or the process, ends.

    Gives what a person should know. Raises UserError where another process is at it.
    """
    run, path = cfg.run_place, storage_of(cfg).lock
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = []
    with ExitStack() as stack:
        while True:
            file = stack.enter_context(path.open("a+"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                who = file.read() or "another process"
                raise UserError(f"{run}: {who} is at it: stop it first") from None
            except OSError as error:
                notes.append(
                    f"{run}: its disk has no locks ({error.strerror}): nothing keeps a second "
                    "process from this run"
                )
            if _is_at(path, file):  # else the process before removed it at its end
                break
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield notes
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty: the run began
                path.parent.rmdir()


def _is_at(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def write_run_config(cfg: Config, recorded: dict[str, Any]) -> None:
    """Write the config with the environment that the run was started in, whole or not at all."""
    record = named_within(cfg).model_dump() | {"environment": recorded}
    text = yaml.safe_dump(record, sort_keys=False)
    partial = cfg.run_dir / PARTIAL_CONFIG
    partial.write_text(text)
    storage_of(cfg).replace(partial, cfg.run_dir / CONFIG_FILE)


def read_run_config(
    run: str | Path, overrides: Sequence[str] = ()
) -> tuple[Config, dict[str, Any]]:
    """The config and environment a run (a path or a URL) was started with, as they are kept.

    Raises UserError if it is no run.
    """
    storage = storage_at(run)
    text = storage.read(storage.run_dir / CONFIG_FILE)
    if text is None:
        raise UserError(f"{storage.place}: not a run directory (it has no {CONFIG_FILE})")
    storage.bring(FILES)
    raw = yaml.safe_load(text)
    recorded = raw.pop("environment")
    raw["run"]["dir"] = storage.place  # wherever it was when it began
    apply_overrides(raw, overrides)
    where = f"{storage.place}/{CONFIG_FILE}"
    return parse_config(raw, base=storage.run_dir, where=where), recorded


def environment(threads: dict[str, int]) -> dict[str, Any]:
    """What a result's last bits depend on besides the config."""
    return {
        "python": sys.version.split()[0],
        "libraries": {name: _installed(name) for name in LIBRARIES},
        "git": shipped_revision() or _git_revision(),
        "threads": threads,
    }


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    checkout = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
