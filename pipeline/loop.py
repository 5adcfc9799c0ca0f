"""The loop: sample, judge, learn, sync. Everything else serves this file."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from pipeline import gap
from pipeline.checkpoint import Checkpoints, Cursor
from pipeline.clock import Clock
from pipeline.config import Config
from pipeline.drift import Drift
from pipeline.evaluate import Evaluator
from pipeline.learner import RemoteLearner
from pipeline.ledger import Ledger
from pipeline.lesson import Lesson, earlier_groups, terms_of
from pipeline.resampling import Dial, RoundPlan
from pipeline.rollout import Pending, RoundSource
from pipeline.stopping import Stop
from pipeline.sync import WeightSync
from pipeline.tracking import Tracker
from pipeline.watch import Watch
from workers.messages import Round


def run(
    cfg: Config,
    rollout: RoundSource,
    learner: RemoteLearner,
    sync: WeightSync,
    ledger: Ledger,
    drift: Drift,
    watch: Watch,
    tracker: Tracker,
    checkpoints: Checkpoints,
    evaluator: Evaluator,
    stop: Stop,
    cursor: Cursor,
) -> None:
    """Online preference optimisation, from ``cursor`` to update ``cfg.run.updates``.

    ``resampling.rounds_in_flight: 0`` waits for each round; more overlap sampling and judging with
    learning; ``updates_per_round: .inf`` samples once. Raises Stopped, after a checkpoint, when
    ``stop`` was requested or drift has gone past a threshold that stops.
    """
    dial = Dial(cfg.resampling, cfg.run.updates, cfg.sampling.prompts_per_update, cfg.run.seed)
    clock = Clock()
    begun = deque(cursor.rounds)
    in_flight: deque[tuple[RoundPlan, Pending | None]] = deque()
    if cursor.dial is not None:
        dial.load(cursor.dial)

    def keep(plan: RoundPlan, done: int) -> None:
        """Write a checkpoint that leaves nothing half-done; end here where that was asked for."""
        for waiting in in_flight:
            into_ledger(*waiting, cfg, sync, learner, ledger, clock)
        rounds = (plan, *(waiting for waiting, _ in in_flight))
        states = (dial.state(), drift.state(), watch.state())
        checkpoints.save(
            learner, Cursor(learner.version, done, tracker.position(), rounds, *states)
        )
        stop.check(learner.version)

    sync.push(learner)  # never sample with unsynced weights
    evaluator.baseline(learner, sync)
    while True:
        clock.start()
        while len(in_flight) <= cfg.resampling.rounds_in_flight:
            admitted = begun.popleft() if begun else dial.admit()
            if admitted is None:
                break
            recorded = admitted.index in ledger  # by the run that this one resumes
            pending = None if recorded else rollout.submit(admitted, learner, sync)
            in_flight.append((admitted, pending))
        if not in_flight:
            return

        plan, pending = in_flight.popleft()
        round_ = into_ledger(plan, pending, cfg, sync, learner, ledger, clock)
        lesson = begin(plan, round_, cfg, learner, ledger, clock)
        with clock.stage("learn"):
            panel = drift.of(lesson.round_, learner.score_policy)
        panel |= gap.measures(round_, cfg.generator.gap)
        watch.begin(lesson.round_, panel)
        done, cursor = cursor.batch, Cursor()
        if stop.brake(watch.stops):
            keep(plan, done)
        for batch in lesson.batches()[done:]:
            if watch.ended:
                break
            dial.check_lag(learner.version, round_)
            with clock.stage("learn"):
                stats = learner.reset() if watch.resets else learner.update(batch)
            done += 1
            tracker.update(stats)
            watch.update(stats, learner.version)
            if evaluator.due(learner.version):
                with clock.stage("evaluate"):
                    sync.push(learner)
                    for evaluation in evaluator.evaluate(learner, sync):
                        tracker.evaluation(evaluation)
            if stop.brake(watch.stops) or checkpoints.due(learner.version):
                keep(plan, done)

        dial.ended(plan, done, watch.ages)
        told = watch.record(lesson, done) | clock.record(round_)
        tracker.round({"version": round_.version} | panel | told)


def into_ledger(
    plan: RoundPlan,
    pending: Pending | None,
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
    if not round_.given:
        with clock.stage("sync"):
            largest = max(sync.prove(version) for version in round_.versions)
        clock.add("sync", sync.seconds)
        with clock.stage("learn"):
            round_ = replace(round_, logprob_gap=largest)
            round_ = gap.corrected(plan, round_, cfg, learner, ledger)
    ledger.append(round_)
    return round_


def begin(
    plan: RoundPlan,
    round_: Round,
    cfg: Config,
    learner: RemoteLearner,
    ledger: Ledger,
    clock: Clock,
) -> Lesson:
    """The round as a lesson, with what the reference says of it now that it begins.

    That is in the ledger, too; what it says anew of earlier rounds is not.
    """
    version = learner.begin_round(plan.index)
    earlier = earlier_groups(plan, ledger, cfg.run.seed, version)
    lesson = Lesson(plan, round_, earlier, terms_of(cfg))
    if version is None:
        return lesson
    with clock.stage("learn"):
        lesson = lesson.with_reference(learner)
    if round_.reference_version is None:
        lesson = replace(lesson, round_=replace(lesson.round_, reference_version=version))
        ledger.append_reference(lesson.round_)
    return lesson.by_the_reference() if cfg.prompts.behaviour == "reference" else lesson
