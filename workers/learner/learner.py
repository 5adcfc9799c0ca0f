"""The learner: scores completions, takes updates, and hands out its weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.learner.assembly import Assembly, ScoredRows, behaviour_logps, reference_logprobs
from workers.learner.batching import pad_rows, rows_by_tokens
from workers.learner.density_ratio import DensityRatio
from workers.learner.logprobs import CompletionScorer
from workers.learner.objective_options import BcoOptions, Options
from workers.learner.objectives import ObjectiveOutput, build_objective
from workers.learner.options import LearnerOptions, ReferenceOptions, learning_rate
from workers.learner.reference import Reference
from workers.learner.statistics import Scored, update_measures
from workers.messages import (
    BatchCompletion,
    BatchExample,
    Completion,
    DoubleArray,
    FloatArray,
    IntArray,
    UpdateBatch,
    probe_completion,
)
from workers.models.load import load_policy
from workers.options import PolicyOptions
from workers.sampler import logprobs_of
from workers.weight_sync.buckets import Receipt, WeightPush, pack


class Learner:
    """Policy, reference and optimizer of one process.

    ``version`` counts updates applied. Dropout is off: a completion has one log-probability. A
    reference is kept where the objective needs one or ``keep_reference`` asks for it.
    """

    def __init__(
        self,
        policy: PolicyOptions,
        options: LearnerOptions,
        objective: Options,
        updates: int,
        reference: ReferenceOptions | None = None,
        keep_reference: bool = False,
    ) -> None:
        self.version = 0
        self._sent = Receipt(-1, "")
        self._options = options
        self._objective_options = objective
        self._updates = updates
        self._objective = build_objective(objective)
        self._density_ratio: DensityRatio | None = None
        if isinstance(objective, BcoOptions) and objective.embedding_model is not None:
            self._density_ratio = DensityRatio(objective.embedding_model)
        self._policy = load_policy(policy)
        self._reference: Reference | None = None
        if self._objective.needs.reference or keep_reference:
            self._reference = Reference(self._policy, reference or ReferenceOptions())
        self._score_policy = CompletionScorer(self._policy)
        self._optimizer = torch.optim.AdamW(
            self._policy.parameters(),
            lr=options.learning_rate,
            weight_decay=options.weight_decay,
            fused=True,
        )

    def notes(self) -> list[str]:
        """What a user should know of how this model is computed."""
        if not self._score_policy.plain:
            return []
        return [
            "the model's logits are not its head applied to its last hidden state: the learner "
            "holds full logits (more memory, slower)"
        ]

    def begin_round(self, index: int) -> int | None:
        """Let the reference move before round ``index`` is learned from; its version then.

        None where there is no reference.
        """
        if self._reference is None:
            return None
        self._reference.begin_round(index, self._policy, self.version)
        return self._reference.version

    @torch.no_grad()
    def score_reference(self, batches: Sequence[UpdateBatch]) -> list[list[FloatArray | None]]:
        """Reference log-probabilities of every completion, [tokens] each, batch by batch.

        Scored in the micro-batches in which ``update`` will score the policy, so that policy =
        reference gives a log-ratio of exactly 0. None each where there is no reference.
        """
        if self._reference is None:
            return [[None] * len(batch.completions) for batch in batches]
        return [list(self._scores(self._reference.score, batch)) for batch in batches]

    @torch.no_grad()
    def probe(self, prompt_ids: IntArray, new_tokens: int) -> Completion:
        """Greedy continuation of the probe, by full forward passes: nothing is cached."""
        ids = torch.from_numpy(prompt_ids)
        logprobs = []
        for _ in range(new_tokens):
            logits = self._policy(ids[None], use_cache=False, logits_to_keep=1).logits[:, -1]
            token = logits.argmax(-1)
            logprobs.append(float(logprobs_of(logits, token)))
            ids = torch.cat([ids, token])
        return probe_completion(self.version, ids[len(prompt_ids) :].tolist(), logprobs)

    @torch.no_grad()
    def score_policy(self, batch: UpdateBatch) -> list[FloatArray]:
        """The current policy's log-probabilities of every completion, [tokens] each."""
        return self._scores(self._score_policy, batch)

    def _scores(self, scorer: CompletionScorer, batch: UpdateBatch) -> list[FloatArray]:
        scores: list[FloatArray] = [np.empty(0, np.float32)] * len(batch.completions)
        for rows, _ in self._micro_batches(batch):
            padded = pad_rows([batch.completions[row] for row in rows])
            found = scorer(padded.ids_BT, padded.starts_B, padded.lengths_B)
            for row, logprobs in zip(rows, found, strict=True):
                scores[row] = logprobs.numpy()
        return scores

    def _micro_batches(self, batch: UpdateBatch) -> list[tuple[list[int], list[BatchExample]]]:
        """Completions by index and the examples over them."""
        split = rows_by_tokens(
            batch.completions, batch.examples, self._options.tokens_per_micro_batch
        )
        return [(rows, [batch.examples[e] for e in examples]) for rows, examples in split]

    def update(self, batch: UpdateBatch) -> dict[str, Any]:
        """One optimizer step on the mean loss of the batch's examples; version += 1.

        Also when nothing was left to learn from: then no step is taken and the measures are None.
        Every completion must carry ``reference_logprobs`` if the objective needs a reference.
        Returns the update record.
        """
        began = time.perf_counter()
        rate = learning_rate(self._options, self.version, self._updates)
        scored, gradient_norm = None, None
        if batch.examples:
            try:
                scored = self._backward(batch)
            except FloatingPointError:
                self._optimizer.zero_grad(set_to_none=True)
                raise
            gradient_norm = self._step(rate)
        measures = update_measures(batch, scored, self._objective_options, self.version)
        self.version += 1
        return measures | {
            "reference_version": None if self._reference is None else self._reference.version,
            "grad_norm": gradient_norm,
            "learning_rate": rate,
            "seconds": time.perf_counter() - began,
        }

    def _backward(self, batch: UpdateBatch) -> Scored:
        """Accumulate the gradient of the mean loss over the batch's examples."""
        micro_batches = [part for part in self._micro_batches(batch) if part[1]]
        if self._objective.needs.whole_update and len(micro_batches) > 1:
            parts = [self._in_two_passes(batch, [rows for rows, _ in micro_batches])]
        else:
            parts = [self._in_one_pass(batch, *part) for part in micro_batches]
        return self._scored(batch, parts)

    def _in_one_pass(
        self, batch: UpdateBatch, rows: Sequence[int], examples: Sequence[BatchExample]
    ) -> tuple[ScoredRows, ObjectiveOutput]:
        """Score a micro-batch and add its share of the gradient."""
        scored = self._score(batch, rows)
        output = self._loss(batch, scored, examples)
        if output.loss.requires_grad:  # not where every completion is only contrasted with
            mean = output.loss.sum() / len(batch.examples)
            mean.backward()  # type: ignore[no-untyped-call]
        return scored, output

    def _in_two_passes(
        self, batch: UpdateBatch, micro_batches: Sequence[Sequence[int]]
    ) -> tuple[ScoredRows, ObjectiveOutput]:
        """Score everything, differentiate the loss with respect to the log-probabilities, and
        carry that gradient through the policy, a micro-batch at a time."""
        with torch.no_grad():
            found = [self._score(batch, rows) for rows in micro_batches]
        scored = ScoredRows(
            {row: logprobs for part in found for row, logprobs in part.logprobs.items()},
            {row: values for part in found for row, values in part.log_collisions.items()},
        )
        learned = [row for row in scored.logprobs if batch.completions[row].learn]
        leaves = [scored.logprobs[row].requires_grad_() for row in learned]
        output = self._loss(batch, scored, batch.examples)
        if leaves:
            mean = output.loss.sum() / len(batch.examples)
            gradients = torch.autograd.grad(mean, leaves, materialize_grads=True)
            gradient_of = dict(zip(learned, gradients, strict=True))
            for rows in micro_batches:
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
        if self._objective.needs.collisions:
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
        self, batch: UpdateBatch, scored: ScoredRows, examples: Sequence[BatchExample]
    ) -> ObjectiveOutput:
        needs = self._objective.needs
        mismatched = self._mismatched(batch.mismatched) if needs.mismatched else None
        density_ratio = self._density_ratio(examples) if self._density_ratio else None
        assembly = Assembly(batch, scored, needs, self.version)
        return self._objective(assembly.record(examples, mismatched, density_ratio))

    @torch.no_grad()
    def _mismatched(self, items: tuple[BatchCompletion, ...]) -> tuple[Tensor, Tensor]:
        """Policy and reference log-probabilities [M] of completions under others' prompts."""
        assert self._reference is not None
        batch = UpdateBatch(items, ())
        policy, reference = (
            [float(logprobs.sum(dtype=np.float64)) for logprobs in self._scores(scorer, batch)]
            for scorer in (self._score_policy, self._reference.score)
        )
        return torch.tensor(policy), torch.tensor(reference)

    def _scored(
        self, batch: UpdateBatch, parts: Sequence[tuple[ScoredRows, ObjectiveOutput]]
    ) -> Scored:
        """What was scored and lost, as columns over the batch."""
        items = batch.completions
        logps = torch.full((len(items),), torch.nan)
        for scored, _ in parts:
            for row, logprobs in scored.logprobs.items():
                logps[row] = logprobs.detach().sum()
        reference = None
        if self._objective.needs.reference:
            reference = torch.stack([reference_logprobs(item).sum() for item in items])
        log_weight = logps - behaviour_logps(items, logps, self.version)
        outputs = [output for _, output in parts]
        return Scored(
            logps=logps.double().numpy(),
            ref=None if reference is None else reference.double().numpy(),
            log_weight=log_weight.double().numpy(),
            loss=_column([output.loss for output in outputs]),
            measures={
                name: _column([output.measures[name] for output in outputs])
                for name in outputs[0].measures
            },
        )

    def _step(self, rate: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(
            self._policy.parameters(), self._options.max_grad_norm
        )
        if not torch.isfinite(norm):
            self._optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(
                f"update {self.version + 1}: the gradient norm is {norm.item()}; "
                "no step was taken (lower learner.learning_rate or raise objective.beta)"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def weights(self) -> WeightPush:
        """The policy's weights at this version; tied tensors travel once."""
        began = time.perf_counter()
        push = pack(dict(self._policy.named_parameters()), self.version)
        self._sent = Receipt(push.version, push.checksum, time.perf_counter() - began)
        return push

    def sent(self) -> Receipt:
        """What a generator's receipt must say after the last push."""
        return self._sent

    def save(self, directory: Path) -> None:
        """Write policy, reference, optimizer and the objective's memory: ``load`` goes on bit for
        bit."""
        torch.save(
            {
                "version": self.version,
                "policy": self._policy.state_dict(),
                "reference": self._reference and self._reference.state(),
                "optimizer": self._optimizer.state_dict(),
                "objective": self._objective.state(),
                "density_ratio": self._density_ratio and self._density_ratio.state(),
            },
            directory / "learner.pt",
        )

    def load(self, directory: Path) -> int:
        """Take up a checkpoint's state; returns its version."""
        state = torch.load(directory / "learner.pt", weights_only=True)
        self._policy.load_state_dict(state["policy"])
        if self._reference is not None:
            self._reference.load(state["reference"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._objective.load(state["objective"])
        if self._density_ratio is not None:
            self._density_ratio.load(state["density_ratio"])
        self.version = int(state["version"])
        return self.version

    def adopt(self, policy: PolicyOptions, version: int) -> None:
        """Take the weights of another model of the same shape as the policy's."""
        self._policy.load_state_dict(load_policy(policy).state_dict())
        self.version = version

    def export(self, directory: Path) -> None:
        """Write the policy in Hugging Face format (weights and config, safetensors)."""
        self._policy.save_pretrained(directory)


def _column(values: Sequence[Tensor]) -> DoubleArray:
    return torch.cat([value.detach() for value in values]).double().numpy()
