"""Files that came with a job: kept in the run's directory, so that the run can be resumed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config_files import CHECKOUT, Kind, with_files

if TYPE_CHECKING:
    from pipeline.config import Config

FILES = "files"
"""Their folder, in a job's package and in a run's directory."""

REVISION_FILE = "revision.txt"
"""The git revision that a package was made of: a package has no git."""


def keep_files(run_dir: Path) -> Path | None:
    """Copy the files that came with this job into the run's directory: their folder there."""
    sent = CHECKOUT / FILES
    if not ((CHECKOUT / REVISION_FILE).is_file() and sent.is_dir()):
        return None
    return Path(shutil.copytree(sent, run_dir / FILES, dirs_exist_ok=True))


def named_within(cfg: Config) -> Config:
    """The config in which such files are named from the run's directory, wherever that will be."""
    folders = [f"{root}/{FILES}/" for root in (CHECKOUT, cfg.run_dir.absolute())]

    def change(kind: Kind, name: str, key: str) -> str:
        within = next((folder for folder in folders if name.startswith(folder)), None)
        return name if within is None else f"{FILES}/{name.removeprefix(within)}"

    return with_files(cfg, change)


def shipped_revision() -> str | None:
    """The revision that this package was made of; None in a checkout."""
    path = CHECKOUT / REVISION_FILE
    return (path.read_text().strip() or None) if path.is_file() else None
