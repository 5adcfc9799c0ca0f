"""metrics.jsonl, its cut on resume, and the dashboards built from it."""

import json
import math
import os
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tensorboardX.proto.event_pb2 import Event

from judges.errors import UserError
from pipeline.dashboards import WandbOptions
from pipeline.tracking import ROUND_KEYS, UPDATE_KEYS, Tracker, TrackingOptions, metrics

FILE_ONLY = TrackingOptions(tensorboard=False)
STAGES = ("generate", "judge", "learn", "sync", "idle")
REASONS = ("tie", "invalid", "identical", "margin", "truncated")


def an_update(**values: Any) -> dict[str, Any]:
    return dict.fromkeys(UPDATE_KEYS, 0.5) | values


def a_round(**values: Any) -> dict[str, Any]:
    nested = {"dropped": dict.fromkeys(REASONS, 1), "seconds": dict.fromkeys(STAGES, 0.25)}
    return dict.fromkeys(ROUND_KEYS, 2) | nested | values


def an_evaluation(**values: Any) -> dict[str, Any]:
    return {
        "judge": "sentiment",
        "win": 3,
        "tie": 1,
        "loss": 2,
        "win_rate": 3.5 / 6,
        "win_rate_ci": (0.25, 0.75),
        "quality": 0.5,
        "quality_baseline": 0.25,
        "kl_to_reference": None,
    } | values


def scalars(directory: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of every scalar in a directory's event files, in order.

    A record is its length (8 bytes), a checksum (4), an Event, a checksum (4).
    """
    found = []
    for file in sorted(directory.glob("events.out.tfevents.*")):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    return found


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


def test_tensorboard_has_every_number_over_updates(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, TrackingOptions())
    tracker.update(an_update(loss=0.75, margin=None))
    tracker.round(a_round(dropped={"tie": 4, "invalid": None}))
    tracker.evaluation(an_evaluation())
    tracker.close()
    found = {tag: (step, value) for tag, step, value in scalars(tmp_path / "tensorboard")}
    assert found["update/loss"] == (1, 0.75)
    assert found["round/dropped/tie"] == (1, 4.0)
    assert found["round/seconds/idle"] == (1, 0.25)
    assert found["evaluation/sentiment/quality_baseline"] == (1, 0.25)
    assert found["evaluation/sentiment/win_rate_ci/low"] == (1, 0.25)
    assert found["evaluation/sentiment/win_rate_ci/high"] == (1, 0.75)
    absent = {"update/margin", "update/schema", "update/update", "round/dropped/invalid"}
    assert not absent & set(found)


def test_cut_rebuilds_tensorboard_so_that_nothing_is_doubled(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, TrackingOptions())
    tracker.update(an_update(loss=1))
    tracker.update(an_update(loss=2))
    checkpoint = tracker.position()
    tracker.update(an_update(loss=30))
    tracker.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.rename(events.with_name("events.out.tfevents.1.yesterday"))  # its name is the time

    tracker = Tracker(tmp_path, TrackingOptions())
    tracker.cut(checkpoint)
    tracker.update(an_update(loss=3))
    tracker.close()
    losses = [entry for entry in scalars(tmp_path / "tensorboard") if entry[0] == "update/loss"]
    assert losses == [("update/loss", 1, 1.0), ("update/loss", 2, 2.0), ("update/loss", 3, 3.0)]


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


class FakeWandb(ModuleType):
    """As much of wandb as is used: ``init`` gives a run that logs into ``logged``."""

    class Error(Exception):
        pass

    def __init__(self, failure: str | None = None) -> None:
        super().__init__("wandb")
        self.failure = failure
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def init(self, **arguments: Any) -> "FakeWandb":
        if self.failure is not None:
            raise self.Error(self.failure)
        self.started.append(arguments)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "update")

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


WANDB = TrackingOptions(tensorboard=False, wandb=WandbOptions(project="pairs", mode="offline"))


def test_wandb_gets_one_run_over_a_resume_and_the_line_as_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run_dir = tmp_path / "quickstart"
    run_dir.mkdir()
    tracker = Tracker(run_dir, WANDB)
    tracker.update(an_update(loss=1))
    checkpoint = tracker.position()
    tracker.round(a_round())
    tracker.close()
    tracker = Tracker(run_dir, WANDB)
    tracker.cut(checkpoint)
    tracker.round(a_round())
    tracker.close()

    assert [step for step, _ in fake.logged] == [1, 2, 2]
    assert fake.logged[0][1]["update/loss"] == 1
    assert fake.logged[0][1]["update"] == 1
    first, second = fake.started
    assert first == second
    assert len(first["id"]) == 32
    assert (first["project"], first["name"], first["mode"]) == ("pairs", "quickstart", "offline")
    assert (first["dir"], first["resume"]) == (str(run_dir), "allow")
    assert fake.finished == 2


@pytest.mark.parametrize("module", [None, ModuleType("wandb")])
def test_wandb_that_is_not_installed_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType | None
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(UserError, match=r'pip install "freshpairs\[wandb\]"'):
        Tracker(tmp_path, WANDB)


def test_wandb_that_does_not_let_us_in_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("No API key.\nLog in."))
    with pytest.raises(UserError) as raised:
        Tracker(tmp_path, WANDB)
    assert str(raised.value) == (
        "tracking.wandb.project=pairs: No API key. Log in; "
        "`wandb login`, or set tracking.wandb.mode=offline"
    )


def test_options_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValidationError, match="tensorbord"):
        TrackingOptions.model_validate({"tensorbord": True})
    options = TrackingOptions.model_validate({"wandb": {"project": "pairs"}})
    assert options.tensorboard
    assert options.wandb == WandbOptions(project="pairs", name=None, mode=None)
