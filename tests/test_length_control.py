"""What longer completions gain by their length alone is taken off, and nothing else."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from judges.asking import Asker, Question
from judges.errors import UserError
from judges.interface import Score, Text
from judges.length_control import fitted_slope
from judges.options import JudgeOptions
from tests.judge_helpers import desk

Row = tuple[Text, int, Any]
"""A prompt, a completion's length in characters, and what the inner judge says of it."""


def quality(completions, quality):
    return quality


def built(**args: Any) -> Asker:
    judge = {"name": "tests.test_length_control:quality"}
    return desk().asker(JudgeOptions(name="length_control", args={"judge": judge, **args}))


def controlled(rows: Sequence[Row], asker: Asker | None = None, **args: Any) -> list[Score]:
    questions = [
        Question(prompt, ("x" * length,), {"quality": said}) for prompt, length, said in rows
    ]
    return asyncio.run((asker or built(**args)).ask(questions))


def values_of(scores: Sequence[Score]) -> list[float | None]:
    return [score.value for score in scores]


def test_a_given_slope_by_hand():
    # The mean length is 20: 10 characters less gain 0.5, 10 more lose it; equals tie exactly.
    scores = controlled([("p", 10, 1.0), ("p", 30, 2.0), ("q", 20, 0.25)], slope=0.05)
    assert scores == [
        Score(1.5, "1 less 0.05 a character (10, mean 20.0)"),
        Score(1.5, "2 less 0.05 a character (30, mean 20.0)"),
        Score(0.25, "0.25 less 0.05 a character (20, mean 20.0)"),
    ]
    told = controlled([("p", 3, Score(1.0, "kind"))], slope=1)
    assert told == [Score(1.0, "1 less 1 a character (3, mean 3.0); kind")]
    assert values_of(controlled([("p", 10, 1.0), ("p", 30, 2.0)], slope=-0.05)) == [0.5, 2.5]
    assert controlled([("p", 10, 0.1), ("p", 30, 0.3)], slope=0) == [Score(0.1), Score(0.3)]


slopes = st.floats(-2, 2).filter(lambda slope: abs(slope) > 1e-3)
seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=30, deadline=None)
@given(slope=slopes, seed=seeds)
def test_an_additive_effect_of_length_is_removed_exactly(slope, seed):
    """With qualities that do not go with length within a prompt, what is left is the qualities."""
    draws = np.random.default_rng(seed)
    rows, qualities = [], []
    for prompt in range(6):
        level = float(draws.normal(0, 5)) + prompt  # prompts differ in quality and in length
        short, long = sorted(draws.integers(1, 300, 2) + 100 * prompt)
        for length in (short, long):
            for sign in (-1, 1):
                quality = level + sign * (prompt + 1)
                qualities.append(quality)
                rows.append((f"p{prompt}", int(length), quality + slope * int(length)))
    if len({(prompt, length) for prompt, length, _ in rows}) == 6:
        return  # no prompt has completions of two lengths
    scores = np.array(values_of(controlled(rows)))
    raw = np.array([score for *_, score in rows])
    assert scores.mean() == pytest.approx(raw.mean(), abs=1e-9)
    np.testing.assert_allclose(scores - scores.mean(), qualities - np.mean(qualities), atol=1e-9)


def test_a_judge_of_length_alone_prefers_nothing():
    rows = [(f"p{at % 5}", length, 0.1 * length) for at, length in enumerate(range(3, 33))]
    scores = controlled(rows)
    assert set(values_of(scores)) == {scores[0].value}
    assert scores[0].value == pytest.approx(0.1 * 17.5, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_the_slope_is_that_of_a_regression_with_a_level_for_each_prompt(seed):
    draws = np.random.default_rng(seed)
    prompts = draws.integers(0, 4, 40)
    lengths = draws.integers(0, 500, 40)
    scores = draws.normal(size=40) + 0.3 * lengths
    levels = (prompts[:, None] == np.arange(4)).astype(float)
    expected = np.linalg.lstsq(np.column_stack([lengths, levels]), scores, rcond=None)[0][0]
    rows = [(str(p), int(n), float(s)) for p, n, s in zip(prompts, lengths, scores, strict=True)]
    assert fitted_slope(rows) == pytest.approx(expected, abs=1e-9)


def test_what_prompts_differ_in_does_not_count():
    # Between prompts the longer ones score far lower; within each, 0.01 a character.
    rows = [
        (f"p{prompt}", 100 * prompt + extra, -5.0 * prompt + 0.01 * extra)
        for prompt in range(5)
        for extra in (0, 10, 20)
    ]
    lengths, raw = (np.array([row[at] for row in rows]) for at in (1, 2))
    assert np.polyfit(lengths, raw, 1)[0] < -0.04
    assert fitted_slope(rows) == pytest.approx(0.01, abs=1e-12)
    scores = np.array(values_of(controlled(rows))).reshape(5, 3)
    assert (scores == scores[:, :1]).all()


def test_equal_prompts_are_one_prompt_wherever_they_stand_in_text_and_chat():
    chat = [{"role": "user", "content": "p"}]
    for prompt, other in (("p", "q"), (chat, [{"role": "user", "content": "q"}])):
        rows = [(prompt, 10 * at, 1.0 * at) for at in range(5)]
        rows += [(other, 10 * at, 100 + 1.0 * at) for at in range(5)]
        mixed = [rows[at] for at in (0, 5, 1, 6, 2, 7, 3, 8, 4, 9)]
        scores = values_of(controlled(mixed))
        assert scores[::2] == pytest.approx([2.0] * 5, abs=1e-9)
        assert scores[1::2] == pytest.approx([102.0] * 5, abs=1e-9)


def test_a_message_is_as_long_as_its_text():
    completions = [[{"role": "assistant", "content": "x" * n}] for n in (10, 30)]
    questions = [
        Question([], (completion,), {"quality": 1.0 + at})
        for at, completion in enumerate(completions)
    ]
    assert values_of(asyncio.run(built(slope=0.05).ask(questions))) == [1.5, 1.5]


@pytest.mark.parametrize("slope", ["fitted", 0.1])
def test_what_has_no_score_stays_without_and_does_not_count(slope):
    declined = Score(None, "skipped", declined=True)
    rows: list[Row] = [("p", n, 0.1 * n) for n in range(0, 100, 10)]
    plain = controlled(rows, slope=slope)
    more = controlled([("p", 999, None), *rows, ("p", 5000, declined)], slope=slope)
    assert more == [Score(None, "returned None"), *plain, declined]
    assert controlled([("p", 9, math.nan)], slope=slope) == [Score(None, "returned NaN")]


def test_too_few_comparisons_leave_the_scores_and_say_so():
    # Each prompt of two gives one comparison, one of three gives two; one alone gives none.
    pairs: list[Row] = [(f"p{at}", n, 1.0 * n) for at in range(7) for n in (at, at + 9)]
    alone: list[Row] = [("q", 50, Score(3.0, "fine"))]
    reason = "length not controlled: fewer than 8 comparisons within prompts"
    scores = controlled([*pairs, *alone])
    assert scores[:2] == [Score(0.0, reason), Score(9.0, reason)]
    assert scores[-1] == Score(3.0, f"{reason}; fine")
    eighth = [*pairs, ("q", 50, 3.0), ("q", 59, 12.0)]
    # The slope is 1, and the mean of 0, 9, 1, 10 … 6, 15, 50, 59 is 13.375.
    assert values_of(controlled(eighth))[:2] == [13.375, 13.375]
    assert fitted_slope([*pairs, ("p0", 20, 20.0)]) == pytest.approx(1.0, abs=1e-12)


def test_completions_of_one_length_are_left_as_they_are():
    rows: list[Row] = [("p", 20, float(at)) for at in range(10)]
    assert controlled(rows) == [Score(float(at)) for at in range(10)]


def test_every_call_is_fitted_by_itself():
    asker = built()
    rows: list[Row] = [("p", n, 0.1 * n) for n in range(10)]
    once = controlled(rows, asker)
    controlled([("p", n, 7.0 * n) for n in range(10)], asker)
    assert controlled(rows, asker) == once


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ({"slope": "fited"}, "judge.args.slope=fited: write fitted, or points of score"),
        ({"slope": math.inf}, "judge.args.slope=inf: write fitted"),
        ({"slope": True}, "judge.args.slope=True: write fitted"),
        ({"slope": None}, "judge.args.slope=None: write fitted"),
        ({"judge": {"name": "sentiment", "weight": 1}}, "judge.args.judge.weight: unknown key"),
        ({"judge": ["sentiment"]}, "judge.args.judge=['sentiment']: must be a judge's name"),
        ({"judge": "sentimant"}, "judge.args.judge.name=sentimant: no such judge"),
    ],
)
def test_mistakes_say_where_they_are(args, line):
    with pytest.raises(UserError) as caught:
        built(**args)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
