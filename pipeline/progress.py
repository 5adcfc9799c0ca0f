"""Progress: a run as a person follows it, a bar in a terminal and plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from pipeline.report import figure, interval, short_name, visible

COLUMNS = {
    "round": 5,
    "update": 7,
    "score": 8,
    "KL nats": 9,
    "accuracy": 9,
    "pairs": 7,
    "dropped": 8,
    "length": 8,
    "tokens/s": 9,
    "seconds": 8,
}
"""Heading and width of a round's line: 78 characters."""

ROWS_PER_HEADING = 20
HEARTBEAT_SECONDS = 60.0
"""Without a bar, a round that lasts longer than this is heard of in between."""


class Progress:
    """Tells a person how a run goes; a listener of its tracker.

    ``updates`` is how many the run makes, ``done`` how many it had made when resumed. Seconds are
    wall-clock since the line before, and the time left goes by the updates since the last stage
    was announced before the first one.
    """

    def __init__(
        self,
        *,
        name: str,
        model: str,
        objective: str,
        settings: str,
        judge: str,
        run_dir: str | Path,
        updates: int,
        done: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        loss = f"{short_name(objective)} ({settings})" if settings else short_name(objective)
        what = f"{short_name(model)}, {loss}, judge {short_name(judge)}"
        self._heading = (f"{visible(name)}: {what}", str(run_dir))
        self._updates = updates
        self._done_before = self._done = done
        self._console = console if console is not None else _console()
        self._clock = clock
        self._loop_start = self._round_start = self._last_line = clock()
        self._rows = 0
        self._accuracies: list[tuple[float, int]] = []
        self._bar: Bar | None = None
        self._task = TaskID(0)

    def start(self) -> None:
        """Print the header and, in a terminal, show the bar."""
        title, place = self._heading
        self._print(Text(title, style="bold"))
        self._console.print(Text(f"writing to {place}"), soft_wrap=True)  # a path, to be copied
        if self._console.is_interactive:
            self._bar = Bar(
                SpinnerColumn(),
                TextColumn("update {task.completed}/{task.total}"),
                BarColumn(bar_width=20),
                TimeElapsedColumn(),
                TextColumn("elapsed{task.fields[left]}"),
                console=self._console,
                refresh_per_second=4,
                transient=True,
            )
            self._task = self._bar.add_task("", total=self._updates, completed=self._done, left="")
            self._bar.start()

    def stop(self) -> None:
        """Take the bar away; the lines stay."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Progress:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def say(self, message: str) -> None:
        """Announce a stage, or anything else a person should read."""
        self._print(Text(visible(message), style="dim"))
        if self._done == self._done_before:
            self._loop_start = self._round_start = self._clock()

    def record(self, record: Mapping[str, Any]) -> None:
        """Show a record of the tracker's."""
        match record["kind"]:
            case "update":
                self._update(record)
            case "round":
                self._round(record)
            case "evaluation":
                self._evaluation(record)

    def _update(self, record: Mapping[str, Any]) -> None:
        self._done = record["update"]
        if record["accuracy"] is not None:
            self._accuracies.append((record["accuracy"], record["pairs"]))
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, left=self._time_left())
        elif self._clock() - self._last_line > HEARTBEAT_SECONDS:
            loss = f"loss {figure(record['loss'])}, accuracy {figure(record['accuracy'])}"
            self._print(Text(f"update {self._done}/{self._updates}: {loss}{self._time_left()}"))

    def _round(self, record: Mapping[str, Any]) -> None:
        now = self._clock()
        cells = (
            str(record["round"]),
            str(record["update"]),
            figure(record["score_mean"]),
            figure(record["kl_to_reference"]),
            figure(self._accuracy()),
            _count(record["pairs"]),
            _count(sum(record["dropped"].values())),
            figure(record["length_mean"]),
            figure(record["tokens_per_second"]),
            _seconds(now - self._round_start),
        )
        if self._rows % ROWS_PER_HEADING == 0:
            self._print(Text(_row(COLUMNS), style="bold"))
        self._print(Text(_row(cells)))
        if told := _judging(record.get("judging", {})):
            self._print(Text(f"   judge: {told}", style="yellow"))
        for alarm in record.get("alarms", []):
            self._print(Text(f"   {visible(alarm)}", style="yellow"))
        resampling = record.get("resampling", {})
        if ended_by := resampling.get("ended_by"):
            fed = f"{resampling['updates']} of {resampling['planned_updates']} updates"
            left = f"{resampling['unused_pairs']} pairs unused"
            self._print(Text(f"   resampled after {fed}, {left}: {visible(ended_by)}", "dim"))
        self._rows += 1
        self._round_start = now
        self._accuracies.clear()

    def _evaluation(self, record: Mapping[str, Any]) -> None:
        judge = f"{short_name(record['judge'])} {figure(record['quality'])}"
        start = f"(start {figure(record['quality_baseline'])})"
        rate = f"win rate {figure(record['win_rate'])} {interval(record['win_rate_ci'])}".rstrip()
        if record["kl_to_reference"] is not None:
            rate += f", KL {figure(record['kl_to_reference'])} nats"
        when = f"held-out after update {record['update']}"
        self._print(Text(f"{when}: {judge} {start},", style="cyan"), Text(rate, "cyan"))

    def _accuracy(self) -> float | None:
        """Of the round's updates, each weighing as many pairs as it had."""
        pairs = sum(pairs for _, pairs in self._accuracies)
        return sum(a * pairs for a, pairs in self._accuracies) / pairs if pairs else None

    def _time_left(self) -> str:
        done = self._done - self._done_before
        if done <= 0:
            return ""
        per_update = (self._clock() - self._loop_start) / done
        return f", {_duration(per_update * (self._updates - self._done))} left"

    def _print(self, line: Text, rest: Text | None = None) -> None:
        """One line; in a terminal too narrow for both, ``rest`` goes below it, indented."""
        self._last_line = self._clock()
        if rest is not None:
            whole = Text(" ").join([line, rest])
            if not self._console.is_interactive or len(whole) <= self._console.width:
                line, rest = whole, None
        self._console.print(line, soft_wrap=not self._console.is_interactive)
        if rest is not None:
            self._console.print(Padding(rest, (0, 0, 0, 4)))


def _console() -> Console:
    """Standard output; FORCE_COLOR colours a file, it does not draw a bar into it."""
    return Console(force_interactive=None if sys.stdout.isatty() else False)


def _row(cells: Any) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True))


def _judging(found: Mapping[str, Any]) -> str:
    """What a person should know of how a round was judged; empty where all is well and free."""
    parts = []
    if invalid := found.get("invalid"):
        asked = invalid + found["valid"]
        parts.append(f"{invalid} of {asked} answers INVALID (the ledger has the reasons)")
    if flip_rate := found.get("flip_rate"):
        parts.append(f"{flip_rate:.0%} changed with the order")
    if usd := found.get("usd"):
        parts.append(f"{usd:.4f} dollars")
    return ", ".join(parts)


def _count(count: int) -> str:
    return str(count) if count < 10_000 else figure(count)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds < 1000 else figure(seconds)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
