"""The mean loss of a batch under an objective, and its gradient, a micro-batch at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from judges.errors import UserError
from workers.learner.assembly import (
    Assembly,
    ScoredRows,
    behaviour_logps,
    gap_weights,
    reference_logprobs,
)
from workers.learner.batching import micro_batches, pad_rows
from workers.learner.correction import example_weights
from workers.learner.correction_options import Correction
from workers.learner.density_ratio import DensityRatio
from workers.learner.logprobs import CompletionScorer, score_batch
from workers.learner.needs import Needs
from workers.learner.objective_options import BcoOptions
from workers.learner.objectives import ObjectiveOutput, build_objective
from workers.learner.pairwise_options import Options
from workers.learner.reference import Reference
from workers.learner.statistics import Scored
from workers.messages import BatchCompletion, BatchExample, DoubleArray, UpdateBatch


@dataclass(frozen=True, slots=True, eq=False)
class _Update:
    """A batch, the policy's version, and what the whole of it says of mismatched completions."""

    batch: UpdateBatch
    version: int
    mismatched: tuple[Tensor, Tensor] | None


class BatchLoss:
    """An objective over batches, with what it remembers from update to update.

    An objective of single examples is differentiated through each micro-batch in one pass. One that
    needs the whole update is computed on log-probabilities scored beforehand, and its gradient with
    respect to them is carried through a second pass: accumulation cannot change it. Each example's
    loss is multiplied by its ``gap_weights`` under ``gap_clip`` and by the weight that
    ``correction`` gives what an older policy wrote.
    """

    def __init__(
        self,
        options: Options,
        score_policy: CompletionScorer,
        reference: Reference | None,
        tokens_per_micro_batch: int,
        gap_clip: float | None = None,
        correction: Correction | None = None,
    ) -> None:
        self._name = options.name
        self._objective = build_objective(options)
        self._begun = self._objective.state()
        self._score_policy = score_policy
        self._reference = reference
        self._tokens_per_micro_batch = tokens_per_micro_batch
        self._gap_clip = gap_clip
        self._correction = correction or Correction()
        self._needs = self._correction.widen(self._objective.needs)
        self._density_ratio: DensityRatio | None = None
        if isinstance(options, BcoOptions) and options.embedding_model is not None:
            self._density_ratio = DensityRatio(options.embedding_model)

    @property
    def needs(self) -> Needs:
        """What the objective and its correction must be given."""
        return self._needs

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "objective": self._objective.state(),
            "density_ratio": self._density_ratio and self._density_ratio.state(),
        }

    def forget(self) -> None:
        """Let the objective begin again: what it remembers is of a policy that is no more."""
        self._objective.load(self._begun)

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state`` gave."""
        self._objective.load(state["objective"])
        if self._density_ratio is not None:
            self._density_ratio.load(state["density_ratio"])

    def backward(self, batch: UpdateBatch, version: int) -> Scored:
        """Add the gradient of the mean loss over the batch's examples to the policy's.

        ``version`` is the policy's. Raises NonFiniteLossError; a part of the gradient may have been
        added then.
        """
        split = micro_batches(batch, self._tokens_per_micro_batch)
        learned = [(rows, examples) for rows, examples in split if examples]
        update = _Update(batch, version, self._mismatched(batch.mismatched))
        if self.needs.whole_update and len(learned) > 1:
            parts = [self._in_two_passes(update, [rows for rows, _ in learned])]
        else:
            parts = [self._in_one_pass(update, *part) for part in learned]
        return self._scored(update, parts)

    def _in_one_pass(
        self, update: _Update, rows: Sequence[int], examples: Sequence[BatchExample]
    ) -> tuple[ScoredRows, ObjectiveOutput]:
        """Score a micro-batch and add its share of the gradient."""
        scored = self._score(update.batch, rows)
        output = self._loss(update, scored, examples)
        if output.loss.requires_grad:  # not where every completion is only contrasted with
            mean = output.loss.sum() / len(update.batch.examples)
            mean.backward()  # type: ignore[no-untyped-call]
        return scored, output

    def _in_two_passes(
        self, update: _Update, split: Sequence[Sequence[int]]
    ) -> tuple[ScoredRows, ObjectiveOutput]:
        """Score everything, differentiate the loss with respect to the log-probabilities, and
        carry that gradient through the policy, a micro-batch at a time."""
        batch = update.batch
        with torch.no_grad():
            found = [self._score(batch, rows) for rows in split]
        scored = ScoredRows(
            {row: logprobs for part in found for row, logprobs in part.logprobs.items()},
            {row: values for part in found for row, values in part.log_collisions.items()},
        )
        learned = [row for row in scored.logprobs if batch.completions[row].learn]
        leaves = [scored.logprobs[row].requires_grad_() for row in learned]
        output = self._loss(update, scored, batch.examples)
        if leaves:
            mean = output.loss.sum() / len(batch.examples)
            gradients = torch.autograd.grad(mean, leaves, materialize_grads=True)
            gradient_of = dict(zip(learned, gradients, strict=True))
            for rows in split:
                own = [row for row in rows if row in gradient_of]
                if own:
                    logprobs = self._score(batch, rows).logprobs
                    torch.autograd.backward(
                        [logprobs[row] for row in own], [gradient_of[row] for row in own]
                    )
        return scored, output

    def _score(self, batch: UpdateBatch, rows: Sequence[int]) -> ScoredRows:
        """The policy's log-probabilities of these completions, differentiable where learned."""
        items = [batch.completions[row] for row in rows]
        padded = pad_rows(items)
        arguments = (padded.ids_BT, padded.starts_B, padded.lengths_B)
        collisions: list[Tensor] = []
        if self.needs.collisions:
            logprobs, collisions = self._score_policy.with_collisions(*arguments)
        else:
            logprobs = self._score_policy(*arguments)
        learned = [
            row if item.learn else row.detach() for row, item in zip(logprobs, items, strict=True)
        ]
        return ScoredRows(
            dict(zip(rows, learned, strict=True)), dict(zip(rows, collisions, strict=False))
        )

    def _loss(
        self, update: _Update, scored: ScoredRows, examples: Sequence[BatchExample]
    ) -> ObjectiveOutput:
        density_ratio = self._density_ratio(examples) if self._density_ratio else None
        assembly = Assembly(update.batch, scored, self._objective.needs, update.version)
        output = self._objective(assembly.record(examples, update.mismatched, density_ratio))
        learns = any(logprobs.requires_grad for logprobs in scored.logprobs.values())
        if learns and not output.loss.requires_grad:
            raise UserError(
                f"objective.name={self._name}: its loss does not depend on the policy: compute it "
                "from the record's log-probabilities, without detach()"
            )
        batch = update.batch
        correction = example_weights(self._correction, batch, scored, examples, update.version).to(
            output.loss
        )
        gaps = gap_weights(batch.completions, examples, self._gap_clip).to(output.loss)
        measures = dict(output.measures)
        if self._correction.name != "none":
            measures["correction_weight"] = correction
        return replace(output, loss=output.loss * gaps * correction, measures=measures)

    def _mismatched(self, items: tuple[BatchCompletion, ...]) -> tuple[Tensor, Tensor] | None:
        """Policy and reference log-probabilities [M] of completions under others' prompts."""
        if not self.needs.mismatched:
            return None
        assert self._reference is not None
        batch, tokens = UpdateBatch(items, ()), self._tokens_per_micro_batch
        policy, reference = (
            [float(row.sum(dtype=np.float64)) for row in score_batch(scorer, batch, tokens)]
            for scorer in (self._score_policy, self._reference.score)
        )
        return torch.tensor(policy), torch.tensor(reference)

    def _scored(
        self, update: _Update, parts: Sequence[tuple[ScoredRows, ObjectiveOutput]]
    ) -> Scored:
        """What was scored and lost, as columns over the batch."""
        items = update.batch.completions
        logps = torch.full((len(items),), torch.nan)
        log_ratio, moved = (torch.full((len(items),), torch.nan).double() for _ in range(2))
        for scored, _ in parts:
            for row, logprobs in scored.logprobs.items():
                logps[row] = logprobs.detach().sum()
                since = _since_sampled(items[row], logprobs.detach(), update.version)
                log_ratio[row] = since.sum()
                moved[row] = (torch.expm1(since) - since).sum()
        reference = None
        if self.needs.reference:
            reference = torch.stack([reference_logprobs(item).sum() for item in items])
        log_weight = logps - behaviour_logps(items, logps, update.version)
        own = torch.tensor([item.completion.reference_share == 0.0 for item in items])
        log_weight = torch.where(own, log_weight, 0.0)  # an opponent's sample is meant to be other
        outputs = [output for _, output in parts]
        return Scored(
            logps=logps.double().numpy(),
            ref=None if reference is None else reference.double().numpy(),
            log_weight=log_weight.double().numpy(),
            log_ratio=torch.where(own, log_ratio, 0.0).numpy(),
            moved=torch.where(own, moved, 0.0).numpy(),
            loss=_column([output.loss for output in outputs]),
            measures={
                name: _column([output.measures[name] for output in outputs])
                for name in outputs[0].measures
            },
        )


def _since_sampled(item: BatchCompletion, logprobs: Tensor, version: int) -> Tensor:
    """ln r of each token [T], r = π / the policy that sampled, both at temperature 1.

    Exactly 0 for what this version sampled. Σ_t (r − 1 − ln r) estimates the KL from that policy
    in nats, never negative, without bias where its plain softmax was sampled (the estimator k3 of
    Schulman, Approximating KL Divergence, 2020).
    """
    completion = item.completion
    if completion.version == version and not item.given:
        return torch.zeros_like(logprobs, dtype=torch.float64)
    return logprobs.double() - torch.from_numpy(completion.logprobs).double()


def _column(values: Sequence[Tensor]) -> DoubleArray:
    return torch.cat([value.detach() for value in values]).double().numpy()
