"""The measures of one update, from what was scored and lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from workers.learner.pairwise_options import Options
from workers.messages import (
    BatchExample,
    BatchLabel,
    BatchPair,
    BatchRanking,
    BatchSample,
    DoubleArray,
    UpdateBatch,
)

MEASURES = (
    "loss",
    "margin",
    "accuracy",
    "rewards_chosen",
    "rewards_rejected",
    "chosen_logps",
    "rejected_logps",
    "lag_mean",
    "lag_max",
    "ess",
    "ess_per_token",
    "policy_ess",
    "policy_ess_per_token",
    "kl_from_sampler",
)


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """Columns [C] over a batch's completions and [E] over its examples.

    ``ref`` is None without a reference; ``log_weight`` [C] is log π − log of the distribution
    sampled from; ``log_ratio`` [C] log π − log of the policy that sampled, both at temperature 1,
    and ``moved`` [C] the KL, in nats, from that policy to π, as estimated on the completion;
    ``measures`` are the objective's own, [E] each.
    """

    logps: DoubleArray
    ref: DoubleArray | None
    log_weight: DoubleArray
    log_ratio: DoubleArray
    moved: DoubleArray
    loss: DoubleArray
    measures: Mapping[str, DoubleArray]


def update_measures(
    batch: UpdateBatch, scored: Scored | None, objective: Options, version: int
) -> dict[str, Any]:
    """Means over examples; None where a measure is undefined, all of them where nothing was left.

    Chosen and rejected are the two sides of a pair, the desirable and the undesirable completions,
    the first and the last of a ranking, the samples that beat and that lost to their opponent.
    ``accuracy`` is the share of pairs (of neighbours in a ranking) that the implicit reward orders
    as the label does, even labels aside. The measures of age are of the round's own examples,
    ``replayed`` has those of earlier rounds': ``ess`` is of importance weights, towards the
    distribution really sampled; ``policy_ess`` of π over the policy that sampled, both at
    temperature 1, hence 1 at lag 0 however samples were drawn; ``kl_from_sampler`` in nats a token.
    ``lags`` counts every example by its lag.
    """
    if scored is None:
        nothing = {"pairs": 0, "tokens": 0, "lags": {}, "replayed": None, "objective": {}}
        return dict.fromkeys(MEASURES) | nothing
    chosen, rejected = _sides(batch.examples)
    lengths = np.array([len(item.completion.ids) for item in batch.completions], np.float64)
    reward = np.asarray(objective.implicit_reward(scored.logps, scored.ref, lengths))
    rows = [list(example.rows) for example in batch.examples]
    ages = [_Ages(batch, scored, version, replayed) for replayed in (False, True)]
    return {
        "loss": float(np.mean(scored.loss)),
        "margin": _margin(reward, chosen, rejected),
        "accuracy": _accuracy(reward, batch.examples),
        "rewards_chosen": _mean(reward[chosen]),
        "rewards_rejected": _mean(reward[rejected]),
        "chosen_logps": _mean(scored.logps[chosen]),
        "rejected_logps": _mean(scored.logps[rejected]),
        **ages[0].measures(),
        "lags": ages[0].lags(),
        "replayed": {"pairs": len(ages[1]), **ages[1].measures()} if len(ages[1]) else None,
        "pairs": len(rows),
        "tokens": int(sum(lengths[r].sum() for r in rows)),
        "objective": {name: _mean(values) for name, values in scored.measures.items()},
    }


class _Ages:
    """How old an update's examples are: the round's own, or the replayed ones."""

    def __init__(self, batch: UpdateBatch, scored: Scored, version: int, replayed: bool) -> None:
        self._rows = [
            list(example.rows)
            for example in batch.examples
            if batch.completions[example.rows[0]].replayed is replayed
        ]
        self._items = [item.completion for item in batch.completions]
        self._scored = scored
        self._version = version

    def __len__(self) -> int:
        return len(self._rows)

    def lags(self) -> dict[str, int]:
        """Examples by their lag."""
        return {str(lag): count for lag, count in sorted(Counter(self._lags()).items())}

    def _lags(self) -> list[int]:
        return [self._version - self._items[rows[0]].version for rows in self._rows]

    def measures(self) -> dict[str, float | None]:
        """Lag, effective sample size and the KL from the sampler; None of nothing."""
        if not self._rows:
            return dict.fromkeys(MEASURES[MEASURES.index("lag_mean") :])
        tokens = np.array([sum(len(self._items[row].ids) for row in rows) for rows in self._rows])
        weights, ratios = (
            np.array([column[rows].sum() for rows in self._rows])
            for column in (self._scored.log_weight, self._scored.log_ratio)
        )
        held = sorted({row for rows in self._rows for row in rows})
        nats = float(self._scored.moved[held].sum())
        return {
            "lag_mean": float(np.mean(self._lags())),
            "lag_max": max(self._lags()),
            "ess": effective_sample_share(weights),
            "ess_per_token": effective_sample_share(weights / tokens),
            "policy_ess": effective_sample_share(ratios),
            "policy_ess_per_token": effective_sample_share(ratios / tokens),
            "kl_from_sampler": nats / sum(len(self._items[row].ids) for row in held),
        }


def effective_sample_share(log_weight: DoubleArray) -> float:
    """ESS/n = (Σw)² / (n Σw²) of weights given by their logarithms, [n]; 1 when all are equal."""
    weight = np.exp(log_weight - log_weight.max())
    return float(weight.sum() ** 2 / (len(weight) * (weight**2).sum()))


def _sides(examples: Sequence[BatchExample]) -> tuple[list[int], list[int]]:
    chosen: list[int] = []
    rejected: list[int] = []
    for example in examples:
        match example:
            case BatchPair() | BatchRanking():
                chosen.append(example.rows[0])
                rejected.append(example.rows[-1])
            case BatchLabel(completion=row, desirable=desirable):
                (chosen if desirable else rejected).append(row)
            case BatchSample(completion=row, win_prob=win_prob) if win_prob != 0.5:
                (chosen if win_prob > 0.5 else rejected).append(row)
    return chosen, rejected


def _margin(reward: DoubleArray, chosen: list[int], rejected: list[int]) -> float | None:
    if not chosen or not rejected:
        return None
    return float(np.mean(reward[chosen]) - np.mean(reward[rejected]))


def _accuracy(reward: DoubleArray, examples: Sequence[BatchExample]) -> float | None:
    ordered = [
        reward[better] > reward[worse]
        for example in examples
        if isinstance(example, BatchPair | BatchRanking) and not _even(example)
        for better, worse in pairwise(example.rows)
    ]
    return float(np.mean(ordered)) if ordered else None


def _even(example: BatchExample) -> bool:
    return isinstance(example, BatchPair) and example.label_prob == 0.5


def _mean(values: DoubleArray) -> float | None:
    return float(np.mean(values)) if len(values) else None
