"""Comparisons by hand and against closed forms, and what a person gets to read."""

import math
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from judges.interface import Score
from pipeline.comparison import compare_probabilities, compare_scores, mean_interval
from pipeline.evaluate import invalid_reason
from pipeline.report import Sample, figure, final_table, visible
from workers.messages import Prompt
from workers.verdicts import scored

NAN = math.nan


def wilson(wins: int, n: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927)."""
    z, p = 1.959964, wins / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return centre - half, centre + half


def test_scores_are_compared_prompt_by_prompt() -> None:
    comparison = compare_scores([3, 1, 2, 5, NAN, 4], [1, 2, 2, 1, 1, NAN], seed=0)
    counts = (comparison.win, comparison.tie, comparison.loss, comparison.invalid)
    assert counts == (2, 1, 1, 2)
    assert comparison.win_rate == 2.5 / 4
    assert comparison.quality == (3 + 1 + 2 + 5) / 4
    assert comparison.quality_baseline == (1 + 2 + 2 + 1) / 4


def test_probabilities_are_compared_by_outcome() -> None:
    comparison = compare_probabilities([0.9, 0.6, 0.5, 0.1, NAN], seed=0)
    counts = (comparison.win, comparison.tie, comparison.loss, comparison.invalid)
    assert counts == (2, 1, 1, 1)
    assert comparison.win_rate == 2.5 / 4
    assert comparison.quality == pytest.approx(2.1 / 4)
    assert comparison.quality_baseline == pytest.approx(1.9 / 4)


@pytest.mark.parametrize("wins", [100, 120, 170])
def test_win_rate_interval_agrees_with_wilson_for_200_flips(wins: int) -> None:
    comparison = compare_scores([1.0] * wins + [0.0] * (200 - wins), [0.5] * 200, seed=3)
    assert comparison.win_rate == wins / 200
    assert comparison.win_rate_ci == pytest.approx(wilson(wins, 200), abs=0.012)


def test_quality_interval_agrees_with_the_normal_one() -> None:
    # 0, 1, …, 99: mean 49.5, standard error sqrt((100² − 1) / 12 / 100).
    error = 1.959964 * math.sqrt((100**2 - 1) / 12 / 100)
    comparison = compare_scores(list(map(float, range(100))), [0.0] * 100, seed=1)
    assert comparison.quality_ci == pytest.approx((49.5 - error, 49.5 + error), abs=0.3)


def test_both_sides_are_drawn_together() -> None:
    baseline = np.random.default_rng(0).normal(size=50)
    comparison = compare_scores(list(baseline + 2.0), list(baseline), seed=5)
    assert comparison.quality_ci is not None
    assert comparison.quality_baseline_ci is not None
    shift = np.subtract(comparison.quality_ci, comparison.quality_baseline_ci)
    assert shift == pytest.approx([2.0, 2.0])


def test_intervals_are_derived_from_the_seed() -> None:
    values = np.random.default_rng(0).normal(size=20)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)


@pytest.mark.parametrize(("score", "rate"), [(2.0, 1.0), (1.0, 0.5), (0.0, 0.0)])
@pytest.mark.parametrize("prompts", [1, 7])
def test_all_equal_outcomes_have_an_interval_of_no_width(
    score: float, rate: float, prompts: int
) -> None:
    comparison = compare_scores([score] * prompts, [1.0] * prompts, seed=0)
    assert comparison.win_rate == rate
    assert comparison.win_rate_ci == (rate, rate)
    assert comparison.quality_ci == (score, score)


def test_no_valid_verdict_is_no_rate() -> None:
    for comparison in (
        compare_scores([NAN, 1.0], [1.0, NAN], seed=0),
        compare_probabilities([NAN, NAN], seed=0),
    ):
        assert comparison.invalid == 2
        assert comparison.win_rate is None
        assert comparison.win_rate_ci is None
        assert comparison.quality is None
        assert comparison.quality_ci is None


def test_a_score_for_every_prompt_on_either_side() -> None:
    with pytest.raises(ValueError, match="2 scores against 1"):
        compare_scores([1.0, 2.0], [1.0], seed=0)


def an_evaluation(**values: Any) -> dict[str, Any]:
    return {
        "judge": "sentiment",
        "win": 61,
        "tie": 3,
        "loss": 36,
        "win_rate": 0.6251,
        "win_rate_ci": [0.55, 0.67],
        "quality": 0.4512,
        "quality_baseline": 0.289,
        "kl_to_reference": 3.21,
    } | values


def rendered(
    evaluations: list[dict[str, Any]],
    samples: list[Sample] | None = None,
    run_dir: Path = Path("runs/quickstart"),
    width: int = 80,
) -> str:
    file = StringIO()
    table = final_table(evaluations, samples or [], run_dir)
    Console(file=file, width=width).print(table, crop=False)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def the_line(text: str, words: str) -> str:
    (line,) = (line for line in text.splitlines() if words in line)
    return " ".join(line.split())


def test_table_of_judges() -> None:
    text = rendered(
        [
            an_evaluation(win_rate=0.1),
            an_evaluation(quality_ci=[0.43, 0.473]),
            an_evaluation(judge="polarity", win_rate=None, win_rate_ci=None, quality=None),
        ]
    )
    assert (
        the_line(text, "sentiment") == "sentiment 0.29 0.45 [0.43, 0.47] 61/3/36 0.63 [0.55, 0.67]"
    )
    assert the_line(text, "polarity") == "polarity 0.29 - 61/3/36 -"
    assert the_line(text, "judge") == "judge start now [95 % CI] win/tie/loss win rate [95 % CI]"
    assert "KL to reference  3.21 nats a sequence" in text
    assert "left out" not in text
    assert "Length" not in text


def test_lines_below_the_table_show_what_was_measured() -> None:
    more = {
        "invalid": 2,
        "length_mean": 41.26,
        "length_mean_baseline": 38.2,
        "repetition_rate": 0.051,
        "repetition_rate_baseline": 0.02,
        "kl_to_reference": None,
    }
    text = rendered([an_evaluation(**more)])
    assert "sentiment: 2 prompts left out: no valid verdict" in text
    assert the_line(text, "Length") == "Length 38.2 → 41.3 tokens"
    assert the_line(text, "Repetition").startswith("Repetition 2.0% → 5.1%")
    assert "KL" not in text


def test_a_judge_that_failed_on_every_prompt_tells_why() -> None:
    none = dict.fromkeys(("win_rate", "win_rate_ci", "quality", "quality_baseline"))
    failed = none | {"win": 0, "tie": 0, "loss": 0, "invalid": 9, "invalid_reason": "[b]no\nkey"}
    text = " ".join(rendered([an_evaluation(**failed)]).split())
    assert "9 prompts left out: no valid verdict, for example: [b]no key" in text


def test_the_reason_of_a_failure_goes_before_that_of_a_declined_one() -> None:
    nothing = Score(None, "not labelled yet", declined=True)
    prompt = Prompt(0, "p", np.zeros(1, np.int64), {})
    declined = scored(prompt, [nothing, Score(1.0)])
    failed = scored(prompt, [Score(0.0), Score(None, "no key")])
    valid = scored(prompt, [Score(0.0, "fine"), Score(1.0)])
    assert invalid_reason([valid, declined, failed]) == {"invalid_reason": "no key"}
    assert invalid_reason([valid, declined]) == {"invalid_reason": "not labelled yet"}
    assert invalid_reason([valid]) == {}


def test_colour_only_where_the_interval_leaves_out_one_half() -> None:
    def coloured(low: float, high: float) -> str:
        console = Console(file=StringIO(), force_terminal=True, color_system="standard", width=80)
        with console.capture() as capture:
            console.print(final_table([an_evaluation(win_rate_ci=[low, high])], [], Path("r")))
        return capture.get()

    green, red = "\x1b[1;32m0.63", "\x1b[1;31m0.63"
    assert green in coloured(0.51, 0.7)
    assert red in coloured(0.3, 0.49)
    assert green not in coloured(0.5, 0.7)
    assert red not in coloured(0.3, 0.5)


def test_what_a_model_writes_is_text_never_markup_or_control() -> None:
    sample = Sample(
        prompt="[bold]Once[/bold] :smile:",
        before="[/] \x1b[2Jgone \x9b1m \ud800 \a",
        after="two\nlines, [link=http://x]y[/link]",
    )
    text = rendered([an_evaluation(judge="[red]a[/red]")], [sample])
    assert "[bold]Once[/bold] :smile:" in text
    assert r"[/] \x1b[2Jgone \x9b1m \ud800 \x07" in text
    assert "  two\n  lines, [link=http://x]y[/link]" in text
    assert "[red]a[/red]" in text
    assert not {"\x1b", "\x9b", "\ud800", "\a"} & set(text)


def test_visible_keeps_newlines_tabs_and_letters() -> None:
    assert visible("a\tb\né 漢 👩‍🚀\r") == "a\tb\né 漢 👩‍🚀\\r"


def test_a_long_sample_is_wrapped_and_shortened() -> None:
    text = rendered([], [Sample("Once", "word " * 400, "end")])
    assert text.count("word") == 600 // 5
    assert "…" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_no_line_is_wider_than_80_columns() -> None:
    wide = an_evaluation(
        judge="a_path/to/my_own_judge.py:score",
        quality=-123.4,
        quality_ci=[-131.2, -122.1],
        quality_baseline=-14222.0,
        win=10000,
        tie=1000,
        loss=10000,
    )
    text = rendered([wide])
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "[-131, -122]" in text
    assert "10000/1000/10000" in text
    assert "0.63 [0.55, 0.67]" in text


def test_paths_and_commands_can_be_copied() -> None:
    run_dir = Path("/a long directory/" + "x" * 80)
    lines = rendered([], run_dir=run_dir).splitlines()
    assert f"  metrics  {run_dir}/metrics.jsonl" in lines
    assert f"  ledger   {run_dir}/ledger" in lines
    assert f"  policy   {run_dir}/policy" in lines
    assert f"  tensorboard --logdir '{run_dir}/tensorboard'" in lines
    assert f"  freshpairs evaluate '{run_dir}'" in lines
    assert f"  freshpairs export '{run_dir}' --out pairs.parquet" in lines
    assert "No held-out evaluation" in lines[0]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (0.0, "0.00"),
        (-3.5e-07, "0.00"),
        (0.4512, "0.45"),
        (-0.00312, "-0.0031"),
        (12.345, "12.3"),
        (-123.4, "-123"),
        (9999.0, "9999"),
        (12345.0, "12.3k"),
        (999_600.0, "1M"),
        (-2.5e8, "-250M"),
        (1e13, "1.0e+13"),
    ],
)
def test_figures_have_about_three_digits(value: float | None, shown: str) -> None:
    assert figure(value) == shown
    assert len(shown) <= 7
