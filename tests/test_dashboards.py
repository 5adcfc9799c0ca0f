"""TensorBoard and Weights & Biases as views of metrics.jsonl."""

import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from judges.errors import UserError
from pipeline.dashboards import WandbOptions
from pipeline.tracking import Tracker, TrackingOptions
from tests.record_helpers import a_round, an_evaluation, an_update


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
