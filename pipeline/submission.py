"""What a job on a cluster is sent: our packages, the config, and the files that it names."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from judges.errors import UserError
from judges.plugins import resolve_plugin_path
from pipeline.config import apply_overrides, check_config, read_config
from pipeline.config_files import CHECKOUT, PACKAGES, Kind, find_data, find_model, with_files
from pipeline.prompt_files import DATA_SUFFIXES
from pipeline.run_directory import CONFIG_FILE, environment
from pipeline.shipped_files import (
    LEFT_OUT,
    REVISION_FILE,
    Names,
    copy_files,
    titled,
)
from workers.places import is_url, normalised

COMMAND = ("python", "-m", "pipeline.cli")

LARGEST = 100 << 20
"""Bytes that a cluster takes in one request, Ray's DASHBOARD_CLIENT_MAX_SIZE; it packs files
uncompressed."""

STOP_SECONDS = 1800
"""How long a job that is stopped may take to end its update and write its checkpoint."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A job to be: its package's folder and size in bytes, its command, and what tells of it."""

    folder: Path
    size: int
    name: str
    run_dir: str
    entrypoint: str

    @property
    def metadata(self) -> dict[str, str]:
        """What a cluster's list of jobs says of it."""
        return {
            "freshpairs": freshpairs_version(),
            "run": self.name,
            "run_dir": self.run_dir,
            "revision": environment({})["git"] or "unknown",
        }


@dataclass(slots=True)
class _Files:
    """The files to be sent, each once, under its own name; ``there`` are folders every node has."""

    base: Path
    there: Sequence[Path]
    names: Names = field(default_factory=Names)

    def change(self, kind: Kind, name: str, key: str) -> str:
        """What the config calls the file within the package. Raises UserError where it cannot."""
        if "://" in name or self._is_there(name):
            return name
        match kind:
            case "plugin":
                spec = resolve_plugin_path(name, self.base, key=key)
                path, _, attribute = spec.rpartition(":")
                return f"{self._send(Path(path))}:{attribute}" if os.path.isfile(path) else name
            case "place":
                if not Path(name).is_absolute():
                    raise UserError(
                        f"{key}={name}: a job's own folder is gone when the job ends: give an "
                        "absolute path on the cluster"
                    )
                return name
            case "model":
                _refuse_directory(find_model(name, self.base), name, key)
                return name
            case "arg":
                found = find_data(name, self.base)
                if found is not None and found.is_dir():
                    _refuse_directory(found, name, key)
                    return name
            case "data":
                found = find_data(str(Path(name).expanduser()), self.base)
                if found is None:
                    _refuse_missing(name, key)
        return name if found is None else self._send(found)

    def _is_there(self, name: str) -> bool:
        return any(Path(name).is_relative_to(folder) for folder in self.there)

    def _send(self, path: Path) -> str:
        if self._is_there(str(path)):
            return str(path)
        return self.names.of(path)


def pack(
    config: str | Path, overrides: Sequence[str], folder: Path, there: Iterable[Path] = ()
) -> Submission:
    """Write the package of a new run into ``folder``.

    Files that the config names are copied, but for those in ``there``: folders that every node of
    the cluster has under the same path. Models are never copied. Raises UserError, before anything
    is copied, for a config that does not hold, for what cannot be sent, and for too large a
    package.
    """
    config = Path(config)
    raw = read_config(config, overrides)
    cfg = check_config(raw, where=str(config))
    _refuse_own_folder(cfg.run.dir)
    files = _Files(config.parent, [path.absolute() for path in there])
    sent = titled(with_files(cfg, files.change), cfg, config.parent)
    address = "inline" if cfg.cluster.address == "inline" else "auto"
    cluster = sent.cluster.model_copy(update={"address": address})
    sent = sent.model_copy(update={"cluster": cluster})
    size = _copy(folder, files.names.given)
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(sent.model_dump(), sort_keys=False))
    entrypoint = shlex.join([*COMMAND, "train", CONFIG_FILE])
    return Submission(folder, size, cfg.run.name, one_spelling(str(cfg.run.dir)), entrypoint)


def pack_resume(run_dir: str, overrides: Sequence[str], folder: Path) -> Submission:
    """Write the package that goes on with a run on the cluster. Raises UserError as ``pack``.

    It joins the cluster that it is sent to, wherever the run was begun.
    """
    if "://" not in run_dir and not Path(run_dir).is_absolute():
        raise UserError(f"{run_dir}: with --address, give the run's absolute path on the cluster")
    told: dict[str, Any] = {}
    apply_overrides(told, overrides)
    joins = [] if "address" in told.get("cluster", {}) else ["cluster.address=auto"]
    size = _copy(folder, {})
    entrypoint = shlex.join([*COMMAND, "resume", run_dir, *joins, *overrides])
    name = run_dir.rstrip("/").rpartition("/")[2]
    return Submission(folder, size, name, one_spelling(run_dir), entrypoint)


def one_spelling(run_dir: str) -> str:
    """A run directory as every job of it calls it. Raises UserError for a URL of no storage."""
    place = normalised(run_dir)
    return place if is_url(place) else str(Path(place))


def submission_id(name: str, now: datetime) -> str:
    """NAME-YYYYmmdd-HHMMSS, in letters that a URL and a shell leave alone."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name).strip('-') or 'run'}-{now:%Y%m%d-%H%M%S}"


def runtime_environment(
    folder: Path, file: Path | None = None, names: Iterable[str] = ()
) -> dict[str, Any]:
    """Ray's runtime environment of a job: the package, the user's own, and variables passed on.

    ``file`` is a YAML file of Ray's keys (pip, env_vars, …), ``names`` are variables of this
    process. Raises UserError where one is missing, or the file sets what is ours.
    """
    own = {} if file is None else _read_runtime_environment(file)
    passed = {}
    for name in names:
        if name not in os.environ:
            raise UserError(f"--env={name}: not set here: set it, or leave the option out")
        passed[name] = os.environ[name]
    ours = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
    variables = ours | {k: str(v) for k, v in own.get("env_vars", {}).items()} | passed
    return {**own, "working_dir": str(folder), "env_vars": variables}


def _read_runtime_environment(file: Path) -> dict[str, Any]:
    where = f"--runtime-env={file}"
    try:
        own = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(own, dict) or not isinstance(own.get("env_vars", {}), Mapping):
        raise UserError(f"{where}: not a runtime environment: write e.g. pip: [a-package]")
    if "working_dir" in own:
        raise UserError(f"{where}: working_dir is the package that is submitted: leave it out")
    return own


def freshpairs_version() -> str:
    """As installed; unknown where only the checkout is there."""
    try:
        return version("freshpairs")
    except PackageNotFoundError:
        return "unknown"


def _refuse_own_folder(run_dir: str | None) -> None:
    if run_dir is None or not ("://" in run_dir or Path(run_dir).is_absolute()):
        given = "not set" if run_dir is None else "a relative path"
        raise UserError(
            f"run.dir{'' if run_dir is None else f'={run_dir}'}: {given}, and a job's own folder "
            "is gone when the job ends: set run.dir=/a/path/every/node/sees/NAME or "
            "s3://bucket/NAME"
        )


def _refuse_directory(found: Path | None, name: str, key: str) -> None:
    if found is not None and not Path(name).is_absolute():
        raise UserError(
            f"{key}={name}: a directory here, and models are not sent with a job: give an "
            "absolute path that every node has, a fetched model's name, or a hub id"
        )


def _refuse_missing(name: str, key: str) -> None:
    path = Path(name)
    meant_as_file = path.suffix.lower() in DATA_SUFFIXES or name.startswith((".", "~"))
    if meant_as_file and not path.is_absolute():
        raise UserError(
            f"{key}={name}: no such file here: mend the path, or give an absolute one that every "
            "node has"
        )


def _copy(folder: Path, files: Mapping[Path, str]) -> int:
    """Copy our packages and the files; their bytes. Raises UserError where they are too many."""
    sources = {CHECKOUT / package: package for package in PACKAGES}
    if (project := CHECKOUT / "pyproject.toml").is_file():
        sources[project] = project.name
    sizes = {source: _size(source) for source in (*sources, *files)}
    total = sum(sizes.values())
    if total >= LARGEST:
        largest = sorted(files, key=lambda source: sizes[source], reverse=True)[:3]
        named = ", ".join(f"{source} ({told_size(sizes[source])})" for source in largest)
        raise UserError(
            f"the job's package would be {told_size(total)}, and a cluster takes "
            f"{told_size(LARGEST)}; the largest files: {named}: put them in a folder that every "
            "node has and name it by --there FOLDER, or let the config name a hub's data set"
        )
    copy_files(sources | dict(files), folder)
    (folder / REVISION_FILE).write_text(environment({})["git"] or "")
    return total


def _size(source: Path) -> int:
    if source.is_file():
        return source.stat().st_size
    total = 0
    for place, folders, names in os.walk(source):
        left_out = LEFT_OUT(place, [*folders, *names])
        folders[:] = [name for name in folders if name not in left_out]
        total += sum(os.path.getsize(Path(place, n)) for n in names if n not in left_out)
    return total


def told_size(size: int) -> str:
    """Bytes as people read them: 2.4 MB, rounded up."""
    return f"{math.ceil(size / 1e5) / 10:g} MB"
