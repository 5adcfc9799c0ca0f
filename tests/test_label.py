"""``freshpairs label``: any judge over a file, without a run."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from judges.errors import UserError
from pipeline.cli import app
from pipeline.judge_config import read_judge
from pipeline.label import label, summary
from tests.judge_helpers import served_model

VADER = SentimentIntensityAnalyzer()


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labelled(folder: Path, path: Path, judge: str, *overrides: str) -> list[dict[str, Any]]:
    out = folder / "out.parquet"
    label(path, read_judge(judge, overrides), out)
    return list(pq.read_table(out).to_pylist())


TEXTS = ("I love it", "I hate it", "It is a table")


def test_completions_get_scores_and_keep_their_columns(tmp_path):
    rows = [{"prompt": "p", "completion": text, "id": i} for i, text in enumerate(TEXTS)]
    found = labelled(tmp_path, write(tmp_path / "in.jsonl", *rows), "sentiment")
    assert [row["score"] for row in found] == [VADER.polarity_scores(t)["compound"] for t in TEXTS]
    assert [row["outcome"] for row in found] == ["valid"] * 3
    assert [{k: row[k] for k in ("prompt", "completion", "id")} for row in found] == rows


@pytest.mark.parametrize("sides", [("chosen", "rejected"), ("first", "second")])
def test_pairs_get_verdicts(tmp_path, sides):
    pairs = [(0, 1), (1, 0), (2, 2)]
    rows = [
        {"prompt": [{"role": "user", "content": "p"}], sides[0]: TEXTS[i], sides[1]: TEXTS[j]}
        for i, j in pairs
    ]
    path = write(tmp_path / "in.jsonl", *rows)
    found = labelled(tmp_path, path, "sentiment")
    assert [row["first_better"] for row in found] == [1.0, 0.0, 0.5]
    assert [row["outcome"] for row in found] == ["preference", "preference", "tie"]
    scores = [VADER.polarity_scores(text)["compound"] for text in TEXTS]
    assert [row[f"score_{sides[0]}"] for row in found] == [scores[i] for i, _ in pairs]
    soft = labelled(tmp_path, path, "sentiment", "judge.link=bradley_terry")
    expected = 1 / (1 + math.exp(scores[1] - scores[0]))
    assert soft[0]["first_better"] == pytest.approx(expected)


def test_both_sides_are_scored_in_one_call(tmp_path):
    # Standardised side by side, a gap between the sides would be gone.
    path = write(
        tmp_path / "in.jsonl",
        *({"prompt": "p", "chosen": "x" * (9 + i), "rejected": "x" * i} for i in range(3)),
    )
    (tmp_path / "mine.py").write_text(
        "def centred(completions):\n"
        "    lengths = [len(c) for c in completions]\n"
        "    return [n - sum(lengths) / len(lengths) for n in lengths]\n"
    )
    found = labelled(tmp_path, path, f"{tmp_path}/mine.py:centred")
    assert [row["first_better"] for row in found] == [1.0] * 3


def test_what_a_judge_does_not_say_is_told(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from judges.interface import Score\n"
        "def compare(prompts, first, second):\n"
        "    return [0.9, None, Score(None, 'skipped', declined=True), 7.0]\n"
    )
    rows = [{"prompt": "p", "first": "a", "second": "b"}] * 4
    path = write(tmp_path / "in.jsonl", *rows)
    found = labelled(tmp_path, path, f"{tmp_path}/mine.py:compare")
    assert [row["outcome"] for row in found] == ["preference", "invalid", "declined", "invalid"]
    assert [row["first_better"] for row in found] == [0.9, None, None, None]
    reasons = [row["reason"] for row in found]
    assert reasons[1:] == ["returned None", "skipped", "returned 7.0: a probability lies in [0, 1]"]


def test_what_was_paid_for_is_kept(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(5)]
    path = write(tmp_path / "in.jsonl", *rows)
    with served_model() as url:
        overrides = [f"judge.client={{kind: openai, model: m, base_url: '{url}'}}"]
        options = read_judge("llm_pairwise", overrides)
        first = label(path, options, tmp_path / "out.parquet")
    again = label(path, options, tmp_path / "out.parquet")  # nobody answers any more
    assert again.table.equals(first.table)
    assert (first.counts["calls"], first.counts["tokens"]) == (10, 110)
    assert (again.counts["calls"], again.counts["cached"]) == (0, 5)
    assert set(first.table.column("outcome").to_pylist()) <= {"preference", "tie"}
    assert summary(first).row_count > 4


def test_a_budget_ends_it_and_a_larger_one_goes_on(tmp_path):
    rows = [{"prompt": "p", "completion": f"text {i}"} for i in range(300)]
    path = write(tmp_path / "in.jsonl", *rows)
    command = ["label", str(path), "--judge", "sentiment", "--out", str(tmp_path / "o.parquet")]
    from judges.budget import BudgetSpent

    stopped = CliRunner().invoke(app, [*command, "judge.budget.labels=260"])
    assert isinstance(stopped.exception, BudgetSpent)
    assert not (tmp_path / "o.parquet").exists()
    done = CliRunner().invoke(app, [*command, "judge.budget.labels=300"])
    assert done.exit_code == 0, done.output
    assert pq.read_table(tmp_path / "o.parquet").num_rows == 300


@pytest.mark.parametrize(
    ("row", "judge", "said"),
    [
        ({"completion": "c"}, "sentiment", "the prompt is null"),
        ({"prompt": "p", "completon": "c"}, "sentiment", "row 1: completion (did you mean"),
        (
            {"prompt": "p", "completion": None},
            "sentiment",
            "row 1: completion: the completion is null",
        ),
        ({"prompt": "p", "completion": ["c"]}, "sentiment", "the completion is a list of strings"),
        (
            {"prompt": "p", "chosen": [], "rejected": "r"},
            "sentiment",
            "the chosen is an empty list",
        ),
        ({"prompt": "p", "first": "f", "second": 3}, "sentiment", "the second is of type int"),
        ({"prompt": "p", "completion": "c"}, "llm_pairwise", "judge.client: llm_pairwise asks"),
        ({"prompt": "p", "completion": "c"}, "vote", "judge.args: vote needs members"),
        ({"prompt": "p", "completion": "c"}, "implicit_reward", "there is no policy in training"),
    ],
)
def test_mistakes_are_one_line(tmp_path, row, judge, said):
    path = write(tmp_path / "in.jsonl", row)
    with pytest.raises(UserError, match=r"^[^\n]*$") as mistake:
        label(path, read_judge(judge), tmp_path / "out.parquet")
    assert said in str(mistake.value)


def test_a_judge_that_compares_needs_pairs(tmp_path):
    path = write(tmp_path / "in.jsonl", {"prompt": "p", "completion": "c"})
    options = read_judge("vote", ["judge.args={members: [sentiment, polarity]}"])
    with pytest.raises(UserError, match="vote compares, and these rows have one completion each"):
        label(path, options, tmp_path / "out.parquet")


READS = "def told(prompts, completions):\n    return [Score(None, repr(c)) for c in completions]\n"


def told(folder: Path, *rows: dict[str, Any]) -> list[str]:
    """Each completion as the judge was given it."""
    (folder / "mine.py").write_text("from judges.interface import Score\n" + READS)
    path = write(folder / "in.jsonl", *rows)
    return [row["reason"] for row in labelled(folder, path, f"{folder}/mine.py:told")]


def test_a_chats_completion_is_one_message_of_the_assistant(tmp_path):
    chat = [{"role": "user", "content": "p"}]
    answer = [{"role": "assistant", "content": "c"}]
    rows = [{"prompt": chat, "completion": "c"}, {"prompt": chat, "completion": ""}]
    assert told(tmp_path, *rows) == [repr(answer), repr([{"role": "assistant", "content": ""}])]
    assert told(tmp_path, {"prompt": chat, "completion": answer}) == [repr(answer)]
    assert told(tmp_path, {"prompt": "p", "completion": ""}) == ["''"]


def test_the_summary_tells_why_a_row_is_invalid(tmp_path):
    from io import StringIO

    from rich.console import Console

    (tmp_path / "mine.py").write_text(
        "from judges.interface import Score\n"
        "def fn(completions):\n"
        "    return [Score(None, '[b]no\\nway ' + c) if c else 1.0 for c in completions]\n"
    )
    rows = [{"prompt": "p", "completion": text} for text in ("", "x" * 200)]
    path = write(tmp_path / "in.jsonl", *rows)
    judge = read_judge(f"{tmp_path}/mine.py:fn")
    console = Console(file=StringIO(), width=200)
    console.print(summary(label(path, judge, tmp_path / "out.parquet")))
    assert f"for example  [b]no way {'x' * 89}…" in console.file.getvalue()


@pytest.mark.parametrize(
    ("values", "out", "said"),
    [
        ((1, "one"), "out.parquet", "in.jsonl: the column 'extra' cannot be written as Parquet"),
        ((10**30, 1), "out.parquet", "the column 'extra'"),
        (("\ud800", "a"), "out.parquet", "the column 'extra'"),
        (({}, {}), "out.parquet", "the column 'extra'"),
        ((1, 2), "folder.parquet", "is a directory: name a file"),
        ((1, 2), "in.jsonl/out.parquet", "out.parquet: cannot be written (File exists)"),
    ],
)
def test_what_cannot_be_written_is_told_before_anything_is_asked(tmp_path, values, out, said):
    (tmp_path / "folder.parquet").mkdir()
    asked = tmp_path / "asked"
    (tmp_path / "mine.py").write_text(
        f"def fn(completions):\n    open({str(asked)!r}, 'w')\n    return [1.0, 1.0]\n"
    )
    rows = [{"prompt": "p", "completion": "c", "extra": value} for value in values]
    path = write(tmp_path / "in.jsonl", *rows)
    with pytest.raises(UserError, match=r"^[^\n]*$") as mistake:
        label(path, read_judge(f"{tmp_path}/mine.py:fn"), tmp_path / out)
    assert said in str(mistake.value)
    assert not asked.exists()


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_json_that_is_nested_too_deep_is_a_mistake(tmp_path, suffix):
    path = tmp_path / f"in.{suffix}"
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"broken JSON \(nested too deep\)"):
        label(path, read_judge("sentiment"), tmp_path / "out.parquet")


@pytest.fixture
def interruptible():
    """SIGINT interrupts, as in a terminal: what is started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "stopped: no answer was kept; run this again"),
        (["judge.budget.labels=900"], "what was answered and cached is kept in {}/out.judge; run"),
    ],
)
def test_ctrl_c_exits_3_and_tells_what_is_kept(tmp_path, interruptible, overrides, said):
    (tmp_path / "mine.py").write_text(
        "import signal\n"
        "def fn(completions):\n"
        "    if '299' in completions:\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    return [1.0] * len(completions)\n"
    )
    rows = [{"prompt": "p", "completion": str(i)} for i in range(600)]
    path = write(tmp_path / "in.jsonl", *rows)
    command = ["label", str(path), "--judge", f"{tmp_path}/mine.py:fn", *overrides]
    stopped = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "new" / "out.parquet")])
    assert stopped.exit_code == 3, stopped.output
    assert said.format(tmp_path / "new") in " ".join(stopped.output.split())


def test_without_out_labels_lie_beside_the_file(tmp_path):
    rows = [{"prompt": "p", "first": "same", "second": "same"}]
    path = write(tmp_path / "pairs.jsonl", *rows)
    done = CliRunner().invoke(app, ["label", str(path), "--judge", "human"])
    assert done.exit_code == 0, done.output
    assert pq.read_table(tmp_path / "pairs.labels.parquet").num_rows == 1


def test_a_judge_may_be_that_of_a_config(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def fn(completions, k=1):\n    return [k] * len(completions)\n"
    )
    (tmp_path / "c.yaml").write_text('judge: {name: "mine.py:fn", args: {k: 2}}\nrun: {name: x}\n')
    path = write(tmp_path / "in.jsonl", {"prompt": "p", "completion": "c"})
    assert labelled(tmp_path, path, str(tmp_path / "c.yaml"))[0]["score"] == 2.0
    found = labelled(tmp_path, path, str(tmp_path / "c.yaml"), "judge.args.k=3")
    assert found[0]["score"] == 3.0
