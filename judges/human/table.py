"""Win, tie and loss of one side against the other as people see it, and each side's quality."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from judges.human.agreement import agreement, plurality
from judges.human.records import Choice, Rating, pair_key
from judges.human.store import Store
from judges.interface import Text, text_of


@dataclass(frozen=True, slots=True)
class HumanTable:
    """A row of Table 2 of arXiv:2402.04792, first against second.

    ``win``, ``tie`` and ``loss`` are shares of the ``items`` that have a verdict, None without any;
    ``quality_first`` and ``quality_second`` are means over items, on the scale of 1 to 5.
    ``unrated`` items have no verdict, and of these ``skipped`` were skipped by somebody. ``alpha``
    and ``alpha_quality`` are those of ``Agreement``.
    """

    items: int
    win: float | None
    tie: float | None
    loss: float | None
    quality_first: float | None
    quality_second: float | None
    ratings: int
    raters: int
    unrated: int
    skipped: int
    alpha: float | None
    alpha_quality: float | None


def human_table(store: Store, pairs: Sequence[tuple[Text, Text, Text]] | None = None) -> HumanTable:
    """The table of these (prompt, first, second), or of the whole store in the order of queueing.

    An item counts once: as what most of its raters say, as a tie where they are split. Its quality
    is the mean of those given. A pair that is not in the store is unrated, one that is given twice
    counts twice, and one of two equal completions, which nobody is asked about, is a tie.
    """
    items = {item.key: item for item in store.items()}
    if pairs is None:
        equal = 0
        asked = [(item.key, item.first) for item in items.values()]
    else:
        told = [(p, text_of(first), text_of(second)) for p, first, second in pairs]
        equal = sum(first == second for _, first, second in told)
        asked = [(pair_key(*pair), pair[1]) for pair in told if pair[1] != pair[2]]
    by_item = defaultdict(list)
    for rating in store.ratings():
        by_item[rating.item].append(rating)
    counts = {Choice.FIRST: 0, Choice.TIE: equal, Choice.SECOND: 0}
    qualities_first: list[float] = []
    qualities_second: list[float] = []
    unrated = skipped = 0
    counted: dict[str, list[Rating]] = {}
    for key, first in asked:
        ratings = by_item[items[key].id] if key in items else []
        if ratings and first != items[key].first:
            ratings = [rating.swapped() for rating in ratings]
        counted.setdefault(key, ratings)
        verdicts = [rating for rating in ratings if rating.choice is not Choice.SKIP]
        if not verdicts:
            unrated += 1
            skipped += bool(ratings)
            continue
        counts[plurality(rating.choice for rating in verdicts) or Choice.TIE] += 1
        qualities_first += _mean(rating.quality_first for rating in verdicts)
        qualities_second += _mean(rating.quality_second for rating in verdicts)
    judged = sum(counts.values())
    agreed = agreement([rating for ratings in counted.values() for rating in ratings])
    return HumanTable(
        items=judged,
        win=counts[Choice.FIRST] / judged if judged else None,
        tie=counts[Choice.TIE] / judged if judged else None,
        loss=counts[Choice.SECOND] / judged if judged else None,
        quality_first=next(iter(_mean(qualities_first)), None),
        quality_second=next(iter(_mean(qualities_second)), None),
        ratings=agreed.verdicts,
        raters=sum(bias.verdicts > 0 for bias in agreed.raters),
        unrated=unrated,
        skipped=skipped,
        alpha=agreed.preference,
        alpha_quality=agreed.quality,
    )


def _mean(values: Iterable[float | None]) -> list[float]:
    """The mean of those given, or nothing, as a list of one or none."""
    given = [value for value in values if value is not None]
    return [statistics.fmean(given)] if given else []
