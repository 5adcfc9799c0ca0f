"""The table of ``freshpairs compare``: a column a group of runs, as many as fit beside another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from pipeline.compare import Run, SideBySide
from pipeline.config_difference import value_text
from pipeline.report import figure, interval, short_name, visible

WIDEST_CELL = 24
GAP = 2
LONGEST_LABEL = 80


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _count(value: float) -> str:
    return f"{value:.0f}" if value < 1e5 else figure(value)


HELD_OUT: dict[str, tuple[str, Callable[[float], str]]] = {
    "update": ("after update", _count),
    "kl_to_reference": ("KL, nats a sequence", figure),
    "off_reference_share": ("off reference", _percent),
    "length_mean": ("length, tokens", figure),
    "repetition_rate": ("repetition", _percent),
}
LAST_ROUND: dict[str, tuple[str, Callable[[float], str]]] = {
    "version": ("sampled by version", _count),
    "score_mean": ("judge's score", figure),
    "kl_to_reference": ("KL, nats a sequence", figure),
    "kl_per_token": ("KL, nats a token", figure),
    "entropy": ("entropy, nats a token", figure),
    "off_reference_share": ("off reference", _percent),
    "off_reference_unlikely": ("… too unlikely", _percent),
    "off_reference_likely": ("… too likely", _percent),
    "length_mean": ("length, tokens", figure),
    "length_ratio": ("length / reference's", figure),
    "eos_rate": ("ended by itself", _percent),
    "repetition_rate": ("repetition", _percent),
    "distinct_ngrams": ("distinct n-grams", figure),
    "self_similarity": ("self-similarity", figure),
    "held_out_nll": ("held-out NLL", figure),
    "bad_mass": ("bad mass", figure),
}
TOTALS: dict[str, tuple[str, Callable[[float], str]]] = {
    "rounds": ("rounds", _count),
    "prompts": ("prompts sampled", _count),
    "completions": ("completions", _count),
    "judge_calls": ("judge calls", _count),
    "judge_cached": ("… from the cache", _count),
    "judge_invalid": ("INVALID verdicts", _count),
    "judge_usd": ("dollars", figure),
    "pairs": ("pairs learned from", _count),
    "tokens": ("tokens learned from", _count),
    "lag": ("mean lag of the pairs", figure),
    "pairs_unused": ("pairs left unused", _count),
    "ended_early": ("rounds ended early", _count),
    "alarms": ("alarms", _count),
    "seconds": ("seconds of work", figure),
}
ONLY_IF_ANY = {
    f"total.{name}"
    for name in (
        "judge_cached",
        "judge_invalid",
        "judge_usd",
        "pairs_unused",
        "ended_early",
        "alarms",
    )
}


@dataclass(frozen=True, slots=True)
class Row:
    """A title and a cell for each group; without cells, the heading of the rows below it."""

    title: str
    cells: Sequence[Text] = ()


class Columns:
    """Rows as tables, one below the other where the columns do not fit beside each other."""

    def __init__(self, headings: Sequence[str], rows: Sequence[Row]) -> None:
        self._headings = headings
        self._rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        titles = max(len(row.title) for row in self._rows)
        for beside in self._beside(options.max_width - titles - GAP):
            table = Table(
                box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False
            )
            table.add_column("", no_wrap=True)
            for at in beside:
                table.add_column(
                    self._headings[at], justify="right", overflow="fold", max_width=WIDEST_CELL
                )
            for number, row in enumerate(self._rows):
                if not row.cells and number:
                    table.add_section()
                title = Text(row.title, style="" if row.cells else "bold")
                table.add_row(title, *[row.cells[at] for at in beside if row.cells])
            yield table

    def _beside(self, room: int) -> Iterator[list[int]]:
        """The columns of each table, at least one."""
        taken: list[int] = []
        left = room
        for at in range(len(self._headings)):
            cells = [row.cells[at] for row in self._rows if row.cells]
            widest = max(len(line) for cell in cells for line in cell.plain.split("\n"))
            width = min(widest, WIDEST_CELL) + GAP
            if taken and width > left:
                yield taken
                taken, left = [], room
            taken.append(at)
            left -= width
        yield taken


def table(found: SideBySide) -> RenderableType:
    """Which runs these are, and their configs and measures beside each other."""
    rows = list(_rows(found))
    parts: list[RenderableType] = list(_legend(found))
    parts.append(Columns([group.letter for group in found.groups], rows))
    parts += [Text(note, style="dim") for note in _notes(found)]
    return Group(*parts)


def label(found: SideBySide, at: int) -> str:
    """A group in a line: its letter and what is particular about its config, if that is short."""
    group = found.groups[at]
    texts = {key: _config_texts(found, key)[at] for key in found.differing}
    particular = ", ".join(f"{found.titles[key]}={text}" for key, text in texts.items())
    named = 0 < len(particular) <= LONGEST_LABEL
    return f"{group.letter}: {visible(particular if named else group.runs[0].directory.name)}"


def _legend(found: SideBySide) -> Iterator[Text]:
    for group in found.groups:
        for number, run in enumerate(group.runs):
            letter = group.letter if number == 0 else ""
            line = Text(f"{letter:<3}", style="bold", no_wrap=True, overflow="ignore")
            line.append(visible(run.url or _near(run.directory)), style="not bold")
            if not run.finished:
                line.append(f"  {_unfinished(run)}", style="not bold yellow")
            yield line


def _near(directory: Path) -> str:
    """Its path from the working directory, where it lies in that."""
    path = Path(os.path.abspath(directory))
    here = Path.cwd()
    return str(path.relative_to(here)) if here in path.parents else str(path)


def _unfinished(run: Run) -> str:
    return f"unfinished: {len(run.updates)} of {run.config['run.updates']} updates"


def _rows(found: SideBySide) -> Iterator[Row]:
    yield Row("config")
    seeds = [sorted({run.seed for run in group.runs}) for group in found.groups]
    for key, title in found.titles.items():
        yield Row(title, [Text(visible(text)) for text in _config_texts(found, key)])
    if len({seed for some in seeds for seed in some}) > 1:
        yield Row("seed", [Text(", ".join(map(str, some))) for some in seeds])
    yield _measured(found, "updates", "updates done", _count)
    if found.judges:
        yield Row("held out, last evaluation")
        yield from _some(found, "held_out", HELD_OUT)
    for judge in found.judges:
        yield Row(f"by {short_name(judge)}"[:WIDEST_CELL])
        yield from _judge_rows(found, judge)
    if any(run.rounds for run in found.runs):
        yield Row("last round")
        yield from _some(found, "round", LAST_ROUND)
    yield Row("in all")
    yield from _some(found, "total", TOTALS)


def _judge_rows(found: SideBySide, judge: str) -> Iterator[Row]:
    for name, title in (
        ("quality_baseline", "quality at the start"),
        ("quality", "quality"),
        ("win_rate", "win rate"),
    ):
        row = _measured(found, f"judge.{judge}.{name}", title, figure)
        if name != "quality_baseline":
            for group, cell in zip(found.groups, row.cells, strict=True):
                if len(group.runs) == 1:  # of several, the range over seeds stands there
                    ci = group.runs[0].last_evaluations.get(judge, {}).get(f"{name}_ci")
                    cell.append(f"\n{interval(ci)}" if ci else "", style="dim")
        yield row


def _some(
    found: SideBySide, section: str, rows: dict[str, tuple[str, Callable[[float], str]]]
) -> Iterator[Row]:
    """Those of the rows that any group has a value for."""
    for name, (title, text) in rows.items():
        measure = f"{section}.{name}"
        values = [value for group in found.groups for value in group.values(measure)]
        if values and (any(values) or measure not in ONLY_IF_ANY):
            yield _measured(found, measure, title, text)


def _measured(found: SideBySide, measure: str, title: str, text: Callable[[float], str]) -> Row:
    return Row(title, [_cell(group.values(measure), text) for group in found.groups])


def _cell(values: Sequence[float], text: Callable[[float], str]) -> Text:
    """The mean, and under it the range where the values are not one."""
    if not values:
        return Text("-")
    cell = Text(text(sum(values) / len(values)))
    low, high = text(min(values)), text(max(values))
    if low != high:
        cell.append(f"\n{low}…{high}", style="dim")
    return cell


def _config_texts(found: SideBySide, key: str) -> list[str]:
    """The groups' values: files without their folders, unless two would then look the same."""
    full = [value_text(group.config[key]) if key in group.config else "-" for group in found.groups]
    short = [short_name(text) for text in full]
    return short if len(set(short)) == len(set(full)) else full


def _notes(found: SideBySide) -> Iterator[str]:
    if found.left_out:
        names = ", ".join(visible(directory.name) for directory in found.left_out)
        yield f"Left out, without metrics yet: {names}."
    if any(len(group.runs) > 1 for group in found.groups):
        yield "Of several seeds: the mean, and the lowest…highest."
    if any(len(group.runs) == 1 and group.runs[0].evaluations for group in found.groups):
        yield "[…, …]: 95 % interval over held-out prompts."
    yield "Seconds of work: all stages of all rounds; evaluations are not counted."
