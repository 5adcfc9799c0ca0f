"""Options of drift: what is watched besides the samples, and thresholds on what is measured."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from judges.errors import UserError

Action: TypeAlias = Literal["warn", "resample", "reset", "stop"]
Side: TypeAlias = Literal["above", "below"]
Need: TypeAlias = Literal["samples", "judge", "reference", "band", "bad", "held_out"]

ACTIONS: tuple[Action, ...] = ("warn", "resample", "reset", "stop")
"""What a tripped threshold does, mildest first."""


@dataclass(frozen=True, slots=True)
class Measure:
    """``side``: where drift leads it, None where both ways; ``needs``: what it is made of."""

    side: Side | None
    needs: tuple[Need, ...] = ()


def _measures(side: Side | None, *names: str, needs: tuple[Need, ...] = ()) -> dict[str, Measure]:
    return dict.fromkeys(names, Measure(side, needs))


MEASURES: Mapping[str, Measure] = {
    # Of a round: its fresh samples …
    **_measures("above", "kl_to_reference", "kl_per_token", needs=("samples", "reference")),
    **_measures(
        "above",
        *("length_ratio", "off_reference_share", "off_reference_unlikely", "off_reference_likely"),
        needs=("samples", "reference", "band"),
    ),
    **_measures("above", "length_mean", "repetition_rate", "self_similarity", needs=("samples",)),
    **_measures(
        "below",
        *("entropy", "eos_rate", "distinct_ngrams", "score_mean", "score_std"),
        needs=("samples",),
    ),
    # … the probes …
    **_measures("below", "chosen_logps_change", "rejected_logps_change"),
    **_measures("above", "bad_mass", "bad_logps", needs=("bad",)),
    **_measures("above", "held_out_nll", needs=("held_out",)),
    # … its generators, its judge, and what was not learned from.
    **_measures("above", "logprob_gap", needs=("samples",)),
    **_measures(None, "gap_weight", needs=("samples",)),
    **_measures(
        "above",
        *(f"judging.{name}" for name in ("tie_rate", "flip_rate", "invalid", "declined")),
        *(f"judging.{name}" for name in ("retries", "timeouts")),
        needs=("judge",),
    ),
    **_measures("below", "judging.agreement", "judging.valid", needs=("judge",)),
    **_measures("above", *(f"dropped.{name}" for name in ("tie", "invalid", "unjudged"))),
    **_measures("above", *(f"dropped.{name}" for name in ("identical", "margin", "truncated"))),
    # Of an update.
    **_measures("above", "loss", "margin", "grad_norm", "kl_from_sampler", "lag_mean", "lag_max"),
    **_measures("below", "accuracy", "ess", "ess_per_token", "chosen_logps", "rejected_logps"),
    **_measures("below", "policy_ess", "policy_ess_per_token"),
    **_measures("below", "rewards_chosen", "rewards_rejected"),
}
"""What a threshold may stand on, by its name in the records; a dot leads into a nested record."""

NESTED = {name.partition(".")[0] for name in MEASURES if "." in name}

REMEDIES: Mapping[Need, tuple[str, str]] = {
    "samples": ("needs fresh samples, and the pairs are given", "leave it out"),
    "judge": ("needs a judge, and the pairs are given", "leave it out"),
    "reference": ("needs a reference, and none is kept", "set drift.reference to true"),
    "band": (
        "needs samples by the reference, which an averaged one never writes",
        "use a reference.update that is frozen or {every_rounds: N}",
    ),
    "bad": ("needs completions to watch", "give their file in drift.bad"),
    "held_out": ("needs text to watch", "give its file in drift.held_out"),
}
"""What is wrong where a measure's need is not met, and the remedy."""


class Bound(BaseModel):
    """Where a measure trips: above one number, below another, or either."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    above: float | None = Field(default=None, allow_inf_nan=False, description="Trips above this")
    below: float | None = Field(default=None, allow_inf_nan=False, description="Trips below this")

    @model_validator(mode="after")
    def _leaves_room(self) -> Bound:
        if self.above is None and self.below is None:
            raise ValueError("no threshold: give above, below or both")
        if self.above is not None and self.below is not None and self.above < self.below:
            raise ValueError(f"every number is above {self.above:g} or below {self.below:g}")
        return self

    def __str__(self) -> str:
        sides = {"above": self.above, "below": self.below}
        given = (f"{side}: {value:g}" for side, value in sides.items() if value is not None)
        return "{" + ", ".join(given) + "}"


class HeldOutOptions(BaseModel):
    """Text the policy is not trained on: what it forgets shows there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(description="A file, a directory or a hub dataset, as prompts.path")
    subset: str | None = Field(default=None, description="The configuration of a hub dataset")
    split: str = Field(default="train", description="Which split to use")
    column: str = Field(default="text", description="The column that holds the text")
    count: int = Field(default=64, ge=1, description="Texts to score each round, from the first")


class DriftOptions(BaseModel):
    """What is measured each round besides the samples, and thresholds on all that is measured.

    A threshold is a number (above or below it by the measure's nature) or {above: x, below: y}.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    reference: bool = Field(
        default=False,
        description="Keep and score a reference for the measures of drift although the objective "
        "needs none",
    )
    bad: str | None = Field(
        default=None,
        description="File of rows with prompt and completion that the policy should not say: "
        "their probability is measured",
    )
    held_out: HeldOutOptions | None = Field(
        default=None, description="Held-out text whose log-probability is measured; null = none"
    )
    warn: dict[str, Bound] = Field(default_factory=dict, description="Thresholds that warn")
    resample: dict[str, Bound] = Field(
        default_factory=dict, description="Thresholds that end the round: fresh pairs are sampled"
    )
    reset: dict[str, Bound] = Field(
        default_factory=dict, description="Thresholds that put the policy back to its reference"
    )
    stop: dict[str, Bound] = Field(
        default_factory=dict, description="Thresholds that stop the run, after a checkpoint"
    )

    @field_validator(*ACTIONS, mode="before")
    @classmethod
    def _by_measure(cls, given: Any, info: ValidationInfo) -> Any:
        """Thresholds by the measure's whole name, each a mapping of sides to numbers."""
        if not isinstance(given, Mapping):
            return given
        key = f"drift.{info.field_name}"
        return {
            name: _sides(f"{key}.{name}", name, value)
            for name, value in _flat(given)
            if value is not None  # as an override takes a threshold away
        }

    def thresholds(self) -> Iterator[tuple[Action, str, Bound]]:
        """Each action, measure and bound, the mildest action first."""
        for action in ACTIONS:
            for measure, bound in getattr(self, action).items():
                yield action, measure, bound


def check_measurable(
    options: DriftOptions, *, reference: bool, averaged: bool = False, samples: bool = True
) -> None:
    """Raises UserError, a line each, for thresholds on measures that this run never has.

    ``reference``: one is kept; ``averaged``: it is a mean of policies; ``samples``: the policy
    writes rounds itself (False: all pairs are given).
    """
    met: Mapping[Need, bool] = {
        "samples": samples,
        "judge": samples,
        "reference": reference,
        "band": not averaged,
        "bad": options.bad is not None,
        "held_out": options.held_out is not None,
    }
    lines = []
    if options.reset and not reference:
        lines.append("drift.reset: no reference is kept to go back to: set drift.reference to true")
    for action, measure, bound in options.thresholds():
        missing = next((need for need in MEASURES[measure].needs if not met[need]), None)
        if missing is not None:
            wrong, remedy = REMEDIES[missing]
            lines.append(f"drift.{action}.{measure}={bound}: {wrong}: {_or_left_out(remedy)}")
    if lines:
        raise UserError("\n".join(lines))


def _or_left_out(remedy: str) -> str:
    return remedy if remedy == "leave it out" else f"{remedy}, or leave the threshold out"


def _flat(given: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """A key path's nesting undone: ``drift.stop.judging.tie_rate=0.5`` is a mapping in another."""
    for name, value in given.items():
        if name in NESTED and isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", bound) for inner, bound in value.items())
        else:
            yield str(name), value


def _sides(key: str, measure: str, given: Any) -> Any:
    if measure not in MEASURES:
        raise ValueError(f"{key}: unknown measure; the nearest is {_nearest(measure, MEASURES)!r}")
    if isinstance(given, Mapping | Bound):
        return given
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise ValueError(f"{key}={given}: must be a number, or a mapping of above and below to one")
    side = MEASURES[measure].side
    if side is None:
        raise ValueError(
            f"{key}={given}: both ways are drift: write {{above: …}}, {{below: …}} or both"
        )
    return {side: given}


def _nearest(name: str, known: Mapping[str, Measure]) -> str:
    """The most alike; a beginning or a nested measure's last name may be meant by its own."""
    begun = next((full for full in known if full.startswith(f"{name}_")), None)
    if begun is not None:
        return begun
    candidates: Sequence[str] = [*known, *(full.rpartition(".")[2] for full in known)]
    (found,) = difflib.get_close_matches(name, candidates, n=1, cutoff=0.0)
    return next(full for full in known if found in (full, full.rpartition(".")[2]))
