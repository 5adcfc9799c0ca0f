"""Files that a config names, kept in the run's directory, so that the run can be resumed anywhere.

They came with a job, or were here when a run in object storage began.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from judges.options import AskOptions, JudgeOptions
from judges.plugins import is_plugin, resolve_plugin_path
from pipeline.config_files import CHECKOUT, Kind, with_files
from workers.places import is_url

if TYPE_CHECKING:
    from pipeline.config import Config

FILES = "files"
"""Their folder, in a job's package and in a run's directory."""

REVISION_FILE = "revision.txt"
"""The git revision that a package was made of: a package has no git."""


LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".gitignore", ".rayignore", ".git")
"""What of a directory is not copied."""


@dataclass(slots=True)
class Names:
    """What files are called within a package or a run's directory, each by its own name."""

    given: dict[Path, str] = field(default_factory=dict)

    def of(self, path: Path) -> str:
        """The file's name there."""
        if path not in self.given:
            taken = set(self.given.values())
            names = (f"{FILES}/{path.name}", *(f"{FILES}/{n}/{path.name}" for n in range(2, 1000)))
            self.given[path] = next(name for name in names if name not in taken)
        return self.given[path]


def copy_files(files: Mapping[Path, str], folder: Path) -> None:
    """Copy files and directories into a folder, each under its name there."""
    for source, name in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=LEFT_OUT)
        else:
            shutil.copyfile(source, target)


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


def renamed(cfg: Config) -> tuple[Config, Mapping[Path, str]]:
    """The config as its run keeps it, and the files here that the run must keep by their new names.

    In object storage every file that the config names but no model: another machine has not got
    them. None where the run is in a directory, or was sent as a job, whose files came with it.
    """
    if not is_url(cfg.run_place) or (CHECKOUT / REVISION_FILE).is_file():
        return named_within(cfg), {}
    names = Names()

    def change(kind: Kind, name: str, key: str) -> str:
        path, colon, attribute = name.rpartition(":") if kind == "plugin" else (name, "", "")
        there = os.path.exists(path) if kind == "data" else os.path.isfile(path)
        if kind in ("model", "place") or not (there and Path(path).is_absolute()):
            return name
        return f"{names.of(Path(path))}{colon}{attribute}"

    return titled(with_files(cfg, change), cfg, Path()), names.given


def titled(sent: Config, cfg: Config, base: Path) -> Config:
    """Judges are called in the records as if they were asked here, wherever their files lie."""

    def one(judge: AskOptions, own: AskOptions) -> AskOptions:
        update: dict[str, Any] = {"args": _titled_members(judge.args, own.args, base)}
        if own.alias is None and judge.name != own.name:
            update["alias"] = resolve_plugin_path(own.name, base)
        if isinstance(judge, JudgeOptions) and isinstance(own, JudgeOptions):
            pairs = zip(judge.select_by, own.select_by, strict=True)
            update["select_by"] = [one(*pair) for pair in pairs]
            if judge.second is not None and own.second is not None:
                update["second"] = one(judge.second, own.second)
        return judge.model_copy(update=update)

    evaluation, own = sent.evaluation, cfg.evaluation
    others = [one(*pair) for pair in zip(evaluation.judges, own.judges, strict=True)]
    return sent.model_copy(
        update={
            "judge": one(sent.judge, cfg.judge),
            "evaluation": evaluation.model_copy(update={"judges": others}),
        }
    )


def _titled_members(args: Mapping[str, Any], own: Mapping[str, Any], base: Path) -> dict[str, Any]:
    members = args.get("members")
    if not isinstance(members, list):
        return dict(args)
    titled = []
    for member, mine in zip(members, own["members"], strict=True):
        name = mine.get("name") if isinstance(mine, Mapping) else mine
        if isinstance(name, str) and is_plugin(name):
            written = member if isinstance(member, Mapping) else {"name": member}
            titled.append({"alias": resolve_plugin_path(name, base), **written})
        else:
            titled.append(member)
    return {**args, "members": titled}


def shipped_revision() -> str | None:
    """The revision that this package was made of; None in a checkout."""
    path = CHECKOUT / REVISION_FILE
    return (path.read_text().strip() or None) if path.is_file() else None
