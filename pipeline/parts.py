"""The parts of a run, each built from its config: what the job puts together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from rich.console import Console

from judges.errors import UserError
from pipeline.checkpoint import Checkpoints
from pipeline.config import Config
from pipeline.evaluate import Evaluator
from pipeline.fleet import Fleet
from pipeline.given_pairs import GivenPairs
from pipeline.given_rounds import GivenRounds
from pipeline.inputs import Inputs, pairing_of
from pipeline.judge_fit import evaluating_judges
from pipeline.judging import Judges
from pipeline.launch.crew import Crew, CrewPlan, Say, judges_of
from pipeline.progress import Progress
from pipeline.prompts import PromptStream
from pipeline.replica import Replica
from pipeline.rollout import Rollout, RoundSource, UnitSize
from pipeline.selection import Selection
from pipeline.stopping import Stop
from pipeline.storage import storage_of
from workers.messages import Prompt


def checkpoints_of(cfg: Config) -> Checkpoints:
    """The run's checkpoints."""
    directory, options = cfg.run_dir / "checkpoints", cfg.checkpoint
    return Checkpoints(directory, options.every, options.keep, storage_of(cfg))


def start_crew(cfg: Config, plan: CrewPlan, say: Say) -> AbstractContextManager[Crew]:
    """The workers, as ``cluster.address`` asks; ``say`` is told what they wait for.

    Raises UserError for what is planned and not built: a learner of several processes.
    """
    if plan.learner_processes > 1:
        raise UserError(
            f"learner.workers={plan.learner_processes}: a run has one learner process as yet; "
            "`freshpairs plan` shows what more of them would need: set learner.workers=1"
        )
    if cfg.cluster.address == "inline":
        from pipeline.launch.inline import inline_crew

        return inline_crew(plan)
    from pipeline.launch.ray import ray_crew

    return ray_crew(plan, cfg.cluster.address, cfg.cluster.wait_minutes, say)


def progress_of(cfg: Config, quiet: bool) -> Progress:
    """What tells a person how the run goes; nothing where ``quiet``."""
    return Progress(
        name=cfg.run.name,
        model=cfg.policy.model,
        objective=cfg.objective.name,
        settings=cfg.objective.settings,
        judge=cfg.judge.title,
        run_dir=cfg.run_place,
        updates=cfg.run.updates,
        done=checkpoints_of(cfg).latest_update(),
        console=Console(quiet=True) if quiet else None,
    )


def replicas_of(
    cfg: Config, crew: Crew, inputs: Inputs, say: Say, stop: Stop | None = None
) -> list[Replica]:
    """The generators, as they are mended when they fail, or stand in for each other.

    ``say`` is told of those that leave and join, where they may; ``stop`` ends the waiting for one.
    """
    limit = cfg.generator.gap_limit(cfg.policy)
    probe_ids = inputs.probe_ids()
    replicas = [Replica(i, handle, probe_ids, limit) for i, handle in enumerate(crew.generators)]
    if cfg.generator.min_replicas is not None:
        Fleet(replicas, say, stop or Stop(cfg.run_place))
    return replicas


def judges_with(cfg: Config, crew: Crew, inputs: Inputs) -> Judges:
    """The judge workers, as they are replaced when they die or hang."""
    limit, probe_ids = cfg.generator.gap_limit(cfg.policy), inputs.probe_ids()
    return Judges(
        [Replica(i, h, probe_ids, limit, kind="judge") for i, h in enumerate(crew.judges)],
        crew.learner,
        judges_of(cfg),
        in_one_process=cfg.cluster.address == "inline",
    )


def rounds_of(
    cfg: Config,
    prompts: PromptStream | GivenPairs,
    replicas: Sequence[Replica],
    judges: Judges,
    selection: Selection,
) -> RoundSource:
    """Where the run's rounds come from: the policy, or the given pairs."""
    if isinstance(prompts, GivenPairs):
        return GivenRounds(prompts)
    return Rollout(
        prompts,
        replicas,
        judges,
        selection,
        pairing_of(cfg),
        judge_name=cfg.judge.title,
        second_judge=None if cfg.judge.second is None else cfg.judge.second.title,
        reference_shares=reference_shares(cfg),
        unit_size=unit_size(cfg, cfg.sampling.prompts_per_update),
        max_invalid_share=cfg.judge.max_invalid_share,
        in_flight_updates=cfg.generator.in_flight_updates,
        rest_between_rounds=rests(cfg),
        run_seed=cfg.run.seed,
    )


def unit_size(cfg: Config, fixed: int) -> UnitSize:
    """How a round is cut into calls of the generators."""
    if cfg.generator.backend_for(cfg.needs) == "vllm":
        return UnitSize(replicas=cfg.generator.replicas)
    return UnitSize(fixed)


def rests(cfg: Config) -> bool:
    """Whether generators give their GPU's memory back after a round, while the learner learns."""
    waits = cfg.resampling.rounds_in_flight == 0
    return waits and bool(cfg.generator.engine.get("enable_sleep_mode"))


def reference_shares(cfg: Config) -> list[float]:
    """Whose each sample of a prompt is: the second may be an opponent's (XPO, Nash-MD)."""
    own = [0.0] * cfg.sampling.completions_per_prompt
    opponent = cfg.needs.opponent
    return [*own[:-1], opponent] if opponent else own


def evaluator_of(
    cfg: Config,
    judges: Judges,
    replicas: Sequence[Replica],
    held_out: Sequence[Prompt],
    directory: Path,
) -> Evaluator:
    """An evaluator by the run's training judge and the others, that writes to ``directory``."""
    return Evaluator(
        held_out,
        replicas,
        judges,
        evaluating_judges(cfg),
        directory,
        every=cfg.evaluation.every,
        updates=cfg.run.updates,
        unit_size=unit_size(cfg, max(64, cfg.sampling.prompts_per_update)),
        run_seed=cfg.run.seed,
        reference_moves=cfg.reference.update != "frozen",
        storage=storage_of(cfg),
    )
