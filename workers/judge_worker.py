"""The judge as a worker: every completion of a round gets a score, or INVALID and the reason."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from judges.asking import Asker, Question
from judges.build import Judge
from judges.desk import Desk
from judges.interface import Score, Text, text_of
from judges.options import AskOptions, is_implicit
from workers.generator import Generator, SampledUnit
from workers.messages import Completion, IntArray, Judgement, Prompt
from workers.verdicts import agreement, compared, dispute, scored
from workers.weight_sync.buckets import Receipt, WeightPush
from workers.weight_sync.proof import Proof

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class JudgedUnit:
    """The judgements of a work unit, one for each prompt, and what judging took in seconds.

    ``counts`` say how it was asked. ``stuck``: a call that was given up still runs, so the worker
    must be replaced.
    """

    judgements: tuple[Judgement, ...]
    seconds: float
    counts: Mapping[str, float] = field(default_factory=dict)
    stuck: bool = False


@dataclass(frozen=True, slots=True)
class Disputed:
    """The ``count`` prompts on whose completions the judges of these names agree least."""

    count: int
    by: tuple[str, ...]


class JudgeWorker:
    """Asks one judge, built once. Raises UserError where ``build_judge`` does."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker
        self._loop = asyncio.new_event_loop()

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError if the judge needs a column that none of these prompts has."""
        self._asker.judge.require(_columns(prompts), OF_COMPLETIONS)

    @property
    def compares(self) -> bool:
        """Whether it is asked for P(first better), else for scores."""
        return self._asker.judge.compares

    def judge(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        *,
        chat: bool,
        selected: frozenset[int] | None = None,
    ) -> list[Judgement]:
        """One judgement a prompt; ``completions[i]`` are the n completions of ``prompts[i]``.

        The judge is asked about every completion, or, if it compares, about every pair i < j of
        each prompt's completions. In ``chat`` form it reads prompts as message lists and each
        completion as one message of the assistant; else both are str. A column that a prompt lacks
        is None in its place. What fails is INVALID with its reason. Prompts whose index is not
        ``selected`` (None: all are) are not asked about. Raises BudgetSpent where the judge's
        budget does not allow so many questions.
        """
        size = 2 if self.compares else 1
        subsets = [list(itertools.combinations(range(len(group)), size)) for group in completions]
        questions = [
            _question(prompt, [group[i] for i in subset], chat, self._asker.judge)
            for at, (prompt, group) in enumerate(zip(prompts, completions, strict=True))
            if selected is None or at in selected
            for subset in subsets[at]
        ]
        answers = iter(self._run(self._asker.ask(questions)))
        judgements = []
        for at, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
            asked = selected is None or at in selected
            scores = {
                subset: next(answers) if asked else Score(None, "not selected", declined=True)
                for subset in subsets[at]
            }
            if self.compares:
                judgements.append(compared(prompt, len(group), scores))
            else:
                judgements.append(scored(prompt, list(scores.values())))
        return judgements

    def judge_unit(
        self,
        prompts: Sequence[Prompt],
        sampled: SampledUnit,
        selected: frozenset[int] | None = None,
    ) -> JudgedUnit:
        """Judge what a generator sampled for these prompts; in chat form if they are in it."""
        began = time.perf_counter()
        before = Counter(self._asker.counts)
        chat = any(not isinstance(prompt.content, str) for prompt in prompts)
        judgements = self.judge(prompts, sampled.completions, chat=chat, selected=selected)
        seconds = time.perf_counter() - began
        counts = Counter(self._asker.counts)
        counts.subtract(before)
        return JudgedUnit(tuple(judgements), seconds, dict(counts), self._asker.stuck())

    def _run(self, asking: Coroutine[Any, Any, T]) -> T:
        """Run it on this worker's loop: here, or where a loop runs here already, beside."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            try:
                return self._loop.run_until_complete(asking)
            finally:
                self._end_tasks()
        with ThreadPoolExecutor(1) as beside:
            return beside.submit(self._run, asking).result()

    def _end_tasks(self) -> None:
        """Ctrl-C leaves tasks behind: end them, so that they free what they have claimed."""
        while tasks := asyncio.all_tasks(self._loop):
            for task in tasks:
                task.cancel()
            with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
                self._loop.run_until_complete(asyncio.wait(tasks))


class JudgePanel:
    """Judges of one process, asked by name."""

    def __init__(
        self,
        judges: Mapping[str, AskOptions],
        desk: Desk,
        policy: Callable[[], Generator | None] = lambda: None,
    ) -> None:
        """``policy`` gives the generator that holds the policy, where a judge asks it."""
        self._workers = {
            title: JudgeWorker(asker_of(options, desk))
            for title, options in judges.items()
            if not is_implicit(options)
        }
        self._policy = policy()

    def load(self, push: WeightPush) -> Receipt:
        """Take the policy's weights. Raises SyncError as a generator does."""
        assert self._policy is not None
        return self._policy.load(push)

    def prove(
        self, prompt_ids: IntArray, sent: Receipt, expected: Completion, limit: float
    ) -> Proof:
        """Show that the last push is what is asked, as a generator does."""
        assert self._policy is not None
        return self._policy.prove(prompt_ids, sent, expected, limit)

    def check(self, prompts: Sequence[Prompt]) -> dict[str, bool]:
        """Which judges compare. Raises UserError if one needs a column that no prompt has."""
        for worker in self._workers.values():
            worker.check(prompts)
        return {name: worker.compares for name, worker in self._workers.items()}

    def judge(
        self,
        name: str,
        prompts: Sequence[Prompt],
        sampled: SampledUnit,
        selected: frozenset[int] | Disputed | None = None,
        second: str | None = None,
    ) -> JudgedUnit:
        """What the judge of that name says of a work unit, and how far a second one agrees."""
        if isinstance(selected, Disputed):
            selected = self._most_disputed(selected, prompts, sampled)
        unit = self._workers[name].judge_unit(prompts, sampled, selected)
        if second is None:
            return unit
        other = self._workers[second].judge_unit(prompts, sampled, selected)
        counts = {**unit.counts, **agreement(unit.judgements, other.judgements)}
        for paid in ("tokens", "usd"):
            counts[paid] = unit.counts.get(paid, 0) + other.counts.get(paid, 0)
        seconds = unit.seconds + other.seconds
        return JudgedUnit(unit.judgements, seconds, counts, unit.stuck or other.stuck)

    def _most_disputed(
        self, disputed: Disputed, prompts: Sequence[Prompt], sampled: SampledUnit
    ) -> frozenset[int]:
        units = [self._workers[name].judge_unit(prompts, sampled) for name in disputed.by]
        verdicts = zip(*(unit.judgements for unit in units), strict=True)
        return largest([dispute(of_prompt) for of_prompt in verdicts], disputed.count)


def asker_of(options: AskOptions, desk: Desk) -> Asker:
    """A judge with its budget, where it has one."""
    return desk.asker(options, budget=getattr(options, "budget", None))


def largest(values: Sequence[float], count: int) -> frozenset[int]:
    """The indices of the ``count`` largest values; of equals, the first."""
    order = sorted(range(len(values)), key=lambda index: (-values[index], index))
    return frozenset(order[:count])


OF_COMPLETIONS = ("prompt_ids", "completion_ids")
"""What a judge is given of each completion besides the text, if its signature takes it."""


def _question(
    prompt: Prompt, completions: Sequence[Completion], chat: bool, judge: Judge
) -> Question:
    """With the columns that the judge reads; ids of a comparison are those of both."""
    columns = dict.fromkeys(judge.needed()) | dict(prompt.columns)
    if judge.reads("prompt_ids"):
        columns["prompt_ids"] = prompt.ids.tolist()
    if judge.reads("completion_ids"):
        ids = [completion.ids.tolist() for completion in completions]
        columns["completion_ids"] = ids[0] if len(ids) == 1 else ids
    texts = tuple(_completion_text(completion, chat) for completion in completions)
    return Question(prompt_text(prompt, chat), texts, columns)


def _columns(prompts: Sequence[Prompt]) -> list[str]:
    return list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))


def prompt_text(prompt: Prompt, chat: bool) -> Text:
    """The prompt as judges read it: as messages in ``chat`` form, else as text."""
    if not chat:
        return text_of(prompt.content)
    if isinstance(prompt.content, str):
        return [{"role": "user", "content": prompt.content}]
    return [dict(message) for message in prompt.content]


def _completion_text(completion: Completion, chat: bool) -> Text:
    return [{"role": "assistant", "content": completion.text}] if chat else completion.text
