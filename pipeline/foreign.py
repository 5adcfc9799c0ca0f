"""Are given pairs what the policy would say? Offline training of foreign pairs goes astray."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.given_pairs import GivenPairs
from pipeline.learner import RemoteLearner
from pipeline.replica import Replica
from workers.generator import SampleRequest, SamplingOptions
from workers.messages import BatchCompletion, Completion, PromptGroup, UpdateBatch

PROMPTS = 64
"""Prompts of the set, the first, that the policy completes to compare."""

TOO_MANY = 0.5
"""Share of chosen completions below the policy's own band from which on the pairs look foreign."""


def foreign_pairs(
    pairs: GivenPairs,
    replicas: Sequence[Replica],
    learner: RemoteLearner,
    sampling: SamplingOptions,
    context: int,
    run_seed: int,
) -> str | None:
    """What a user should know if the chosen completions are unlike the policy's own; else None.

    Compared is the mean log-probability a token under the policy, on the same prompts, with what
    the policy itself writes there at temperature 1, where that fits into the ``context`` in tokens.
    The generators must hold the learner's version.
    """
    room = context - sampling.max_new_tokens
    groups = [g for g in pairs.first(PROMPTS, learner.version) if len(g.prompt.ids) <= room]
    chosen = [(group, completion) for group in groups for completion in _preferred(group)]
    if not chosen:
        return None
    batch = UpdateBatch(tuple(BatchCompletion(g.prompt.ids, c) for g, c in chosen), ())
    given = np.array([np.mean(row, dtype=np.float64) for row in learner.score_policy([batch])[0]])
    plain = SamplingOptions(
        prompts_per_update=sampling.prompts_per_update, max_new_tokens=sampling.max_new_tokens
    )
    prompts = tuple(group.prompt for group in groups)
    request = SampleRequest(prompts, 1, run_seed, "foreign", (0.0,), sampling=plain)
    own = [completion for (completion,) in replicas[0].sample(request).result().completions]
    means = np.array([np.mean(c.logprobs, dtype=np.float64) for c in own])
    low = float(np.percentile(means, 1.0))
    unlikely = float(np.mean(given < low))
    if unlikely <= TOO_MANY:
        return None
    return (
        f"the given pairs look foreign to the policy: {unlikely:.0%} of their chosen completions "
        f"are less likely, token for token, than 99 % of its own ({given.mean():.2f} against "
        f"{means.mean():.2f} nats a token). Offline training then moves it where nothing is "
        "judged: first train on the chosen side with `freshpairs sft`, and start from that policy"
    )


def _preferred(group: PromptGroup) -> list[Completion]:
    """What the set calls good."""
    learned = {pair.chosen for pair in group.pairs}
    learned |= {label.sample for label in group.labels if label.desirable}
    return [group.completions[sample] for sample in sorted(learned)]
