"""What a person sees while a run goes on."""

import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.progress import Progress, _judging

DROPPED = {"tie": 1, "invalid": 2, "identical": 0, "margin": 0, "truncated": 1}


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Screen:
    """A progress display on a file, by default no terminal."""

    def __init__(self, terminal: bool = False, **options: Any) -> None:
        self.clock = Clock()
        self.file = StringIO()
        console = Console(
            file=self.file, width=80, force_terminal=terminal, force_interactive=terminal
        )
        self.progress = Progress(
            name="quickstart",
            model="stories15M",
            objective="dpo",
            settings="beta 0.1",
            judge="sentiment",
            run_dir=Path("runs/quickstart"),
            console=console,
            clock=self.clock,
            **({"updates": 24} | options),
        )

    def update(self, update: int, after: float = 1.0, **values: Any) -> None:
        self.clock.now += after
        record = {"kind": "update", "update": update, "loss": 0.5, "accuracy": 0.75, "pairs": 10}
        self.progress.record(record | values)

    def round(self, index: int, update: int, **values: Any) -> None:
        record = {
            "kind": "round",
            "round": index,
            "update": update,
            "score_mean": 0.451,
            "kl_to_reference": 3.21,
            "pairs": 28,
            "dropped": DROPPED,
            "length_mean": 41.26,
            "tokens_per_second": 1234.5,
        }
        self.progress.record(record | values)

    @property
    def lines(self) -> list[str]:
        return self.file.getvalue().splitlines()

    @property
    def last(self) -> str:
        return " ".join(self.lines[-1].split())


EVALUATION = {
    "kind": "evaluation",
    "update": 8,
    "judge": "sentiment",
    "quality": 0.45,
    "quality_baseline": 0.29,
    "win_rate": 0.61,
    "win_rate_ci": [0.55, 0.67],
    "kl_to_reference": 3.2,
}


def test_a_file_gets_plain_lines_one_a_round() -> None:
    screen = Screen()
    with screen.progress as progress:
        progress.say("starting Ray …")
        for index in range(3):
            screen.update(index + 1)
            screen.round(index, index + 1)
    assert screen.lines[:3] == [
        "quickstart: stories15M, dpo (beta 0.1), judge sentiment",
        "writing to runs/quickstart",
        "starting Ray …",
    ]
    assert len(screen.lines) == 3 + 1 + 3
    assert all(character.isprintable() or character == "\n" for character in screen.file.getvalue())
    assert max(map(len, screen.lines)) <= 80


def test_a_round_in_figures() -> None:
    screen = Screen()
    screen.progress.say("sampling")
    screen.update(7, after=2.0, accuracy=0.5, pairs=30)
    screen.update(8, after=2.0, accuracy=1.0, pairs=10)
    screen.round(3, 8)
    heading, row = screen.lines[-2:]
    assert " ".join(heading.split()) == (
        "round update score KL nats accuracy pairs dropped length tokens/s seconds"
    )
    # accuracy: (0.5 · 30 + 1.0 · 10) / 40, rounded to even
    assert " ".join(row.split()) == "3 8 0.45 3.21 0.62 28 4 41.3 1234 4.0"
    screen.update(9, after=1.5, accuracy=None, pairs=0)
    screen.round(4, 9, score_mean=None, kl_to_reference=None)
    assert screen.last == "4 9 - - - 28 4 41.3 1234 1.5"


def test_large_figures_keep_their_columns() -> None:
    screen = Screen()
    screen.update(1, after=123456.7)
    screen.round(
        9999,
        999999,
        score_mean=-0.00312,
        kl_to_reference=-0.00312,
        pairs=12_345_678,
        dropped={"tie": 123_456},
        length_mean=123456.0,
        tokens_per_second=1.5e6,
    )
    assert len(screen.lines[-1]) == len(screen.lines[-2]) == 78
    assert screen.last == "9999 999999 -0.0031 -0.0031 0.75 12.3M 123k 123k 1.5M 123k"


def test_the_heading_returns_every_20_rounds() -> None:
    screen = Screen()
    for index in range(41):
        screen.round(index, index)
    headings = [row for row, line in enumerate(screen.lines) if line.startswith("round")]
    assert headings == [0, 21, 42]


def test_evaluations_are_said_in_one_line() -> None:
    screen = Screen()
    screen.progress.record(EVALUATION)
    screen.progress.record(
        EVALUATION | {"win_rate": None, "win_rate_ci": None, "kl_to_reference": None}
    )
    assert screen.lines == [
        "held-out after update 8: sentiment 0.45 (start 0.29), "
        "win rate 0.61 [0.55, 0.67], KL 3.20 nats",
        "held-out after update 8: sentiment 0.45 (start 0.29), win rate -",
    ]


def test_names_are_text_never_markup_or_control() -> None:
    screen = Screen()
    screen.progress.say("[red]judge[/red] said \x1b[2J")
    screen.progress.record(EVALUATION | {"judge": "[bold]a[/bold]\x1b"})
    assert screen.lines[0] == r"[red]judge[/red] said \x1b[2J"
    assert r"update 8: [bold]a[/bold]\x1b 0.45" in screen.lines[1]


def test_a_long_round_is_heard_of_in_between() -> None:
    screen = Screen(updates=10)
    screen.progress.say("sampling")
    for update in range(1, 5):
        screen.update(update, after=25.0)
    # Updates 1 and 2 come 25 and 50 s after the last line, update 3 after 75 s.
    assert screen.lines == ["sampling", "update 3/10: loss 0.50, accuracy 0.75, 3 min left"]


@pytest.mark.parametrize(("done", "left"), [(0, "20 s left"), (6, "60 s left")])
def test_time_left_goes_by_the_updates_of_this_session(done: int, left: str) -> None:
    # 9 updates of 24 in 12 s leave 15 · 12 / 9 s; 3 since a resume at 6 leave 15 · 12 / 3 s.
    screen = Screen(terminal=True, done=done)
    screen.clock.now += 1000
    with screen.progress as progress:
        progress.say("sampling")
        screen.update(8, after=10.0)
        progress.say("something said later does not start the clock again")
        screen.update(9, after=2.0)
    assert left in screen.file.getvalue()


def test_a_terminal_shows_a_bar_and_takes_it_away() -> None:
    screen = Screen(terminal=True)
    with screen.progress:
        screen.update(6)
        screen.round(0, 6)
        screen.progress.record(EVALUATION)
    shown = screen.file.getvalue()
    assert "update 6/24" in shown
    assert "(start 0.29)," in shown
    assert re.search(r"\x1b\[2K    \S*win rate 0.61", shown)
    assert shown.endswith("\x1b[?25h\r\x1b[1A\x1b[2K")  # the cursor shown, the bar erased


@pytest.mark.parametrize(
    ("judging", "told"),
    [
        ({}, None),
        ({"valid": 64, "invalid": 0, "flip_rate": None, "usd": 0}, None),
        (
            {"valid": 51, "invalid": 13, "flip_rate": 0.25, "usd": 0.01234},
            "judge: 13 of 64 answers INVALID (the ledger has the reasons), 25% changed with the "
            "order, 0.0123 dollars",
        ),
    ],
)
def test_a_round_tells_what_its_judge_did_not_say(judging: dict[str, Any], told: str | None):
    assert (_judging(judging) or None) == (None if told is None else told.removeprefix("judge: "))
