"""A picture of an objective: its loss, where its gradient pulls, and the path that a run took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError

from judges.errors import UserError
from judges.plugins import is_plugin, load_plugin, resolve_plugin_path
from pipeline.config import apply_overrides
from pipeline.explain_figure import MEANINGS, NAMES, Trajectory, draw, write
from pipeline.mistakes import explain as lines_of
from pipeline.run_directory import read_run_config
from pipeline.tracking import metrics
from workers.learner.objective_options import BcoOptions, KtoOptions, ObjectiveOptions, OwnOptions
from workers.learner.pairwise_options import Options

SUFFIXES = (".png", ".svg", ".pdf")
RATIOS = (0.02, 2.0)
NATS = 4.0
"""The axes: π/π_ref from the first to the second of ``RATIOS``; its logarithm, ±``NATS``."""


def explain(
    name: str, settings: Sequence[str] = (), run_dir: Path | None = None, out: Path | None = None
) -> list[str]:
    """Draw an objective with these ``key=value`` settings to a file; the lines that sum it up.

    ``out`` is ``NAME.png`` in the working directory unless given. Raises UserError for an
    objective, a value, a run or a file that cannot be.
    """
    options = read_options(name, settings)
    out = _free_file(out or Path(f"{_short(options.name)}.png"))
    trajectory = None if run_dir is None else read_trajectory(run_dir)
    from workers.learner.landscape import is_surrogate, log_plane, ratio_plane, regions, shares

    points = _resolution(options)
    ratio = ratio_plane(options, np.linspace(*RATIOS, points))
    nats = log_plane(options, np.linspace(*_span(trajectory), points))
    found = regions(ratio)
    notes = _notes(options, is_surrogate(options))
    about = _about(options)
    captions = _captions(options, notes, np.unique(found).tolist(), trajectory)
    write(draw(about[0], captions, ratio, nats, found, trajectory), out)
    return [
        *about,
        *[f"  {key}: {_yaml(value)}" for key, value in _settings(options).items()],
        f"Of the plane (x₁, x₂), π/π_ref from {RATIOS[0]:g} to {RATIOS[1]:g} of chosen, rejected:",
        *[
            f"  {share:4.0%}  {NAMES[region]}: {MEANINGS[region]}"
            for region, share in shares(found).items()
            if share or region <= 2
        ],
        *notes,
        f"drawn in {out}",
    ]


def read_options(name: str, settings: Sequence[str]) -> Options:
    """The options of a built-in objective or a plug-in. Raises UserError, a line a mistake."""
    if is_plugin(name):
        name = resolve_plugin_path(name, Path.cwd(), key="objective.name")
    raw: dict[str, Any] = {"name": name}
    apply_overrides(raw, settings)

    class Section(BaseModel):
        objective: ObjectiveOptions

    try:
        return Section.model_validate({"objective": raw}).objective
    except ValidationError as error:
        raise UserError("\n".join(lines_of(Section, error.errors()))) from None


def read_trajectory(run_dir: Path) -> Trajectory:
    """Where a run's records say its policy went; raises UserError where they do not say."""
    cfg, _ = read_run_config(run_dir)
    options = cfg.objective
    scale = options.reward_scale
    # Any numbers will do: is the reward β·(log π − log π_ref), whatever the length?
    rewards = [options.implicit_reward(np.array([-3.0]), np.array([-5.0]), n) for n in (1.0, 7.0)]
    if not options.needs.reference:
        raise UserError(f"--run {run_dir}: {options.name} has no reference, so no π/π_ref to draw")
    if not np.allclose(rewards, 2.0 * scale):
        raise UserError(
            f"--run {run_dir}: the implicit reward of {options.name} is not β·log π/π_ref, so its "
            "records do not hold the path"
        )
    sides = [
        (record.get("rewards_chosen"), record.get("rewards_rejected"))
        for record in metrics(run_dir)
        if record["kind"] == "update"
    ]
    known = [side for side in sides if None not in side]
    if not known:
        raise UserError(
            f"--run {run_dir}: of {len(sides)} updates none has rewards_chosen and "
            "rewards_rejected: name a run that learned something"
        )
    moving = "" if cfg.reference.update == "frozen" else ", against a reference that moved"
    run = f"{run_dir.resolve().name} ({_short(options.name)}, {len(known)} updates{moving})"
    return Trajectory(np.array(known, np.float64) / scale, run)


def _free_file(out: Path) -> Path:
    """The file, if it can be written. Raises UserError."""
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out {out}: ends in none of {', '.join(SUFFIXES)}; choose one")
    if out.exists():
        raise UserError(f"--out {out}: exists already and is not overwritten; choose another name")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: no such directory {out.parent}; make it first")
    return out


def _short(name: str) -> str:
    """``dpo``; of a plug-in, its function."""
    return name.rpartition(":")[2]


def _settings(options: Options) -> Mapping[str, Any]:
    """The hyper-parameters, those of this objective alone first."""
    own = type(options).__annotations__
    values = options.model_dump(exclude={"name"})
    return {key: values[key] for key in sorted(values, key=lambda key: key not in own)}


def _yaml(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _about(options: Options) -> list[str]:
    """What the objective is, in a line, and of a plug-in where it is."""
    if not isinstance(options, OwnOptions):
        return [f"{options.name}: {' '.join((options.__doc__ or '').split())}"]
    about = (load_plugin(options.name, key="objective.name").__doc__ or "").strip()
    first = about.splitlines()[0] if about else "an objective of your own"
    return [f"{_short(options.name)}: {first}", f"  source: {options.name}"]


def _notes(options: Options, surrogate: bool) -> list[str]:
    """What a reader must know of how the plane was made."""
    from workers.learner.landscape import REFERENCE_LOGPS, TOKENS, one_at_a_time

    needs = options.needs
    side = f"{REFERENCE_LOGPS:g} nats under the reference".replace("-", "−")
    notes = [f"Both completions have {TOKENS} tokens and {side}."]
    if not needs.reference:
        notes.append("The objective itself needs no reference: here it is only the ruler.")
    match needs.records:
        case "unpaired":
            notes.append("The loss is of a desirable completion at x₁ plus an undesirable at x₂.")
        case "ranked":
            notes.append("The ranking is of these two completions.")
        case "sampled":
            notes.append("The loss is of a sample that wins at x₁ plus one that loses at x₂.")
    if isinstance(options, KtoOptions):
        notes.append("Mismatched completions have KL z = 0.")
    if isinstance(options, BcoOptions):
        notes.append("The running offset δ is 0.")
    if needs.opponent and needs.records == "pairs":
        notes.append("The rejected is the reference's sample.")
    if needs.collisions:
        notes.append("WPO's weights are 1.")
    if one_at_a_time(options):
        notes.append("Each point is an update of two pairs, the other of them at the reference.")
    if surrogate:
        notes.append(
            "The loss is a surrogate: descent follows the arrows, not the slope of its value."
        )
    return notes


def _resolution(options: Options) -> int:
    """Points a side: where each is an update of its own, a tenth of them in all."""
    from workers.learner.landscape import one_at_a_time

    return 64 if one_at_a_time(options) else 200


def _span(trajectory: Trajectory | None) -> tuple[float, float]:
    """The axes in nats: ±NATS, or as far as the run went and a twentieth more."""
    if trajectory is None:
        return -NATS, NATS
    low, high = float(trajectory.points.min()), float(trajectory.points.max())
    room = 0.05 * (max(high, NATS) - min(low, -NATS))
    return min(-NATS, low - room), max(NATS, high + room)


def _captions(
    options: Options, notes: Sequence[str], found: Sequence[int], trajectory: Trajectory | None
) -> list[str]:
    """Under each of the three panels."""
    settings = ", ".join(f"{key} {_yaml(value)}" for key, value in _settings(options).items())
    regions = " ".join(f"{NAMES[region]}: {MEANINGS[region]}." for region in found)
    path = f" The line is {trajectory.run}: means over each update's pairs." if trajectory else ""
    cross = "The cross is π\u00a0=\u00a0π_ref."
    return [
        f"With {settings}. {cross} {' '.join(notes)}",
        f"Arrows, all of one length: −∂L/∂x, where descent goes. {regions}",
        f"The same over log x, in nats; arrows −∂L/∂log x. {cross}{path}",
    ]
