"""Runs side by side: numbers of hand-made records, what differs, seeds together, the picture."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from judges.errors import UserError
from pipeline.compare import compare, read_run, run_directories, side_by_side
from pipeline.compare_figure import mean_curve, panels, quality
from pipeline.config import parse_config
from pipeline.config_difference import differences, flat, short_keys, value_text
from pipeline.run_directory import create_run_directory


def a_run(
    folder: Path,
    name: str,
    records: list[dict[str, Any]],
    finished: bool = True,
    **sections: Mapping[str, Any],
) -> Path:
    """A run directory with a config of these sections and these records."""
    run = {"name": name, "dir": str(folder / name), "updates": 4, **sections.pop("run", {})}
    cfg = parse_config({"prompts": {"path": "p"}, "run": run, **sections}, folder)
    create_run_directory(cfg, {})
    lines = [json.dumps({"schema": 1} | record) + "\n" for record in records]
    (cfg.run_dir / "metrics.jsonl").write_text("".join(lines))
    if finished:
        (cfg.run_dir / "policy").mkdir()
    return cfg.run_dir


def update(at: int, **more: Any) -> dict[str, Any]:
    return {"kind": "update", "update": at, "lag_mean": 0.0, "pairs": 2, "tokens": 10, **more}


def round_(version: int, **more: Any) -> dict[str, Any]:
    return {
        "kind": "round",
        "version": version,
        "prompts": 4,
        "completions": 8,
        "judging": {"calls": 3, "cached": 0, "usd": 0.5},
        "seconds": {"generate": 1.5, "learn": 2.0},
        **more,
    }


def evaluation(at: int, judge: str, value: float, **more: Any) -> dict[str, Any]:
    return {
        "kind": "evaluation",
        "update": at,
        "judge": judge,
        "quality": value,
        "quality_baseline": 0.25,
        "win_rate": 0.75,
        "win_rate_ci": [0.5, 0.875],
        "kl_to_reference": 3.0,
        **more,
    }


RECORDS = [
    update(1, pairs=1, lag_mean=0.0),
    update(2, pairs=3, lag_mean=1.0),
    evaluation(2, "kind", 0.5),
    round_(0, kl_to_reference=0.0, off_reference_share=0.125),
    update(3, pairs=0, lag_mean=None),
    update(4, pairs=1, lag_mean=2.0),
    evaluation(4, "kind", 0.75, kl_to_reference=6.0),
    evaluation(4, "curt", 2.0, win_rate=0.5, kl_to_reference=6.0),
    round_(2, kl_to_reference=4.5, off_reference_share=0.25, held_out_nll=1.75),
]


def shown(renderable: Any, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable, crop=False)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def cells(lines: list[str], title: str) -> list[list[str]]:
    """Of every row of that title, what stands in it."""
    return [line[len(title) :].split() for line in lines if line.startswith(f"{title}  ")]


def test_measures_of_a_run_are_those_of_its_records(tmp_path: Path) -> None:
    measures = read_run(a_run(tmp_path, "one", RECORDS)).measures
    assert measures["updates"] == 4
    assert measures["judge.kind.quality"] == 0.75  # the last of each judge
    assert measures["judge.curt.quality"] == 2.0
    assert measures["judge.curt.win_rate"] == 0.5
    assert measures["held_out.kl_to_reference"] == 6.0
    assert measures["round.kl_to_reference"] == 4.5
    assert measures["round.off_reference_share"] == 0.25
    assert measures["round.held_out_nll"] == 1.75
    assert "round.repetition_rate" not in measures
    totals = {name: measures[f"total.{name}"] for name in ("rounds", "prompts", "completions")}
    assert totals == {"rounds": 2, "prompts": 8, "completions": 16}
    assert measures["total.judge_calls"] == 6
    assert measures["total.judge_usd"] == 1.0
    assert measures["total.pairs"] == 5
    assert measures["total.tokens"] == 40
    assert measures["total.lag"] == (1 * 0.0 + 3 * 1.0 + 1 * 2.0) / 5
    assert measures["total.seconds"] == 7.0


def test_what_rounds_say_of_early_ends_and_alarms_is_counted(tmp_path: Path) -> None:
    ended = {"unused_pairs": 3, "ended_by": "ess is below 0.5"}
    whole = {"unused_pairs": 0, "ended_by": None}
    rounds = [
        round_(0, resampling=ended, alarms=["one", "two"]),
        round_(1, resampling=whole, alarms=[]),
        round_(2, resampling=ended, alarms=["one"]),
    ]
    measures = read_run(a_run(tmp_path, "one", rounds)).measures
    assert measures["total.pairs_unused"] == 6
    assert measures["total.ended_early"] == 2
    assert measures["total.alarms"] == 3


def test_the_table_holds_only_what_differs_and_the_numbers(tmp_path: Path) -> None:
    one = a_run(tmp_path, "one", RECORDS)
    other = a_run(
        tmp_path,
        "other",
        [update(1), evaluation(1, "kind", 0.375, win_rate_ci=None)],
        finished=False,
        resampling={"updates_per_round": float("inf")},
        sampling={"temperature": 0.5},
    )
    lines = shown(compare([one, other]))
    assert max(map(len, lines[2:])) <= 80
    assert lines[0] == f"A  {one}"
    assert lines[1] == f"B  {other}  unfinished: 1 of 4 updates"
    assert cells(lines, "updates_per_round") == [["1", ".inf"]]
    assert cells(lines, "temperature") == [["1.0", "0.5"]]
    assert not cells(lines, "passes")
    assert not cells(lines, "seed")
    assert cells(lines, "updates done") == [["4", "1"]]
    assert cells(lines, "after update") == [["4", "1"]]
    assert cells(lines, "quality") == [["0.75", "0.38"], ["2.00", "-"]]
    assert cells(lines, "win rate") == [["0.75", "0.75"], ["0.50", "-"]]
    assert "[0.50, 0.88]" in lines[1 + lines.index(next(x for x in lines if "win rate" in x))]
    assert cells(lines, "KL, nats a sequence") == [["6.00", "3.00"], ["4.50", "-"]]
    assert cells(lines, "off reference") == [["25.0%", "-"]]
    assert cells(lines, "judge calls") == [["6", "-"]]
    assert cells(lines, "dollars") == [["1.00", "-"]]
    assert not cells(lines, "… from the cache")
    assert cells(lines, "pairs learned from") == [["5", "2"]]
    assert cells(lines, "mean lag of the pairs") == [["1.00", "0.00"]]


def test_runs_that_differ_in_their_seed_are_one_column(tmp_path: Path) -> None:
    low = a_run(tmp_path, "low", [update(1), evaluation(1, "kind", 0.25)], run={"seed": 3})
    far = a_run(tmp_path, "far", [update(1)], resampling={"passes": 2})
    high = a_run(tmp_path, "high", [update(1), evaluation(1, "kind", 0.75)], run={"seed": 5})
    found = side_by_side([read_run(run) for run in (low, far, high)])
    assert [[run.seed for run in group.runs] for group in found.groups] == [[3, 5], [0]]
    assert found.differing == ["resampling.passes"]
    lines = shown(compare([low, far, high]))
    assert [line.split("  ")[0] for line in lines[:3]] == ["A", "", "B"]
    assert cells(lines, "seed") == [["3,", "5", "0"]]
    (at,) = [i for i, line in enumerate(lines) if line.startswith("quality  ")]
    assert lines[at].split() == ["quality", "0.50", "-"]
    assert lines[at + 1].split() == ["0.25…0.75"]
    assert cells(lines, "win rate") == [["0.75", "-"]]
    assert not any("[0.50" in line for line in lines)  # an interval is of a single run


@pytest.mark.parametrize(("width", "tables"), [(120, 1), (80, 2), (40, 5)])
def test_columns_that_do_not_fit_go_below(tmp_path: Path, width: int, tables: int) -> None:
    runs = [
        a_run(tmp_path, f"r{n}", RECORDS, sampling={"max_new_tokens": n + 10}) for n in range(5)
    ]
    lines = shown(compare(runs), width)
    rows = cells(lines, "max_new_tokens")
    assert len(rows) == tables
    assert [cell for row in rows for cell in row] == ["10", "11", "12", "13", "14"]
    assert all(len(line) <= width for line in lines[5:-3])


def test_a_directory_of_runs_stands_for_them_in_the_order_of_their_values(tmp_path: Path) -> None:
    names = ["k=1,seed=0", "k=2,seed=0", "k=2,seed=10", "k=16,seed=0", "k=.inf,seed=0"]
    runs = [a_run(tmp_path / "sweep", name, [update(1)]) for name in reversed(names)]
    found, left_out = run_directories([runs[1], tmp_path / "sweep", runs[1]])
    assert [run.name for run in found] == ["k=16,seed=0", *[n for n in names if "16" not in n]]
    assert left_out == []


def test_runs_of_a_directory_without_metrics_are_left_out_and_told(tmp_path: Path) -> None:
    names = ["k=1", "k=2", "k=4", "k=16"]
    runs = [a_run(tmp_path / "sweep", name, [update(1)]) for name in names]
    for run in runs[2:]:
        (run / "metrics.jsonl").unlink()
    lines = shown(compare([tmp_path / "sweep"], as_json=tmp_path / "found.json"))
    assert lines[0] == f"A  {runs[0]}"
    assert "Left out, without metrics yet: k=4, k=16." in lines
    assert not any(line.startswith("Left out") for line in shown(compare(runs[:2])))
    found = json.loads((tmp_path / "found.json").read_text())
    assert [run["run"] for run in found["runs"]] == [str(run) for run in runs[:2]]
    assert found["left_out"] == [str(run) for run in runs[2:]]
    with pytest.raises(UserError, match=r"k=4: holds no metrics\.jsonl"):
        compare([runs[0], runs[2]])  # which was asked for by name
    for run in runs[:2]:
        (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"sweep: none of its runs has a metrics\.jsonl yet"):
        compare([tmp_path / "sweep"])


def test_json_has_groups_and_runs(tmp_path: Path) -> None:
    low = a_run(tmp_path, "low", [update(1), evaluation(1, "kind", 0.25)], run={"seed": 3})
    high = a_run(tmp_path, "high", [update(1), evaluation(1, "kind", 0.75)], run={"seed": 5})
    inf = {"updates_per_round": float("inf")}
    other = a_run(tmp_path, "other", [], finished=False, resampling=inf)
    compare([low, high, other], as_json=tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["differing"] == ["resampling.updates_per_round"]
    first, second = found["groups"]
    assert first["seeds"] == [3, 5]
    assert first["measures"]["judge.kind.quality"] == {"mean": 0.5, "low": 0.25, "high": 0.75}
    assert second["config"] == {"resampling.updates_per_round": ".inf"}
    assert "judge.kind.quality" not in second["measures"]
    assert [run["group"] for run in found["runs"]] == ["A", "A", "B"]
    assert [run["finished"] for run in found["runs"]] == [True, True, False]
    assert found["runs"][1]["evaluations"]["kind"]["win_rate_ci"] == [0.5, 0.875]


def test_curves_stand_where_the_policy_was(tmp_path: Path) -> None:
    run = read_run(a_run(tmp_path, "one", RECORDS))
    assert quality(run, "kind") == {0: 0.25, 2: 0.5, 4: 0.75}
    found = side_by_side([run])
    kind, curt, kl, off = panels(found)
    assert [kind.title, curt.title] == ["Quality, by kind", "Quality, by curt"]
    assert kl.curves == [[{0: 0.0, 2: 3.0, 4: 6.0}]]  # evaluations go further than rounds
    assert off.curves == [[{0: 0.125, 2: 0.25}]]  # which only rounds have


def test_without_evaluations_curves_are_of_the_rounds(tmp_path: Path) -> None:
    rounds = [
        round_(0, score_mean=1.0, kl_to_reference=0.0),
        round_(0, score_mean=2.0, kl_to_reference=0.5),
        round_(4, score_mean=4.0, kl_to_reference=None),
    ]
    score, kl, off = panels(side_by_side([read_run(a_run(tmp_path, "one", rounds))]))
    assert score.curves == [[{0: 1.5, 4: 4.0}]]
    assert kl.curves == [[{0: 0.25}]]
    assert off.curves == [[{}]]


def test_a_mean_is_taken_where_every_run_has_a_value() -> None:
    assert mean_curve([{0: 1.0, 2: 3.0, 4: 9.0}, {0: 2.0, 4: 1.0}]) == {0: 1.5, 4: 5.0}


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_a_picture_is_drawn_of_whatever_there_is(tmp_path: Path, suffix: str, magic: bytes) -> None:
    runs = [
        a_run(tmp_path, "costs $5 a_b", RECORDS),
        a_run(tmp_path, "again", RECORDS, run={"seed": 1}),
        a_run(tmp_path, "nothing", [], objective={"name": "ipo"}),
    ]
    compare(runs, tmp_path / f"all{suffix}")
    assert (tmp_path / f"all{suffix}").read_bytes().startswith(magic)
    compare(runs[2:], tmp_path / f"empty{suffix}")
    assert (tmp_path / f"empty{suffix}").read_bytes().startswith(magic)


def test_mistakes_are_told_before_anything_is_written(tmp_path: Path) -> None:
    run = a_run(tmp_path, "one", RECORDS)
    free = tmp_path / "free.png"
    (tmp_path / "taken.json").write_text("")
    for out, as_json, said in (
        (tmp_path / "a.gif", None, "ends in none of .png, .svg, .pdf"),
        (tmp_path / "no" / "a.png", None, "no such directory"),
        (free, tmp_path / "taken.json", "exists already"),
    ):
        with pytest.raises(UserError, match=said):
            compare([run], out, as_json)
    with pytest.raises(UserError, match="not a run directory"):
        compare([run, tmp_path / "absent"], free)
    assert not free.exists()


def test_differences_of_configs() -> None:
    one = flat({"run": {"name": "a", "dir": "x"}, "o": {"name": "dpo", "beta": 0.1, "m": {}}})
    other = flat({"run": {"name": "b", "dir": "y"}, "o": {"name": "dpo", "m": {"k": None}}})
    assert one == {"run.name": "a", "run.dir": "x", "o.name": "dpo", "o.beta": 0.1, "o.m": {}}
    assert differences([one, other]) == ["o.beta", "o.m", "o.m.k"]


def test_short_keys_are_those_that_name_one() -> None:
    keys = ["checkpoint.every", "evaluation.every", "run.seed", "a.b.c", "x.b.c", "seed"]
    assert short_keys(keys) == {
        "checkpoint.every": "checkpoint.every",
        "evaluation.every": "evaluation.every",
        "run.seed": "run.seed",
        "a.b.c": "a.b.c",
        "x.b.c": "x.b.c",
        "seed": "seed",
    }
    assert short_keys(["a.b.c", "run.seed"], ["x.y.c"]) == {"a.b.c": "b.c", "run.seed": "seed"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (float("inf"), ".inf"),
        (0.5, "0.5"),
        ("name", "name"),
        ([1.0, None], "[1.0, null]"),
        ({"a": [False]}, "{a: [false]}"),
    ],
)
def test_values_are_told_as_yaml_has_them(value: Any, text: str) -> None:
    assert value_text(value) == text
