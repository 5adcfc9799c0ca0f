"""What a round's verdicts add up to, in numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from judges.interface import Score
from tests.test_judge_worker import completions, prompt
from workers.messages import Fate, Judgement, Pair, PromptGroup
from workers.verdicts import (
    JudgeFailed,
    agreement,
    asked_of,
    compared,
    dispute,
    judging_record,
    refuse_invalid_rounds,
    scored,
)

NAN = float("nan")
LATER = Score(None, "asked later", declined=True)
FAILED = Score(None, "it failed")


def group(judgement: Judgement, *fates: Fate, text: str = "text") -> PromptGroup:
    pairs = tuple(Pair(judgement.position, 0, 1, 1.0, fate) for fate in fates)
    texts = [f"{text} {at}" for at in range(len(judgement.scores))]
    return PromptGroup(prompt(judgement.position), tuple(completions(*texts)), judgement, pairs)


def by_scores(*values: float | Score | None) -> Judgement:
    scores = [value if isinstance(value, Score) else Score(value) for value in values]
    return scored(prompt(0), scores)


def by_comparisons(count: int, **values: float | Score) -> Judgement:
    """``p01`` is P(0 better than 1)."""
    answers = {
        (int(name[1]), int(name[2])): value if isinstance(value, Score) else Score(value)
        for name, value in values.items()
    }
    return compared(prompt(0), count, answers)


def mixed() -> list[PromptGroup]:
    """Two scores and one comparison that hold, one and two that failed, one and one declined."""
    return [
        group(by_scores(0.0, 2.0, FAILED, LATER), Fate.LEARN, Fate.INVALID, Fate.UNJUDGED),
        group(
            by_comparisons(3, p01=0.5, p02=LATER, p12=1.5),
            *(Fate.TIE, Fate.UNJUDGED, Fate.INVALID, Fate.MARGIN, Fate.TRUNCATED),
        ),
    ]


def test_questions_and_what_came_of_them():
    first, second = mixed()
    np.testing.assert_equal(
        list(asked_of(first.judgement)),
        [(0, 0.0, False), (1, 2.0, False), (2, NAN, False), (3, NAN, True)],
    )
    np.testing.assert_equal(
        list(asked_of(second.judgement)), [(0, 0.5, False), (0, NAN, True), (1, NAN, False)]
    )


def test_what_failed_is_told_before_what_was_declined_and_what_held():
    judgement = by_comparisons(4, p01=Score(0.5, "even"), p02=LATER, p03=FAILED, p12=0.25, p13=0.5)
    assert judgement.reasons == (
        "against 3: it failed\nagainst 2: asked later\nagainst 1: even",
        "against 0: even",
        "against 0: asked later",
        "against 0: it failed",
    )
    np.testing.assert_array_equal(judgement.scores, [0.5, (0.5 + 0.25 + 0.5) / 3, 0.75, 0.5])
    assert judgement.declined is not None
    assert np.argwhere(judgement.declined).tolist() == [[0, 2], [2, 0]]


def test_the_record_of_a_round():
    counts = {
        "asked": 7,
        "cached": 3,
        "calls": 4,
        "usd": 0.25,
        "both_orders": 8,
        "flipped": 2,
        "compared_twice": 5,
        "agreed": 4,
    }
    assert judging_record(counts, mixed()) == {
        "valid": 3,
        "invalid": 2,
        "declined": 2,
        "asked": 7,
        "cached": 3,
        "calls": 4,
        "retries": 0,
        "timeouts": 0,
        "tokens": 0,
        "usd": 0.25,
        "tie_rate": 0.25,  # of LEARN, TIE, MARGIN and TRUNCATED
        "flip_rate": 0.25,
        "agreement": 0.8,
    }


def test_shares_of_nothing_are_not_told():
    for groups in ([], [group(by_scores(FAILED, LATER), Fate.INVALID, Fate.UNJUDGED)]):
        record = judging_record({}, groups)
        assert [record[name] for name in ("tie_rate", "flip_rate", "agreement")] == [None] * 3
        assert record["valid"] == record["asked"] == 0


def test_none_of_something_is_a_share():
    counts = {"both_orders": 3, "compared_twice": 2}
    record = judging_record(counts, [group(by_scores(1.0, 2.0), Fate.LEARN)])
    assert [record[name] for name in ("tie_rate", "flip_rate", "agreement")] == [0.0] * 3


def test_what_was_declined_is_no_failure():
    # Of 3 + 2 that were answered or failed, 2 failed.
    refuse_invalid_rounds(mixed(), 0.4, "mine")
    with pytest.raises(JudgeFailed, match=r"2 of the round's 5 scores are INVALID.*'text 2'"):
        refuse_invalid_rounds(mixed(), 0.39, "mine")
    refuse_invalid_rounds([group(by_scores(LATER, LATER))], 0.0, "mine")


def test_the_example_names_what_failed_first():
    judgement = by_comparisons(3, p01=LATER, p02=0.5, p12=Score(2.0))
    with pytest.raises(JudgeFailed) as caught:
        refuse_invalid_rounds([group(judgement)], 0.0, "mine")
    assert str(caught.value) == (
        "judge.name=mine: 1 of the round's 2 comparisons are INVALID, for example 'text 1' "
        "(against 2: returned 2.0: a probability lies in [0, 1] against 0: asked later): "
        "mend the judge, or raise judge.max_invalid_share=0.0"
    )


def test_the_example_is_short_enough_to_read():
    long = Score(None, "why? " * 10_000)
    with pytest.raises(JudgeFailed) as caught:
        refuse_invalid_rounds([group(by_scores(long), text="x" * 10_000)], 0.0, "mine")
    assert len(str(caught.value)) < 1_000


def votes(*of_judges: Sequence[float]) -> float:
    return dispute([by_scores(*scores) for scores in of_judges])


def test_dispute_is_the_mean_variance_of_votes():
    # Pairs 01, 02, 12: +1 +1 +1 against -1 -1 0; variances 1, 1 and 1/4.
    assert votes([3.0, 2.0, 1.0], [1.0, 2.0, 2.0]) == pytest.approx(0.75, abs=1e-15)
    assert votes([3.0, 2.0, 1.0], [30.0, 20.0, 10.0]) == 0.0
    # +1 -1 -1: the variance is 1 - 1/9.
    assert votes([1.0, 0.0], [0.0, 1.0], [2.0, 3.0]) == pytest.approx(8 / 9, abs=1e-15)
    assert votes([1.0, 1.0], [0.0, 0.0]) == 0.0
    compared_ones = [by_comparisons(2, p01=0.9), by_comparisons(2, p01=0.5), by_scores(5.0, 1.0)]
    # +1 0 +1: the mean square is 2/3, the mean 2/3.
    assert dispute(compared_ones) == pytest.approx(2 / 3 - 4 / 9, abs=1e-15)


def test_who_has_no_verdict_has_no_vote():
    assert votes([1.0, 0.0], [NAN, 1.0]) == 0.0
    # On 01 +1 -1 -1, on 02 +1 -1, on 12 +1 0: a failure is no tie.
    disputed = votes([3.0, 2.0, 1.0], [1.0, 2.0, 2.0], [0.0, 1.0, NAN])
    assert disputed == pytest.approx((8 / 9 + 1.0 + 0.25) / 3, abs=1e-15)
    declined = by_comparisons(2, p01=LATER)
    assert dispute([by_scores(1.0, 0.0), declined]) == 0.0
    assert dispute([by_scores(1.0, 0.0), declined, by_scores(0.0, 1.0)]) == 1.0
    assert dispute([declined, declined]) == 0.0


def test_of_nothing_there_is_no_dispute():
    assert dispute([]) == 0.0
    assert votes([1.0], [2.0]) == 0.0
    assert votes([], []) == 0.0


def test_agreement_is_of_pairs_that_both_prefer_a_side_of():
    # 01: both +1; 02: +1 and -1; 12: +1 and a tie.
    mine = [by_scores(3.0, 2.0, 1.0), by_scores(FAILED, 1.0)]
    theirs = [by_comparisons(3, p01=0.6, p02=0.1, p12=0.5), by_scores(0.0, 1.0)]
    assert agreement(mine, theirs) == {"compared_twice": 2, "agreed": 1}
    assert agreement(mine, mine) == {"compared_twice": 3, "agreed": 3}
    assert agreement([by_comparisons(2, p01=LATER)], [by_scores(1.0, 0.0)]) == {
        "compared_twice": 0,
        "agreed": 0,
    }
    assert agreement([], []) == {"compared_twice": 0, "agreed": 0}
