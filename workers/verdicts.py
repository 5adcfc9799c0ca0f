"""From a judge's answers to judgements, and what several of these say together."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from judges.interface import Score, as_probability
from workers.messages import DoubleArray, Fate, Judgement, Prompt, PromptGroup


class JudgeFailed(RuntimeError):  # noqa: N818  a failure of the user's judge, not of ours
    """Too many of a round's scores are INVALID to go on."""


def scored(prompt: Prompt, scores: Sequence[Score]) -> Judgement:
    """The judgement of a prompt's completions by a judge that scores."""
    declined = np.array([score.declined for score in scores], dtype=np.bool_)
    return Judgement(
        position=prompt.position,
        scores=np.array([_number(score) for score in scores], dtype=np.float64),
        reasons=tuple(score.reason for score in scores),
        declined=declined if declined.any() else None,
    )


def compared(prompt: Prompt, count: int, comparisons: Mapping[tuple[int, ...], Score]) -> Judgement:
    """The judgement of a prompt's ``count`` completions by a judge that compares pairs i < j."""
    wins = np.full((count, count), np.nan)
    declined = np.zeros((count, count), np.bool_)
    reasons: list[list[str]] = [[] for _ in range(count)]
    read = {(i, j): as_probability(score) for (i, j), score in comparisons.items()}
    for (i, j), score in read.items():
        declined[i, j] = declined[j, i] = score.declined
        if score.value is not None:
            wins[i, j], wins[j, i] = score.value, 1.0 - score.value
    # What failed first, then what was declined: a reason may be read to its first line only.
    for (i, j), score in sorted(read.items(), key=lambda item: _by_failure(item[1])):
        if score.reason:
            reasons[i].append(f"against {j}: {score.reason}")
            reasons[j].append(f"against {i}: {score.reason}")
    return Judgement(
        position=prompt.position,
        scores=np.array([_mean_of_valid(row) for row in wins], dtype=np.float64),
        reasons=tuple("\n".join(lines) or None for lines in reasons),
        wins=wins,
        declined=declined if declined.any() else None,
    )


def _by_failure(score: Score) -> tuple[bool, bool]:
    return score.value is not None, score.declined


def _mean_of_valid(values: DoubleArray) -> float:
    valid = values[~np.isnan(values)]
    return float(valid.mean()) if len(valid) else np.nan


def _number(score: Score) -> float:
    return np.nan if score.value is None else score.value


def refuse_invalid_rounds(
    groups: Sequence[PromptGroup], max_invalid_share: float, judge: str
) -> None:
    """Raises JudgeFailed when more than that share of a round is INVALID.

    Counted are scores, and comparisons (i < j) where the judge compares; not those that nobody
    asked for, or that the judge declined.
    """
    total = 0
    invalid: list[tuple[PromptGroup, int]] = []
    for group in groups:
        for example, value, declined in asked_of(group.judgement):
            if declined:
                continue
            total += 1
            if np.isnan(value):
                invalid.append((group, example))
    if not invalid or len(invalid) / total <= max_invalid_share:
        return
    group, example = invalid[0]
    unit = "scores" if group.judgement.wins is None else "comparisons"
    reason = " ".join((group.judgement.reasons[example] or "no reason given").split())[:300]
    raise JudgeFailed(
        f"judge.name={judge}: {len(invalid)} of the round's {total} {unit} are INVALID, for "
        f"example {group.completions[example].text[:80]!r} ({reason}): mend the judge, or raise "
        f"judge.max_invalid_share={max_invalid_share}"
    )


def asked_of(judgement: Judgement) -> Iterator[tuple[int, float, bool]]:
    """Each question: a completion it is about, the number that came of it, whether declined."""
    declined = judgement.declined
    if judgement.wins is None:
        for i, score in enumerate(judgement.scores):
            yield i, score, declined is not None and bool(declined[i])
        return
    for i, j in itertools.combinations(range(len(judgement.wins)), 2):
        yield i, judgement.wins[i, j], declined is not None and bool(declined[i, j])


def judging_record(
    counts: Mapping[str, float], groups: Sequence[PromptGroup]
) -> dict[str, float | None]:
    """How a round's judge was asked (sums of its workers' counts) and what came of it.

    ``tie_rate`` is the share of ties among the pairs with a verdict, ``flip_rate`` that of the
    comparisons asked in both orders whose preference changed with the order, ``agreement`` that of
    the pairs on which both judges have a preference and it is the same; each None of nothing.
    """
    asked = [
        (bool(np.isnan(value)), declined)
        for group in groups
        for _, value, declined in asked_of(group.judgement)
    ]
    valid = sum(not missing for missing, _ in asked)
    declined = sum(missing and declined for missing, declined in asked)
    fates = Counter(pair.fate for group in groups for pair in group.pairs)
    judged = sum(fates.values()) - fates[Fate.INVALID] - fates[Fate.UNJUDGED]
    return {
        "valid": valid,
        "invalid": len(asked) - valid - declined,
        "declined": declined,
        **{name: counts.get(name, 0) for name in COUNTED},
        "tie_rate": _share(fates[Fate.TIE], judged),
        "flip_rate": _share(counts.get("flipped", 0), counts.get("both_orders", 0)),
        "agreement": _share(counts.get("agreed", 0), counts.get("compared_twice", 0)),
    }


COUNTED = ("asked", "cached", "calls", "retries", "timeouts", "tokens", "usd")
"""What is told of how a judge was asked."""


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def agreement(judged: Sequence[Judgement], others: Sequence[Judgement]) -> dict[str, int]:
    """How many pairs both prefer a side of ("compared_twice"), and how many the same ("agreed")."""
    both = agreed = 0
    for one, other in zip(judged, others, strict=True):
        for mine, theirs in zip(one.preferences(), other.preferences(), strict=True):
            if mine and theirs:
                both += 1
                agreed += mine == theirs
    return {"compared_twice": both, "agreed": agreed}


def dispute(judgements: Sequence[Judgement]) -> float:
    """Mean over a prompt's pairs of the variance of the judges' votes (1, −1, 0 for a tie).

    A judge without a verdict on a pair has no vote on it.
    """
    votes = np.array([_votes(judgement) for judgement in judgements], np.float64)
    of_pairs = [pair[~np.isnan(pair)] for pair in votes.T]
    return float(np.mean([pair.var() if pair.size else 0.0 for pair in of_pairs] or [0.0]))


def _votes(judgement: Judgement) -> DoubleArray:
    """Of each pair i < j as ``Judgement.preferences`` has it, NaN without a verdict."""
    first, second = np.triu_indices(len(judgement.scores), 1)
    scores, wins = judgement.scores, judgement.wins
    said = scores[first] - scores[second] if wins is None else wins[first, second]
    return np.where(np.isnan(said), np.nan, judgement.preferences())
