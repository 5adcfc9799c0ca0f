"""Generators that come and go: what a lost one owed is done by others, and no number changes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from judges.errors import UserError
from pipeline import fleet, job
from pipeline.fleet import DEATHS, Fleet, those_here
from pipeline.handles import Future, WorkerDied
from pipeline.judging import Judging
from pipeline.launch.inline import InlineHandle, _Failed
from pipeline.learner import RemoteLearner
from pipeline.replica import Replica
from pipeline.rollout import Rollout
from pipeline.stopping import Stop
from pipeline.sync import WeightSync
from tests import tiny
from tests.test_replica import (
    GAP_LIMIT,
    PROBE,
    Cached,
    Close,
    Doomed,
    FakeGenerator,
    FakeLearner,
    Result,
    Slot,
    request,
)
from workers.messages import UpdateBatch


class SpotSlot(Slot):
    """A handle on a spot node: ``lost`` takes it away, and a new worker is there only when it is
    ``back``."""

    def __init__(self, *kinds: type[FakeGenerator]) -> None:
        self.back = True
        super().__init__(*kinds)

    def lost(self) -> None:
        self.worker = None
        self.back = False

    def begin_anew(self) -> None:
        self.calls.append("begin_anew")
        self.worker = None

    def here(self) -> bool:
        if self.back and self.worker is None:
            self.restart()
        return self.worker is not None


def fleet_of(*slots: SpotSlot) -> tuple[list[Replica], list[str], WeightSync]:
    said: list[str] = []
    replicas = [Replica(i, slot, PROBE, GAP_LIMIT) for i, slot in enumerate(slots)]
    Fleet(replicas, said.append, Stop("run"))
    return replicas, said, WeightSync(replicas, PROBE)


def weight(result: Any) -> tuple[int, int, float]:
    (completion,) = result.completions[0]
    return completion.position, completion.version, float(completion.logprobs[0])


def test_what_a_lost_generator_owed_is_sampled_by_its_own_versions_elsewhere():
    """Two rounds in flight, by versions 0 and 1, on a generator that is lost with both of them.

    The other one holds version 1 by then: it is given 0, and then 1 again, before what follows.
    """
    gone, left = SpotSlot(FakeGenerator), SpotSlot(FakeGenerator)
    (one, other), said, sync = fleet_of(gone, left)
    learner = RemoteLearner(FakeLearner())
    sync.push(learner)
    first = [one.sample(request(i)) for i in (0, 1)]
    learner.update(UpdateBatch((), ()))
    sync.push(learner)
    second = [one.sample(request(2)), other.sample(request(3))]
    gone.lost()
    for unit in (*first, second[0]):
        unit.future = Result(error=WorkerDied("the node of generator 0 ended"))
    left.calls.clear()

    found = [weight(unit.result()) for unit in (*first, *second)]
    assert found == [(0, 0, 0.0), (1, 0, 0.0), (2, 1, 1.0), (3, 1, 1.0)]
    assert [unit.attempt for unit in (*first, *second)] == [2, 2, 2, 1]
    to, fro = ["load", "prove", "sample"], ["load", "prove"]
    assert left.calls == [*to, *fro, *to, *fro, "sample"]
    assert (sync.prove(0), sync.prove(1)) == (0.0, 0.0)
    assert said == ["generator 0 left (the node of generator 0 ended; 1 of 2)"]
    assert not one.present


def test_weights_are_kept_for_what_a_lost_generator_still_owes():
    fake = FakeLearner()
    learner = RemoteLearner(fake)
    gone = SpotSlot(FakeGenerator)
    (one, _), _, sync = fleet_of(gone, SpotSlot(FakeGenerator))
    sync.push(learner)
    unit = one.sample(request(0))
    gone.lost()
    unit.future = Result(error=WorkerDied("the process of generator 0 ended"))
    for _ in range(2):
        learner.update(UpdateBatch((), ()))
        sync.push(learner)
    assert [args[0] for method, args in fake.calls if method == "weights"] == [0, 0, 0]
    assert weight(unit.result()) == (0, 0, 0.0)


def test_who_comes_back_has_the_newest_weights_before_it_samples():
    learner = RemoteLearner(FakeLearner())
    slot = SpotSlot(FakeGenerator)
    slot.lost()
    (late, _), said, sync = fleet_of(slot, SpotSlot(FakeGenerator))
    assert not late.present
    sync.push(learner)
    learner.update(UpdateBatch((), ()))
    sync.push(learner)
    slot.back = True
    sync.push(learner)  # the same version: only who has not got it is sent it
    assert said == ["generator 0 joined (2 of 2)"]
    assert slot.calls == ["restart", "load", "prove"]
    assert weight(late.sample(request(0)).result()) == (0, 1, 1.0)
    sync.push(learner)
    assert slot.calls.count("load") == 1


def test_with_nobody_left_it_waits_and_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fleet, "LOOK", 0.0)
    slot = SpotSlot(FakeGenerator)
    (only,), said, sync = fleet_of(slot)
    sync.push(RemoteLearner(FakeLearner()))
    unit = only.sample(request(0))
    slot.lost()
    unit.future = Result(error=WorkerDied("the process of generator 0 ended"))
    looks = 0

    def here() -> bool:
        nonlocal looks
        looks += 1
        slot.back = looks > 3
        return SpotSlot.here(slot)

    monkeypatch.setattr(slot, "here", here)
    assert weight(unit.result()) == (0, 0, 0.0)
    assert said == [
        "generator 0 left (the process of generator 0 ended; 0 of 1)",
        "no generator is left: waiting until a node has room for one",
        "generator 0 joined (1 of 1)",
    ]


def test_a_unit_that_workers_die_of_ends_the_run():
    """Not after so many rounds of the fleet, but after so many workers."""
    replicas, _, sync = fleet_of(SpotSlot(Doomed), SpotSlot(Doomed))
    sync.push(RemoteLearner(FakeLearner()))
    unit = replicas[0].sample(request(0))
    with pytest.raises(WorkerDied, match=r"\(7 workers ended while the same prompts"):
        unit.result()
    assert unit.lost == DEATHS + 2


def test_generators_that_are_gone_together_are_no_units_fault():
    """A node with eight of them ends: the units reach the one that is left, one death at a time."""
    gone = [SpotSlot(FakeGenerator) for _ in range(8)]
    replicas, said, sync = fleet_of(*gone, SpotSlot(FakeGenerator))
    sync.push(RemoteLearner(FakeLearner()))
    unit = replicas[0].sample(request(0))
    for slot in gone:
        slot.lost()
    unit.future = Result(error=WorkerDied("the process of generator 0 ended"))
    assert weight(unit.result()) == (0, 0, 0.0)
    assert unit.replica is replicas[8]
    assert len(said) == 8


def test_what_is_pushed_again_is_not_kept_once_it_is_superseded():
    """Nobody waits for its proof: it must not hold a version's weights to the run's end."""
    fake = FakeLearner()
    learner = RemoteLearner(fake)
    gone, left = SpotSlot(FakeGenerator), SpotSlot(FakeGenerator)
    (one, other), _, sync = fleet_of(gone, left)
    sync.push(learner)
    unit = one.sample(request(0))
    learner.update(UpdateBatch((), ()))
    sync.push(learner)
    gone.lost()
    unit.future = Result(error=WorkerDied("the process of generator 0 ended"))
    assert weight(unit.result()) == (0, 0, 0.0)  # 0 and 1 were pushed again to the other one
    assert (sync.prove(0), sync.prove(1)) == (0.0, 0.0)
    for _ in range(3):
        learner.update(UpdateBatch((), ()))
        sync.push(learner)
        other.sample(request(learner.version)).result()
        sync.prove(learner.version)
    assert [args[0] for method, args in fake.calls if method == "weights"][-1] == 3


def test_a_newcomer_that_cannot_be_built_is_left_out(monkeypatch: pytest.MonkeyPatch):
    spot = SpotSlot(FakeGenerator)
    (late, _), said, sync = fleet_of(spot, SpotSlot(FakeGenerator))
    late.present = False

    def here() -> bool:
        raise OSError("no model at /models/x")

    monkeypatch.setattr(spot, "here", here)
    learner = RemoteLearner(FakeLearner())
    for _ in range(5):
        sync.push(learner)
    again = "generator 0 could not join (no model at /models/x): it is tried again"
    left_out = "generator 0 could not join (no model at /models/x): it is left out from here on"
    assert said == [again, again, left_out]


def test_one_that_cannot_be_built_at_first_does_not_keep_a_run_from_its_start(
    monkeypatch: pytest.MonkeyPatch,
):
    def here(slot: SpotSlot) -> bool:
        raise OSError("no model at /models/x")

    broken = SpotSlot(FakeGenerator)
    monkeypatch.setattr(broken, "here", lambda: here(broken))
    replicas, said, _ = fleet_of(SpotSlot(FakeGenerator), broken)
    assert [replica.present for replica in replicas] == [True, False]
    assert said == ["generator 1 could not join (no model at /models/x): it is tried again"]


def test_all_samples_of_a_round_are_waited_for_before_its_verdicts(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a lost generator's prompts are sampled again while the judges are at work."""
    waited: list[str] = []
    for owner, kind in ((Rollout, "_sampled"), (Judging, "result")):
        original = getattr(owner, kind)

        def noted(*args: Any, original: Any = original, kind: str = kind) -> Any:
            waited.append(kind)
            return original(*args)

        monkeypatch.setattr(owner, kind, noted)
    cfg = tiny.config(tiny_model, tmp_path, run={"updates": 6}, resampling={"updates_per_round": 3})
    job.run(cfg, quiet=True)
    assert waited == 2 * [*3 * ["_sampled"], *3 * ["result"]]


def test_what_is_wrong_with_all_of_them_ends_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fleet, "LOOK", 0.0)
    spot = SpotSlot(FakeGenerator)
    (only,), _, sync = fleet_of(spot)
    only.present = False

    def here() -> bool:
        raise OSError("no model at /models/x")

    monkeypatch.setattr(spot, "here", here)
    with pytest.raises(OSError, match="no model at /models/x"):
        sync.push(RemoteLearner(FakeLearner()))


def test_a_stop_ends_the_waiting_for_a_generator(monkeypatch: pytest.MonkeyPatch):
    spot = SpotSlot(FakeGenerator)
    (only,), _, sync = fleet_of(spot)
    spot.lost()
    only.present = False
    only.fleet._stop.requested = True
    with pytest.raises(KeyboardInterrupt):
        sync.push(RemoteLearner(FakeLearner()))


def test_one_whose_proofs_fail_leaves_instead_of_being_waited_for():
    replicas, said, sync = fleet_of(SpotSlot(Cached), SpotSlot(FakeGenerator))
    sync.push(RemoteLearner(FakeLearner()))
    unit = replicas[0].sample(request(0))
    assert weight(unit.result()) == (0, 0, 0.0)
    assert unit.replica is replicas[1]
    assert said[0].startswith("generator 0 left (holds version 0, but")


def test_the_gap_of_a_version_is_of_those_that_proved_it():
    gone = SpotSlot(Close)
    (one, _), _, sync = fleet_of(gone, SpotSlot(FakeGenerator))
    sync.push(RemoteLearner(FakeLearner()))
    gone.lost()
    for delivery in one._journal:
        delivery.proving = Result(error=WorkerDied("the process of generator 0 ended"))
    assert sync.prove(0) == 0.0
    assert [replica.name for replica in those_here(one.fleet._replicas)] == ["generator 1"]


def test_generators_that_do_not_come_and_go_are_all_there():
    replicas = [Replica(i, Slot(FakeGenerator), PROBE, GAP_LIMIT) for i in range(2)]
    assert those_here(replicas) == replicas


class Spot:
    """Takes generators of a real run away, each for a while, by a schedule drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.deadly = set(self.rng.sample(range(1, 10), 4))
        self.away: dict[InlineHandle, int] = {}
        self.asked = self.losses = 0

    def submit(self, handle: InlineHandle, method: str, *args: object) -> Future[Any]:
        self.asked += method == "sample"
        dies = method == "sample" and self.asked in self.deadly
        if handle._plan.name.startswith("generator") and (handle in self.away or dies):
            if handle not in self.away:
                self.losses += 1
                self.away[handle] = self.rng.randint(0, 3)
                handle._worker = None
            return _Failed(WorkerDied(f"the process of {handle._plan.name} ended"))
        return SUBMIT(handle, method, *args)

    def here(self, handle: InlineHandle) -> bool:
        if self.away.get(handle, 0) > 0:
            self.away[handle] -= 1
            return False
        if self.away.pop(handle, None) is not None:
            handle.restart()
        return True


SUBMIT = InlineHandle.submit


@pytest.mark.parametrize(
    ("rounds_in_flight", "seed"),
    [(0, 0), pytest.param(1, 1), *(pytest.param(1, s, marks=pytest.mark.slow) for s in (2, 3, 4))],
)
def test_a_run_whose_generators_come_and_go_is_the_run_of_one_that_stays(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rounds_in_flight: int,
    seed: int,
) -> None:
    """The real loop and learner: records, ledger and weights to the bit."""
    resampling = {"updates_per_round": 3, "rounds_in_flight": rounds_in_flight}
    cfg = tiny.config(tiny_model, tmp_path, run={"updates": 9}, resampling=resampling)
    job.run(cfg, quiet=True)

    spot = Spot(seed)
    monkeypatch.setattr(fleet, "LOOK", 0.0)
    monkeypatch.setattr(InlineHandle, "submit", lambda *call: spot.submit(*call))
    monkeypatch.setattr(InlineHandle, "here", lambda handle: spot.here(handle))
    monkeypatch.setattr(InlineHandle, "begin_anew", lambda handle: None)
    several = cfg.model_copy(
        update={
            "generator": cfg.generator.model_copy(update={"replicas": 3, "min_replicas": 1}),
            "run": cfg.run.model_copy(update={"dir": str(tmp_path / "spot")}),
        }
    )
    job.run(several, quiet=True)
    assert spot.losses >= 2
    assert tiny.records(several.run_dir) == tiny.records(cfg.run_dir)
    for part in sorted((cfg.run_dir / "ledger").glob("*.parquet")):
        other = several.run_dir / "ledger" / part.name
        assert pq.read_table(other).equals(pq.read_table(part))
    weights = [
        (run.run_dir / "policy" / "model.safetensors").read_bytes() for run in (cfg, several)
    ]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_replicas": 3}, "generator.min_replicas=3: more than generator.replicas=2"),
        ({"min_replicas": 0}, "generator.min_replicas=0: must be greater than or equal to 1"),
    ],
)
def test_fewest_replicas_that_make_no_sense(tmp_path: Path, options: dict, said: str) -> None:
    with pytest.raises(UserError) as refusal:
        tiny.config(tmp_path, tmp_path, generator={"replicas": 2, **options})
    assert said in str(refusal.value)
