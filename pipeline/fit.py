"""Do the sections of a config fit the objective they serve? Each misfit is one line."""

from __future__ import annotations

from dataclasses import dataclass

from judges.errors import UserError
from pipeline.drift_options import DriftOptions, check_measurable
from pipeline.pairing import PairingOptions
from pipeline.resampling_options import ALL, EarlyOptions, ResamplingOptions
from pipeline.training_prompts import TrainingPrompts
from workers.generator import SamplingOptions
from workers.learner.needs import Needs
from workers.learner.objective_options import PdpoOptions
from workers.learner.options import ReferenceOptions, ReferenceSchedule, is_averaged
from workers.learner.pairwise_options import Options


@dataclass(frozen=True, slots=True)
class Served:
    """An objective and the sections that must give it what it needs.

    ``drift`` may ask for a reference that the objective does without.
    """

    objective: Options
    sampling: SamplingOptions
    pairing: PairingOptions
    resampling: ResamplingOptions
    reference: ReferenceOptions
    drift: DriftOptions
    prompts: TrainingPrompts
    updates: int

    def check(self, needs: Needs) -> None:
        """Raises UserError where sampling, pairing or reference cannot give what is needed."""
        given = self.prompts.pairs is not None
        self._check_reference(needs)
        self._check_drift(needs, given)
        self._check_correction()
        prompts = self.sampling.prompts_per_update
        if needs.mismatched and prompts < 2:
            raise UserError(
                f"sampling.prompts_per_update={prompts}: {self.objective.name} meets completions "
                "with other prompts: it needs at least 2"
            )
        if given:
            self._check_given(needs)
            return
        self._check_replay()
        self._check_early()
        self._check_pairing(needs)
        self._check_opponent(needs)
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
        if pairing.ties == "keep" and self.objective.likelihood:
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
        if not (needs.reference or self.drift.reference):
            raise UserError(
                f"reference.update: {self.objective.name} has no reference to update: leave it "
                "out, or set drift.reference to true to measure drift against it"
            )
        early = self.resampling.early != EarlyOptions() or bool(self.drift.resample)
        if early or self.resampling.adaptive is not None:
            return  # how many rounds there will be is not known
        span = self.resampling.updates_per_round * self.resampling.passes
        rounds_after_the_first = -(-self.updates // span) - 1
        if rounds_after_the_first < (update.every_rounds or 1):
            raise UserError(
                f"reference.update: run.updates={self.updates} make {rounds_after_the_first + 1:g} "
                "rounds, so the reference would never move: sample more often "
                "(resampling.updates_per_round), or use frozen"
            )

    def _check_drift(self, needs: Needs, given: bool) -> None:
        kept = needs.reference or self.drift.reference
        averaged = is_averaged(self.reference)
        check_measurable(self.drift, reference=kept, averaged=averaged, samples=not given)
        update = self.reference.update
        if self.drift.reset and isinstance(update, ReferenceSchedule) and update.every_rounds == 1:
            raise UserError(
                "drift.reset: with reference.update={every_rounds: 1} the reference is the policy "
                "that the round began with: reset to a frozen or an averaged one, or leave it out"
            )

    def _check_replay(self) -> None:
        replay, most = self.resampling.replay, self.resampling.updates_per_round
        if replay == ALL or len(replay) == 1:
            return
        least = most if self.resampling.adaptive is None else self.resampling.adaptive.min
        prompts = min(least, self.updates) * self.sampling.prompts_per_update
        if round(min(replay) * prompts) == 0:
            raise UserError(
                f"resampling.replay={replay}: {min(replay):g} of a round's {prompts:g} prompts is "
                "less than one: raise sampling.prompts_per_update, updates_per_round or the share"
            )

    def _check_early(self) -> None:
        """An effective sample size below one pair there never is."""
        sampling, strategy = self.sampling, self.pairing.strategy
        n = sampling.completions_per_prompt
        of_a_prompt = 1 if strategy in ("best_worst", "best_random", "random") else n * n
        least = 1.0 / (sampling.prompts_per_update * of_a_prompt)
        early, adaptive = self.resampling.early, self.resampling.adaptive
        asked = {
            "early.ess_below": early.ess_below,
            "early.ess_per_token_below": early.ess_per_token_below,
            "adaptive.target": None if adaptive is None else adaptive.target,
        }
        for key, value in asked.items():
            if value is not None and value <= least:
                raise UserError(
                    f"resampling.{key}={value:g}: of {sampling.prompts_per_update} pairs the "
                    f"effective share is at least {least:.2g}: set it above that"
                )

    def _check_correction(self) -> None:
        """Weights are given once, and of importance only to pairs that were drawn at random."""
        objective, correction = self.objective, self.resampling.weights
        key = f"resampling.correction={correction.name}"
        if correction.name == "none":
            return
        if isinstance(objective, PdpoOptions):
            raise UserError(f"{key}: pdpo has weights of its own: set objective.weights instead")
        if correction.name == "wpo" and getattr(objective, "wpo", False):
            raise UserError(f"{key}: objective.wpo weighs every pair already: leave one out")
        n, strategy = self.sampling.completions_per_prompt, self.pairing.strategy
        picks = n != 2 and strategy not in ("random", "threshold")
        if correction.by_importance and picks and self.prompts.pairs is None:
            raise UserError(
                f"{key}: importance weights are of pairs drawn at random, and pairing.strategy="
                f"{strategy} picks from sampling.completions_per_prompt={n}: use 2, or strategy: "
                "random"
            )

    def _check_given(self, needs: Needs) -> None:
        """Of given pairs nothing can be asked that only a sampler gives."""
        name, resampling = self.objective.name, self.resampling
        early = resampling.early != EarlyOptions() or resampling.adaptive is not None
        if early or self.drift.resample:
            keys = "resampling.early, resampling.adaptive and drift.resample"
            raise UserError(f"prompts.pairs: given pairs are never sampled anew: leave out {keys}")
        if needs.records == "sampled" or needs.opponent:
            raise UserError(
                f"prompts.pairs: {name} learns from the policy's own samples: give prompts.path, "
                "or use an objective of pairs"
            )
        if isinstance(self.objective, PdpoOptions) and self.objective.weights == "none":
            raise UserError(
                f"prompts.pairs: {name} takes an expectation over the policy's own pairs, and "
                "these are given: set objective.weights to clipped, raw or self_normalized"
            )
        if self.prompts.behaviour == "reference" and not (needs.reference or self.drift.reference):
            raise UserError(
                f"prompts.behaviour=reference: {name} has no reference: set drift.reference to true"
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
