"""The judge as a worker: every completion of a round gets a score, or INVALID and the reason."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from judges.build import build_judge
from judges.errors import UserError
from judges.interface import Score, Text, text_of
from workers.generator import SampledUnit
from workers.messages import Completion, DoubleArray, Judgement, Prompt, PromptGroup


class JudgeOptions(BaseModel):
    """Who judges, and how its scores become labels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        default="sentiment",
        description="sentiment (VADER), polarity (TextBlob), path/to/file.py:name or "
        "installed.module:name",
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the judge, or of its class"
    )
    link: Literal["hard"] = Field(
        default="hard",
        description="From two scores to P(first better): hard = 1 for the higher, equal is a tie",
    )
    max_invalid_share: float = Field(
        default=0.5,
        ge=0.0,
        le=1.0,
        description="The run stops when a larger share of a round's scores is INVALID",
    )


@dataclass(frozen=True, slots=True, eq=False)
class JudgedUnit:
    """The judgements of a work unit, one for each prompt, and what judging took in seconds."""

    judgements: tuple[Judgement, ...]
    seconds: float


class JudgeFailed(RuntimeError):  # noqa: N818  a failure of the user's judge, not of ours
    """Too many of a round's scores are INVALID to go on."""


class JudgeWorker:
    """Asks one judge, built once. Raises UserError where ``build_judge`` does."""

    def __init__(self, options: JudgeOptions) -> None:
        self._judge = build_judge(options.name, options.args)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError if the judge needs a column that none of these prompts has."""
        self._judge.require(_columns(prompts))

    def judge(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        *,
        chat: bool,
    ) -> list[Judgement]:
        """One judgement a prompt; ``completions[i]`` are the n completions of ``prompts[i]``.

        The judge is called once: with every completion, or, if it compares, with every pair i < j
        of each prompt's completions. In ``chat`` form it reads prompts as message lists and each
        completion as one message of the assistant; else both are str. A column that a prompt lacks
        is None in its place. What fails is INVALID with its reason. Raises UserError if the judge
        needs a column that no prompt has.
        """
        if self._judge.compares:
            return self._compared(prompts, completions, chat)
        return self._scored(prompts, completions, chat)

    def judge_unit(self, prompts: Sequence[Prompt], sampled: SampledUnit) -> JudgedUnit:
        """Judge what a generator sampled for these prompts; in chat form if they are in it."""
        began = time.perf_counter()
        chat = any(not isinstance(prompt.content, str) for prompt in prompts)
        judgements = self.judge(prompts, sampled.completions, chat=chat)
        return JudgedUnit(tuple(judgements), time.perf_counter() - began)

    def _scored(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], chat: bool
    ) -> list[Judgement]:
        counts = [len(group) for group in completions]
        flat = iter(
            self._ask(
                "completions",
                _repeat(prompts, counts),
                chat,
                completions=[_completion_text(c, chat) for group in completions for c in group],
            )
        )
        judgements = []
        for prompt, count in zip(prompts, counts, strict=True):
            scores = list(itertools.islice(flat, count))
            judgements.append(
                Judgement(
                    position=prompt.position,
                    scores=np.array([_number(score) for score in scores], dtype=np.float64),
                    reasons=tuple(score.reason for score in scores),
                )
            )
        return judgements

    def _compared(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], chat: bool
    ) -> list[Judgement]:
        pairs = [list(itertools.combinations(range(len(group)), 2)) for group in completions]
        asked = [
            (_completion_text(group[i], chat), _completion_text(group[j], chat))
            for group, of_prompt in zip(completions, pairs, strict=True)
            for i, j in of_prompt
        ]
        flat = iter(
            self._ask(
                "comparisons",
                _repeat(prompts, [len(of_prompt) for of_prompt in pairs]),
                chat,
                first=[first for first, _ in asked],
                second=[second for _, second in asked],
            )
        )
        return [
            _judgement_of(prompt, len(group), {pair: next(flat) for pair in of_prompt})
            for prompt, group, of_prompt in zip(prompts, completions, pairs, strict=True)
        ]

    def _ask(
        self, unit: str, prompts: Sequence[Prompt], chat: bool, **texts: Sequence[Text]
    ) -> list[Score]:
        """One score for each of the prompts, in order; ``unit`` is what is counted."""
        if not prompts:
            return []
        texts = {"prompts": [_prompt_text(prompt, chat) for prompt in prompts], **texts}
        columns = _columns(prompts)
        try:
            returned = self._judge.ask(columns, **texts)
            if inspect.isawaitable(returned):
                returned = asyncio.run(_wait_for(returned))
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001  a judge may fail in any way: all are INVALID
            return [Score(None, f"{type(error).__name__}: {error}")] * len(prompts)
        if hasattr(returned, "tolist"):
            returned = returned.tolist()
        if isinstance(returned, str | bytes) or not isinstance(returned, Sequence):
            reason = f"returned a {type(returned).__name__} for {len(prompts)} {unit}"
        elif len(returned) != len(prompts):
            reason = f"returned {len(returned)} values for {len(prompts)} {unit}"
        else:
            return [Score.read(element) for element in returned]
        return [Score(None, reason)] * len(prompts)


class JudgePanel:
    """Judges of one process, asked by name."""

    def __init__(self, judges: Mapping[str, JudgeOptions]) -> None:
        self._workers = {name: JudgeWorker(options) for name, options in judges.items()}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError if a judge needs a column that none of these prompts has."""
        for worker in self._workers.values():
            worker.check(prompts)

    def judge(self, name: str, prompts: Sequence[Prompt], sampled: SampledUnit) -> JudgedUnit:
        """What the judge of that name says of a work unit."""
        return self._workers[name].judge_unit(prompts, sampled)


def refuse_invalid_rounds(
    groups: Sequence[PromptGroup], max_invalid_share: float, judge: str
) -> None:
    """Raises JudgeFailed when more than that share of a round is INVALID.

    Counted are scores, and comparisons (i < j) where the judge compares.
    """
    total = 0
    invalid: list[tuple[PromptGroup, int]] = []
    for group in groups:
        wins = group.judgement.wins
        if wins is None:
            asked = list(enumerate(group.judgement.scores))
        else:
            asked = [(i, wins[i, j]) for i, j in itertools.combinations(range(len(wins)), 2)]
        total += len(asked)
        invalid += [(group, i) for i, value in asked if np.isnan(value)]
    if not invalid or len(invalid) / total <= max_invalid_share:
        return
    group, example = invalid[0]
    unit = "scores" if group.judgement.wins is None else "comparisons"
    reason = " ".join((group.judgement.reasons[example] or "no reason given").split())
    raise JudgeFailed(
        f"judge.name={judge}: {len(invalid)} of the round's {total} {unit} are INVALID, for "
        f"example {group.completions[example].text[:80]!r} ({reason}): mend the judge, or raise "
        f"judge.max_invalid_share={max_invalid_share}"
    )


def _judgement_of(
    prompt: Prompt, count: int, comparisons: Mapping[tuple[int, int], Score]
) -> Judgement:
    wins = np.full((count, count), np.nan)
    reasons: list[list[str]] = [[] for _ in range(count)]
    read = {pair: _as_probability(score) for pair, score in comparisons.items()}
    for (i, j), score in read.items():
        if score.value is not None:
            wins[i, j], wins[j, i] = score.value, 1.0 - score.value
    # The INVALID ones first: whoever reads one line of a reason wants to know what failed.
    for (i, j), score in sorted(read.items(), key=lambda item: item[1].value is not None):
        if score.reason:
            reasons[i].append(f"against {j}: {score.reason}")
            reasons[j].append(f"against {i}: {score.reason}")
    return Judgement(
        position=prompt.position,
        scores=np.array([_mean_of_valid(row) for row in wins], dtype=np.float64),
        reasons=tuple("\n".join(lines) or None for lines in reasons),
        wins=wins,
    )


def _as_probability(score: Score) -> Score:
    if score.value is None or 0.0 <= score.value <= 1.0:
        return score
    return Score(None, f"returned {score.value}: a probability lies in [0, 1]")


def _mean_of_valid(values: DoubleArray) -> float:
    valid = values[~np.isnan(values)]
    return float(valid.mean()) if len(valid) else np.nan


def _number(score: Score) -> float:
    return np.nan if score.value is None else score.value


async def _wait_for(returned: Awaitable[Any]) -> Any:
    return await returned


def _repeat(prompts: Sequence[Prompt], counts: Sequence[int]) -> list[Prompt]:
    return [prompt for prompt, n in zip(prompts, counts, strict=True) for _ in range(n)]


def _columns(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return {name: [prompt.columns.get(name) for prompt in prompts] for name in names}


def _prompt_text(prompt: Prompt, chat: bool) -> Text:
    if not chat:
        return text_of(prompt.content)
    if isinstance(prompt.content, str):
        return [{"role": "user", "content": prompt.content}]
    return [dict(message) for message in prompt.content]


def _completion_text(completion: Completion, chat: bool) -> Text:
    return [{"role": "assistant", "content": completion.text}] if chat else completion.text
