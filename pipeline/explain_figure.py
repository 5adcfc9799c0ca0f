"""The picture of ``freshpairs explain``: three panels and their captions, by matplotlib."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from judges.errors import UserError
from workers.messages import DoubleArray

if TYPE_CHECKING:
    from workers.learner.landscape import Plane

# Okabe and Ito's colours, which the colour-blind tell apart; in the order of Region.
_TINTS = ("#F0E442", "#D55E00", "#0072B2", "#CC79A7", "#999999")
NAMES = ("saddle", "rejected-collapse", "chosen-rescue", "reversed", "settled")
MEANINGS = (
    "the two pulls are of similar size, within a factor of 2",
    "the rejected is pushed down more than twice as hard as the chosen is pulled up",
    "the chosen is pulled up more than twice as hard as the rejected is pushed down",
    "the chosen is pushed down or the rejected pulled up",
    "no gradient",
)


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """Mean log π/π_ref [U, 2] of chosen and rejected in nats, as each update found the policy."""

    points: DoubleArray
    run: str


def draw(
    title: str,
    captions: Sequence[str],
    ratio: Plane,
    nats: Plane,
    found: npt.NDArray[np.int8],
    trajectory: Trajectory | None,
) -> Any:
    """Loss, gradient with its regions, and loss in log space: a matplotlib Figure, no window.

    ``ratio`` and ``nats`` are the planes of π/π_ref and of its logarithm, ``found`` the regions.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    captions = [textwrap.fill(caption, 62) for caption in captions]
    below_in = 0.25 + 0.16 * max(caption.count("\n") + 1 for caption in captions)
    above_in = 4.75
    space = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.08)
    figure = Figure(figsize=(14.5, above_in + below_in), layout=space)
    figure.suptitle(_text(textwrap.shorten(title, 110)), x=0.012, ha="left", fontsize=14)
    grid = figure.add_gridspec(2, 3, height_ratios=(above_in, below_in))
    panels = [figure.add_subplot(grid[0, column]) for column in range(3)]
    _loss_panel(figure, panels[0], ratio)
    _gradient_panel(figure, panels[1], ratio, found)
    _log_panel(figure, panels[2], nats, trajectory)
    for column, caption in enumerate(captions):
        below = figure.add_subplot(grid[1, column])
        below.set_axis_off()
        words = below.text(0.0, 1.0, _text(caption), va="top", fontsize=9)
        words.set_in_layout(False)  # its width is the wrapping's, not the panel's
    return figure


def write(figure: Any, out: Path) -> None:
    """Save to .png, .svg or .pdf. Raises UserError."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format=out.suffix[1:], dpi=100)
    if out.suffix == ".png":  # a palette: a third of the bytes
        with Image.open(drawn) as image:
            palette = image.convert("RGB").quantize(256)
        drawn = io.BytesIO()
        palette.save(drawn, format="png", optimize=True)
    try:
        out.write_bytes(drawn.getvalue())
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from error


def _text(words: str) -> str:
    """For matplotlib: no dollar of a user's opens a formula, π_ref is one."""
    return words.replace("$", r"\$").replace("π_ref", r"$\pi_\mathrm{ref}$")


def _loss_panel(figure: Any, axes: Any, plane: Plane) -> None:
    _contours(figure, axes, plane)
    _ratio_axes(axes, plane)
    axes.plot(1.0, 1.0, "+", color="white", markersize=14, markeredgewidth=2.0)
    axes.set_title("Loss", loc="left", fontweight="bold")


def _gradient_panel(figure: Any, axes: Any, plane: Plane, found: Any) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    low, high = plane.axis[[0, -1]]
    axes.imshow(
        found,
        origin="lower",
        extent=(low, high, low, high),
        cmap=ListedColormap(_TINTS),
        vmin=-0.5,
        vmax=len(_TINTS) - 0.5,
        alpha=0.35,
        interpolation="nearest",
    )
    x1, x2, right, up, size = _arrows(plane)
    dark = ListedColormap(colormaps["magma"](np.linspace(0.0, 0.75, 256))[::-1])
    quiver = axes.quiver(x1, x2, right, up, np.log10(size), cmap=dark, **_ARROWS)
    figure.colorbar(quiver, ax=axes, label="log₁₀ |∂L/∂x|", **_BAR)
    for region, x, y in _label_places(found):
        axes.text(
            low + min(max(x, 0.26), 0.74) * (high - low),  # the whole label inside
            low + y * (high - low),
            NAMES[region],
            ha="center",
            va="center",
            fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": _TINTS[region], "linewidth": 1.5},
        )
    _ratio_axes(axes, plane)
    axes.set_title("Gradient and its regions", loc="left", fontweight="bold")


def _log_panel(figure: Any, axes: Any, plane: Plane, trajectory: Trajectory | None) -> None:
    _contours(figure, axes, plane)
    x, y, right, up, _ = _arrows(plane)
    axes.quiver(x, y, right, up, color="white", alpha=0.55, **_ARROWS)
    axes.plot(0.0, 0.0, "+", color="white", markersize=14, markeredgewidth=2.0)
    if trajectory is not None:
        _draw_path(axes, trajectory.points)
    axes.set(
        xlabel=_text("chosen: log π/π_ref (nats)"),
        ylabel=_text("rejected: log π/π_ref (nats)"),
        aspect="equal",
    )
    axes.set_title(
        "Loss in log space" + (", and the run" if trajectory else ""), loc="left", fontweight="bold"
    )


_BAR: Mapping[str, Any] = {"fraction": 0.046, "pad": 0.02}
_ARROWS: Mapping[str, Any] = {
    "pivot": "middle",
    "angles": "xy",
    "scale": 24.0,
    "width": 0.0045,
}


def _arrows(plane: Plane, count: int = 15) -> tuple[Any, Any, Any, Any, Any]:
    """Where they stand, their unit descent directions and |∇L|, where there is any gradient."""
    at = np.linspace(0, len(plane.axis) - 1, 2 * count + 1).round().astype(int)[1::2]
    right, up = (
        -gradient[np.ix_(at, at)] for gradient in (plane.chosen_gradient, plane.rejected_gradient)
    )
    size = np.hypot(right, up)
    some = size > 0.0
    x1, x2 = np.meshgrid(plane.axis[at], plane.axis[at])
    size = size[some]
    return x1[some], x2[some], right[some] / size, up[some] / size, size


def _contours(figure: Any, axes: Any, plane: Plane) -> None:
    """Filled contours of the loss; they leave out the steepest corner where it would drown all."""
    from matplotlib.colors import LogNorm

    levels, extend, logarithmic = _levels(plane.loss)
    norm = LogNorm(levels[0], levels[-1]) if logarithmic else None
    filled = axes.contourf(
        plane.axis, plane.axis, plane.loss, levels, cmap="viridis", norm=norm, extend=extend
    )
    axes.contour(plane.axis, plane.axis, plane.loss, levels, colors="black", linewidths=0.35)
    figure.colorbar(filled, ax=axes, label="loss", **_BAR)


def _levels(loss: DoubleArray) -> tuple[Sequence[float], str, bool]:
    """Contour levels, matplotlib's ``extend`` for them, and whether they are powers."""
    from matplotlib.ticker import MaxNLocator

    low, middle, most, high = np.quantile(loss, [0.0, 0.5, 0.95, 1.0])
    if low > 0.0 and most > 1e3 * middle:
        return np.geomspace(low, high, 22).tolist(), "neither", True
    capped = high - low > 3.0 * (most - low) > 0.0
    levels = MaxNLocator(20, min_n_ticks=2).tick_values(low, most if capped else high)
    return levels, "max" if capped else "neither", False


def _ratio_axes(axes: Any, plane: Plane) -> None:
    axes.set(
        xlabel=_text("chosen: x₁ = π/π_ref"),
        ylabel=_text("rejected: x₂ = π/π_ref"),
        xlim=plane.axis[[0, -1]],
        ylim=plane.axis[[0, -1]],
        aspect="equal",
    )


def _label_places(found: Any) -> list[tuple[int, float, float]]:
    """The point of each region farthest from its edge, in shares of the width and the height."""
    from scipy.ndimage import distance_transform_edt

    places: list[tuple[int, float, float]] = []
    for region in np.unique(found).tolist():
        inside = np.pad(found == region, 1)
        depth = distance_transform_edt(inside)[1:-1, 1:-1]
        row, column = divmod(int(depth.argmax()), len(found))
        if depth.max() > 0.03 * len(found):  # else a label would cover more than the region
            places.append((region, column / len(found), row / len(found)))
    return places


def _draw_path(axes: Any, points: DoubleArray) -> None:
    """A line through the points, start and end marked."""
    axes.plot(*points.T, color="white", linewidth=3.2)
    axes.plot(*points.T, color="#D55E00", linewidth=1.6)
    for point, marker, label in ((points[0], "o", "start"), (points[-1], "D", "end")):
        axes.plot(
            *point,
            marker,
            color="#D55E00",
            markeredgecolor="white",
            markersize=9,
            linestyle="none",
            label=label,
        )
    axes.legend(loc="best")
