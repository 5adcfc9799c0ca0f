"""From a prompt's judged completions to pairs: who is contrasted with whom, and which is chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from judges.interface import Outcome, Verdict
from judges.links import bradley_terry, hard, sampled
from judges.options import LinkName
from pipeline.pairing_rules import build_rule, unpairable
from workers.messages import Completion, Fate, Judgement, Label, Pair, Prompt
from workers.seeds import derive_seed


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
        default="drop",
        description="What becomes of a tie, of a pair nearer than min_margin and of two identical "
        "completions; keep learns from them as P = 0.5",
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
        plain = (self.ties, self.max_pairs) == ("drop", None)
        if self.strategy in ("ranking", "threshold") and not plain:
            raise ValueError(f"strategy: {self.strategy} takes neither ties nor max_pairs")
        return self


class Pairing:
    """Makes a prompt's pairs; the rule is built, or loaded from its plug-in, once.

    Raises UserError for an unknown strategy or args that do not fit it.
    """

    def __init__(
        self,
        options: PairingOptions,
        *,
        link: LinkName = "hard",
        link_temperature: float = 1.0,
        drop_truncated: bool,
        run_seed: int,
    ) -> None:
        self._rule = build_rule(options.strategy, options.args)
        self._min_margin = options.min_margin
        self._ranks = options.strategy == "ranking"
        self._max_pairs = options.max_pairs
        self._threshold = options.threshold
        self._keep_ties = options.ties == "keep"
        self._link: LinkName = link
        self._link_temperature = link_temperature
        self._drop_truncated = drop_truncated
        self._run_seed = run_seed

    def pairs(
        self, prompt: Prompt, completions: Sequence[Completion], judgement: Judgement
    ) -> tuple[Pair, ...]:
        """The prompt's pairs in the rule's order, those not to be learned from with their fate.

        ``completions`` stand in order of their sample index. A pair has one fate, the first that
        holds of INVALID or UNJUDGED, IDENTICAL, TRUNCATED, TIE, MARGIN, else LEARN. ``label_prob``
        is P(chosen better): 1 under the hard and the sampled link, 0.5 in a tie, NaN without a
        verdict. Past ``max_pairs`` to be learned from the others are left out. Raises UserError for
        a plug-in's wrong proposal.
        """
        rng = np.random.default_rng(derive_seed(self._run_seed, "pairing", prompt.position))
        scores = [None if math.isnan(s) else s for s in judgement.scores.tolist()]
        if self._ranks:
            return self._ranking(completions, judgement)
        proposals = self._rule(scores, rng)
        pairs = [self._pair(completions, judgement, i, j) for i, j in proposals]
        learned = [index for index, pair in enumerate(pairs) if pair.fate is Fate.LEARN]
        if self._max_pairs is not None and len(learned) > self._max_pairs:
            kept = rng.choice(learned, size=self._max_pairs, replace=False).tolist()
            pairs = [p for i, p in enumerate(pairs) if p.fate is not Fate.LEARN or i in kept]
        return tuple(pairs)

    def _ranking(self, completions: Sequence[Completion], judgement: Judgement) -> tuple[Pair, ...]:
        """A chain of pairs from the best score down, each completion against the next lower one.

        Where the judge compares, scores are mean win probabilities. A completion that cannot take
        its place (a comparison of it is missing, truncated and dropped, equal to the one before it
        or nearer than ``min_margin``)
        is left out, and a pair with the one before it says why; so the chain has no gaps.
        """
        scores = _comparable_scores(judgement)
        valid = [index for index, score in enumerate(scores) if not math.isnan(score)]
        links: list[Pair] = []
        left: list[Pair] = []
        last: int | None = None
        unplaced: list[int] = []
        for index in sorted(valid, key=lambda index: (-scores[index], index)):
            if last is None:
                if self._drop_truncated and not completions[index].finished:
                    unplaced.append(index)
                else:
                    last = index
                continue
            verdict = hard(scores[last], scores[index])
            margin = scores[last] - scores[index]
            fate = self._fate(completions[last], completions[index], verdict, margin)
            pair = Pair(judgement.position, last, index, verdict.first_better, fate)
            if fate is Fate.LEARN:
                links.append(pair)
                last = index
            else:
                left.append(pair)
        first = links[0].chosen if links else last
        if first is None:
            proposals = unpairable([None if math.isnan(s) else s for s in scores])
            return tuple(self._pair(completions, judgement, i, j) for i, j in proposals)
        invalid = [index for index in range(len(scores)) if index not in valid]
        left += [Pair(judgement.position, i, first, 1.0, Fate.TRUNCATED) for i in unplaced]
        left += [
            Pair(judgement.position, first, i, math.nan, _without_verdict(judgement, first, i))
            for i in invalid
        ]
        return (*links, *left)

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
            Label(
                prompt.position,
                sample,
                margin > 0,
                _without_verdict(judgement, sample)
                if math.isnan(margin)
                else self._label_fate(completion, margin),
            )
            for sample, (completion, margin) in enumerate(zip(completions, above, strict=True))
        )

    def _label_fate(self, completion: Completion, margin: float) -> Fate:
        if self._drop_truncated and not completion.finished:
            return Fate.TRUNCATED
        if margin == 0.0:
            return Fate.TIE
        return Fate.MARGIN if abs(margin) < self._min_margin else Fate.LEARN

    def _pair(
        self, completions: Sequence[Completion], judgement: Judgement, first: int, second: int
    ) -> Pair:
        first, second, verdict, margin = self._better_first(judgement, first, second)
        fate = self._fate(completions[first], completions[second], verdict, margin)
        if fate is Fate.INVALID:
            fate = _without_verdict(judgement, first, second)
        if self._keep_ties and fate in (Fate.TIE, Fate.IDENTICAL, Fate.MARGIN):
            return Pair(judgement.position, first, second, 0.5, Fate.LEARN)
        return Pair(judgement.position, first, second, verdict.first_better, fate)

    def _better_first(
        self, judgement: Judgement, first: int, second: int
    ) -> tuple[int, int, Verdict, float]:
        """Two completions, the better in front; the verdict on them; how far apart they are."""
        wins = judgement.wins
        if wins is None:
            better, worse = float(judgement.scores[first]), float(judgement.scores[second])
        else:
            better, worse = float(wins[first, second]), float(wins[second, first])
        if better < worse:
            first, second, better, worse = second, first, worse, better
        if wins is not None:
            return first, second, Verdict.from_probability(better), 2.0 * better - 1.0
        margin = better - worse
        match self._link:
            case "hard":
                return first, second, hard(better, worse), margin
            case "bradley_terry":
                verdict = bradley_terry(better, worse, self._link_temperature)
                return first, second, verdict, margin
            case "sampled":
                place = (judgement.position, min(first, second), max(first, second))
                seed = derive_seed(self._run_seed, "link", *place)
                uniform = np.random.default_rng(seed).random()
                verdict = sampled(better, worse, self._link_temperature, uniform)
                if verdict.first_better == 0.0:
                    return second, first, verdict.swapped(), margin
                return first, second, verdict, margin

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
            return Fate.TIE
        return Fate.MARGIN if margin < self._min_margin else Fate.LEARN


def _comparable_scores(judgement: Judgement) -> list[float]:
    """Scores that rank: NaN for a completion that cannot be placed among the others.

    Where the judge compares, whoever lacks most comparisons (of equals, the last) is left out until
    none is missing; the others' scores are their mean win probabilities against each other.
    """
    scores: list[float] = judgement.scores.tolist()
    wins = judgement.wins
    if wins is None or not np.isnan(wins[~np.eye(len(wins), dtype=bool)]).any():
        return scores
    kept = list(range(len(wins)))
    while kept:
        missing = [int(np.isnan(wins[i, [j for j in kept if j != i]]).sum()) for i in kept]
        worst = max(range(len(kept)), key=lambda at: (missing[at], at))
        if not missing[worst]:
            break
        kept.pop(worst)
    ranked = [math.nan] * len(wins)
    for i in kept if len(kept) > 1 else []:
        ranked[i] = float(wins[i, [j for j in kept if j != i]].mean())
    return ranked


def _without_verdict(judgement: Judgement, *members: int) -> Fate:
    """INVALID, or UNJUDGED where all that is missing was not asked for or declined."""
    declined = judgement.declined
    if declined is None:
        return Fate.INVALID
    if judgement.wins is not None:
        return Fate.UNJUDGED if declined[members].all() else Fate.INVALID
    missing = [member for member in members if math.isnan(judgement.scores[member])]
    return Fate.UNJUDGED if all(declined[member] for member in missing) else Fate.INVALID
