"""metrics.jsonl, and its cut on resume."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from judges.errors import UserError
from pipeline.dashboards import WandbOptions
from pipeline.tracking import ROUND_KEYS, UPDATE_KEYS, Tracker, TrackingOptions, metrics
from tests.record_helpers import FILE_ONLY, a_round, an_evaluation, an_update


def test_lines_say_which_update_and_round_they_belong_to(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, FILE_ONLY)
    tracker.evaluation(an_evaluation())
    for _ in range(2):
        tracker.update(an_update())
        tracker.update(an_update())
        tracker.evaluation(an_evaluation())
        tracker.round(a_round())
    tracker.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["update"], line["round"]) for line in lines] == [
        ("evaluation", 0, 0),
        ("update", 1, 0),
        ("update", 2, 0),
        ("evaluation", 2, 0),
        ("round", 2, 0),
        ("update", 3, 1),
        ("update", 4, 1),
        ("evaluation", 4, 1),
        ("round", 4, 1),
    ]
    assert {line["schema"] for line in lines} == {1}
    assert list(lines[1]) == ["schema", "kind", "update", "round", *UPDATE_KEYS]
    assert list(lines[4]) == ["schema", "kind", "update", "round", *ROUND_KEYS]


def test_nan_and_infinities_become_null_at_any_depth(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, FILE_ONLY)
    tracker.update(an_update(loss=math.nan, margin=-math.inf, ess=np.float32("nan"), pairs=None))
    tracker.round(a_round(seconds={"generate": math.inf, "judge": 1.5}))
    tracker.evaluation(an_evaluation(win_rate_ci=(math.nan, 1.0)))
    update, round_, evaluation = metrics(tmp_path)
    assert (update["loss"], update["margin"], update["ess"], update["pairs"]) == (None,) * 4
    assert round_["seconds"] == {"generate": None, "judge": 1.5}
    assert evaluation["win_rate_ci"] == [None, 1.0]


def test_numpy_scalars_are_numbers(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, FILE_ONLY)
    tracker.update(an_update(tokens=np.int64(7), loss=np.float32(0.25)))
    (update,) = metrics(tmp_path)
    assert (update["tokens"], update["loss"]) == (7, 0.25)


def test_each_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, FILE_ONLY)
    for written in (1, 2, 3):
        tracker.update(an_update())
        assert len(list(metrics(tmp_path))) == written


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"kind": "update", "loss": 1}\n{"kind": "update", "lo')
    assert [record["loss"] for record in metrics(tmp_path)] == [1]
    file.write_text('{"kind": "update", "loss": 1}\n{"kind": "update", "loss": 2}')
    assert [record["loss"] for record in metrics(tmp_path)] == [1]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "update"}\n{"kin\n{"kind": "update"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not JSON"):
        list(metrics(tmp_path))


def test_a_directory_without_metrics_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name the directory of a run"):
        list(metrics(tmp_path))


@pytest.mark.parametrize("kind", ["update", "round"])
def test_records_have_exactly_their_keys(tmp_path: Path, kind: str) -> None:
    tracker = Tracker(tmp_path, FILE_ONLY)
    whole = an_update() if kind == "update" else a_round()
    short = {key: value for key, value in whole.items() if key != "seconds"}
    with pytest.raises(ValueError, match=rf"{kind} record: missing \['seconds'\], unknown \[\]"):
        getattr(tracker, kind)(short)
    with pytest.raises(ValueError, match=rf"{kind} record: missing \[\], unknown \['los'\]"):
        getattr(tracker, kind)({**whole, "los": 1})
    assert list(metrics(tmp_path)) == []


def test_an_evaluation_may_say_more_but_not_less(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, FILE_ONLY)
    tracker.evaluation(an_evaluation(invalid=2))
    assert next(metrics(tmp_path))["invalid"] == 2
    with pytest.raises(ValueError, match=r"missing \['judge'\]"):
        tracker.evaluation({k: v for k, v in an_evaluation().items() if k != "judge"})


def test_position_is_the_length_of_the_file_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker(tmp_path, FILE_ONLY)
    assert tracker.position() == 0
    tracker.update(an_update())
    synced: list[int] = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", recorded)
    position = tracker.position()
    assert position == len((tmp_path / "metrics.jsonl").read_bytes()) > 0
    assert synced == [position]


def test_killed_and_resumed_writes_the_same_bytes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for run_dir in (whole, killed):
        run_dir.mkdir()
    tracker = Tracker(whole, FILE_ONLY)
    for loss in range(5):
        tracker.update(an_update(loss=loss))
        if loss % 2:
            tracker.round(a_round())

    tracker = Tracker(killed, FILE_ONLY)
    tracker.update(an_update(loss=0))
    tracker.update(an_update(loss=1))
    tracker.round(a_round())
    tracker.update(an_update(loss=2))
    checkpoint = tracker.position()
    tracker.update(an_update(loss=3))
    tracker.round(a_round())
    tracker.close()
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"schema": 1, "kind": "upda')

    tracker = Tracker(killed, FILE_ONLY)
    tracker.cut(checkpoint)
    assert len(list(metrics(killed))) == 4
    tracker.update(an_update(loss=3))
    tracker.round(a_round())
    tracker.update(an_update(loss=4))
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_continued_file_loses_its_torn_line_only(tmp_path: Path) -> None:
    Tracker(tmp_path, FILE_ONLY).update(an_update(loss=1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"torn')
    Tracker(tmp_path, FILE_ONLY).update(an_update(loss=2))
    found = [(record["update"], record["loss"]) for record in metrics(tmp_path)]
    assert found == [(1, 1), (2, 2)]


@pytest.mark.parametrize("off", [-1, 1])
def test_a_cut_that_does_not_fall_on_a_line_end_is_refused(tmp_path: Path, off: int) -> None:
    tracker = Tracker(tmp_path, FILE_ONLY)
    tracker.update(an_update())
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="the file was changed"):
        tracker.cut(len(before) + off)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_cut_to_nothing(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, FILE_ONLY)
    tracker.update(an_update())
    tracker.cut(0)
    tracker.update(an_update())
    assert [record["update"] for record in metrics(tmp_path)] == [1]


def test_without_tensorboard_there_is_no_directory(tmp_path: Path) -> None:
    Tracker(tmp_path, FILE_ONLY).update(an_update())
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_listeners_get_what_was_written(tmp_path: Path) -> None:
    class Ears:
        def __init__(self) -> None:
            self.heard: list[Mapping[str, Any]] = []

        def record(self, record: Mapping[str, Any]) -> None:
            self.heard.append(record)

    ears = Ears()
    tracker = Tracker(tmp_path, FILE_ONLY, [ears])
    tracker.update(an_update(loss=math.nan))
    tracker.round(a_round())
    assert ears.heard == list(metrics(tmp_path))
    assert ears.heard[0]["loss"] is None


def test_options_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValidationError, match="tensorbord"):
        TrackingOptions.model_validate({"tensorbord": True})
    options = TrackingOptions.model_validate({"wandb": {"project": "pairs"}})
    assert options.tensorboard
    assert options.wandb == WandbOptions(project="pairs", name=None, mode=None)
