"""How far raters agree, and how each of them leans."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from judges.human.records import Choice, Rating

Level: TypeAlias = Literal["nominal", "interval"]


@dataclass(frozen=True, slots=True)
class RaterBias:
    """One rater's habits; shares are in [0, 1], None where there is nothing to count.

    ``left_rate`` is the share of left among the preferences, as seen: 0.5 without a bias, since
    sides are drawn at random. ``tie_rate`` is the share of ties among the verdicts.
    ``majority_rate`` is the share of verdicts equal to the most frequent one of the others, over
    the ``compared`` items where the others have one such. ``seconds`` is the median for a verdict.
    """

    rater: str
    verdicts: int
    skips: int
    left_rate: float | None
    tie_rate: float | None
    majority_rate: float | None
    compared: int
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Agreement:
    """Krippendorff's alphas (1: perfect, 0: as by chance, None: undefined), counts and raters.

    ``preference`` is nominal over first, second and tie; ``quality`` is interval over the 1–5 of
    each completion. ``shared`` counts the items with two verdicts or more, the only ones in them.
    """

    preference: float | None
    quality: float | None
    items: int
    shared: int
    verdicts: int
    skips: int
    raters: tuple[RaterBias, ...]


def agreement(ratings: Sequence[Rating]) -> Agreement:
    """The agreement in these ratings, raters in the order of their names; skips say nothing."""
    verdicts = [rating for rating in ratings if rating.choice is not Choice.SKIP]
    per_item = Counter(rating.item for rating in verdicts)
    qualities = [
        (rating.rater, (rating.item, side), quality)
        for rating in verdicts
        for side, quality in enumerate((rating.quality_first, rating.quality_second))
        if quality is not None
    ]
    return Agreement(
        preference=alpha([(r.rater, r.item, r.choice.value) for r in verdicts], "nominal"),
        quality=alpha(qualities, "interval"),
        items=len(per_item),
        shared=sum(n > 1 for n in per_item.values()),
        verdicts=len(verdicts),
        skips=len(ratings) - len(verdicts),
        raters=_biases(ratings),
    )


def alpha(
    labels: Iterable[tuple[str, tuple[int, int] | int, str | int]], level: Level
) -> float | None:
    """Krippendorff's alpha of (rater, unit, value); what a rater left out is missing.

    A unit with one value says nothing of agreement and is left out. None if no unit has two, or if
    all values are one: 1 - 0/0. Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011.
    """
    from nltk.metrics.agreement import AnnotationTask
    from nltk.metrics.distance import binary_distance, interval_distance

    units = defaultdict(list)
    for rater, unit, value in labels:
        units[unit].append((rater, value))
    paired = [
        (rater, str(unit), value)
        for unit, values in units.items()
        if len(values) > 1
        for rater, value in values
    ]
    if len({value for _, _, value in paired}) < 2:
        return None
    distance = {"nominal": binary_distance, "interval": interval_distance}[level]
    return float(AnnotationTask(paired, distance=distance).alpha())


def plurality(choices: Iterable[Choice]) -> Choice | None:
    """The most frequent verdict; None if two are, or if there is none."""
    ranked = Counter(choice for choice in choices if choice is not Choice.SKIP).most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]


def _biases(ratings: Sequence[Rating]) -> tuple[RaterBias, ...]:
    by_item = defaultdict(list)
    by_rater = defaultdict(list)
    for rating in ratings:
        by_item[rating.item].append(rating)
        by_rater[rating.rater].append(rating)
    biases = []
    for rater, own in sorted(by_rater.items()):
        verdicts = [rating for rating in own if rating.choice is not Choice.SKIP]
        seen = [rating.choice.as_seen(rating.left) for rating in verdicts]
        others = [
            plurality(r.choice for r in by_item[rating.item] if r.rater != rater)
            for rating in verdicts
        ]
        agrees = [
            rating.choice is other
            for rating, other in zip(verdicts, others, strict=True)
            if other is not None
        ]
        biases.append(
            RaterBias(
                rater=rater,
                verdicts=len(verdicts),
                skips=len(own) - len(verdicts),
                left_rate=_share(side == "left" for side in seen if side != "tie"),
                tie_rate=_share(side == "tie" for side in seen),
                majority_rate=_share(agrees),
                compared=len(agrees),
                seconds=statistics.median(r.seconds for r in verdicts) if verdicts else None,
            )
        )
    return tuple(biases)


def _share(flags: Iterable[bool]) -> float | None:
    counted = list(flags)
    return sum(counted) / len(counted) if counted else None
