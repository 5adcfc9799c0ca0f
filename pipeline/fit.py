"""Do the sections of a config fit the objective they serve? Each misfit is one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from judges.errors import UserError
from workers.learner.objective_options import Needs, PdpoOptions
from workers.learner.options import ReferenceSchedule

if TYPE_CHECKING:
    from pipeline.config import Config


def check(cfg: Config, needs: Needs) -> None:
    """Raises UserError where sampling, pairing or reference cannot give what is needed."""
    _check_pairing(cfg, needs)
    _check_opponent(cfg, needs)
    _check_reference(cfg, needs)
    if needs.mismatched and cfg.sampling.prompts_per_update < 2:
        raise UserError(
            f"sampling.prompts_per_update={cfg.sampling.prompts_per_update}: "
            f"{cfg.objective.name} meets completions with other prompts: it needs at least 2"
        )
    if isinstance(cfg.objective, PdpoOptions):
        _check_pdpo(cfg, cfg.objective)


def _check_pairing(cfg: Config, needs: Needs) -> None:
    strategy = cfg.pairing.strategy
    if needs.records == "ranked" and strategy != "ranking":
        raise UserError(
            f"pairing.strategy={strategy}: {cfg.objective.name} learns from whole rankings: "
            "set pairing.strategy to ranking"
        )
    if needs.records == "ranked" and cfg.pairing.max_pairs is not None:
        raise UserError("pairing.max_pairs: would tear rankings apart: set it to null")
    if needs.records == "ranked" and cfg.pairing.ties != "drop":
        raise UserError("pairing.ties=keep: a ranking has no ties: set it to drop")
    if strategy == "threshold" and needs.records != "unpaired":
        raise UserError(
            "pairing.strategy=threshold: labels completions one by one, but "
            f"{cfg.objective.name} needs pairs: use another strategy, or kto or bco"
        )


def _check_opponent(cfg: Config, needs: Needs) -> None:
    n = cfg.sampling.completions_per_prompt
    if (needs.opponent or needs.records == "sampled") and n != 2:
        raise UserError(
            f"sampling.completions_per_prompt={n}: {cfg.objective.name} plays one sample of the "
            "policy against one opponent: it needs 2"
        )
    if needs.opponent and cfg.reference.update != "frozen":
        raise UserError(
            f"reference.update: {cfg.objective.name} samples from the reference, which generators "
            "hold as the starting model: it must be frozen"
        )


def _check_reference(cfg: Config, needs: Needs) -> None:
    update = cfg.reference.update
    if not isinstance(update, ReferenceSchedule):
        return
    if not (needs.reference or cfg.drift.reference):
        raise UserError(
            f"reference.update: {cfg.objective.name} has no reference to update: leave it out, or "
            "set drift.reference to true to measure drift against it"
        )
    span = cfg.resampling.updates_per_round * cfg.resampling.passes
    rounds_after_the_first = -(-cfg.run.updates // span) - 1
    if rounds_after_the_first < (update.every_rounds or 1):
        raise UserError(
            f"reference.update: run.updates={cfg.run.updates} make {rounds_after_the_first + 1:g} "
            "rounds, so the reference would never move: sample more often "
            "(resampling.updates_per_round), or use frozen"
        )


def _check_pdpo(cfg: Config, pdpo: PdpoOptions) -> None:
    n, strategy = cfg.sampling.completions_per_prompt, cfg.pairing.strategy
    if n != 2 and strategy != "random":
        raise UserError(
            f"sampling.completions_per_prompt={n}: pdpo takes an expectation over the policy's "
            "pairs, so they must be drawn at random: use 2, or pairing.strategy: random"
        )
    sampling = cfg.sampling
    reshaped = sampling.temperature != 1.0 or sampling.top_p < 1.0 or sampling.top_k is not None
    if reshaped and pdpo.weights == "none":
        raise UserError(
            f"objective.weights=none: with sampling.temperature={sampling.temperature:g}, top_p or "
            "top_k the samples are not the policy's own: set weights to clipped, raw or "
            "self_normalized, or sample at temperature 1 without truncation"
        )
