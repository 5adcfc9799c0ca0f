"""The picture of ``freshpairs compare``: quality, KL and off-reference share against updates."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from pipeline.compare import Run, SideBySide
from pipeline.compare_table import label
from pipeline.report import short_name, visible
from pipeline.tracking import Record

# Okabe and Ito's colours, which the colour-blind tell apart; the yellow is too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
ACROSS = 3

Curve: TypeAlias = dict[int, float]
"""A measure by updates applied."""


@dataclass(frozen=True, slots=True)
class Panel:
    """A measure of every run: ``curves[g][r]`` is that of run r of group g."""

    title: str
    axis: str
    curves: Sequence[Sequence[Curve]]


def draw(found: SideBySide) -> Any:
    """A matplotlib Figure, no window; a group has one colour, each of its seeds a thin line."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    drawn = panels(found)
    longest = max(1, *(len(run.updates) for run in found.runs))
    labels = [_plain(label(found, at)) for at in range(len(found.groups))]
    across = 2 if len(drawn) == 4 else min(ACROSS, len(drawn))
    down = math.ceil(len(drawn) / across)
    below_in = 0.3 + 0.22 * len(labels)
    space = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(4.8 * across, 3.8 * down + below_in), layout=space)
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(3.8 * down, below_in))[
        :, 0
    ]
    axes = above.subplots(down, across, squeeze=False).ravel()
    for panel, ax in zip(drawn, axes, strict=False):
        _draw_panel(ax, panel, longest)
    for ax in axes[len(drawn) :]:
        ax.set_axis_off()
    handles = [_line(at, labels[at]) for at in range(len(labels))]
    below.legend(handles=handles, loc="upper left", frameon=False, fontsize=9)
    return figure


def panels(found: SideBySide) -> list[Panel]:
    """Quality by each judge (the judge's score of fresh samples where none evaluated), KL, share.

    KL and share are of the held-out completions where evaluations have them: offline, a round says
    nothing of later versions. The starting model is its own reference: there the KL is 0.
    """
    of_judges = [
        Panel(
            f"Quality, by {visible(short_name(judge))}",
            "mean score, held-out prompts",
            [[quality(run, judge) for run in group.runs] for group in found.groups],
        )
        for judge in found.judges
    ]
    scores = _panel(found, "Judge's score", "mean score", "score_mean")
    return [
        *(of_judges or [scores]),
        _panel(found, "KL to the reference", "nats a sequence", "kl_to_reference"),
        _panel(found, "Off reference", "share of completions", "off_reference_share"),
    ]


def _panel(found: SideBySide, title: str, unit: str, name: str) -> Panel:
    held_out = any(e.get(name) is not None for run in found.runs for e in run.evaluations)
    where = "held-out prompts" if held_out else "fresh samples"
    start = {0: 0.0} if name == "kl_to_reference" else {}

    def curve(run: Run) -> Curve:
        if not held_out:
            return _curve(run.rounds, "version", name)
        known = _curve(run.evaluations, "update", name)
        return start | known if known else known

    curves = [[curve(run) for run in group.runs] for group in found.groups]
    return Panel(title, f"{unit}, {where}", curves)


def quality(run: Run, judge: str) -> Curve:
    """By update; the starting model's stands at 0."""
    own = [record for record in run.evaluations if record["judge"] == judge]
    start = {0: own[0]["quality_baseline"]} if own else {}
    curve = start | _curve(own, "update", "quality")
    return {at: value for at, value in curve.items() if value is not None}


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean of several runs, wherever all of them have a value."""
    shared = [at for at in curves[0] if all(at in curve for curve in curves)]
    return {at: sum(curve[at] for curve in curves) / len(curves) for at in shared}


def _curve(records: Sequence[Record], when: str, name: str) -> Curve:
    """By ``when`` (for a round, the version that wrote it); several at one place are averaged."""
    found: dict[int, list[float]] = defaultdict(list)
    for record in records:
        if record.get(name) is not None and record.get(when) is not None:
            found[record[when]].append(record[name])
    return {at: sum(values) / len(values) for at, values in sorted(found.items())}


def _draw_panel(ax: Any, panel: Panel, updates: int) -> None:
    for at, curves in enumerate(panel.curves):
        known = [curve for curve in curves if curve]
        if len(known) > 1:
            for curve in known:
                ax.plot(list(curve), list(curve.values()), **_style(at) | {"linewidth": 0.7})
        if known:
            mean = mean_curve(known)
            marker = "o" if len(mean) < 25 else ""
            ax.plot(list(mean), list(mean.values()), marker=marker, markersize=4, **_style(at))
    if not any(curve for curves in panel.curves for curve in curves):
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="#666666")
    ax.set_title(_plain(panel.title), loc="left", fontweight="bold", fontsize=11)
    ax.set(xlabel="updates", ylabel=panel.axis, xlim=(-0.02 * updates, 1.02 * updates))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def _style(at: int) -> dict[str, Any]:
    dash = DASHES[at // len(COLOURS) % len(DASHES)]
    return {"color": COLOURS[at % len(COLOURS)], "linestyle": dash, "linewidth": 1.8}


def _line(at: int, words: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=words, **_style(at))


def _plain(words: str) -> str:
    """For matplotlib: no dollar of a user's opens a formula."""
    return words.replace("$", r"\$")
