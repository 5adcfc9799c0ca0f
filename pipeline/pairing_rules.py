"""Which completions of a prompt are contrasted, by their scores alone."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from judges.errors import UserError
from judges.plugins import (
    FORM,
    args_key,
    is_plugin,
    load_plugin,
    nearest,
    open_parameters,
    required,
)

Scores: TypeAlias = list[float | None]
Proposals: TypeAlias = list[tuple[int, int]]
Rule: TypeAlias = Callable[[Scores, np.random.Generator], Proposals]
"""From the n scores of a prompt (None: INVALID) to the index pairs to contrast."""


def best_worst(scores: Scores, _rng: np.random.Generator) -> Proposals:
    """The highest against the lowest valid score; of equals, the lowest index."""
    valid = _valid(scores)
    if len(valid) < 2:
        return unpairable(scores)
    best = max(valid, key=valid.__getitem__)
    worst = min(valid.keys() - {best}, key=lambda index: (valid[index], index))
    return [(best, worst)]


def best_random(scores: Scores, rng: np.random.Generator) -> Proposals:
    """The highest valid score (of equals, the lowest index) against any other valid one."""
    valid = _valid(scores)
    if len(valid) < 2:
        return unpairable(scores)
    best = max(valid, key=valid.__getitem__)
    return [(best, int(rng.choice([index for index in valid if index != best])))]


def random_pair(scores: Scores, rng: np.random.Generator) -> Proposals:
    """Two completions whatever their scores: what an unbiased estimate of E over pairs needs."""
    if len(scores) < 2:
        return []
    first, second = rng.choice(len(scores), size=2, replace=False).tolist()
    return [(first, second)]


def all_pairs(scores: Scores, _rng: np.random.Generator) -> Proposals:
    """Every completion against every other, once."""
    return list(itertools.combinations(range(len(scores)), 2))


def no_pairs(_scores: Scores, _rng: np.random.Generator) -> Proposals:
    """The strategies ``ranking`` and ``threshold`` look at more than scores: see ``Pairing``."""
    return []


STRATEGIES: Mapping[str, Rule] = {
    "best_worst": best_worst,
    "best_random": best_random,
    "random": random_pair,
    "all": all_pairs,
    "ranking": no_pairs,
    "threshold": no_pairs,
}


def _valid(scores: Scores) -> dict[int, float]:
    return {index: score for index, score in enumerate(scores) if score is not None}


def unpairable(scores: Scores) -> Proposals:
    """One pair with an INVALID completion, so that the prompt's failure is counted."""
    by_validity = sorted(range(len(scores)), key=lambda index: scores[index] is None)
    return [(by_validity[0], by_validity[1])] if len(scores) >= 2 else []


def build_rule(strategy: str, args: Mapping[str, Any]) -> Rule:
    key = "pairing.strategy"
    if not is_plugin(strategy):
        if strategy not in STRATEGIES:
            raise UserError(
                f"{key}={strategy}: no such strategy{nearest(strategy, STRATEGIES)}: "
                f"write {', '.join(STRATEGIES)}, {FORM}"
            )
        for arg in args:
            raise UserError(f"{args_key(key)}.{arg}: {strategy} takes no arguments: leave it out")
        return STRATEGIES[strategy]
    function = load_plugin(strategy, key=key)
    open_, _ = open_parameters(function, args, key=key, spec=strategy)
    if missing := required(open_)[1:]:
        raise UserError(f"{args_key(key)}: {strategy} needs {', '.join(missing)}: give it there")

    def rule(scores: Scores, _rng: np.random.Generator) -> Proposals:
        return _read_proposals(function(list(scores), **args), len(scores), f"{key}={strategy}")

    return rule


def _read_proposals(returned: Any, n: int, where: str) -> Proposals:
    """Raises UserError unless these are pairs of different indices below n."""
    expected = f"return a list of pairs of different indices from 0 to {n - 1}"
    try:
        proposals = [(operator.index(i), operator.index(j)) for i, j in returned]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where}: returned {returned!r} for {n} completions: {expected}"
        ) from error
    for i, j in proposals:
        if i == j or not (0 <= i < n and 0 <= j < n):
            raise UserError(f"{where}: proposed ({i}, {j}) for {n} completions: {expected}")
    return proposals
