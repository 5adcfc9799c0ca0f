"""Several judges as one: the weighted sum of their scores, or a vote."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pydantic import Field

from judges.asking import Asker, Question, gathered
from judges.errors import UserError
from judges.interface import Score, Text
from judges.links import hard
from judges.members import (
    AskMember,
    MemberOptions,
    asked_once,
    missing_of,
    questions_of,
    read_members,
    scoring,
)
from judges.template import canonical

VETOED = -100.0
"""The score of a vetoed completion, in standard deviations."""

SAME = 1e-12
"""Scores whose standard deviation is at most this part of the largest are all the same."""

DECIMALS = 12
"""Of a sum of standardised scores: two that are equal but for rounding must tie."""

WORDS = {1.0: "first", 0.5: "tie", 0.0: "second"}
"""How a vote is told, by P(first better)."""


class WeighedMember(MemberOptions):
    """A member of a weighted sum."""

    weight: float = Field(default=1.0, allow_inf_nan=False, description="Below 0: a penalty")
    veto_below: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="A completion with a lower score of this member loses against any other",
    )


class WeightedSum:
    """Scores by Σ w·z / Σ|w| over its members.

    z is a member's score less its mean over the call, in population standard deviations, both over
    the member's valid scores; a member whose scores are all the same adds 0. Sums have
    ``DECIMALS``. A call is a work unit, or ``batch_size`` completions: only the scores of one call
    may be compared.
    """

    def __init__(
        self, members: Sequence[Any], ask_member: AskMember, args_key: str = "judge.args"
    ) -> None:
        """Raises UserError for members that make no sense, cannot be built, or compare."""
        key = f"{args_key}.members"
        self._options = read_members(WeighedMember, members, key)
        self._titles = [member.title for member in self._options]
        total = math.fsum(abs(member.weight) for member in self._options)
        if total == 0.0:
            raise UserError(f"{key}: all weights are 0: give one another weight")
        self._shares = [member.weight / total for member in self._options]
        self._askers = [
            scoring(ask_member, member, f"{key}[{at}]") for at, member in enumerate(self._options)
        ]

    async def score(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Sequence[Any]
    ) -> list[Score]:
        """A completion is INVALID where a member finds it so, declined where one declines it.

        One that a member vetoes scores ``VETOED``, or −√n in a call of more than 10,000
        completions: below any sum, as no z of n scores is below −√(n − 1).
        """
        questions = questions_of(prompts, [(completion,) for completion in completions], columns)
        answers = await gathered([asker.ask(questions) for asker in self._askers])
        zs = [standardised([score.value for score in scores]) for scores in answers]
        vetoed = min(VETOED, -math.sqrt(len(questions)))
        return [
            self._summed(scores, z, vetoed)
            for scores, z in zip(zip(*answers, strict=True), zip(*zs, strict=True), strict=True)
        ]

    def _summed(self, scores: Sequence[Score], zs: Sequence[float], vetoed: float) -> Score:
        if (missing := missing_of(self._titles, scores)) is not None:
            return missing
        values = [score.value for score in scores if score.value is not None]
        for member, value in zip(self._options, values, strict=True):
            if member.veto_below is not None and value < member.veto_below:
                reason = f"vetoed by {member.title}: {value:.6g} is below {member.veto_below:g}"
                return Score(vetoed, reason)
        said = ", ".join(f"{t}: {v:.4g}" for t, v in zip(self._titles, values, strict=True))
        total = math.fsum(w * z for w, z in zip(self._shares, zs, strict=True))
        return Score(round(total, DECIMALS), said)


def standardised(scores: Sequence[float | None]) -> list[float]:
    """Those that are not None with mean 0 and population standard deviation 1, the others as 0.

    All are 0 where all are the same, up to rounding.
    """
    valid = [score for score in scores if score is not None]
    largest = max(map(abs, valid), default=0.0) or 1.0
    mean = fmean([score / largest for score in valid]) if valid else 0.0
    centred = [0.0 if score is None else score / largest - mean for score in scores]
    deviation = math.sqrt(math.fsum(c * c for c in centred) / max(len(valid), 1))
    if deviation <= SAME:
        return [0.0] * len(scores)
    return [c / deviation for c in centred]


class VotingMember(MemberOptions):
    """A member of a vote."""

    veto: bool = Field(
        default=False, description="Nothing is preferred against the vote of this member"
    )


@dataclass(frozen=True, slots=True)
class _Voter:
    options: VotingMember
    asker: Asker

    async def votes(self, pairs: Sequence[Question]) -> list[Score]:
        """1 for the first, 0 for the second, 0.5 for a tie; or no verdict, and why."""
        if self.asker.judge.compares:
            return await self._compared(pairs)
        sides = [_side(pair, side) for pair in pairs for side in (0, 1)]
        scores = await asked_once(self.asker, sides)
        return [
            _higher(first, second) for first, second in zip(scores[::2], scores[1::2], strict=True)
        ]

    async def _compared(self, pairs: Sequence[Question]) -> list[Score]:
        """Asked in an order of the texts' own, so that both orders of a pair are one question."""
        swap = [canonical(pair.texts[0]) > canonical(pair.texts[1]) for pair in pairs]
        asked = [_swapped(q) if swapped else q for q, swapped in zip(pairs, swap, strict=True)]
        scores = await asked_once(self.asker, asked)
        return [_preferred(score, swapped) for score, swapped in zip(scores, swap, strict=True)]


class Vote:
    """Compares by what most of its members prefer; as many for the one as for the other is a tie.

    A member that scores votes for the completion with the higher score, one that compares for that
    with the higher P. Exchanging the two completions exchanges every verdict.
    """

    def __init__(
        self,
        members: Sequence[Any],
        ask_member: AskMember,
        min_agreement: float = 0.0,
        args_key: str = "judge.args",
    ) -> None:
        """``min_agreement``: the share of the members whose vote must be the verdict.

        Raises UserError for members that make no sense or cannot be built.
        """
        if not _is_share(min_agreement):
            raise UserError(f"{args_key}.min_agreement={min_agreement}: write a share from 0 to 1")
        key = f"{args_key}.members"
        options = read_members(VotingMember, members, key)
        self._voters = [
            _Voter(member, ask_member(member, key=f"{key}[{at}].name"))
            for at, member in enumerate(options)
        ]
        self._titles = [member.title for member in options]
        self._min_agreement = min_agreement

    async def compare(
        self,
        prompts: Sequence[Text],
        first: Sequence[Text],
        second: Sequence[Text],
        **columns: Sequence[Any],
    ) -> list[Score]:
        """1, 0 or 0.5 (a tie); INVALID where a member finds a pair so.

        Declined where a member declines, fewer than ``min_agreement`` agree with the verdict, or a
        member with a veto votes against the preference. The same text twice is a tie, unasked.
        """
        pairs = questions_of(prompts, zip(first, second, strict=True), columns)
        same = [
            canonical(one) == canonical(other) for one, other in zip(first, second, strict=True)
        ]
        different = [pair for pair, equal in zip(pairs, same, strict=True) if not equal]
        votes = await gathered([voter.votes(different) for voter in self._voters])
        verdicts = iter([self._verdict(of_pair) for of_pair in zip(*votes, strict=True)])
        return [
            Score(0.5, "the same completion twice") if equal else next(verdicts) for equal in same
        ]

    def _verdict(self, votes: Sequence[Score]) -> Score:
        if (missing := missing_of(self._titles, votes)) is not None:
            return missing
        worths = [vote.value for vote in votes if vote.value is not None]
        verdict = hard(worths.count(1.0), worths.count(0.0)).first_better
        said = ", ".join(f"{t}: {WORDS[w]}" for t, w in zip(self._titles, worths, strict=True))
        if worths.count(verdict) / len(worths) < self._min_agreement:
            return _abstained(f"agreement is below {self._min_agreement:g}", said)
        for voter, worth in zip(self._voters, worths, strict=True):
            if voter.options.veto and verdict != 0.5 and worth == 1.0 - verdict:
                return _abstained(f"vetoed by {voter.options.title}", said)
        return Score(verdict, said)


def _abstained(why: str, said: str) -> Score:
    return Score(None, f"abstained: {why} ({said})", declined=True)


def _higher(first: Score, second: Score) -> Score:
    if first.value is not None and second.value is not None:
        return Score(hard(first.value, second.value).first_better)
    return min((s for s in (first, second) if s.value is None), key=lambda s: s.declined)


def _preferred(score: Score, swapped: bool) -> Score:
    if score.value is None:
        return score
    if not 0.0 <= score.value <= 1.0:
        return Score(None, f"returned {score.value}: a probability lies in [0, 1]")
    vote = hard(score.value, 0.5).first_better
    return Score(1.0 - vote if swapped else vote)


def _side(pair: Question, side: int) -> Question:
    """The question about one completion of a pair."""
    return _rearranged(pair, (pair.texts[side],), lambda ids: ids[side])


def _swapped(pair: Question) -> Question:
    return _rearranged(pair, pair.texts[::-1], lambda ids: ids[::-1])


def _rearranged(
    pair: Question, texts: tuple[Text, ...], of_ids: Callable[[list[list[int]]], Any]
) -> Question:
    """With those of its texts; the ids of a pair's completions are rearranged like them."""
    match pair.columns.get("completion_ids"):
        case [list(), list()] as ids:
            return Question(pair.prompt, texts, {**pair.columns, "completion_ids": of_ids(ids)})
    return Question(pair.prompt, texts, pair.columns)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and value is not True and 0.0 <= value <= 1.0
