"""The gap between a generator's log-probabilities and the learner's: measured and corrected."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipeline.config import Config
from pipeline.learner import RemoteLearner
from pipeline.ledger import Ledger
from pipeline.lesson import Lesson, earlier_groups, terms_of
from pipeline.resampling import RoundPlan
from workers.generator import GapOptions
from workers.messages import Completion, Round


def corrected(
    plan: RoundPlan, round_: Round, cfg: Config, learner: RemoteLearner, ledger: Ledger
) -> Round:
    """The round with the learner's own log-probabilities where its gap is above the limit.

    The learner must be at the version that sampled it: at lag 0 the policy's log-probabilities in
    an update are then those recorded, to the bit. ``sampling_logprobs`` stay the generator's.
    """
    limit = cfg.generator.gap.correct_above
    if limit is None or round_.logprob_gap is None or round_.logprob_gap <= limit:
        return round_
    earlier = earlier_groups(plan, ledger, cfg.run.seed, None)
    lesson = Lesson(plan, round_, earlier, terms_of(cfg))
    scores = lesson.scored_once(learner.score_policy)

    def correct(completion: Completion) -> Completion:
        own = scores[completion.position, completion.sample]
        difference = np.subtract(own, completion.logprobs, dtype=np.float64)
        return replace(completion, logprobs=own, gap_log_weight=float(difference.sum()))

    return round_.with_completions(correct)


def measures(round_: Round, options: GapOptions) -> dict[str, float | None]:
    """The round record's ``logprob_gap`` in nats a token and ``gap_weight``.

    That is the mean of exp(gap_log_weight), at most the clip where losses are weighed by it, over
    the policy's own completions: 1 is no gap, None a round that was not corrected.
    """
    own = [c.gap_log_weight for c in round_.completions if not c.reference_share]
    log_weights = np.array([weight for weight in own if weight is not None], np.float64)
    clip = np.inf if options.weight_clip is None else options.weight_clip
    with np.errstate(over="ignore"):  # e^710 and more is recorded as null, as any infinity
        weights = np.minimum(np.exp(log_weights), clip)
    gap_weight = float(weights.mean()) if len(weights) else None
    return {"logprob_gap": round_.logprob_gap, "gap_weight": gap_weight}
