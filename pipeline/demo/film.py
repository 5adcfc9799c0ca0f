"""The picture of ``freshpairs demo drift``: an animation, a frame a snapshot, by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from judges.errors import UserError
from pipeline.demo.words import OFFLINE, ONLINE, number, percent, sentence
from pipeline.demo.worlds import GOOD, PAIRS_PER_UPDATE, UPDATES, Setting, Snapshot, Worlds

# Okabe and Ito's colours, which the colour-blind tell apart; online ones are blue and green.
COLOURS = ("#D55E00", "#E69F00", "#CC79A7", "#0072B2", "#009E73")
_STYLES = ("-", (0, (4, 2)), "-", "-", (0, (2, 2)))
"""Dashes where one line lies upon another."""

_FRAME_MS, _LAST_FRAME_MS = 90, 4000
_LEAST_MASS = 1e-6
_BUBBLE_POINTS2 = 1500.0
"""Area of a completion that is always said."""


class Film:
    """Frames of the study so far: all settings as lines, two of them as a map of a world."""

    def __init__(self, worlds: Worlds, settings: Sequence[Setting]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self._worlds = worlds
        self._settings = settings
        self._frames: list[Any] = []
        self._palette = _palette()
        figure = Figure(figsize=(10.0, 6.2), dpi=100)
        self._canvas = FigureCanvasAgg(figure)
        count = len(worlds.seeds)
        figure.text(
            0.02,
            0.945,
            f"The same DPO, the same {count} worlds: only how often pairs are sampled differs",
            fontsize=14,
            fontweight="bold",
        )
        self._caption = figure.text(0.02, 0.03, "", fontsize=10.5, va="center")
        reward, mass, upper, lower = (
            figure.add_axes(place)
            for place in (
                (0.075, 0.52, 0.44, 0.31),
                (0.075, 0.145, 0.44, 0.30),
                (0.585, 0.52, 0.395, 0.31),
                (0.585, 0.145, 0.395, 0.30),
            )
        )
        self._reward_lines = self._reward_panel(reward)
        self._mass_lines = self._mass_panel(mass)
        figure.legend(
            handles=self._reward_lines,
            loc="center left",
            bbox_to_anchor=(0.012, 0.9),
            ncols=len(settings),
            fontsize=9.5,
            frameon=False,
            columnspacing=1.6,
        )
        self._maps = [
            (index, *self._map_panel(axes, index))
            for axes, index in ((upper, OFFLINE), (lower, ONLINE))
        ]
        lower.set_xlabel("feature 0, e.g. length: goes with quality among the 36", fontsize=9)

    def __len__(self) -> int:
        return len(self._frames)

    def add(self, snapshots: Sequence[Snapshot]) -> None:
        """A frame of the last of ``snapshots``, which are all so far."""
        from PIL import Image

        now = snapshots[-1]
        updates = [snapshot.update for snapshot in snapshots]
        for index, (reward, mass) in enumerate(
            zip(self._reward_lines, self._mass_lines, strict=True)
        ):
            rewards = [float(snapshot.reward_SW[index].mean()) for snapshot in snapshots]
            masses = [float(snapshot.bad_mass[index].mean()) for snapshot in snapshots]
            reward.set_data(updates, rewards)
            mass.set_data(updates, np.maximum(masses, _LEAST_MASS))
        for index, bubbles, told in self._maps:
            probs_V = now.probs_SWV[index, 0]
            bubbles.set_sizes(_BUBBLE_POINTS2 * probs_V)
            with_bad, judged = now.judged_bad_SW[index, 0], now.judged_SW[index, 0]
            told.set_text(
                f"one of the bad four\nis said in {percent(float(probs_V[GOOD:].sum()))} of cases,"
                f"\nin {with_bad} of {judged:,} judged pairs"
            )
        words = sentence(now, self._settings)
        self._caption.set_text(f"Update {now.update} of {UPDATES}.  {words}")
        self._canvas.draw()
        drawn = Image.frombuffer(
            "RGBA", self._canvas.get_width_height(), self._canvas.buffer_rgba()
        )
        self._frames.append(
            drawn.convert("RGB").quantize(palette=self._palette, dither=Image.Dither.NONE)
        )

    def write(self, out: Path) -> None:
        """Save the frames as a GIF that repeats, its last frame held. Raises UserError."""
        first, *others = self._frames
        pauses = [_FRAME_MS] * len(others) + [_LAST_FRAME_MS]
        encoded = io.BytesIO()
        first.save(encoded, "GIF", save_all=True, append_images=others, duration=pauses, loop=0)
        try:
            with out.open("xb") as file:
                file.write(encoded.getvalue())
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written ({error.strerror})") from error

    def _reward_panel(self, axes: Any) -> list[Any]:
        best = float(self._worlds.reward(self._worlds.optimum()).mean())
        _over_updates(axes, "True reward, mean over the worlds")
        bad = float(self._worlds.rewards_WV[:, GOOD:].mean())
        _mark(axes, best, f"the optimum p0·exp(r/β): {number(best)}", side=1)
        _mark(axes, bad, f"reward of the bad four: {number(bad)}", side=-1)
        axes.set_ylim(bad - 1.6, best + 1.6)
        axes.tick_params(labelbottom=False)
        return self._lines(axes)

    def _mass_panel(self, axes: Any) -> list[Any]:
        _over_updates(axes, "Probability of the bad four, mean over the worlds")
        axes.set_yscale("log")
        axes.set_ylim(_LEAST_MASS, 3.0)
        ticks = [1e-6, 1e-4, 1e-2, 1.0]
        axes.set_yticks(ticks, [percent(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(f"updates, {PAIRS_PER_UPDATE} pairs each", fontsize=9)
        return self._lines(axes)

    def _lines(self, axes: Any) -> list[Any]:
        return [
            axes.plot([], [], color=colour, linestyle=style, linewidth=2.0, label=setting.label)[0]
            for setting, colour, style in zip(self._settings, COLOURS, _STYLES, strict=True)
        ]

    def _map_panel(self, axes: Any, index: int) -> tuple[Any, Any]:
        """The first world's completions where they are; their areas are probabilities."""
        from matplotlib.ticker import MultipleLocator

        features_V = self._worlds.features_WVD[0, :, 0]
        rewards_V = self._worlds.rewards_WV[0]
        bad = np.arange(len(rewards_V)) >= GOOD
        axes.set_title(
            f"The first world, {self._settings[index].label}",
            loc="left",
            fontsize=10.5,
            fontweight="bold",
        )
        for side, marker in ((~bad, "o"), (bad, "x")):
            axes.scatter(
                features_V[side], rewards_V[side], s=9, marker=marker, color="black", linewidths=0.9
            )
        bubbles = axes.scatter(
            features_V,
            rewards_V,
            s=np.zeros(len(rewards_V)),
            color=[COLOURS[index]] * len(rewards_V),
            alpha=0.45,
            edgecolors="black",
            linewidths=0.5,
        )
        axes.set_xlim(features_V.min() - 0.8, features_V.max() + 1.5)
        axes.set_ylim(rewards_V.min() - 2.2, rewards_V.max() + 2.4)
        axes.annotate(
            "the bad four",
            (float(features_V[bad].mean()), float(rewards_V[bad].mean())),
            (0.0, 25.0),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
        )
        axes.text(
            0.02,
            0.04,
            "area = probability",
            transform=axes.transAxes,
            fontsize=8.5,
            color="#555555",
        )
        axes.set_ylabel("true reward", fontsize=9)
        axes.yaxis.set_major_locator(MultipleLocator(5.0))
        axes.tick_params(labelsize=8.5)
        told = axes.text(
            0.97, 0.64, "", transform=axes.transAxes, ha="right", va="center", fontsize=9
        )
        return bubbles, told


def _over_updates(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    axes.set_xlim(0, UPDATES)
    axes.set_xticks(range(0, UPDATES + 1, 128))
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.tick_params(labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)


def _mark(axes: Any, value: float, words: str, *, side: int) -> None:
    """A dotted line with words above (1) or below (−1) its right end."""
    axes.axhline(value, color="black", linewidth=0.9, linestyle=(0, (1, 2)))
    va = "bottom" if side > 0 else "top"
    axes.text(UPDATES, value + 0.25 * side, words, ha="right", va=va, fontsize=8.5)


def _palette() -> Any:
    """One for all frames, lest colours flicker: greys, and each colour in steps from white."""
    from matplotlib.colors import to_rgb
    from PIL import Image

    # Steps of 15: Pillow finds the nearest only to within 8, and white must stay white.
    steps = np.linspace(0.0, 1.0, 18)[:, None]
    shades = [1.0 - steps * (1.0 - np.array(to_rgb(colour))) for colour in ("black", *COLOURS)]
    # Black marks lie beneath the bubbles.
    dark = [(1.0 - steps) * np.array(to_rgb(COLOURS[index])) for index in (OFFLINE, ONLINE)]
    palette = Image.new("P", (1, 1))
    levels = np.rint(255.0 * np.concatenate([*shades, *dark])).astype(int)
    palette.putpalette(levels.ravel().tolist())
    return palette
