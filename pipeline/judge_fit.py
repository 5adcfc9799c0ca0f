"""Does a config's judge fit the rest of it? Each misfit is one line, before anything is started."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import TYPE_CHECKING

from judges.budget import BudgetOptions
from judges.errors import UserError
from judges.model_clients import PolicyClientOptions
from judges.options import AUTO, OFF, AskOptions, is_implicit
from pipeline.handles import Handle
from pipeline.human_pages import people_of
from pipeline.resampling import Dial, whole_run
from pipeline.resampling_options import EarlyOptions
from pipeline.selection import Selection
from workers.learner.objective_options import PdpoOptions
from workers.places import is_url

if TYPE_CHECKING:
    from pipeline.config import Config


def check_judge(cfg: Config) -> None:
    """Raises UserError where the judge and another section do not go together."""
    judge, strategy = cfg.judge, cfg.pairing.strategy
    if judge.link != "hard" and strategy in ("ranking", "threshold"):
        raise UserError(
            f"judge.link={judge.link}: pairing.strategy={strategy} goes by the scores themselves: "
            "leave the link out"
        )
    _check_titles(cfg)
    _check_implicit(cfg)
    _check_human(cfg)
    _check_budget(cfg)
    has_reference = cfg.objective.needs.reference or cfg.drift.reference
    by_margin = judge.select == "uncertainty" and not judge.select_by
    implicit = any(is_implicit(asked) for asked in (judge, *cfg.evaluation.judges))
    if not has_reference and (by_margin or implicit):
        raise UserError(
            f"drift.reference=false: {cfg.objective.name} needs no reference, but "
            f"{'judge.select=uncertainty' if by_margin else 'the implicit reward'} does: set it to "
            "true" + (", or name judges in judge.select_by" if by_margin else "")
        )
    whole = cfg.objective.needs.records == "sampled" or isinstance(cfg.objective, PdpoOptions)
    if judge.select == "uncertainty" and whole:
        raise UserError(
            f"judge.select=uncertainty: {cfg.objective.name} takes an expectation over the "
            "policy's samples, and picking some biases it: use random"
        )
    if judge.select == "uncertainty" and cfg.resampling.weights.by_importance:
        raise UserError(
            f"judge.select=uncertainty: resampling.correction={cfg.resampling.correction} takes "
            "pairs to be drawn at random, and picking some biases it: use random"
        )
    unknown = cfg.resampling.early != EarlyOptions() or cfg.resampling.adaptive is not None
    if judge.select is not None and (unknown or cfg.drift.resample or cfg.drift.reset):
        raise UserError(
            f"judge.select={judge.select}: spreads the labels over the run's prompts, and rounds "
            "that end early or adapt leave their number open: leave out resampling.early and "
            "adaptive, drift.resample and reset, or select"
        )
    if isinstance(judge.client, PolicyClientOptions) and cfg.generator.in_flight_updates:
        raise UserError(
            "judge.client.kind=policy: with generator.in_flight_updates no version is a round's "
            "own: set that to false"
        )


def _check_implicit(cfg: Config) -> None:
    """The policy in training is asked by the learner, which keeps no limits, budget or cache."""
    beside = [*cfg.judge.select_by, *([] if cfg.judge.second is None else [cfg.judge.second])]
    if any(is_implicit(judge) for judge in beside):
        raise UserError(
            "judge.second, judge.select_by: the policy in training cannot judge beside another: "
            "give implicit_reward a policy and a reference of its own, or leave it out"
        )
    for judge in (cfg.judge, *cfg.evaluation.judges):
        if not is_implicit(judge):
            continue
        beta = judge.args.get("beta", 0.1)
        if not isinstance(beta, int | float) or isinstance(beta, bool) or not 0 < beta < inf:
            raise UserError(f"judge.args.beta={beta}: must be a number above 0")
        for name in judge.args:
            if name != "beta":
                raise UserError(
                    f"judge.args.{name}: the policy in training takes beta alone: leave it out, or "
                    "give implicit_reward a policy and a reference"
                )
        plain = type(judge)(name=judge.name, args=judge.args, alias=judge.alias)
        free = {"link", "link_temperature", "max_invalid_share", "replicas", "gpus", "threads"}
        for name in type(judge).model_fields:
            if name not in free and getattr(judge, name) != getattr(plain, name):
                raise UserError(
                    f"judge.{name}: the policy in training is asked by the learner, without it: "
                    "leave it out"
                )


def _check_human(cfg: Config) -> None:
    """What people said must last: object storage holds no SQLite file."""
    beside = [*cfg.judge.select_by, *([] if cfg.judge.second is None else [cfg.judge.second])]
    for judge in (cfg.judge, *beside, *cfg.evaluation.judges):
        if is_url(cfg.run_place) and any("store" not in one.args for one in people_of(judge)):
            raise UserError(
                f"judge.args.store: not set, and run.dir={cfg.run_place} cannot hold what people "
                "say: give the human judge a file on a disk that lasts"
            )


def _check_budget(cfg: Config) -> None:
    """What was spent must be known to every judge worker, and to a run that goes on elsewhere."""
    budgeted = cfg.judge.budget != BudgetOptions()
    if budgeted and is_url(cfg.run_place) and cfg.judge.cache in (AUTO, OFF):
        raise UserError(
            f"judge.cache={cfg.judge.cache}: judge.budget is counted in its file, and "
            f"run.dir={cfg.run_place} holds none: give judge.cache a path that every judge worker "
            "sees, on a disk that lasts"
        )


def _check_titles(cfg: Config) -> None:
    """Two judges of one title must be the same judge."""
    second = [] if cfg.judge.second is None else [cfg.judge.second]
    sections = {
        "judge.second": second,
        "judge.select_by": cfg.judge.select_by,
        "evaluation.judges": cfg.evaluation.judges,
    }
    titles: dict[str, tuple[object, ...]] = {cfg.judge.title: _asked(cfg.judge)}
    for section, judge in ((name, one) for name, several in sections.items() for one in several):
        same = judge.title in titles and (_is_bare(judge) or titles[judge.title] == _asked(judge))
        if judge.title in titles and not same:
            raise UserError(f"{section}: {judge.title} stands for two judges: give one an alias")
        titles.setdefault(judge.title, _asked(judge))


def _is_bare(judge: AskOptions) -> bool:
    """Whether it is a name and nothing else, also when a kept config spells the rest out."""
    return judge.model_copy(update={"alias": None}).model_dump() == (
        AskOptions(name=judge.name).model_dump()
    )


def _asked(judge: AskOptions) -> tuple[object, ...]:
    return (judge.name, judge.args, judge.client)


def evaluating_judges(cfg: Config) -> list[str]:
    """The titles of the judges that evaluate: the training judge, then the others."""
    titles = [cfg.judge.title, *(judge.title for judge in cfg.evaluation.judges)]
    return list(dict.fromkeys(titles))


def selection_of(
    cfg: Config, compares: Mapping[str, bool], held_out: int, learner: Handle
) -> Selection:
    """Which prompts are judged, so that ``judge.budget.labels`` lasts for the whole run.

    ``compares`` tells of each judge's shape, ``held_out`` how many prompts it evaluates on. Raises
    UserError where evaluation alone uses the budget up.
    """
    judge, n = cfg.judge, cfg.sampling.completions_per_prompt
    dial = Dial(cfg.resampling, cfg.run.updates, cfg.sampling.prompts_per_update, cfg.run.seed)
    prompts = sum(plan.prompts for plan in whole_run(dial))
    judged = prompts
    if judge.select is not None and judge.budget.labels is not None:
        pairwise = compares[judge.title]
        every = cfg.evaluation.every
        due = set(range(0, cfg.run.updates, every)) - {0} if every else set()
        evaluations = len(due | {cfg.run.updates}) * held_out * (1 if pairwise else 2)
        left = judge.budget.labels - evaluations
        judged = left // (n * (n - 1) // 2 if pairwise else n)
        if judged < 1:
            raise UserError(
                f"judge.budget.labels={judge.budget.labels}: evaluation takes {evaluations} of "
                "them, and no prompt's worth is left to learn from: raise it, or evaluate on fewer "
                "prompts (evaluation.count) or less often (evaluation.every)"
            )
    by = tuple(other.title for other in judge.select_by)
    return Selection(judge.select, judged, prompts, by, learner, cfg.run.seed)
