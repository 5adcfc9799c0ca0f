"""The report a run ends with: is the policy better than the model it started from, and by how much.

Pure functions from records and samples to rich renderables. Everything a model, a judge or a user
named goes through ``Text``: square brackets in it are never markup.
"""

from __future__ import annotations

import shlex
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from judges.human.table import HumanTable

SAMPLE_CHARACTERS = 600
"""Of a prompt or completion, shown at most."""

SAMPLE_REASON = 200
"""Characters of a reason why a prompt had no verdict, shown at most."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A held-out prompt as the starting model and as the policy completed it."""

    prompt: str
    before: str
    after: str


def final_table(
    evaluations: Sequence[Mapping[str, Any]], samples: Sequence[Sample], run: str | Path
) -> RenderableType:
    """What a person reads when a run ends; print it with ``crop=False``, so that paths stay whole.

    ``run`` is the run's directory: a path or a URL.
    ``evaluations`` are records of kind "evaluation" (fresh or as metrics.jsonl has them); of each
    judge the last counts. Shown where the records hold them, besides the contract's keys:
    ``quality_ci``, ``invalid`` and ``invalid_reason``, and ``length_mean`` and
    ``repetition_rate`` with their ``_baseline``.
    """
    latest = {record["judge"]: record for record in evaluations}
    parts: list[RenderableType] = []
    if latest:
        parts += [Text("Against the starting model, on held-out prompts", style="bold")]
        parts += [_judges_table(list(latest.values())), *_notes(list(latest.values()))]
    else:
        parts += [Text("No held-out evaluation was made (evaluation.judges).")]
    for number, sample in enumerate(samples, start=1):
        parts += [Text(""), *_sample_lines(number, sample)]
    return Group(*parts, Text(""), *_places(str(run)))


def human_report(table: HumanTable) -> RenderableType:
    """What people said, as in Table 2 of OAIF (arXiv:2402.04792): shares of pairs, quality 1–5."""
    shown = Table(title="As people see it, against the starting model", title_justify="left")
    for heading in ("win", "tie", "loss", "quality", "at the start", "pairs", "raters", "alpha"):
        shown.add_column(heading, justify="right")
    shares = ("-" if s is None else f"{s:.1%}" for s in (table.win, table.tie, table.loss))
    qualities = (figure(table.quality_first), figure(table.quality_second))
    shown.add_row(*shares, *qualities, str(table.items), str(table.raters), figure(table.alpha))
    if not table.unrated:
        return shown
    left = f"{table.unrated} pairs have no verdict ({table.skipped} skipped)"
    return Group(shown, Text(left, style="yellow"))


def figure(value: float | None) -> str:
    """A number in at most seven characters, about three digits; "-" for None, 0 below 1e-5."""
    if value is None:
        return "-"
    size = abs(value)
    if size < 1e-5:  # a rounding error, not a measure
        return "0.00"
    if size < 0.1:
        return f"{value:.2g}"
    if size < 10.0:
        return f"{value:.2f}"
    if size < 100.0:
        return f"{value:.1f}"
    if size < 1e4:
        return f"{value:.0f}"
    for unit, name in ((1e3, "k"), (1e6, "M"), (1e9, "G")):
        if size < 999.5 * unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.1e}"


def interval(ci: Sequence[float] | None) -> str:
    """``[0.55, 0.67]``, or nothing."""
    return "" if ci is None else f"[{figure(ci[0])}, {figure(ci[1])}]"


def short_name(spec: str) -> str:
    """What stands at an absolute path without its folders; other names as they are."""
    return visible(Path(spec).name if spec.startswith("/") else spec)


def visible(text: str) -> str:
    """Text fit for a terminal: control characters other than newline and tab as escapes."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else ascii(c)[1:-1]
        for c in text
    )


def _judges_table(records: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("judge", overflow="fold", min_width=5)
    table.add_column("start", justify="right", no_wrap=True)
    table.add_column("now \\[95 % CI]", no_wrap=True)
    table.add_column("win/tie/loss", justify="right", no_wrap=True)
    table.add_column("win rate \\[95 % CI]", no_wrap=True)
    for record in records:
        table.add_row(
            Text(short_name(record["judge"])),
            Text(figure(record["quality_baseline"])),
            Text(f"{figure(record['quality'])} {interval(record.get('quality_ci'))}".rstrip()),
            Text(f"{record['win']}/{record['tie']}/{record['loss']}"),
            Text(
                f"{figure(record['win_rate'])} {interval(record['win_rate_ci'])}".rstrip(),
                style=_style(record["win_rate_ci"]),
            ),
        )
    return table


def _style(win_rate_ci: Sequence[float] | None) -> str:
    """Green or red only where the interval leaves out one half."""
    if win_rate_ci is None or win_rate_ci[0] <= 0.5 <= win_rate_ci[1]:
        return ""
    return "bold green" if win_rate_ci[0] > 0.5 else "bold red"


def _notes(records: Sequence[Mapping[str, Any]]) -> Iterator[Text]:
    for record in records:
        if record.get("invalid"):
            left_out = f"{record['invalid']} prompts left out: no valid verdict"
            reason = visible(" ".join(str(record.get("invalid_reason") or "").split()))
            told = f"{left_out}, for example: {reason[:SAMPLE_REASON]}" if reason else left_out
            yield Text(f"{short_name(record['judge'])}: {told}", style="yellow")
    last = records[-1]
    if last["kl_to_reference"] is not None:
        yield Text(f"KL to reference  {figure(last['kl_to_reference'])} nats a sequence")
    if last.get("length_mean") is not None:
        start, now = figure(last["length_mean_baseline"]), figure(last["length_mean"])
        yield Text(f"Length           {start} → {now} tokens")
    if last.get("repetition_rate") is not None:
        start, now = last["repetition_rate_baseline"], last["repetition_rate"]
        yield Text(f"Repetition       {start:.1%} → {now:.1%} of a completion's 4-grams")


def _sample_lines(number: int, sample: Sample) -> Iterator[RenderableType]:
    for title, text, style in (
        (f"Prompt {number}", sample.prompt, ""),
        ("Starting model", sample.before, "dim"),
        ("Aligned model", sample.after, ""),
    ):
        yield Text(title, style="bold")
        yield Padding(Text(_shortened(text), style=style), (0, 0, 0, 2))


def _shortened(text: str) -> str:
    text = text.strip()
    if len(text) > SAMPLE_CHARACTERS:
        text = text[:SAMPLE_CHARACTERS] + " …"
    return visible(text)


def _places(run: str) -> Iterator[Text]:
    quoted = shlex.quote(run)
    yield Text("Written", style="bold")
    for name, place in (
        ("run", run),
        ("metrics", f"{run}/metrics.jsonl"),
        ("ledger", f"{run}/ledger"),
        ("policy", f"{run}/policy"),
    ):
        yield _unbroken(f"  {name:<8} {place}")
    yield Text("Next", style="bold")
    for command in (
        f"tensorboard --logdir {shlex.quote(f'{run}/tensorboard')}",
        f"freshpairs evaluate {quoted}",
        f"freshpairs export {quoted} --out pairs.parquet",
    ):
        yield _unbroken(f"  {command}")


def _unbroken(line: str) -> Text:
    """A line that is meant to be copied: the terminal may wrap it, we may not."""
    return Text(line, no_wrap=True, overflow="ignore")
