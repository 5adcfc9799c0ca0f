"""A whole run, from a config to a finished run directory: what the commands and Python call."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from judges.errors import UserError
from pipeline import loop
from pipeline.brake import Brake
from pipeline.checkpoint import Cursor
from pipeline.config import Config, threads_of
from pipeline.drift import Drift
from pipeline.foreign import foreign_pairs
from pipeline.given_pairs import GivenPairs
from pipeline.human_pages import announced, human_table_of
from pipeline.inputs import Inputs, check_inputs
from pipeline.judge_fit import selection_of
from pipeline.launch.crew import judges_of, plan_crew, unwritten_logs
from pipeline.learner import RemoteLearner
from pipeline.ledger import Ledger
from pipeline.model_card import has_policy, write_policy
from pipeline.parts import (
    checkpoints_of,
    evaluator_of,
    judges_with,
    progress_of,
    replicas_of,
    rounds_of,
    start_crew,
)
from pipeline.progress import Progress
from pipeline.replica import Replica
from pipeline.report import Sample
from pipeline.run_directory import (
    CONFIG_FILE,
    create_run_directory,
    driven,
    read_run_config,
    refuse_existing_run,
    write_run_config,
)
from pipeline.staleness import Staleness
from pipeline.stopping import Stop, Stopped
from pipeline.storage import storage_of
from pipeline.sync import WeightSync
from pipeline.tracking import Tracker, metrics
from pipeline.watch import Watch
from workers.learner.options import is_averaged

if TYPE_CHECKING:
    from judges.human.table import HumanTable

SAMPLES_SHOWN = 3

MAY_CHANGE = ("judge.budget", "drift.stop", "drift.warn", "cluster.")
"""What a resumed run may be told anew: it changes no number of the run up to there."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run: its directory, the last evaluation's record of each judge, some samples.

    ``run_dir`` is the directory here and ``place`` where it lasts: the same path, or a URL.
    ``human``: what people said of that evaluation's pairs, where they were asked.
    """

    run_dir: Path
    place: str
    evaluations: list[dict[str, Any]]
    samples: list[Sample]
    human: HumanTable | None = None


def run(cfg: Config, *, quiet: bool = False) -> RunResult:
    """Start a new run and see it through.

    Raises UserError for the user's mistakes before anything is written, Stopped when it was asked
    to stop (``resume`` goes on from there).
    """
    refuse_existing_run(cfg.run_place)
    inputs = check_inputs(cfg)
    cfg = settled(cfg)
    generator, learner = threads_of(cfg, cores())
    threads = {"generator": generator, "learner": learner}
    with driven(cfg) as notes:
        storage_of(cfg).prepare()
        return _run(cfg, inputs, threads, notes, True, quiet)


def settled(cfg: Config) -> Config:
    """The config with the backend that auto stands for: a resumed run goes on with the same."""
    backend = cfg.generator.backend_for(cfg.needs)
    generator = cfg.generator.model_copy(update={"backend": backend})
    return cfg.model_copy(update={"generator": generator})


def resume(run_dir: str | Path, overrides: Sequence[str] = (), *, quiet: bool = False) -> RunResult:
    """Go on with a run that stopped or was killed: same losses and weights as uninterrupted.

    Rounds that reached the ledger are reused; metrics are cut back to the checkpoint.
    ``overrides`` of what stopped it, or of where it runs (``MAY_CHANGE``), are kept in the run's
    config; UserError for any other, and where another process is at it.
    """
    for override in overrides:
        if not override.startswith(MAY_CHANGE):
            raise UserError(
                f"{override}: a run goes on as it began; only judge.budget, drift.stop, "
                "drift.warn and cluster may change: start another run for anything else"
            )
    cfg, recorded = read_run_config(run_dir, overrides)
    with driven(cfg) as notes:
        storage_of(cfg).fetch()
        if overrides:
            write_run_config(cfg, recorded)
        if has_policy(cfg):
            raise UserError(f"{run_dir}: this run is finished; its policy is in {run_dir}/policy")
        return _run(cfg, check_inputs(cfg), recorded["threads"], notes, False, quiet)


def evaluate(cfg: Config, *, say: Callable[[str], object] = print) -> RunResult:
    """Compare a finished run's policy with its starting model on fresh held-out samples.

    ``say`` is told where people who judge find their page. Raises UserError if the run has no
    policy yet or its config no held-out prompts.
    """
    run = cfg.run_place
    policy = storage_of(cfg).seen_as(cfg.run_dir / "policy")
    if not has_policy(cfg):
        raise UserError(f"{run}: no policy yet; `freshpairs resume {run}` first")
    if cfg.evaluation.prompts is None:
        raise UserError("evaluation.prompts=null: name the held-out prompts to evaluate on")
    inputs = check_inputs(cfg)
    generator, learner_threads = threads_of(cfg, cores())
    with start_crew(cfg, plan_crew(cfg, generator, learner_threads), say) as crew:
        learner = RemoteLearner(crew.learner)
        replicas = replicas_of(cfg, crew, inputs, say)
        judges = judges_with(cfg, crew, inputs)
        judges.check(inputs.held_out[:1])
        sync = WeightSync([*replicas, *judges.given_weights], inputs.probe_ids())
        directory = cfg.run_dir / "evaluations" / f"{datetime.now():%Y%m%d-%H%M%S}"
        evaluator = evaluator_of(cfg, judges, replicas, inputs.held_out, directory)
        sync.push(learner)
        evaluator.baseline(learner, sync)
        learner.adopt(cfg.policy.model_copy(update={"model": policy}), cfg.run.updates)
        sync.push(learner)
        with announced(judges_of(cfg), cfg.run_dir, say):
            records = evaluator.evaluate(learner, sync)
    if cfg.reference.update != "frozen":  # this learner's is the starting model, not the run's last
        nothing = {"kl_to_reference": None, "kl_per_token": None}
        records = [record | nothing for record in records]
    samples = evaluator.samples(cfg.run.updates, SAMPLES_SHOWN)
    people = human_table_of(judges_of(cfg), cfg.run_dir, evaluator.compared)
    return RunResult(cfg.run_dir, run, records, samples, people)


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0))


def _run(
    cfg: Config,
    inputs: Inputs,
    threads: dict[str, int],
    notes: Sequence[str],
    new: bool,
    quiet: bool,
) -> RunResult:
    plan = plan_crew(cfg, threads["generator"], threads["learner"])
    with ExitStack() as stack:
        stack.push(_say_how_to_resume(cfg))
        progress = stack.enter_context(progress_of(cfg, quiet))
        progress.say(f"starting {len(plan.workers)} workers ({cfg.cluster.address}) …")
        stack.enter_context(announced(judges_of(cfg), cfg.run_dir, progress.say))
        crew = stack.enter_context(start_crew(cfg, plan, progress.say))
        judges = judges_with(cfg, crew, inputs)
        sampled = [] if cfg.prompts.pairs else inputs.first_prompts()
        compares = judges.check(sampled + inputs.held_out[:1])
        selection = selection_of(cfg, compares, len(inputs.held_out), crew.learner)
        learner, storage = RemoteLearner(crew.learner), storage_of(cfg)
        storage.check_seen_by(learner)
        if new:
            create_run_directory(cfg, threads)
        for note in (*notes, *learner.notes()):
            progress.say(note)

        drift = Drift(is_averaged(cfg.reference), inputs.probes)
        stop = Stop(cfg.run_place)
        replicas = replicas_of(cfg, crew, inputs, progress.say, stop)
        listeners = [progress, *crew.listeners(replicas)]
        tracker = Tracker(cfg.run_dir, cfg.tracking, listeners, storage)
        stack.callback(tracker.close)
        checkpoints = checkpoints_of(cfg)
        cursor = checkpoints.restore(learner)
        watch = Watch(Staleness(cfg.resampling.early), Brake(cfg.drift))
        _go_back(cursor, drift, watch, tracker)
        if cursor.update:
            progress.say(f"resumed after update {cursor.update}")
        evaluations = cfg.run_dir / "evaluations"
        evaluator = evaluator_of(cfg, judges, replicas, inputs.held_out, evaluations)
        sync = WeightSync([*replicas, *judges.given_weights], inputs.probe_ids())
        if isinstance(inputs.prompts, GivenPairs):
            _say_of_given_pairs(cfg, inputs, inputs.prompts, replicas, learner, sync, progress)
        stack.enter_context(stop)
        loop.run(
            cfg,
            rollout=rounds_of(cfg, inputs.prompts, replicas, judges, selection),
            learner=learner,
            sync=sync,
            ledger=Ledger(cfg.run_dir / "ledger", storage),
            drift=drift,
            watch=watch,
            tracker=tracker,
            checkpoints=checkpoints,
            evaluator=evaluator,
            stop=stop,
            cursor=cursor,
        )
        write_policy(cfg, learner, inputs.tokenizer)
        for note in unwritten_logs(plan):
            progress.say(note)
    samples = evaluator.samples(cfg.run.updates, SAMPLES_SHOWN)
    people = human_table_of(judges_of(cfg), cfg.run_dir, evaluator.compared)
    records = last_evaluations(cfg.run_dir)
    return RunResult(cfg.run_dir, cfg.run_place, records, samples, people)


def _say_of_given_pairs(
    cfg: Config,
    inputs: Inputs,
    pairs: GivenPairs,
    replicas: Sequence[Replica],
    learner: RemoteLearner,
    sync: WeightSync,
    progress: Progress,
) -> None:
    """How many there are, what was left out, and whether the policy would say such things."""
    left_out = ", ".join(f"{count} {reason}" for reason, count in pairs.left_out.items())
    kind = "labelled completions" if pairs.unpaired else "pairs"
    progress.say(f"{pairs.rows} given {kind}" + (f" (left out: {left_out})" if left_out else ""))
    if learner.version or cfg.objective.name == "sft":
        return
    sync.push(learner)
    context = inputs.context
    if note := foreign_pairs(pairs, replicas, learner, cfg.sampling, context, cfg.run.seed):
        progress.say(note)


def _say_how_to_resume(cfg: Config) -> Callable[..., None]:
    """On the way out of a failed run: what was written, and how to go on from it."""

    def exit_(kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        expected = isinstance(error, UserError | Stopped) or not isinstance(error, Exception)
        if error is not None and not expected and (cfg.run_dir / CONFIG_FILE).is_file():
            run = cfg.run_place
            error.add_note(f"nothing is lost: `freshpairs resume {run}` goes on from here")

    return exit_


def _go_back(cursor: Cursor, drift: Drift, watch: Watch, tracker: Tracker) -> None:
    tracker.cut(cursor.metrics_bytes)
    if cursor.drift is not None and cursor.watch is not None:
        drift.load(cursor.drift)
        watch.load(cursor.watch)


def last_evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """The newest evaluation record of each judge."""
    found = [record for record in metrics(run_dir) if record["kind"] == "evaluation"]
    return list({record["judge"]: record for record in found}.values())
