"""Runs side by side: what differs in their configs, and what came of it."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import RenderableType

from judges.errors import UserError
from pipeline.config_difference import OWN_KEYS, differences, flat, short_keys, value_text
from pipeline.run_directory import CONFIG_FILE, read_run_config
from pipeline.storage import RECORDS, run_here
from pipeline.tracking import METRICS_FILE, Record, metrics
from workers.places import is_url

SEED = "run.seed"
SAID = ("win", "tie", "loss", "invalid", "win_rate", "quality", "quality_baseline")
"""Of an evaluation: the judge's; the rest is measured without one."""

PLACE = ("schema", "round")
SUFFIXES = (".png", ".svg", ".pdf")

Measures: TypeAlias = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Run:
    """What a run directory holds: its config by dotted key, and its records of each kind.

    ``url``: where it lasts, if ``directory`` is a copy of that.
    """

    directory: Path
    config: Mapping[str, Any]
    finished: bool
    updates: Sequence[Record]
    rounds: Sequence[Record]
    evaluations: Sequence[Record]
    measures: Measures
    url: str | None = None

    @property
    def seed(self) -> int:
        """``run.seed``."""
        return int(self.config[SEED])

    @property
    def last_evaluations(self) -> dict[str, Record]:
        """The newest evaluation of each judge."""
        return _by_judge(self.evaluations)


@dataclass(frozen=True, slots=True)
class Group:
    """Runs of one config but for their seeds, under the letter they are called by."""

    letter: str
    runs: Sequence[Run]

    @property
    def config(self) -> Mapping[str, Any]:
        """By dotted key; the seed is the first run's."""
        return self.runs[0].config

    def values(self, measure: str) -> list[float]:
        """Of the runs that have this measure."""
        found = (run.measures.get(measure) for run in self.runs)
        return [value for value in found if value is not None]


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Groups of runs, and the dotted keys in which their configs differ, the seed left out.

    ``left_out``: runs that have no metrics yet.
    """

    groups: Sequence[Group]
    differing: Sequence[str]
    left_out: Sequence[Path] = ()

    @property
    def runs(self) -> list[Run]:
        """All of them, group by group."""
        return [run for group in self.groups for run in group.runs]

    @property
    def titles(self) -> dict[str, str]:
        """The differing keys as short as no other key of these configs is."""
        return short_keys(self.differing, {key for group in self.groups for key in group.config})

    @property
    def judges(self) -> list[str]:
        """Whoever evaluated any of the runs."""
        return list(dict.fromkeys(name for run in self.runs for name in run.last_evaluations))


def compare(
    directories: Sequence[str | Path], out: Path | None = None, as_json: Path | None = None
) -> RenderableType:
    """The table of these runs, finished or not, for a terminal.

    A directory (a path or a URL) of runs, such as a sweep's, stands for all of them; those without
    metrics yet are left out and told. ``out`` is drawn (.png, .svg or .pdf), ``as_json`` written.
    Raises UserError for a directory that is no run and a file that cannot be written or exists,
    before anything is written.
    """
    if out is not None:
        _check_free("--out", out)
        if out.suffix not in SUFFIXES:
            raise UserError(f"--out {out}: ends in none of {', '.join(SUFFIXES)}; choose one")
    if as_json is not None:
        _check_free("--json", as_json)
    with ExitStack() as stack:
        here = {
            stack.enter_context(run_here(place, RECORDS)): place
            for place in dict.fromkeys(map(str, directories))
        }
        paths, left_out = run_directories(list(here))
        runs = [replace(read_run(path), url=_url(path, here)) for path in paths]
    once = {run.url or run.directory: run for run in runs}
    found = replace(side_by_side(list(once.values())), left_out=left_out)
    from pipeline.compare_table import table

    if out is not None:
        from pipeline.compare_figure import draw
        from pipeline.explain_figure import write

        write(draw(found), out)
    if as_json is not None:
        as_json.write_text(json.dumps(as_mapping(found), indent=1, allow_nan=False) + "\n")
    return table(found)


def _url(run: Path, copies: Mapping[Path, str]) -> str | None:
    """Where the run lasts, if it is in one of these copies of a place in object storage."""
    for copy, place in copies.items():
        if is_url(place) and run.is_relative_to(copy):
            return "/".join((place.rstrip("/"), *run.relative_to(copy).parts))
    return None


def run_directories(directories: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The runs that these are or hold, each once, in order; and those held without metrics yet.

    Raises UserError where a directory holds only such.
    """
    found: dict[Path, Path] = {}
    left_out: dict[Path, Path] = {}
    for directory in directories:
        inside = sorted((p.parent for p in directory.glob(f"*/{CONFIG_FILE}")), key=_by_values)
        if (directory / CONFIG_FILE).is_file() or not inside:
            found.setdefault(directory.resolve(), directory)
            continue
        begun = [run for run in inside if (run / METRICS_FILE).is_file()]
        if not begun:
            raise UserError(
                f"{directory}: none of its runs has a {METRICS_FILE} yet: wait for the first update"
            )
        for run in inside:
            (found if run in begun else left_out).setdefault(run.resolve(), run)
    return list(found.values()), list(left_out.values())


def _by_values(run: Path) -> list[tuple[float, str]]:
    """Orders ``…=2`` before ``…=16`` before ``…=.inf``, and those before other names."""
    return [_order(part) for part in re.split("[=,]", run.name)]


def _order(part: str) -> tuple[float, str]:
    try:
        return (float(part.replace(".inf", "inf")), "")
    except ValueError:
        return (math.inf, part)


def read_run(directory: Path) -> Run:
    """A run as far as it has come. Raises UserError if the directory is no run's."""
    cfg, _ = read_run_config(directory)
    kinds: dict[str, list[Record]] = defaultdict(list)
    for record in metrics(directory):
        kinds[record["kind"]].append(record)
    return Run(
        directory,
        flat(cfg.model_dump()),
        finished=(directory / "policy").is_dir(),
        updates=kinds["update"],
        rounds=kinds["round"],
        evaluations=kinds["evaluation"],
        measures=measures_of(kinds["update"], kinds["round"], kinds["evaluation"]),
    )


def measures_of(
    updates: Sequence[Record], rounds: Sequence[Record], evaluations: Sequence[Record]
) -> Measures:
    """Every number of a run that is compared, by dotted name; None where it is undefined."""
    last_round = rounds[-1] if rounds else {}
    return {
        "updates": len(updates),
        **_held_out(_by_judge(evaluations)),
        **{f"round.{name}": value for name, value in _numbers(last_round)},
        **{f"total.{name}": value for name, value in _totals(updates, rounds)},
    }


def side_by_side(runs: Sequence[Run]) -> SideBySide:
    """The runs in groups that differ in more than their seeds, in order of appearance."""
    grouped: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        own = {k: v for k, v in run.config.items() if k not in (*OWN_KEYS, SEED)}
        grouped[json.dumps(own, sort_keys=True)].append(run)
    letters = ("".join(name) for n in (1, 2) for name in itertools.product(_ALPHABET, repeat=n))
    groups = [Group(next(letters), members) for members in grouped.values()]
    differing = differences([group.config for group in groups])
    return SideBySide(groups, [key for key in differing if key != SEED])


_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def as_mapping(found: SideBySide) -> dict[str, Any]:
    """What ``--json`` writes: groups with the mean and range of each measure, and every run."""
    return {
        "differing": list(found.differing),
        "groups": [_group_mapping(group, found.differing) for group in found.groups],
        "runs": [_run_mapping(run, group) for group in found.groups for run in group.runs],
        "left_out": [str(directory) for directory in found.left_out],
    }


def _group_mapping(group: Group, differing: Sequence[str]) -> dict[str, Any]:
    measured = dict.fromkeys(name for run in group.runs for name in run.measures)
    values = {name: group.values(name) for name in measured}
    return {
        "letter": group.letter,
        "seeds": [run.seed for run in group.runs],
        "config": {k: value_text(group.config[k]) for k in differing if k in group.config},
        "measures": {
            name: {"mean": sum(found) / len(found), "low": min(found), "high": max(found)}
            for name, found in values.items()
            if found
        },
    }


def _run_mapping(run: Run, group: Group) -> dict[str, Any]:
    return {
        "run": run.url or str(run.directory),
        "group": group.letter,
        "seed": run.seed,
        "finished": run.finished,
        "measures": dict(run.measures),
        "evaluations": run.last_evaluations,
    }


def _by_judge(evaluations: Sequence[Record]) -> dict[str, Record]:
    """The newest of each."""
    return {record["judge"]: record for record in evaluations}


def _totals(
    updates: Sequence[Record], rounds: Sequence[Record]
) -> Iterator[tuple[str, float | None]]:
    yield "rounds", len(rounds)
    yield "prompts", _sum(record.get("prompts") for record in rounds)
    yield "completions", _sum(record.get("completions") for record in rounds)
    for name in ("calls", "cached", "invalid", "usd"):
        yield f"judge_{name}", _sum(record.get("judging", {}).get(name) for record in rounds)
    yield "pairs", _sum(record.get("pairs") for record in updates)
    yield "tokens", _sum(record.get("tokens") for record in updates)
    yield "lag", _mean_lag(updates)
    resampled = [record["resampling"] for record in rounds if record.get("resampling")]
    yield "pairs_unused", _sum(found.get("unused_pairs") for found in resampled)
    yield "ended_early", _sum(found.get("ended_by") is not None for found in resampled)
    if any("alarms" in record for record in rounds):
        yield "alarms", _sum(len(record.get("alarms") or ()) for record in rounds)
    yield "seconds", _sum(s for record in rounds for s in record.get("seconds", {}).values())


def _held_out(evaluations: Mapping[str, Record]) -> dict[str, float | None]:
    """Of the last evaluation: what each judge said, and what needs none."""
    found: dict[str, float | None] = {}
    for judge, record in evaluations.items():
        for name, value in _numbers(record):
            found[f"judge.{judge}.{name}" if name in SAID else f"held_out.{name}"] = value
    return found


def _numbers(record: Record, prefix: str = "") -> Iterator[tuple[str, float | None]]:
    """The numbers of a record by dotted name."""
    for name, value in record.items():
        if name in PLACE:
            continue
        match value:
            case bool() | str():
                continue
            case int() | float() | None:
                yield prefix + name, value
            case Mapping():
                yield from _numbers(value, f"{prefix}{name}.")


def _sum(values: Iterator[float | None]) -> float | None:
    """Of those that are there; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _mean_lag(updates: Sequence[Record]) -> float | None:
    """Of all pairs learned from: each update weighs as many as it had."""
    found = [(u.get("lag_mean"), u.get("pairs") or 0) for u in updates]
    known = [(lag, pairs) for lag, pairs in found if lag is not None]
    pairs = sum(count for _, count in known)
    return sum(lag * count for lag, count in known) / pairs if pairs else None


def _check_free(option: str, path: Path) -> None:
    if path.exists():
        raise UserError(
            f"{option} {path}: exists already and is not overwritten; choose another name"
        )
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: no such directory {path.parent}; make it first")
