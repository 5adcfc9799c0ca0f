"""A sweep: the runs of a grid of configs, one after another, in a directory of their own."""

from __future__ import annotations

import hashlib
import itertools
import re
import shlex
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from judges.errors import UserError
from pipeline.config import Config, load_config
from pipeline.config_difference import differences, flat, short_keys, value_text
from pipeline.handles import WorkerDied
from pipeline.model_card import has_policy
from pipeline.run_directory import CONFIG_FILE, read_run_config, refuse_existing_run
from pipeline.shipped_files import named_within, renamed
from pipeline.stopping import Stopped
from pipeline.storage import storage_of
from pipeline.tracking import METRICS_FILE
from workers.places import StorageFailed, is_url, normalised
from workers.verdicts import JudgeFailed
from workers.weight_sync.buckets import SyncError

GivenT = TypeVar("GivenT")
MadeT = TypeVar("MadeT")

NAMES = ("run", "run.name", "run.dir")
"""Keys that the sweep sets itself, each point its own."""

MAY_CHANGE = ("judge.budget", "drift.stop", "drift.warn")
"""A run may go on with another value of these, each a mapping (job.resume)."""

LONGEST_VALUE, LONGEST_NAME = 40, 200
"""Characters of a value in a point's name, and of the name."""

TOLD_IN_A_LINE = (
    UserError,
    JudgeFailed,
    SyncError,
    WorkerDied,
    StorageFailed,
    FloatingPointError,
)


@dataclass(frozen=True, slots=True)
class Axis:
    """A key and the values it takes, as they were written (YAML)."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a sweep: its name says which; ``more`` are the changes it goes on with, if begun.

    ``begun`` and ``finished`` are of the time when the sweep was planned.
    """

    name: str
    cfg: Config
    begun: bool
    finished: bool
    more: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sweep:
    """All points, checked, and the command that runs them, or goes on with them."""

    points: Sequence[Point]
    command: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is to be compared, and a line for every point that failed or that needs a change."""

    runs: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)


def plan(config: Path, arguments: Sequence[str], directory: str | Path | None = None) -> Sweep:
    """The product of all ``key=value,value,…``, the last key turning fastest.

    ``directory`` is that of the run (``run.dir`` or runs/NAME) with ``-sweep`` appended unless
    given. Nothing is run or written. Raises UserError, a line for each mistake in any of the
    configs, and for each point that was begun with another config; or for a file where the
    directory should be.
    """
    axes = [read_axis(argument) for argument in arguments]
    _check(axes)
    chosen = [
        dict(zip([axis.key for axis in axes], values, strict=True))
        for values in itertools.product(*[axis.values for axis in axes])
    ]
    loaded = _each(lambda c: load_config(config, [f"{k}={v}" for k, v in c.items()]), chosen)
    place = normalised(str(directory or f"{loaded[0].run_place}-sweep"))
    if not is_url(place):
        _check_place(Path(place))
    keys = short_keys([axis.key for axis in axes if len(axis.values) > 1])
    names = [point_name({keys[k]: v for k, v in values.items() if k in keys}) for values in chosen]
    configs = [_placed(cfg, place, name) for cfg, name in zip(loaded, names, strict=True)]
    points = _each(lambda named: _point(*named), list(zip(names, configs, strict=True)))
    where = [] if directory is None else ["--dir", str(directory)]
    return Sweep(points, shlex.join(["freshpairs", "sweep", str(config), *arguments, *where]))


def read_axis(argument: str) -> Axis:
    """``key=1,4`` as a key and its values. Raises UserError for any other form."""
    key, equals, text = argument.partition("=")
    if not equals or not key:
        raise UserError(f"{argument}: a sweep's keys have the form key.path=value,value,…")
    values = tuple(value.strip() for value in split_values(text))
    if len(values) > 1:
        if "" in values:
            raise UserError(f"{argument}: a value is missing beside a comma; null is one, too")
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise UserError(f"{argument}: {twice} is there twice; name each value once")
        if key in NAMES:
            raise UserError(f"{argument}: the sweep names its runs itself; give {key} one value")
    return Axis(key, values)


def split_values(text: str) -> list[str]:
    """YAML values between commas; those inside brackets, braces or quotes divide nothing."""
    values, depth, quote, before = [""], 0, "", ","
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and before in ",[{:":  # elsewhere it is an apostrophe
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        if character == "," and depth <= 0 and not quote:
            values.append("")
        else:
            values[-1] += character
        before = before if character.isspace() else character
    return values


def point_name(values: dict[str, str]) -> str:
    """``updates_per_round=4,seed=0``: a file name that says the same each time.

    A value that cannot stand in one as it is gets a mark of its own.
    """
    name = ",".join(f"{key}={_safe(value)}" for key, value in values.items())
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{_mark(name)}"


def _safe(value: str) -> str:
    plain = value if value[:1] in "[{" else value.rpartition("/")[2]
    plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", plain).strip("-")[:LONGEST_VALUE]
    return plain if plain == value else f"{plain}-{_mark(value)}".lstrip("-")


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def run(sweep: Sweep, *, say: Callable[[str], object] = print, quiet: bool = False) -> Outcome:
    """Run or resume each point that is not finished, here, one after another.

    A point that fails is told, and so is one that stopped because something of its own must be
    changed (a spent budget); the others still run. Raises Stopped for any other stop, Ctrl-C first
    of all: ``sweep.command`` goes on from there. Raises UserError, each line once, where mistakes
    let no point at all begin.
    """
    outcome = Outcome()
    mistakes: list[str] = []
    for number, point in enumerate(sweep.points, start=1):
        heading = f"({number}/{len(sweep.points)}) {point.name}"
        say(f"{heading}: finished before" if point.finished else heading)
        if not point.finished:
            mistakes += _run_point(point, outcome, quiet)
        if _holds(point.cfg, METRICS_FILE):
            outcome.runs.append(point.cfg.run_place)
    if len(mistakes) == len(sweep.points):
        raise UserError("\n".join(dict.fromkeys("\n".join(mistakes).splitlines())))
    return outcome


def _run_point(point: Point, outcome: Outcome, quiet: bool) -> list[str]:
    """The user's mistake that kept the point from beginning; empty where it began."""
    from pipeline import job

    try:
        if point.begun:
            job.resume(point.cfg.run_place, point.more, quiet=quiet)
        else:
            job.run(point.cfg, quiet=quiet)
    except Stopped as stopped:
        if not stopped.changed:
            raise
        outcome.stopped.append(f"{point.name}: {stopped}: it goes on with {stopped.changed}")
    except KeyboardInterrupt as error:  # before the run could take it for a request to stop
        raise Stopped("at once", point.cfg.run_place) from error
    except TOLD_IN_A_LINE as error:
        lines = [str(error), *getattr(error, "__notes__", [])]
        outcome.failed.append(f"{point.name}: {'; '.join(lines)}")
        if isinstance(error, UserError) and not _holds(point.cfg, CONFIG_FILE):
            return ["\n".join(lines)]
    except Exception as error:  # noqa: BLE001 (it is shown whole, and the sweep fails in the end)
        traceback.print_exception(error)
        outcome.failed.append(f"{point.name}: {type(error).__name__}: {error}")
    return []


def _check_place(place: Path) -> None:
    """Raises UserError where a file stands in the way of the directory."""
    there = next(path for path in (place, *place.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--dir {place}: {there} is a file, not a directory: choose another")


def _check(axes: Sequence[Axis]) -> None:
    """Raises UserError where these are no grid."""
    keys = [axis.key for axis in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"{key}: given twice; write all its values after one =, with commas")
    if all(len(axis.values) == 1 for axis in axes):
        raise UserError(
            "no key has several values (key.path=1,4,16): for a single run, `freshpairs train`"
        )


def _each(make: Callable[[GivenT], MadeT], given: Sequence[GivenT]) -> list[MadeT]:
    """What is made of each. Raises UserError with the mistakes in all of them, each line once."""
    made: list[MadeT] = []
    mistakes: dict[str, None] = {}
    for one in given:
        try:
            made.append(make(one))
        except UserError as mistake:
            mistakes |= dict.fromkeys(str(mistake).splitlines())
    if mistakes:
        raise UserError("\n".join(mistakes))
    return made


def _placed(cfg: Config, place: str, name: str) -> Config:
    directory = f"{place}/{name}" if is_url(place) else str((Path(place) / name).absolute())
    own = {"dir": directory, "name": f"{cfg.run.name} {name}"}
    return cfg.model_copy(update={"run": cfg.run.model_copy(update=own)})


def _point(name: str, cfg: Config) -> Point:
    """Raises UserError where something else stands in its directory."""
    if not _holds(cfg, CONFIG_FILE):
        refuse_existing_run(cfg.run_place)
        return Point(name, cfg, begun=False, finished=False, more=())
    recorded = named_within(read_run_config(cfg.run_place)[0]).model_dump()
    asked = renamed(cfg)[0].model_dump()
    if asked["generator"]["backend"] == "auto":  # which the run has settled
        asked["generator"]["backend"] = recorded["generator"]["backend"]
    changes = ((key, _taken(recorded, key), _taken(asked, key)) for key in MAY_CHANGE)
    more = tuple(f"{key}={value_text(new)}" for key, old, new in changes if new != old)
    configs = [flat(recorded), flat(asked)]
    if others := differences(configs):
        was, is_ = (_told(config, others) for config in configs)
        raise UserError(
            f"{cfg.run_place}: was begun with {was}; asked for is {is_}: sweep into another "
            "directory (--dir), or remove this one"
        )
    return Point(name, cfg, True, has_policy(cfg), more)


def _holds(cfg: Config, name: str) -> bool:
    return storage_of(cfg).read(cfg.run_dir / name) is not None


def _taken(config: dict[str, Any], key: str) -> Any:
    """What stands in the config under ``section.name``, which is taken out of it."""
    section, _, name = key.partition(".")
    return config[section].pop(name)


def _told(config: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Those of the keys that the config has, with their values."""
    there = [f"{key}={value_text(config[key])}" for key in keys if key in config]
    return ", ".join(there) or f"no {', '.join(keys)}"
