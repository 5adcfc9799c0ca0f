"""Lines in a terminal: two charts of eight dots a character, and the table beneath them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.demo.film import COLOURS
from pipeline.demo.words import number, percent, sentence
from pipeline.demo.worlds import GOOD, UPDATES, Setting, Snapshot, Worlds
from workers.messages import DoubleArray, IntArray

KEYS = "abcde"
"""What names a setting's line where there are no colours."""

_LEAST_MASS = 1e-6
_SIDE_BY_SIDE = 79
_NARROWEST = 60
_FEWEST_ROWS, _MOST_ROWS = 3, 12

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of Braille's 2×4 dots by row and column, Unicode block 2800."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A chart's vertical axis: its title, its ends, its labelled values and a dotted line."""

    title: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    dotted: float

    def share(self, values: DoubleArray) -> DoubleArray:
        """Where values stand, from 0 at the bottom to 1 at the top."""
        return np.clip((values - self.low) / (self.high - self.low), 0.0, 1.0)


def fits(console: Console) -> bool:
    """Whether the console can show charts that move."""
    room = console.width >= _NARROWEST and _rows(console.width, console.height) >= _FEWEST_ROWS
    return console.is_interactive and room and console.encoding.startswith("utf")


def _rows(width: int, height: int) -> int:
    """Of each chart, beside titles, axes, the table and the sentence."""
    return height - 17 if width >= _SIDE_BY_SIDE else (height - 18) // 2


class Board:
    """What the terminal shows of the study so far."""

    def __init__(self, worlds: Worlds, settings: Sequence[Setting]) -> None:
        self._settings = settings
        self.best = float(worlds.reward(worlds.optimum()).mean())
        bad = float(worlds.rewards_WV[:, GOOD:].mean())
        self._reward = Axis(
            "true reward; dotted: the optimum",
            bad - 0.5,
            self.best + 0.5,
            tuple((value, number(value)) for value in (bad, 0.0, self.best)),
            self.best,
        )
        self._mass = Axis(
            "probability on bad four; dotted: 1 %",
            math.log10(_LEAST_MASS),
            0.2,
            tuple((math.log10(share), percent(share)) for share in (1e-6, 1e-4, 1e-2, 1.0)),
            -2.0,
        )

    def show(self, snapshots: Sequence[Snapshot], width: int, height: int) -> RenderableType:
        """Charts, table and sentence of ``snapshots`` for a terminal of this size."""
        wide = width >= _SIDE_BY_SIDE
        rows = min(max(_rows(width, height), _FEWEST_ROWS), _MOST_ROWS)
        chart_width = (width - 2) // 2 if wide else width
        updates = np.array([snapshot.update for snapshot in snapshots], np.float64)
        rewards = np.stack([snapshot.reward_SW.mean(1) for snapshot in snapshots], 1)
        masses = np.stack([snapshot.bad_mass.mean(1) for snapshot in snapshots], 1)
        charts = [
            draw(self._reward, updates, rewards, chart_width, rows),
            draw(self._mass, updates, np.log10(np.maximum(masses, _LEAST_MASS)), chart_width, rows),
        ]
        if wide:
            beside = Table.grid(padding=(0, 2, 0, 0))
            beside.add_row(*charts)
            shown: list[RenderableType] = [beside]
        else:
            shown = list(charts)
        now = snapshots[-1]
        words = Text(sentence(now, self._settings), style="bold")
        return Group(*shown, Text(""), self.table(now, width), words)

    def table(self, now: Snapshot, width: int) -> Table:
        """Each setting's figures in this snapshot: means over worlds, and how many leaked."""
        headings = ["reward", "bad four", "worlds > 1 %"]
        caption = None
        if width >= _SIDE_BY_SIDE:
            headings = ["true reward", "on bad four", "worlds > 1 %", "bad judged"]
            caption = "bad judged: a world's judged pairs with one of the bad four"
        table = Table(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            show_edge=False,
            caption=caption,
            caption_justify="left",
        )
        table.add_column(f"update {now.update}/{UPDATES}")
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        worlds = now.bad_mass.shape[1]
        for index, setting in enumerate(self._settings):
            cells = (
                number(float(now.reward_SW[index].mean())),
                percent(float(now.bad_mass[index].mean())),
                f"{now.leaked[index]} of {worlds}",
                f"{now.judged_bad_SW[index].mean():,.1f}",
            )
            label = Text(f"{KEYS[index]} {setting.label}", style=COLOURS[index])
            table.add_row(label, *cells[: len(headings)])
        table.add_row("  the optimum", number(self.best))
        return table

    def headings(self) -> list[str]:
        """What stands above the lines of :meth:`line`."""
        keys = KEYS[: len(self._settings)]
        named = zip(keys, self._settings, strict=True)
        columns = "".join(f"{key:>15}" for key in keys)
        return [
            "True reward and probability of the bad four, means over the worlds, of",
            *(f"  {key} {setting.label}" for key, setting in named),
            f"{'update':>6}{columns}",
        ]

    def line(self, now: Snapshot) -> str:
        """A snapshot in 81 characters at most."""
        figures = [
            f"{number(float(reward)):>7} {percent(float(mass)):>7}"
            for reward, mass in zip(now.reward_SW.mean(1), now.bad_mass.mean(1), strict=True)
        ]
        return f"{now.update:>6}" + "".join(figures)


def draw(axis: Axis, updates: DoubleArray, values_SN: DoubleArray, width: int, rows: int) -> Text:
    """Lines of ``values_SN`` over ``updates`` [N], with their keys where they end."""
    labels = {_row(axis, value, rows): label for value, label in axis.ticks}
    margin = max(map(len, labels.values())) + 1
    columns = width - margin - 1 - len(values_SN)
    bits, colours = _dots(axis, updates, values_SN, columns, rows)
    ends = [_row(axis, float(values[-1]), rows) for values in values_SN]
    dotted = _row(axis, axis.dotted, rows)
    text = Text.assemble((axis.title, "bold"), "\n", no_wrap=True)
    for row in range(rows):
        text.append(f"{labels.get(row, ''):>{margin - 1}} │", style="dim")
        for column in range(columns):
            if bits[row, column]:
                cell = chr(0x2800 + int(bits[row, column]))
                text.append(cell, style=COLOURS[colours[row, column]])
            else:
                text.append("·" if row == dotted and column % 2 else " ", style="dim")
        for index, end in enumerate(ends):
            if end == row:
                text.append(KEYS[index], style=f"bold {COLOURS[index]}")
        text.append("\n")
    text.append(" " * margin + "└" + "─" * columns + "\n", style="dim")
    below = f"0{'updates':^{columns - 5}}{UPDATES}"
    text.append(" " * (margin + 1) + below, style="dim")
    return text


def _row(axis: Axis, value: float, rows: int) -> int:
    """The line of text, from the top, in which a value lies."""
    share = float(axis.share(np.array(value)))
    return min(int((1.0 - share) * rows), rows - 1)


def _dots(
    axis: Axis, updates: DoubleArray, values_SN: DoubleArray, columns: int, rows: int
) -> tuple[IntArray, IntArray]:
    """Bits of each character, and whose colour it has: that of the last line through it."""
    bits = np.zeros((rows, columns), np.int64)
    colours = np.zeros((rows, columns), np.int64)
    across = np.arange(2 * columns)
    reached = across[across <= updates[-1] / UPDATES * (2 * columns - 1)]
    for index, values in enumerate(values_SN):
        heights = np.interp(reached / (2 * columns - 1) * UPDATES, updates, axis.share(values))
        dots = np.minimum(((1.0 - heights) * 4 * rows).astype(int), 4 * rows - 1)
        before = np.concatenate([dots[:1], dots[:-1]])
        for x, dot, last in zip(reached.tolist(), dots.tolist(), before.tolist(), strict=True):
            # Down or up from where the line was, so that a steep one has no gaps.
            for y in range(min(dot, last + 1), max(dot, last - 1) + 1):
                bits[y // 4, x // 2] |= _DOTS[y % 4][x % 2]
                colours[y // 4, x // 2] = index
    return bits, colours
