"""Agreement among raters, their habits, and the table of wins, ties and losses."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from judges.human.agreement import agreement, alpha, plurality
from judges.human.records import Choice, Rating
from judges.human.store import Store
from judges.human.table import HumanTable, human_table

# Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011, section C: four observers,
# twelve units, a dot where a value is missing.
PUBLISHED = {
    "A": "1 2 3 3 2 1 4 1 2 . . .",
    "B": "1 2 3 3 2 2 4 1 2 5 . 3",
    "C": ". 3 3 3 2 3 4 2 2 5 1 .",
    "D": "1 2 3 3 2 4 4 1 2 5 1 .",
}


def published() -> list[tuple[str, int, int]]:
    return [
        (observer, unit, int(value))
        for observer, row in PUBLISHED.items()
        for unit, value in enumerate(row.split())
        if value != "."
    ]


@pytest.mark.parametrize(("level", "expected"), [("nominal", 0.743), ("interval", 0.849)])
def test_alpha_of_krippendorffs_own_example(level, expected):
    assert round(alpha(published(), level), 3) == expected


def test_alpha_of_a_table_small_enough_for_a_pencil():
    # Units aa, ab, bb: of 6 values in pairs 3 are a and 3 are b. Observed disagreement 2/6;
    # expected 2·3·3 / (6·5) = 18/30. Alpha is 1 - (1/3)/(3/5) = 4/9.
    labels = [
        (r, u, v) for u, values in enumerate(["aa", "ab", "bb"]) for r, v in enumerate(values)
    ]
    assert math.isclose(alpha(labels, "nominal"), 4 / 9)


def by_enumeration(labels: list[tuple[str, int, int]], level: str) -> float | None:
    """1 - observed / expected disagreement, over every ordered pair of values."""

    def distance(a: int, b: int) -> int:
        return int(a != b) if level == "nominal" else (a - b) ** 2

    units = defaultdict(list)
    for _, unit, value in labels:
        units[unit].append(value)
    paired = [values for values in units.values() if len(values) > 1]
    pooled = [value for values in paired for value in values]
    observed = sum(
        Fraction(sum(distance(a, b) for a, b in itertools.permutations(values, 2)), len(values) - 1)
        for values in paired
    )
    expected = sum(distance(a, b) for a, b in itertools.permutations(pooled, 2))
    if not expected:
        return None
    return float(1 - observed * (len(pooled) - 1) / expected)


@settings(max_examples=150, deadline=None)
@given(
    labels=st.dictionaries(
        st.tuples(st.sampled_from("abcd"), st.integers(0, 11)), st.integers(1, 5), max_size=30
    ),
    level=st.sampled_from(["nominal", "interval"]),
)
def test_alpha_is_what_counting_every_pair_gives(labels, level):
    listed = [(rater, unit, value) for (rater, unit), value in labels.items()]
    expected = by_enumeration(listed, level)
    found = alpha(listed, level)
    assert (found is None) == (expected is None)
    assert found is None or math.isclose(found, expected, abs_tol=1e-12)


def rating(item: int, rater: str, choice: str, **kwargs: object) -> Rating:
    given = {"quality_first": None, "quality_second": None, "left": True, "seconds": 1.0}
    return Rating(item=item, rater=rater, choice=Choice(choice), rated=0.0, **(given | kwargs))


def test_a_raters_habits_by_hand():
    ratings = [
        rating(1, "ada", "first", left=True, seconds=1.0),  # left
        rating(2, "ada", "first", left=False, seconds=9.0),  # right
        rating(3, "ada", "second", left=False, seconds=2.0),  # left
        rating(4, "ada", "tie", seconds=4.0),
        rating(5, "ada", "skip", seconds=99.0),
        rating(1, "ben", "first"),
        rating(1, "eve", "first"),  # the others say first: ada too
        rating(2, "ben", "second"),  # the others say second: ada does not
        rating(3, "ben", "second"),
        rating(3, "eve", "first"),  # the others are split
        rating(4, "ben", "skip"),  # nobody else has a verdict
    ]
    agreed = agreement(ratings)
    ada, ben, eve = agreed.raters
    assert (ada.rater, ada.verdicts, ada.skips) == ("ada", 4, 1)
    assert (ada.left_rate, ada.tie_rate, ada.seconds) == (2 / 3, 1 / 4, 3.0)
    assert (ada.majority_rate, ada.compared) == (1 / 2, 2)
    assert (ben.verdicts, ben.skips, ben.left_rate) == (3, 1, 1 / 3)
    # Of item 3 the others, ada and eve, are split.
    assert (ben.majority_rate, ben.compared) == (1 / 2, 2)
    # Of 1 the others say first, as she does; of 3 second.
    assert (eve.majority_rate, eve.compared) == (1 / 2, 2)
    assert (agreed.items, agreed.shared, agreed.verdicts, agreed.skips) == (4, 3, 9, 2)
    assert agreed.preference == alpha(
        [(r.rater, r.item, r.choice.value) for r in ratings if r.choice != "skip"], "nominal"
    )


def test_agreement_of_qualities_is_over_each_completion():
    given = [
        rating(1, "ada", "first", quality_first=5, quality_second=2),
        rating(1, "ben", "first", quality_first=4, quality_second=2),
        rating(2, "ada", "second", quality_first=1),
        rating(2, "ben", "second", quality_first=3, quality_second=5),
    ]
    units = [("ada", 1, 5), ("ben", 1, 4), ("ada", 2, 2), ("ben", 2, 2), ("ada", 3, 1)]
    units += [("ben", 3, 3), ("ben", 4, 5)]
    assert math.isclose(agreement(given).quality, by_enumeration(units, "interval"))


def test_nothing_to_count_is_none():
    nothing = agreement([])
    assert (nothing.preference, nothing.quality, nothing.raters) == (None, None, ())
    skips = agreement([rating(1, "ada", "skip")])
    (ada,) = skips.raters
    assert (ada.left_rate, ada.tie_rate, ada.majority_rate, ada.seconds) == (None,) * 4
    alike = agreement([rating(i, rater, "tie") for i in (1, 2) for rater in ("ada", "ben")])
    assert (alike.preference, alike.shared) == (None, 2)
    assert alike.raters[0].left_rate is None


def test_a_swapped_rating_says_the_same_of_the_same_completion():
    given = rating(1, "ada", "first", quality_first=5, quality_second=2, left=False)
    turned = given.swapped()
    assert (turned.choice, turned.quality_first, turned.quality_second) == ("second", 2, 5)
    assert given.choice.as_seen(given.left) == turned.choice.as_seen(turned.left) == "right"
    assert turned.swapped() == given
    assert rating(1, "ada", "tie").swapped().choice is Choice.TIE


def test_plurality():
    first, second, tie, skip = Choice.FIRST, Choice.SECOND, Choice.TIE, Choice.SKIP
    assert plurality([first, first, second]) is first
    assert plurality([first, tie]) is None
    assert plurality([first, second, tie]) is None
    assert plurality([first, tie, tie, second]) is tie
    assert plurality([second, skip, skip]) is second
    assert plurality([skip]) is None


@pytest.fixture
def rated(tmp_path) -> Store:
    """Five pairs: a win, a loss, a split, a skipped one and one that nobody has seen."""
    store = Store(tmp_path / "s.sqlite", 3)
    store.queue([(f"p{i}", f"one {i}", f"two {i}") for i in range(1, 6)])
    for item, rater, choice, first, second in [
        (1, "ada", "first", 5, 3),
        (1, "ben", "first", 4, None),
        (1, "eve", "second", 3, 3),
        (2, "ada", "second", 1, 4),
        (3, "ada", "first", None, None),
        (3, "ben", "tie", None, 2),
        (4, "ada", "skip", 5, 5),
    ]:
        store.rate(item, rater, Choice(choice), quality_first=first, quality_second=second)
    return store


def test_the_table_by_hand(rated):
    table = human_table(rated)
    assert (table.items, table.unrated, table.skipped) == (3, 2, 1)
    assert (table.win, table.tie, table.loss) == (1 / 3, 1 / 3, 1 / 3)
    assert table.quality_first == (4 + 1) / 2
    assert table.quality_second == (3 + 4 + 2) / 3
    assert (table.ratings, table.raters) == (6, 3)
    labels = [(0, 1, "f"), (1, 1, "f"), (2, 1, "s"), (0, 3, "f"), (1, 3, "t")]
    assert math.isclose(table.alpha, by_enumeration(labels, "nominal"))
    qualities = [(0, 1, 5), (1, 1, 4), (2, 1, 3), (0, 2, 3), (2, 2, 3)]
    assert math.isclose(table.alpha_quality, by_enumeration(qualities, "interval"))


def test_the_table_of_pairs_is_in_their_order_and_of_them_only(rated):
    def message(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    table = human_table(
        rated,
        [
            ("p1", message("two 1"), message("one 1")),
            ("p2", "one 2", "two 2"),
            ("p4", "one 4", "two 4"),
            ("unknown", "a", "b"),
        ],
    )
    assert (table.items, table.unrated, table.skipped) == (2, 2, 1)
    assert (table.win, table.tie, table.loss) == (0.0, 0.0, 1.0)
    assert (table.quality_first, table.quality_second) == ((3 + 1) / 2, (4 + 4) / 2)
    assert (table.ratings, table.raters) == (4, 3)


def test_alpha_is_of_the_labels_as_the_pairs_are_turned(rated):
    """Item 1 turned: its labels are s, s, f, so that the pool is f, f, s, s and t."""
    table = human_table(rated, [("p1", "two 1", "one 1"), ("p3", "one 3", "two 3")])
    labels = [(0, 1, "s"), (1, 1, "s"), (2, 1, "f"), (0, 3, "f"), (1, 3, "t")]
    assert math.isclose(table.alpha, by_enumeration(labels, "nominal"))
    assert table.alpha != human_table(rated).alpha


def test_the_table_of_an_empty_store(tmp_path):
    empty = human_table(Store(tmp_path / "s.sqlite"))
    assert empty == HumanTable(0, None, None, None, None, None, 0, 0, 0, 0, None, None)
