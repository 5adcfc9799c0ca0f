"""Bound, admission and no bias: the real loop with fake workers of random speed, in virtual time.

Everything between the workers is real: loop, rollout, replicas, judges, dial, lessons, weight sync,
prompt stream. What is expected of a run is derived from its config and from what came before in the
fakes' diary, never from the loop's own plans.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from pipeline import loop, rollout
from pipeline.brake import Brake
from pipeline.checkpoint import Cursor
from pipeline.config import Config, parse_config
from pipeline.drift import Drift
from pipeline.inputs import pairing_of
from pipeline.judging import Judges
from pipeline.learner import RemoteLearner
from pipeline.plan.virtual import Pace, VirtualHandle, World
from pipeline.plan.virtual_workers import MemoryLedger, NoEvaluator
from pipeline.prompts import PromptOptions, PromptStream
from pipeline.replica import Replica
from pipeline.rollout import Rollout, UnitSize
from pipeline.selection import Selection
from pipeline.staleness import Staleness
from pipeline.stopping import Stop, Stopped
from pipeline.sync import WeightSync
from pipeline.watch import Watch
from tests.fake_crew import (
    Diary,
    FakeGenerator,
    FakeJudge,
    FakeLearner,
    Killed,
    MemoryCheckpoints,
    MemoryTracker,
    WatchedRollout,
    erratic,
    steady,
    steady_a_prompt,
)
from tests.prompt_helpers import ENCODER, numbered

NO_IDS = np.zeros(0, np.int64)
SHARES = [0.55, 0.3, 0.15]
RULE = """
def chance(update, below):
    return update["loss"] < below
"""

Paces = Callable[[str], Pace]
"""From a worker's name to its speed."""


@dataclass(frozen=True, slots=True)
class Case:
    """A run: ``rounds`` full ones, the last short of ``cut`` updates; ``ends`` is the chance of an
    early end after an update, ``rows`` are an epoch."""

    rounds: int = 20
    cut: int = 0
    per_round: int | float = 1
    passes: int = 1
    in_flight: int = 0
    replay: list[float] | str = field(default_factory=lambda: [1.0])
    prompts: int = 1
    generators: int = 1
    judges: int = 1
    rows: int = 7
    ends: float = 0.0
    adaptive: bool = False
    seed: int = 0

    @property
    def updates(self) -> int:
        if math.isinf(self.per_round):
            return max(self.passes, self.rounds * self.passes - self.cut)
        full = int(self.per_round) * self.passes
        return self.rounds * full - self.cut % full

    @property
    def lag_bound(self) -> int:
        """(rounds_in_flight + 1) · updates_per_round · passes − 1; no round spans more than all."""
        most = ADAPTIVE_MOST if self.adaptive else self.per_round
        if not self.adaptive:
            most = min(most, math.ceil(self.updates / self.passes))
        return (self.in_flight + 1) * int(min(most * self.passes, self.updates)) - 1

    @property
    def regular(self) -> bool:
        """Whether every round feeds as many updates as were planned at first."""
        return not self.ends and not self.adaptive


ADAPTIVE_MOST = 6


@st.composite
def cases(draw: st.DrawFn, least: int = 25, most: int = 40) -> Case:
    adaptive = draw(st.integers(0, 5)) == 0
    per_round: int | float = draw(st.integers(1, 6))
    if not adaptive and draw(st.integers(0, 9)) == 0:
        per_round = math.inf
    replays: list[list[float] | str] = [[1.0], [1.0], SHARES, "all"]
    replay = draw(st.sampled_from(replays))
    return Case(
        rounds=draw(st.integers(least, most)),
        cut=draw(st.integers(0, 17)),
        per_round=per_round,
        passes=draw(st.sampled_from([1, 1, 2, 3])),
        in_flight=draw(st.integers(0, 4)),
        replay=replay,
        # 0.15 of 3 prompts is none, and the ESS of two pairs is 0.5 at least.
        prompts=4 if replay == SHARES else draw(st.integers(3 if adaptive else 1, 3)),
        generators=draw(st.integers(1, 3)),
        judges=draw(st.integers(1, 2)),
        rows=draw(st.sampled_from([7, 11, 13, 101])),
        ends=draw(st.sampled_from([0.0, 0.0, 0.1, 0.5])),
        adaptive=adaptive,
        seed=draw(st.integers(0, 2**16)),
    )


class Ship:
    """A run and what survives its stops: the ledger, the newest checkpoint, the records."""

    def __init__(
        self, case: Case, folder: Path, paces: Paces | None = None, *, keeps: bool = True
    ) -> None:
        self.case = case
        self.cfg = config(case, folder)
        self.diary = Diary()
        self.world = World()
        self.ledger = MemoryLedger(keeps)
        self.records: list[dict[str, Any]] = []
        self.every: int | None = None
        self._kept = (Cursor().to_json(), 0, 0)
        self._paces = paces or (lambda name: erratic(case.seed, name))

    def sail(self, stops_at: frozenset[int] = frozenset(), dies_at: int | None = None) -> bool:
        """Go on from the newest checkpoint; whether the run was stopped or killed before its end.

        Workers are new, and hold nothing.
        """
        case, cfg, diary = self.case, self.cfg, self.diary
        text, version, state = self._kept
        cursor = Cursor.from_json(text)
        working = FakeLearner(diary, staleness=0.02 if case.adaptive else 0.0, dies_at=dies_at)
        working.version, working.state = version, state
        handle = self._handle(working, "learner")
        learner = RemoteLearner(handle)
        learner.version = version
        replicas = [
            Replica(i, self._handle(FakeGenerator(diary), f"generator {i}"), NO_IDS, 1.0)
            for i in range(case.generators)
        ]
        stop = Stop(cfg.run_dir)
        watch = Watch(Staleness(cfg.resampling.early), Brake(cfg.drift))
        drift = Drift()
        if cursor.drift is not None and cursor.watch is not None:
            drift.load(cursor.drift)
            watch.load(cursor.watch)
        del self.records[cursor.metrics_bytes :]
        del diary.updates[version:], diary.lags[version:], diary.round_of[version:]
        checkpoints = MemoryCheckpoints(working, self.every, self._kept)
        crew: dict[str, Any] = {
            "rollout": WatchedRollout(self._rollout(replicas, handle), diary),
            "ledger": self.ledger,
            "tracker": MemoryTracker(stop, working, stops_at, self.records),
            "checkpoints": checkpoints,
            "evaluator": NoEvaluator(),
        }
        sync = WeightSync(replicas, NO_IDS)
        try:
            loop.run(
                cfg,
                learner=learner,
                sync=sync,
                drift=drift,
                watch=watch,
                stop=stop,
                cursor=cursor,
                **crew,
            )
        except (Stopped, Killed):
            self._kept = checkpoints.kept
            return True
        return False

    def _handle(self, worker: Any, name: str) -> VirtualHandle:
        return VirtualHandle(self.world, worker, self._paces(name))

    def _rollout(self, replicas: list[Replica], learner: VirtualHandle) -> Rollout:
        cfg = self.cfg
        judges = [
            Replica(i, self._handle(FakeJudge(), f"judge {i}"), NO_IDS, 1.0, kind="judge")
            for i in range(self.case.judges)
        ]
        return Rollout(
            PromptStream(PromptOptions(path=cfg.prompts.path), ENCODER, cfg.run.seed),
            replicas,
            Judges(judges, learner, {cfg.judge.title: cfg.judge}, in_one_process=True),
            Selection(None, 0, 0, (), learner, 0),
            pairing_of(cfg),
            judge_name=cfg.judge.title,
            second_judge=None,
            reference_shares=[0.0, 0.0],
            unit_size=UnitSize(cfg.sampling.prompts_per_update),
            max_invalid_share=0.0,
            in_flight_updates=False,
            rest_between_rounds=False,
            run_seed=cfg.run.seed,
        )


def sailed(case: Case, folder: Path, paces: Paces | None = None) -> Ship:
    """A run from its beginning to its end."""
    ship = Ship(case, folder, paces)
    assert not ship.sail()
    return ship


def config(case: Case, folder: Path) -> Config:
    resampling: dict[str, Any] = {
        "updates_per_round": case.per_round,
        "passes": case.passes,
        "rounds_in_flight": case.in_flight,
        "replay": case.replay,
    }
    if case.ends:
        rule = {"rule": f"{folder}/rule.py:chance", "args": {"below": case.ends}}
        resampling["early"] = rule
    if case.adaptive:
        resampling["adaptive"] = {"target": 0.5, "max": ADAPTIVE_MOST}
    raw = {
        "run": {"dir": str(folder / "run"), "updates": case.updates, "seed": case.seed},
        "prompts": {"path": f"{folder}/{case.rows}.jsonl"},
        "sampling": {"prompts_per_update": case.prompts, "max_new_tokens": 2},
        "resampling": resampling,
        "generator": {"backend": "transformers", "replicas": case.generators},
    }
    return parse_config(raw, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rule that ends rounds by chance, and prompt files of so many rows each."""
    where = tmp_path_factory.mktemp("admission")
    (where / "rule.py").write_text(RULE)
    for rows in (7, 11, 13, 101):
        numbered(where / f"{rows}.jsonl", rows)
    return where


def check_lags(ship: Ship) -> None:
    """The bound; and each lag exactly: what was learned since the round was admitted.

    Round r is admitted when round r − rounds_in_flight − 1 is over, the first ones at the start;
    later only where rounds before it were to feed all that was left, and then one ended early.
    """
    case, diary = ship.case, ship.diary
    fed = Counter(diary.round_of)
    boundaries = {sum(fed[before] for before in range(index)) for index in fed}
    for index, version in diary.submitted.items():
        earliest = sum(fed[before] for before in range(index - case.in_flight))
        assert version == earliest or (case.ends and version > earliest and version in boundaries)
    for version, (index, lags) in enumerate(zip(diary.round_of, diary.lags, strict=True)):
        assert lags <= {version - diary.submitted[index]}
        assert all(0 <= lag <= case.lag_bound for lag in lags)
    # Round number rounds_in_flight, of those that span most, was sampled at the very beginning.
    if case.regular and case.replay == [1.0] and fed[case.in_flight] == fed[0]:
        assert max(set().union(*diary.lags)) == (case.in_flight + 1) * fed[0] - 1


def check_prompts(ship: Ship) -> None:
    """Positions come once and in order, so do the rows of each epoch; no seed comes twice."""
    sampled, rows = ship.diary.sampled, ship.case.rows
    assert [position for position, _ in sampled] == list(range(len(sampled)))
    assert len(set(ship.diary.seeds)) == len(ship.diary.seeds) == 2 * len(sampled)
    every = {f"p{row}" for row in range(rows)}
    for first in range(0, len(sampled), rows):
        epoch = [content for _, content in sampled[first : first + rows]]
        assert len(set(epoch)) == len(epoch)
        assert len(epoch) < rows or set(epoch) == every


def check_budget(ship: Ship) -> None:
    """Every update has its prompts, each once; every prompt is learned from in each pass."""
    case, diary = ship.case, ship.diary
    assert len(diary.updates) == case.updates
    fresh: Counter[int] = Counter()
    for completions, pairs in diary.updates:
        positions = Counter(completion[0] for completion in completions)
        assert len(positions) == len(pairs) == case.prompts
        assert set(positions.values()) == {2}
        fresh.update({c[0] for c in completions if not c[-1]})
    if case.replay == "all":
        return
    assert set(fresh) <= {position for position, _ in diary.sampled}
    assert max(fresh.values()) <= case.passes
    if not case.regular:
        return
    # Only a last round that was cut to fit feeds other than whole passes. Its pass is of so many
    # updates, and some prompts get one pass more.
    fed = Counter(diary.round_of)
    last = max(fed)
    in_a_pass = math.ceil(fed[last] / case.passes)
    whole, more = divmod(fed[last], in_a_pass)
    began = len(diary.sampled) - _sampled_in(ship, last)
    assert [fresh[position] for position in range(began)] == [case.passes] * began
    in_last = [fresh[position] for position in range(began, len(diary.sampled))]
    assert set(in_last) <= {whole, whole + 1}
    if case.replay == [1.0]:
        assert len(in_last) == in_a_pass * case.prompts
        assert in_last.count(whole + 1) == more * case.prompts


def _sampled_in(ship: Ship, index: int) -> int:
    return len(ship.ledger.read(index).groups)


def check_back_pressure(ship: Ship) -> None:
    """Never more rounds on their way than rounds_in_flight and the one that is waited for."""
    most = min(ship.case.in_flight + 1, len(ship.diary.submitted))
    assert ship.diary.waiting == most or (ship.case.ends and ship.diary.waiting < most)


def check(ship: Ship) -> None:
    check_lags(ship)
    check_prompts(ship)
    check_budget(ship)
    check_back_pressure(ship)


def many_rounds(folder: Path, wanted: int, first_seed: int) -> None:
    """So many rounds, of random runs that are checked each."""
    rounds = 0

    def checked(case: Case) -> None:
        nonlocal rounds
        ship = sailed(case, folder)
        check(ship)
        rounds += len(ship.diary.begun)

    for number in itertools.count(first_seed):
        seed(number)(settings(max_examples=25, deadline=None)(given(cases())(checked)))()
        if rounds >= wanted:
            return


def test_many_rounds_of_random_speeds(folder: Path) -> None:
    """The lag bound is never breached, every prompt of an epoch used once, none lost or doubled."""
    many_rounds(folder, 500, first_seed=0)


@pytest.mark.slow
def test_ten_thousand_rounds_of_random_speeds(folder: Path) -> None:
    many_rounds(folder, 10_000, first_seed=1_000)


# No bias -----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    case=cases(8, 14),
    generators=st.integers(1, 3),
    judges=st.integers(1, 2),
    luck=st.integers(0, 2**16),
)
def test_what_is_learned_depends_on_nobodys_speed_or_number(
    folder: Path, case: Case, generators: int, judges: int, luck: int
) -> None:
    """Batch by batch the same, to the ids and their order, with early ends and adaptive rounds."""
    first = sailed(case, folder)
    other_speeds = sailed(case, folder, lambda name: erratic(luck, name))
    others = replace(case, generators=generators, judges=judges)
    other_crew = sailed(others, folder, lambda name: erratic(luck + 1, name))
    assert first.diary.updates == other_speeds.diary.updates == other_crew.diary.updates


def test_slow_prompts_are_learned_from_when_their_turn_comes(folder: Path) -> None:
    """One prompt in nine takes fifty times as long; nobody overtakes it, nothing is thrown away."""
    ship = sailed(Case(rounds=40, in_flight=3, generators=3, judges=2, rows=101), folder)
    learned = [completions[0][0] for completions, _ in ship.diary.updates]
    assert learned == list(range(40))


# Memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [0, 1, 4])
@pytest.mark.parametrize(("generators", "judges"), [(1, 1), (3, 2)])
def test_finished_rounds_are_let_go(
    folder: Path, in_flight: int, generators: int, judges: int
) -> None:
    """Of 150 rounds of 2 prompts, completions in memory are those of a few rounds.

    These are the rounds in flight and the one learned from; the one before that, which the loop's
    variables name until the next is begun; and what a judge's journal holds until it is asked
    again: at most what was on its way when it was asked last.
    """
    case = Case(
        rounds=150, prompts=2, in_flight=in_flight, generators=generators, judges=judges, seed=5
    )
    ship = Ship(case, folder, keeps=False)
    assert not ship.sail()
    rounds = (in_flight + 1) + 1 + judges * (in_flight + 1)
    assert (in_flight + 1) * 4 <= ship.diary.most_alive <= rounds * 4


# Virtual time ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_flight", "sample", "judge", "update", "seconds"),
    [
        # One after the other: 20 · (1 + 1); 20 · (1 + 1 + 1).
        (0, 1, 0, 1, 40),
        (0, 1, 1, 1, 60),
        # Round 0 is sampled, then one round is sampled while another is learned from.
        (1, 1, 0, 1, 21),
        # The slower one works without a pause: 1 + 20 · 3; 20 · 3 + 1.
        (1, 1, 0, 3, 61),
        (1, 3, 0, 1, 61),
        # Three stages. Two rounds in three seconds: rounds 0 and 1 leave the learner at 3 and 4,
        # and the next two are admitted then. With two in flight it is one a second, after two.
        (1, 1, 1, 1, 31),
        (2, 1, 1, 1, 22),
    ],
)
def test_overlap_to_the_second(
    folder: Path, in_flight: int, sample: int, judge: int, update: int, seconds: int
) -> None:
    """Twenty rounds of one update."""
    pace = steady(sample=sample, judge=judge, update=update)
    ship = sailed(Case(rounds=20, in_flight=in_flight), folder, lambda name: pace)
    assert ship.world.now == seconds


def one_slow(name: str) -> Pace:
    return steady_a_prompt(sample=3.0 if name == "generator 1" else 1.0)


def test_a_slow_generator_is_given_fewer_units(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten rounds of four units of one prompt; generator 1 takes 3 s for a unit, generator 0 one.

    Of round 0 each gets two, because nothing is known of them: 6 s. Then generator 0 would be done
    with one, two, three units after 1, 2, 3 s, generator 1 with its first after 3, so that it gets
    the fourth: 3 s a round. Dealt in turns every round takes 6 s.
    """
    case = Case(rounds=10, per_round=4, generators=2)
    assert sailed(case, folder, one_slow).world.now == 6 + 9 * 3

    turns = iter(range(1_000))
    monkeypatch.setattr(rollout, "least_busy", lambda all_, prompts: all_[next(turns) % len(all_)])
    assert sailed(case, folder, one_slow).world.now == 10 * 6


# Stopped, killed and resumed ----------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(case=cases(6, 12), data=st.data())
def test_stopped_and_resumed_learns_the_same(folder: Path, case: Case, data: st.DataObject) -> None:
    """Also with early ends, replay and adaptive rounds; and nothing is sampled twice."""
    stops_at = data.draw(st.frozensets(st.integers(1, case.updates), min_size=1, max_size=4))
    whole = sailed(case, folder)
    ship = Ship(case, folder)
    for stop in sorted(stops_at):
        assert ship.sail(stops_at)
        assert len(ship.diary.updates) == stop
    assert not ship.sail()
    assert ship.diary.updates == whole.diary.updates
    assert untimed(ship) == untimed(whole)
    check_lags(ship)
    check_prompts(ship)
    check_budget(ship)


@settings(max_examples=25, deadline=None)
@given(case=cases(6, 12), every=st.integers(1, 9), data=st.data())
def test_killed_and_resumed_learns_the_same(
    folder: Path, case: Case, every: int, data: st.DataObject
) -> None:
    """From the newest checkpoint; what was in flight is sampled again, by the same seeds."""
    dies_at = data.draw(st.integers(1, case.updates))
    whole = sailed(case, folder)
    ship = Ship(case, folder)
    ship.every = every
    assert ship.sail(dies_at=dies_at)
    assert not ship.sail()
    assert ship.diary.updates == whole.diary.updates
    assert untimed(ship) == untimed(whole)
    assert set(ship.diary.seeds) == set(whole.diary.seeds)


def untimed(ship: Ship) -> list[str]:
    """The records, without what was timed."""
    timed = ("seconds", "tokens_per_second")
    kept = [{k: v for k, v in record.items() if k not in timed} for record in ship.records]
    return [json.dumps(record, sort_keys=True) for record in kept]
