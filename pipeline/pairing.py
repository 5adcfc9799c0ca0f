"""From a prompt's judged completions to pairs: who is contrasted with whom, and which is chosen."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from judges.errors import UserError
from judges.interface import Outcome, Verdict
from judges.plugins import (
    FORM,
    args_key,
    is_plugin,
    load_plugin,
    nearest,
    open_parameters,
    required,
)
from workers.messages import Completion, Fate, Judgement, Label, Pair, Prompt
from workers.seeds import derive_seed

Scores: TypeAlias = list[float | None]
Proposals: TypeAlias = list[tuple[int, int]]
Rule: TypeAlias = Callable[[Scores, np.random.Generator], Proposals]
"""From the n scores of a prompt (None: INVALID) to the index pairs to contrast."""


class PairingOptions(BaseModel):
    """Which completions of a prompt are contrasted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: str = Field(
        default="best_worst",
        description="best_worst, best_random, random (two, whatever their scores), all, ranking "
        "(each against the next best), threshold (no pairs: labels by score, for kto and bco), "
        "path/to/file.py:name or installed.module:name",
    )
    min_margin: float = Field(
        default=0.0,
        ge=0.0,
        description="Drop a pair whose scores differ by less; for a judge that compares, one whose "
        "|2 P(first better) - 1| is less",
    )
    max_pairs: int | None = Field(
        default=None,
        ge=1,
        description="Most pairs learned from a prompt, drawn at random; null = all",
    )
    ties: Literal["drop", "keep"] = Field(
        default="drop", description="What becomes of a tie; keep learns from it as P = 0.5"
    )
    threshold: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="With strategy threshold: above it a completion is desirable, below not",
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of a plug-in strategy"
    )

    @model_validator(mode="after")
    def _threshold_with_its_strategy(self) -> PairingOptions:
        if (self.threshold is not None) != (self.strategy == "threshold"):
            raise ValueError("threshold: a number with strategy: threshold, and only with it")
        return self


class Pairing:
    """Makes a prompt's pairs; the rule is built, or loaded from its plug-in, once.

    Raises UserError for an unknown strategy or args that do not fit it.
    """

    def __init__(
        self,
        options: PairingOptions,
        *,
        link: Literal["hard"],
        drop_truncated: bool,
        run_seed: int,
    ) -> None:
        self._rule = _build_rule(options.strategy, options.args)
        self._min_margin = options.min_margin
        self._max_pairs = options.max_pairs
        self._threshold = options.threshold
        self._keep_ties = options.ties == "keep"
        self._link = LINKS[link]
        self._drop_truncated = drop_truncated
        self._run_seed = run_seed

    def pairs(
        self, prompt: Prompt, completions: Sequence[Completion], judgement: Judgement
    ) -> tuple[Pair, ...]:
        """The prompt's pairs in the rule's order, those not to be learned from with their fate.

        ``completions`` stand in order of their sample index. A pair has one fate, the first that
        holds of INVALID, IDENTICAL, TRUNCATED, TIE, MARGIN, else LEARN. ``label_prob`` is P(chosen
        better): 1 under the hard link, 0.5 in a tie, NaN if INVALID. Past ``max_pairs`` to be
        learned from the others are left out. Raises UserError for a plug-in's wrong proposal.
        """
        rng = np.random.default_rng(derive_seed(self._run_seed, "pairing", prompt.position))
        scores = [None if math.isnan(s) else s for s in judgement.scores.tolist()]
        proposals = self._rule(scores, rng)
        pairs = [self._pair(completions, judgement, i, j) for i, j in proposals]
        learned = [index for index, pair in enumerate(pairs) if pair.fate is Fate.LEARN]
        if self._max_pairs is not None and len(learned) > self._max_pairs:
            kept = rng.choice(learned, size=self._max_pairs, replace=False).tolist()
            pairs = [p for i, p in enumerate(pairs) if p.fate is not Fate.LEARN or i in kept]
        return tuple(pairs)

    def labels(
        self, prompt: Prompt, completions: Sequence[Completion], judgement: Judgement
    ) -> tuple[Label, ...]:
        """With strategy ``threshold``, what each completion's score says of it, with its fate.

        INVALID, TRUNCATED, TIE (at the threshold), MARGIN (nearer to it than ``min_margin``), else
        LEARN; none with other strategies.
        """
        if self._threshold is None:
            return ()
        above = (judgement.scores - self._threshold).tolist()
        return tuple(
            Label(prompt.position, sample, margin > 0, self._label_fate(completion, margin))
            for sample, (completion, margin) in enumerate(zip(completions, above, strict=True))
        )

    def _label_fate(self, completion: Completion, margin: float) -> Fate:
        if math.isnan(margin):
            return Fate.INVALID
        if self._drop_truncated and not completion.finished:
            return Fate.TRUNCATED
        if margin == 0.0:
            return Fate.TIE
        return Fate.MARGIN if abs(margin) < self._min_margin else Fate.LEARN

    def _pair(
        self, completions: Sequence[Completion], judgement: Judgement, first: int, second: int
    ) -> Pair:
        wins = judgement.wins
        if wins is None:
            better, worse = float(judgement.scores[first]), float(judgement.scores[second])
        else:
            better, worse = float(wins[first, second]), float(wins[second, first])
        if better < worse:
            first, second, better, worse = second, first, worse, better
        if wins is None:
            verdict, margin = self._link(better, worse), better - worse
        else:
            verdict, margin = Verdict.from_probability(better), 2.0 * better - 1.0
        fate = self._fate(completions[first], completions[second], verdict, margin)
        return Pair(judgement.position, first, second, verdict.first_better, fate)

    def _fate(
        self, chosen: Completion, rejected: Completion, verdict: Verdict, margin: float
    ) -> Fate:
        if verdict.outcome is Outcome.INVALID:
            return Fate.INVALID
        if np.array_equal(chosen.ids, rejected.ids):
            return Fate.IDENTICAL
        if self._drop_truncated and not (chosen.finished and rejected.finished):
            return Fate.TRUNCATED
        if verdict.outcome is Outcome.TIE:
            return Fate.LEARN if self._keep_ties else Fate.TIE
        return Fate.MARGIN if margin < self._min_margin else Fate.LEARN


def hard_link(first: float, second: float) -> Verdict:
    """The higher of two scores is better for certain; equal is a TIE, NaN is INVALID."""
    if math.isnan(first) or math.isnan(second):
        return Verdict(Outcome.INVALID)
    if first == second:
        return Verdict(Outcome.TIE, 0.5)
    return Verdict(Outcome.PREFERENCE, 1.0 if first > second else 0.0)


LINKS: Mapping[str, Callable[[float, float], Verdict]] = {"hard": hard_link}


def best_worst(scores: Scores, _rng: np.random.Generator) -> Proposals:
    """The highest against the lowest valid score; of equals, the lowest index."""
    valid = _valid(scores)
    if len(valid) < 2:
        return _unpairable(scores)
    best = max(valid, key=valid.__getitem__)
    worst = min(valid.keys() - {best}, key=lambda index: (valid[index], index))
    return [(best, worst)]


def best_random(scores: Scores, rng: np.random.Generator) -> Proposals:
    """The highest valid score (of equals, the lowest index) against any other valid one."""
    valid = _valid(scores)
    if len(valid) < 2:
        return _unpairable(scores)
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


def ranking(scores: Scores, _rng: np.random.Generator) -> Proposals:
    """Each valid score against the next lower one, from the best: a chain.

    Of equals the lowest index stands in the chain; the others are ties with it.
    """
    valid = _valid(scores)
    if len(valid) < 2:
        return _unpairable(scores)
    first_of: dict[float, int] = {}
    for index in sorted(valid, key=lambda index: (-valid[index], index)):
        first_of.setdefault(valid[index], index)
    chain = list(first_of.values())
    ties = [(first_of[s], index) for index, s in valid.items() if first_of[s] != index]
    invalid = [(chain[0], index) for index in range(len(scores)) if index not in valid]
    return [*itertools.pairwise(chain), *ties, *invalid]


def no_pairs(_scores: Scores, _rng: np.random.Generator) -> Proposals:
    """Completions are labelled one by one."""
    return []


STRATEGIES: Mapping[str, Rule] = {
    "best_worst": best_worst,
    "best_random": best_random,
    "random": random_pair,
    "all": all_pairs,
    "ranking": ranking,
    "threshold": no_pairs,
}


def _valid(scores: Scores) -> dict[int, float]:
    return {index: score for index, score in enumerate(scores) if score is not None}


def _unpairable(scores: Scores) -> Proposals:
    """One pair with an INVALID completion, so that the prompt's failure is counted."""
    by_validity = sorted(range(len(scores)), key=lambda index: scores[index] is None)
    return [(by_validity[0], by_validity[1])] if len(scores) >= 2 else []


def _build_rule(strategy: str, args: Mapping[str, Any]) -> Rule:
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
