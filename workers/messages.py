"""What travels between workers: frozen records, arrays in numpy, no torch."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from judges.interface import Text

IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float32]
DoubleArray: TypeAlias = npt.NDArray[np.float64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One prompt of the stream.

    ``position`` counts prompts since the start of the run (unique, it seeds the samples);
    ``ids`` [P] is what the policy sees, ``content`` what judges and people read, ``columns`` the
    row's other fields, handed to the judge.
    """

    position: int
    ids: IntArray
    content: Text
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """One sample of the policy for one prompt, token-exact.

    ``ids`` [T] end in an EOS only if it was sampled (``finished``). ``logprobs`` [T] are under the
    plain softmax at temperature 1; ``sampling_logprobs`` [T] under the distribution it was really
    drawn from, None where that is the same. ``version`` is the policy version that wrote it: its
    first token, where ``last_version`` names another that wrote the last (in-flight updates).
    ``reference_logprobs`` [T] are filled in once a reference has scored it. ``reference_share`` μ
    says whose sample it is: of π^(1−μ)·π_ref^μ, normalised token by token; 0 is the policy's own.
    ``gap_log_weight`` is Σ_t (learner's − generator's plain log-probability) in nats where
    ``logprobs`` are the learner's own, recomputed; None where they are what the generator gave.
    """

    position: int
    sample: int
    seed: int
    version: int
    ids: IntArray
    logprobs: FloatArray
    sampling_logprobs: FloatArray | None
    finished: bool
    text: str
    reference_logprobs: FloatArray | None = None
    reference_share: float = 0.0
    last_version: int | None = None
    gap_log_weight: float | None = None

    @property
    def behaviour_logprobs(self) -> FloatArray:
        """[T] log-probabilities under the distribution the tokens were drawn from."""
        return self.logprobs if self.sampling_logprobs is None else self.sampling_logprobs


def probe_completion(version: int, ids: list[int], logprobs: list[float]) -> Completion:
    """A probe's continuation: of no prompt in the stream, for no judge to read."""
    return Completion(
        position=-1,
        sample=0,
        seed=0,
        version=version,
        ids=np.array(ids, np.int64),
        logprobs=np.array(logprobs, np.float32),
        sampling_logprobs=None,
        finished=False,
        text="",
    )


@dataclass(frozen=True, slots=True, eq=False)
class Judgement:
    """What a judge said of the n completions of one prompt.

    ``scores`` [n] (higher is better; NaN is INVALID) and ``reasons``, one each. A comparing judge
    also fills ``wins`` [n, n]: P(i better than j), 0.5 a tie, NaN INVALID; its scores are then the
    mean win probabilities. ``declined``, of the shape of wins, else of scores, tells where a NaN is
    no failure: nobody asked, or the judge declined; None: nowhere.
    """

    position: int
    scores: DoubleArray
    reasons: tuple[str | None, ...]
    wins: DoubleArray | None = None
    declined: BoolArray | None = None

    def preferences(self) -> list[int]:
        """Of each pair i < j: 1 where i is preferred, −1 where j is, 0 where neither."""
        pairs = itertools.combinations(range(len(self.scores)), 2)
        if self.wins is not None:
            margins = [self.wins[i, j] - 0.5 for i, j in pairs]
        else:
            margins = [self.scores[i] - self.scores[j] for i, j in pairs]
        return [0 if np.isnan(margin) else int(np.sign(margin)) for margin in margins]


class Fate(enum.Enum):
    """What became of a pair or a label: learned from, or the reason why not."""

    LEARN = "learn"
    TIE = "tie"
    INVALID = "invalid"
    UNJUDGED = "unjudged"
    IDENTICAL = "identical"
    MARGIN = "margin"
    TRUNCATED = "truncated"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two completions of one prompt by their sample index, and P(chosen is better)."""

    position: int
    chosen: int
    rejected: int
    label_prob: float
    fate: Fate


@dataclass(frozen=True, slots=True)
class Label:
    """One completion of a prompt by its sample index: desirable or not, without a partner."""

    position: int
    sample: int
    desirable: bool
    fate: Fate


@dataclass(frozen=True, slots=True, eq=False)
class PromptGroup:
    """A prompt with all that was sampled and said of it in a round: pairs, or labels."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    judgement: Judgement
    pairs: tuple[Pair, ...]
    labels: tuple[Label, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Round:
    """One sampling of prompts by one policy version, judged and paired.

    ``logprob_gap`` is the generators' distance from the learner when their weights were proved;
    ``reference_version`` that of the reference which scored it, None before or without. ``seconds``
    are wall-clock by stage: the only part of a round that differs between reruns. ``judging`` says
    how the judge was asked and what came of it. ``given``: nobody sampled it, its pairs are of a
    given set; ``version`` is then the learner's when the round was admitted.
    """

    index: int
    version: int
    groups: tuple[PromptGroup, ...]
    judge: str
    seconds: Mapping[str, float]
    logprob_gap: float | None = None
    reference_version: int | None = None
    judging: Mapping[str, float | None] = field(default_factory=dict)
    given: bool = False

    @property
    def versions(self) -> list[int]:
        """Whose proof is due: the version asked for, and those that wrote first and last tokens."""
        written = {c.version for c in self.completions}
        written |= {c.last_version for c in self.completions if c.last_version is not None}
        return sorted({self.version} | written)

    def with_completions(self, change: Callable[[Completion], Completion]) -> Round:
        """The same round with each completion changed."""
        groups = tuple(
            replace(group, completions=tuple(change(c) for c in group.completions))
            for group in self.groups
        )
        return replace(self, groups=groups)

    @property
    def completions(self) -> list[Completion]:
        return [c for group in self.groups for c in group.completions]

    @property
    def pairs(self) -> list[Pair]:
        return [pair for group in self.groups for pair in group.pairs]

    @property
    def labels(self) -> list[Label]:
        return [label for group in self.groups for label in group.labels]


@dataclass(frozen=True, slots=True, eq=False)
class BatchCompletion:
    """A completion as the learner needs it; without ``learn`` no gradient flows into it.

    ``replayed``: an earlier round's, learned from again. ``given``: no policy of this run wrote it.
    """

    prompt_ids: IntArray
    completion: Completion
    learn: bool = True
    replayed: bool = False
    given: bool = False


@dataclass(frozen=True, slots=True)
class BatchPair:
    """Indices into ``UpdateBatch.completions``, and P(chosen is better)."""

    chosen: int
    rejected: int
    label_prob: float

    @property
    def rows(self) -> tuple[int, ...]:
        return (self.chosen, self.rejected)


@dataclass(frozen=True, slots=True)
class BatchLabel:
    """Index into ``UpdateBatch.completions``: desirable or not; the prompt as people read it."""

    completion: int
    desirable: bool
    prompt: str

    @property
    def rows(self) -> tuple[int, ...]:
        return (self.completion,)


@dataclass(frozen=True, slots=True)
class BatchRanking:
    """Indices into ``UpdateBatch.completions`` of one prompt, best first."""

    completions: tuple[int, ...]

    @property
    def rows(self) -> tuple[int, ...]:
        return self.completions


@dataclass(frozen=True, slots=True)
class BatchSample:
    """Index of a policy sample into ``UpdateBatch.completions``, P(better than its opponent)."""

    completion: int
    win_prob: float

    @property
    def rows(self) -> tuple[int, ...]:
        return (self.completion,)


BatchExample: TypeAlias = BatchPair | BatchLabel | BatchRanking | BatchSample
"""What has one loss."""


@dataclass(frozen=True, slots=True, eq=False)
class UpdateBatch:
    """What one update learns from: examples of one type over completions that stand here once.

    ``mismatched`` are completions under prompts that they were not written for (KTO).
    """

    completions: tuple[BatchCompletion, ...]
    examples: tuple[BatchExample, ...]
    mismatched: tuple[BatchCompletion, ...] = ()
