"""Off-policy correction: the weight of an example whose completions an older policy wrote.

Importance weights make the mean over pairs drawn from μ an estimate of the mean over pairs that the
policy would draw; WPO's (arXiv:2406.11827) say how likely it would write them at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.learner.assembly import ScoredRows, behaviour_logps, wpo_weights
from workers.learner.correction_options import Correction
from workers.messages import BatchExample, UpdateBatch


def example_weights(
    correction: Correction,
    batch: UpdateBatch,
    scored: ScoredRows,
    examples: Sequence[BatchExample],
    version: int,
) -> Tensor:
    """[E] constant weights, float64; exactly 1 for what this version sampled by its plain softmax.

    An importance weight is Π π(y)/μ(y) over the example's completions, μ the distribution that y
    was drawn from; ``self_normalized`` weights have mean 1 over the examples, which must then be
    those of the whole update. An opponent's completion was never meant to be the policy's own, and
    counts as 1. WPO's weight is Π exp(mean_t[log π_t − log Σ_v π_v²]) where the example is older,
    or was given.
    """
    if correction.name == "none":
        return torch.ones(len(examples), dtype=torch.float64)
    rows = list(scored.logprobs)
    place = {row: index for index, row in enumerate(rows)}
    items = [batch.completions[row] for row in rows]
    logps = torch.stack([scored.logprobs[row].detach().sum() for row in rows])
    own = torch.tensor([item.completion.reference_share == 0.0 for item in items])
    if correction.name == "wpo":
        older = torch.tensor([i.given or i.completion.version < version for i in items])
        log_weights = torch.where(older & own, wpo_weights(scored).log(), 0.0)
    else:
        behaviour = behaviour_logps(items, logps, version)
        log_weights = torch.where(own, logps.double() - behaviour.double(), 0.0)
    of_examples = torch.stack(
        [log_weights[[place[row] for row in example.rows]].sum() for example in examples]
    ).double()
    match correction.name:
        case "clipped":
            return of_examples.exp().clamp(max=correction.clip)
        case "self_normalized":
            return len(examples) * torch.softmax(of_examples, 0)
        case _:
            return of_examples.exp()
