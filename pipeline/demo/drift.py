"""``freshpairs demo drift``: offline learning leaks to what nobody judged, resampling cures it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from judges.errors import UserError
from pipeline.demo.chart import Board, fits
from pipeline.demo.film import Film
from pipeline.demo.words import conclusion, introduction
from pipeline.demo.worlds import SETTINGS, UPDATES, Snapshot, draw_worlds, learn

WORLDS = 20
UPDATES_PER_FRAME, UPDATES_PER_LINE = 8, 128

Show = Callable[[Sequence[Snapshot]], None]
"""Shows the last of these snapshots, which are all so far."""


def demo_drift(out: Path, seed: int, console: Console) -> None:
    """Learn in twenty worlds at each setting of the dial, shown on ``console`` as it goes.

    The animation is written to ``out``, a GIF. ``seed`` chooses the worlds; 0 has those of the
    documentation. Raises UserError for a file or a seed that cannot be.
    """
    _check(out, seed)
    worlds = draw_worlds(range(WORLDS * seed, WORLDS * (seed + 1)))
    board, film = Board(worlds, SETTINGS), Film(worlds, SETTINGS)
    for paragraph in introduction(worlds):
        console.print(Text(paragraph))
    snapshots: list[Snapshot] = []
    with _watching(board, console) as show:
        for snapshot in learn(worlds, every=UPDATES_PER_FRAME):
            snapshots.append(snapshot)
            show(snapshots)
            film.add(snapshots)
    film.write(out)
    words = conclusion(snapshots[0], snapshots[-1], SETTINGS, board.best)
    console.print(Text(f"\n{words}\n"))
    console.print(Text(f"animation written to {out}"), soft_wrap=True)
    console.print(Text("read on: docs/resampling.md"), soft_wrap=True)


def _check(out: Path, seed: int) -> None:
    if out.suffix != ".gif":
        raise UserError(f"--out {out}: does not end in .gif; choose a name that does")
    if out.exists():
        raise UserError(f"--out {out}: exists already and is not overwritten; choose another name")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: no such directory {out.parent}; make it first")
    if seed < 0:
        raise UserError(f"--seed {seed}: is negative; choose a whole number from 0")


def _watching(board: Board, console: Console) -> AbstractContextManager[Show]:
    return _live(board, console) if fits(console) else _lines(board, console)


@contextmanager
def _live(board: Board, console: Console) -> Iterator[Show]:
    """Charts that move; the last ones stay."""
    with Live(console=console, auto_refresh=False) as live:

        def show(snapshots: Sequence[Snapshot]) -> None:
            live.update(board.show(snapshots, console.width, console.height), refresh=True)

        yield show


@contextmanager
def _lines(board: Board, console: Console) -> Iterator[Show]:
    """A line every so often, and the table in the end."""
    for line in board.headings():
        console.print(Text(line), soft_wrap=True)

    def show(snapshots: Sequence[Snapshot]) -> None:
        now = snapshots[-1]
        if now.update % UPDATES_PER_LINE == 0:
            console.print(Text(board.line(now)), soft_wrap=True)
        if now.update == UPDATES:
            console.print()
            console.print(board.table(now, console.width))

    yield show
