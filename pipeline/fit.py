"""Do the sections of a config fit the objective they serve? Each misfit is one line."""

from __future__ import annotations

from dataclasses import dataclass

from judges.errors import UserError
from pipeline.pairing import PairingOptions
from pipeline.resampling import ResamplingOptions
from workers.generator import SamplingOptions
from workers.learner.needs import Needs
from workers.learner.objective_options import PdpoOptions
from workers.learner.options import ReferenceOptions, ReferenceSchedule
from workers.learner.pairwise_options import Options, PairwiseOptions


@dataclass(frozen=True, slots=True)
class Served:
    """An objective and the sections that must give it what it needs.

    ``measured``: the measures of drift ask for a reference.
    """

    objective: Options
    sampling: SamplingOptions
    pairing: PairingOptions
    resampling: ResamplingOptions
    reference: ReferenceOptions
    measured: bool
    updates: int

    def check(self, needs: Needs) -> None:
        """Raises UserError where sampling, pairing or reference cannot give what is needed."""
        self._check_pairing(needs)
        self._check_opponent(needs)
        self._check_reference(needs)
        prompts = self.sampling.prompts_per_update
        if needs.mismatched and prompts < 2:
            raise UserError(
                f"sampling.prompts_per_update={prompts}: {self.objective.name} meets completions "
                "with other prompts: it needs at least 2"
            )
        if needs.records == "sampled" or isinstance(self.objective, PdpoOptions):
            self._check_expectation()

    def _check_pairing(self, needs: Needs) -> None:
        pairing, name = self.pairing, self.objective.name
        if needs.records == "ranked" and pairing.strategy != "ranking":
            raise UserError(
                f"pairing.strategy={pairing.strategy}: {name} learns from whole rankings: set "
                "pairing.strategy to ranking"
            )
        if pairing.ties == "keep" and needs.records == "unpaired":
            raise UserError(
                f"pairing.ties=keep: {name} would call one side of a tie desirable, the other not: "
                "set it to drop"
            )
        likelihood = isinstance(self.objective, PairwiseOptions) and self.objective.likelihood
        if pairing.ties == "keep" and likelihood:
            raise UserError(
                f"pairing.ties=keep: {name} raises the likelihood of the chosen, and a tie has "
                "none: set ties to drop, or objective.nll_weight to 0"
            )
        if pairing.strategy == "threshold" and needs.records != "unpaired":
            raise UserError(
                f"pairing.strategy=threshold: labels completions one by one, but {name} needs "
                "pairs: use another strategy, or kto or bco"
            )

    def _check_opponent(self, needs: Needs) -> None:
        n = self.sampling.completions_per_prompt
        if (needs.opponent or needs.records == "sampled") and n != 2:
            raise UserError(
                f"sampling.completions_per_prompt={n}: {self.objective.name} plays one sample of "
                "the policy against one opponent: it needs 2"
            )
        if needs.opponent and self.reference.update != "frozen":
            raise UserError(
                f"reference.update: {self.objective.name} samples from the reference, which "
                "generators hold as the starting model: it must be frozen"
            )

    def _check_reference(self, needs: Needs) -> None:
        update = self.reference.update
        if not isinstance(update, ReferenceSchedule):
            return
        if not (needs.reference or self.measured):
            raise UserError(
                f"reference.update: {self.objective.name} has no reference to update: leave it "
                "out, or set drift.reference to true to measure drift against it"
            )
        span = self.resampling.updates_per_round * self.resampling.passes
        rounds_after_the_first = -(-self.updates // span) - 1
        if rounds_after_the_first < (update.every_rounds or 1):
            raise UserError(
                f"reference.update: run.updates={self.updates} make {rounds_after_the_first + 1:g} "
                "rounds, so the reference would never move: sample more often "
                "(resampling.updates_per_round), or use frozen"
            )

    def _check_expectation(self) -> None:
        """For a loss in expectation over the policy's samples: none may be picked or left out."""
        sampling, pairing, name = self.sampling, self.pairing, self.objective.name
        n = sampling.completions_per_prompt
        if n != 2 and pairing.strategy != "random":
            raise UserError(
                f"sampling.completions_per_prompt={n}: {name} takes an expectation over the "
                "policy's pairs, so they must be drawn at random: use 2, or strategy: random"
            )
        if pairing.ties != "keep" or pairing.min_margin > 0 or sampling.truncated != "train":
            raise UserError(
                f"pairing.ties={pairing.ties}: {name} takes an expectation over all samples: set "
                "pairing.ties to keep, min_margin to 0 and sampling.truncated to train, so that "
                "none is left out"
            )
        weighted = isinstance(self.objective, PdpoOptions) and self.objective.weights != "none"
        if sampling.reshapes and not weighted:
            remedy = "sample at temperature 1 without truncation"
            if isinstance(self.objective, PdpoOptions):
                remedy += ", or set objective.weights to clipped, raw or self_normalized"
            raise UserError(
                f"sampling.{sampling.reshaped_by}: so reshaped, samples are not the policy's own, "
                f"as {name} takes them to be: {remedy}"
            )
