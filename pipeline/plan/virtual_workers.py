"""Workers that do nothing but what the loop asks of them: their completions are two tokens.

What they answer is a function of seeds and weights, so that a run is the same at any speed.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.learner import RemoteLearner
from pipeline.sync import WeightSync
from pipeline.tracking import UPDATE_KEYS
from workers.generator import SampledUnit, SampleRequest
from workers.judge_worker import JudgedUnit
from workers.messages import (
    Completion,
    FloatArray,
    Judgement,
    Prompt,
    Round,
    UpdateBatch,
    probe_completion,
)
from workers.weight_sync.buckets import Receipt
from workers.weight_sync.proof import Proof

LOGPROBS: FloatArray = np.array([-1.0, -1.0], np.float32)


class VirtualGenerator:
    """Its completions are a function of seed and weights: two tokens, of which the first differs
    from sample to sample."""

    def __init__(self) -> None:
        self._weights = (-1, 0)
        self.seconds = 0.0

    def load(self, weights: tuple[int, int]) -> Receipt:
        """Take the version and the state of the learner."""
        self._weights = weights
        return Receipt(weights[0], str(weights[1]))

    def prove(self, ids: Any, sent: Receipt, expected: Completion, limit: float) -> Proof:
        """Nothing is lost on the way."""
        return Proof(sent.version, sent.checksum, 0.0, 0.0)

    def sample(self, request: SampleRequest) -> SampledUnit:
        """The completions of the request's prompts."""
        found = [
            self._completion(prompt, sample, request.seed(prompt, sample))
            for prompt in request.prompts
            for sample in range(request.samples)
        ]
        return request.answer(found, self.seconds)

    def rest(self) -> None:
        """Nothing."""

    def _completion(self, prompt: Prompt, sample: int, seed: int) -> Completion:
        version, state = self._weights
        drawn = mixed(state, seed) % 1000
        return Completion(
            position=prompt.position,
            sample=sample,
            seed=seed,
            version=version,
            ids=np.array([sample, drawn], np.int64),
            logprobs=LOGPROBS,
            sampling_logprobs=None,
            finished=True,
            text=f"{sample} {drawn}",
        )


class VirtualJudge:
    """Scores by the second token; of equals, the second sample is better."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def judge(
        self, name: str, prompts: Sequence[Prompt], sampled: SampledUnit, selected: Any, second: Any
    ) -> JudgedUnit:
        """A score for each completion."""
        return judged(prompts, sampled, self.seconds)


class VirtualLearner:
    """Counts its updates, and the pairs of each lag; ``reference``: whether it has one to score."""

    def __init__(self, reference: bool = True) -> None:
        self._reference = reference
        self.version = 0
        self.state = 0
        self.seconds = 0.0
        self.lags: Counter[int] = Counter()

    def begin_round(self, index: int) -> int | None:
        """The reference does not move."""
        return 0 if self._reference else None

    def score_reference(self, batches: Sequence[UpdateBatch]) -> list[list[FloatArray]]:
        """What was sampled with."""
        return [[item.completion.logprobs for item in batch.completions] for batch in batches]

    def score_policy(self, batch: UpdateBatch) -> list[FloatArray]:
        """What was sampled with."""
        return [item.completion.logprobs for item in batch.completions]

    def implicit_reward(
        self, prompts: Sequence[Prompt], sampled: SampledUnit, beta: float
    ) -> JudgedUnit:
        """As the judge's."""
        return judged(prompts, sampled, self.seconds)

    def weights(self, keep_from: int) -> tuple[int, int]:
        """Version and state."""
        return self.version, self.state

    def sent(self) -> Receipt:
        """What the generator must answer."""
        return Receipt(self.version, str(self.state))

    def probe(self, ids: Any, new_tokens: int) -> Completion:
        """Of no tokens."""
        return probe_completion(self.version, [], [])

    def update(self, batch: UpdateBatch) -> dict[str, Any]:
        """One more version."""
        fresh = (item.completion.version for item in batch.completions if not item.replayed)
        self.lags.update(self.version - version for version in fresh)
        self.version += 1
        return dict.fromkeys(UPDATE_KEYS) | {"pairs": len(batch.examples)}


def judged(prompts: Sequence[Prompt], sampled: SampledUnit, seconds: float) -> JudgedUnit:
    """The second token of each completion as its score, half a point for a later sample."""
    judgements = []
    for prompt, completions in zip(prompts, sampled.completions, strict=True):
        scores = [float(c.ids[1]) + 0.5 * c.sample for c in completions]
        judgements.append(Judgement(prompt.position, np.array(scores), (None,) * len(scores)))
    return JudgedUnit(tuple(judgements), seconds)


def mixed(state: int, number: int) -> int:
    """A hash of two numbers, from 0 to 2³² − 1."""
    return zlib.crc32(number.to_bytes(8, "little"), state)


class MemoryLedger:
    """Rounds by index, each written once, as the ledger on disk insists; ``keeps`` False: only
    that they were."""

    def __init__(self, keeps: bool = True) -> None:
        self._keeps = keeps
        self._rounds: dict[int, Round | None] = {}

    def append(self, round_: Round) -> None:
        """Keep a round."""
        assert round_.index == len(self._rounds), "lost, twice or out of turn"
        self._rounds[round_.index] = round_ if self._keeps else None

    def append_reference(self, round_: Round) -> None:
        """Keep what the reference says of it."""
        if self._keeps:
            assert self.read(round_.index).reference_version is None
            self._rounds[round_.index] = round_

    def read(self, index: int) -> Round:
        """A round that was kept."""
        found = self._rounds[index]
        assert found is not None
        return found

    def __contains__(self, index: int) -> bool:
        return index in self._rounds


class NoEvaluator:
    """Never due."""

    def baseline(self, learner: RemoteLearner, sync: WeightSync) -> None:
        """Nothing to compare with."""

    def due(self, update: int) -> bool:
        """Never."""
        return False


class NoCheckpoints:
    """Never due."""

    def due(self, update: int) -> bool:
        """Never."""
        return False
