"""The loop: sample, judge, learn, sync. Everything else serves this file."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from pipeline import gap, resampling
from pipeline.checkpoint import Checkpoints, Cursor
from pipeline.clock import Clock
from pipeline.config import Config
from pipeline.drift import Drift
from pipeline.evaluate import Evaluator
from pipeline.learner import RemoteLearner
from pipeline.ledger import Ledger
from pipeline.resampling import Dial, RoundPlan
from pipeline.rollout import PendingRound, Rollout
from pipeline.stopping import Stop
from pipeline.sync import WeightSync
from pipeline.tracking import Tracker
from workers.messages import Round


def run(
    cfg: Config,
    rollout: Rollout,
    learner: RemoteLearner,
    sync: WeightSync,
    ledger: Ledger,
    drift: Drift,
    tracker: Tracker,
    checkpoints: Checkpoints,
    evaluator: Evaluator,
    stop: Stop,
    cursor: Cursor,
) -> None:
    """Online preference optimisation, from ``cursor`` to update ``cfg.run.updates``.

    ``resampling.rounds_in_flight: 0`` waits for each round; more overlap sampling and judging with
    learning; ``updates_per_round: .inf`` samples once. Raises Stopped, after a checkpoint, when
    ``stop`` was requested.
    """
    dial = Dial(cfg.resampling, cfg.run.updates, cfg.sampling.prompts_per_update)
    clock = Clock()
    in_flight: deque[tuple[RoundPlan, PendingRound | None]] = deque()
    admitted = cursor.round

    sync.push(learner)  # never sample with unsynced weights
    evaluator.baseline(learner, sync)
    while in_flight or admitted < len(dial):
        while len(in_flight) <= cfg.resampling.rounds_in_flight and admitted < len(dial):
            plan = dial.plan(admitted)
            recorded = plan.index in ledger  # by the run that this one resumes
            pending = None if recorded else rollout.submit(plan, learner.version)
            in_flight.append((plan, pending))
            admitted += 1

        clock.start()
        plan, pending = in_flight.popleft()
        round_ = into_ledger(plan, pending, cfg, sync, learner, ledger, clock)
        round_ = scored(plan, round_, cfg, learner, ledger, clock)

        needs = cfg.objective.needs
        batches = resampling.batches(plan, round_, cfg.sampling, needs, cfg.run.seed)
        for done, batch in enumerate(batches[cursor.batch :], start=cursor.batch + 1):
            dial.check_lag(learner.version, round_)
            with clock.stage("learn"):
                stats = learner.update(batch)
            tracker.update(stats)
            if evaluator.due(learner.version):
                with clock.stage("evaluate"):
                    sync.push(learner)
                    for evaluation in evaluator.evaluate(learner, sync):
                        tracker.evaluation(evaluation)
            if checkpoints.due(learner.version) or stop.requested:
                for waiting in in_flight:  # so that the checkpoint leaves nothing half-done
                    into_ledger(*waiting, cfg, sync, learner, ledger, clock)
                position = (learner.version, round_.index, done)
                checkpoints.save(learner, Cursor(*position, tracker.position(), drift.state()))
            stop.check(learner.version)
        cursor = Cursor()

        with clock.stage("sync"):
            sync.push(learner)
        measures = gap.measures(round_, cfg.generator.gap) | drift.of(round_)
        tracker.round({"version": round_.version} | measures | clock.record(round_))


def into_ledger(
    plan: RoundPlan,
    pending: PendingRound | None,
    cfg: Config,
    sync: WeightSync,
    learner: RemoteLearner,
    ledger: Ledger,
    clock: Clock,
) -> Round:
    """The round: its sampler proved, its gap corrected, durable before it is learned from."""
    if pending is None or plan.index in ledger:
        return ledger.read(plan.index)
    with clock.stage("wait"):
        round_ = pending.result()  # a dead worker raises here
    with clock.stage("sync"):
        largest = max(sync.prove(version) for version in round_.versions)
    clock.add("sync", sync.seconds)
    with clock.stage("learn"):
        round_ = gap.corrected(plan, replace(round_, logprob_gap=largest), cfg, learner)
    ledger.append(round_)
    return round_


def scored(
    plan: RoundPlan,
    round_: Round,
    cfg: Config,
    learner: RemoteLearner,
    ledger: Ledger,
    clock: Clock,
) -> Round:
    """The round as the reference sees it now that it begins; that is in the ledger, too."""
    version = learner.begin_round(plan.index)
    if version is None or round_.reference_version is not None:
        return round_
    with clock.stage("learn"):
        round_ = replace(round_, reference_version=version)
        round_ = resampling.with_reference(
            plan, round_, cfg.sampling, cfg.objective.needs, cfg.run.seed, learner
        )
    ledger.append_reference(round_)
    return round_
