"""A lesson: what a round's updates learn from, its own prompts and earlier rounds', in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from pipeline.batch import update_batch
from pipeline.config import Config
from pipeline.learner import RemoteLearner
from pipeline.ledger import Ledger, with_reference_logprobs
from pipeline.resampling import RoundPlan, Share
from workers.learner.needs import Needs
from workers.messages import (
    BatchCompletion,
    Completion,
    FloatArray,
    PromptGroup,
    Round,
    UpdateBatch,
)
from workers.seeds import derive_seed

ScoresT = TypeVar("ScoresT")


@dataclass(frozen=True, slots=True)
class Terms:
    """How a run cuts its rounds into updates."""

    prompts_per_update: int
    truncated: Literal["train", "mask", "drop"]
    needs: Needs
    run_seed: int


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """A round, the ``earlier`` prompts that are learned from with it, and how they make updates.

    A prompt keeps its slot also where nothing is known of it (a given set may have gaps), so that
    each update gets the prompts that are its own.
    """

    plan: RoundPlan
    round_: Round
    earlier: tuple[PromptGroup, ...]
    terms: Terms

    def batches(self) -> list[UpdateBatch]:
        """The updates the round feeds, in order.

        Each takes the next ``prompts_per_update`` slots; the first pass in stream order, or in a
        derived order where rounds are mixed, each later pass in a derived order of its own.
        """
        found: list[UpdateBatch] = []
        passed = 0
        while len(found) < self.plan.updates:
            found += self._pass(passed)
            passed += 1
        return found[: self.plan.updates]

    def unused(self, updates: int) -> int:
        """Pairs (or other examples) of the round's own that its first so many updates left out."""
        learned = _own_examples(self.batches()[:updates])
        return len(_own_examples(self._pass(0)) - learned)

    def scored_once(
        self,
        score: Callable[[Sequence[UpdateBatch]], list[list[ScoresT]]],
        wanted: Callable[[BatchCompletion], bool] = lambda item: True,
    ) -> dict[tuple[int, int], ScoresT]:
        """What ``score`` says of each completion that is ``wanted``, by position and sample.

        Each is scored once, in the batches of the first pass, hence the micro-batches of its
        update, unless others of its batch are not wanted; the round's completions that no example
        holds are scored apart.
        """
        first_pass = [_only(batch, wanted) for batch in self._pass(0)]
        held = {_key(item.completion) for batch in first_pass for item in batch.completions}
        items = (
            BatchCompletion(group.prompt.ids, completion)
            for group in self.round_.groups
            for completion in group.completions
        )
        others = tuple(i for i in items if _key(i.completion) not in held and wanted(i))
        batches = [*first_pass, UpdateBatch(others, ())]
        scored: dict[tuple[int, int], ScoresT] = {}
        for batch, scores in zip(batches, score(batches), strict=True):
            for item, found in zip(batch.completions, scores, strict=True):
                scored[_key(item.completion)] = found
        return scored

    def with_reference(self, learner: RemoteLearner) -> Lesson:
        """The lesson with the current reference's log-probabilities of every completion.

        Those that lack them are scored, so that policy = reference gives a log-ratio of exactly 0;
        all of them where a replayed one does, so that a resumed run scores the same batches.
        """
        anew = any(
            completion.reference_logprobs is None
            for group in self.earlier
            for completion in group.completions
        )
        scores = self.scored_once(
            learner.score_reference,
            lambda item: anew or item.completion.reference_logprobs is None,
        )
        if not scores:
            return self
        return replace(
            self,
            round_=with_reference_logprobs(self.round_, scores),
            earlier=tuple(_rescored(group, scores) for group in self.earlier),
        )

    def by_the_reference(self) -> Lesson:
        """The lesson with the reference declared to have sampled every completion of it."""

        def declare(completion: Completion) -> Completion:
            logprobs = completion.reference_logprobs
            if logprobs is None:
                return completion
            return replace(completion, logprobs=logprobs, sampling_logprobs=logprobs)

        earlier = tuple(
            replace(group, completions=tuple(declare(c) for c in group.completions))
            for group in self.earlier
        )
        return replace(self, round_=self.round_.with_completions(declare), earlier=earlier)

    def _pass(self, passed: int) -> list[UpdateBatch]:
        own = {group.prompt.position: group for group in self.round_.groups}
        groups = own | {group.prompt.position: group for group in self.earlier}
        slots = self._slots(passed)
        size = self.terms.prompts_per_update
        earlier = frozenset(group.prompt.position for group in self.earlier)
        return [
            update_batch(
                [groups[p] for p in slots[first : first + size] if p in groups],
                self.terms.needs,
                self.terms.truncated,
                earlier,
                self.round_.given,
            )
            for first in range(0, len(slots), size)
        ]

    def _slots(self, passed: int) -> list[int]:
        """The positions of a pass, in its order."""
        positions = positions_of(self.plan, self.terms.run_seed)
        if not passed:
            return positions
        seed = derive_seed(self.terms.run_seed, "pass", self.plan.index, passed)
        order = np.random.default_rng(seed).permutation(len(positions))
        return [positions[i] for i in order]


def positions_of(plan: RoundPlan, run_seed: int) -> list[int]:
    """The prompts a round's updates learn from, in the order of the first pass.

    A share's are drawn without replacement; where rounds are mixed, in a derived order.
    """
    if not plan.shares:
        return list(range(plan.start, plan.start + plan.prompts))
    drawn = [position for share in plan.shares for position in _drawn(share, plan.index, run_seed)]
    seed = derive_seed(run_seed, "mixture", plan.index)
    return [drawn[i] for i in np.random.default_rng(seed).permutation(len(drawn))]


def _drawn(share: Share, round_index: int, run_seed: int) -> list[int]:
    seed = derive_seed(run_seed, "replay", round_index, share.index)
    rng = np.random.default_rng(seed)
    chosen = rng.choice(share.prompts, size=share.take, replace=False)
    return [share.start + int(offset) for offset in sorted(chosen)]


def earlier_groups(
    plan: RoundPlan, ledger: Ledger, run_seed: int, reference_version: int | None
) -> tuple[PromptGroup, ...]:
    """The prompts of rounds before that this one learns from again, as the ledger has them.

    Without reference log-probabilities where another reference than that version's gave them.
    Raises KeyError for a round that is not in the ledger.
    """
    found: list[PromptGroup] = []
    for share in plan.shares[1:]:
        wanted = set(_drawn(share, plan.index, run_seed))
        round_ = ledger.read(share.index)
        if round_.reference_version != reference_version:
            round_ = round_.with_completions(lambda c: replace(c, reference_logprobs=None))
        found += [group for group in round_.groups if group.prompt.position in wanted]
    return tuple(found)


def terms_of(cfg: Config) -> Terms:
    """How a config's rounds are cut into updates."""
    sampling = cfg.sampling
    return Terms(sampling.prompts_per_update, sampling.truncated, cfg.needs, cfg.run.seed)


def _own_examples(batches: Sequence[UpdateBatch]) -> set[tuple[tuple[int, int], ...]]:
    """Each example by its completions; those of earlier rounds left out."""
    return {
        tuple(_key(batch.completions[row].completion) for row in example.rows)
        for batch in batches
        for example in batch.examples
        if not batch.completions[example.rows[0]].replayed
    }


def _only(batch: UpdateBatch, wanted: Callable[[BatchCompletion], bool]) -> UpdateBatch:
    """The batch as it is where all its completions are wanted, else those that are."""
    kept = tuple(item for item in batch.completions if wanted(item))
    return batch if len(kept) == len(batch.completions) else UpdateBatch(kept, ())


def _rescored(
    group: PromptGroup, scores: Mapping[tuple[int, int], FloatArray | None]
) -> PromptGroup:
    def change(completion: Completion) -> Completion:
        key = _key(completion)
        if key not in scores:
            return completion
        return replace(completion, reference_logprobs=scores[key])

    return replace(group, completions=tuple(change(c) for c in group.completions))


def _key(completion: Completion) -> tuple[int, int]:
    return completion.position, completion.sample
