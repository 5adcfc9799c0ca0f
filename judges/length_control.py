"""A judge's scores without what longer completions gain by their length alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from judges.errors import UserError
from judges.interface import Score, Text, text_of
from judges.members import AskMember, MemberOptions, questions_of, read_member, scoring
from judges.template import canonical

FITTED = "fitted"

DIGITS = 13
"""Of controlled scores, counted from the call's largest: equals but for rounding must tie."""

FEWEST = 8
"""Comparisons within prompts that a slope is fitted from: n − 1 of n completions of a prompt."""


class LengthControl:
    """Scores by score − slope · (length − mean length), lengths in characters of the text.

    The mean is that of the call's completions with a score: their mean score stays. Like the
    regression of length-controlled AlpacaEval, arXiv:2404.04475, it answers what the scores were
    if all were of one length, but it is linear in the score. Why: arXiv:2403.19159.
    """

    def __init__(
        self,
        judge: Any,
        ask_member: AskMember,
        slope: str | float = FITTED,
        args_key: str = "judge.args",
    ) -> None:
        """``slope``: points of score a character; "fitted": of each call, within its prompts.

        Raises UserError for another slope, and for a judge that cannot be built or compares.
        """
        if not _is_slope(slope):
            raise UserError(
                f"{args_key}.slope={slope}: write fitted, or points of score a character"
            )
        key = f"{args_key}.judge"
        self._asker = scoring(ask_member, read_member(MemberOptions, judge, key), key)
        self._slope = slope

    async def score(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Sequence[Any]
    ) -> list[Score]:
        """What has no score stays without one, with its reason.

        Where fewer than ``FEWEST`` comparisons within prompts can tell a slope, the scores stay
        what they are, and their reasons say so.
        """
        scores = await self._asker.ask(
            questions_of(prompts, [(completion,) for completion in completions], columns)
        )
        lengths = [len(text_of(completion)) for completion in completions]
        rows = [
            (canonical(prompt), length, score.value)
            for prompt, length, score in zip(prompts, lengths, scores, strict=True)
            if score.value is not None
        ]
        slope = fitted_slope(rows) if isinstance(self._slope, str) else float(self._slope)
        if slope is None:
            reason = f"length not controlled: fewer than {FEWEST} comparisons within prompts"
            return [score if score.value is None else _told(score, reason) for score in scores]
        if not rows or slope == 0.0:
            return scores
        mean = fmean([length for _, length, _ in rows])
        unit = max(abs(value) + abs(slope * (length - mean)) for _, length, value in rows)
        controlled = []
        for score, length in zip(scores, lengths, strict=True):
            if score.value is None:
                controlled.append(score)
                continue
            value = _rounded(score.value - slope * (length - mean), unit)
            how = f"{score.value:.6g} less {slope:.3g} a character ({length}, mean {mean:.1f})"
            controlled.append(_told(Score(value, score.reason), how))
        return controlled


def fitted_slope(rows: Iterable[tuple[str, int, float]]) -> float | None:
    """The least-squares slope of score on length within prompts; None where too few tell.

    ``rows`` are (prompt, length, score). Both are taken less their mean over the prompt's rows, so
    that what prompts differ in does not count. 0 where no prompt has rows of different length.
    """
    by_prompt: dict[str, list[tuple[int, float]]] = {}
    for prompt, length, score in rows:
        by_prompt.setdefault(prompt, []).append((length, score))
    if sum(len(group) - 1 for group in by_prompt.values()) < FEWEST:
        return None
    centred = [pair for group in by_prompt.values() for pair in _centred(group)]
    variation = math.fsum(length * length for length, _ in centred)
    if variation == 0.0:
        return 0.0
    return math.fsum(length * score for length, score in centred) / variation


def _centred(group: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    mean_length = fmean([length for length, _ in group])
    mean_score = fmean([score for _, score in group])
    return [(length - mean_length, score - mean_score) for length, score in group]


def _rounded(value: float, unit: float) -> float:
    return round(value, DIGITS - math.ceil(math.log10(unit))) if unit else value


def _told(score: Score, how: str) -> Score:
    return Score(score.value, f"{how}; {score.reason}" if score.reason else how)


def _is_slope(slope: object) -> bool:
    if isinstance(slope, int | float) and not isinstance(slope, bool):
        return math.isfinite(slope)
    return slope == FITTED
