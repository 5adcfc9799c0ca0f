"""The run directory: made once, never overwritten, and all that resume needs to know."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from judges.errors import UserError
from pipeline.config import Config, apply_overrides, parse_config

CONFIG_FILE = "config.yaml"
PARTIAL_CONFIG = ".config.yaml"
LIBRARIES = ("torch", "transformers", "peft", "ray", "datasets", "vllm", "numpy")


def refuse_existing_run(run_dir: Path) -> None:
    """Raises UserError if the directory holds anything: a run is never overwritten."""
    unborn = {PARTIAL_CONFIG}  # a process ended before its run began
    if run_dir.exists() and not (
        run_dir.is_dir() and {path.name for path in run_dir.iterdir()} <= unborn
    ):
        raise UserError(
            f"run.dir={run_dir}: already exists; `freshpairs resume {run_dir}` continues it, "
            "another run.name or run.dir starts a new one"
        )


def create_run_directory(cfg: Config, threads: dict[str, int]) -> Path:
    """Make the directory with its config.yaml; raises UserError where one is already there."""
    refuse_existing_run(cfg.run_dir)
    cfg.run_dir.mkdir(parents=True, exist_ok=True)
    write_run_config(cfg, environment(threads))
    return cfg.run_dir


def write_run_config(cfg: Config, recorded: dict[str, Any]) -> None:
    """Write the config with the environment that the run was started in, whole or not at all."""
    text = yaml.safe_dump(cfg.model_dump() | {"environment": recorded}, sort_keys=False)
    partial = cfg.run_dir / PARTIAL_CONFIG
    partial.write_text(text)
    os.replace(partial, cfg.run_dir / CONFIG_FILE)


def read_run_config(run_dir: Path, overrides: Sequence[str] = ()) -> tuple[Config, dict[str, Any]]:
    """The config and environment a run was started with. Raises UserError if it is no run."""
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{run_dir}: not a run directory (it has no {CONFIG_FILE})")
    raw = yaml.safe_load(path.read_text())
    recorded = raw.pop("environment")
    raw["run"]["dir"] = str(run_dir.absolute())
    apply_overrides(raw, overrides)
    return parse_config(raw, base=run_dir, where=str(path)), recorded


def environment(threads: dict[str, int]) -> dict[str, Any]:
    """What a result's last bits depend on besides the config."""
    return {
        "python": sys.version.split()[0],
        "libraries": {name: _installed(name) for name in LIBRARIES},
        "git": _git_revision(),
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
