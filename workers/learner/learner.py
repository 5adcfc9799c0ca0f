"""The learner: scores completions, takes updates, and hands out its weights."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.learner.batching import pad_rows, rows_by_tokens
from workers.learner.logprobs import CompletionScorer
from workers.learner.objectives import PairLogps, build_objective
from workers.learner.options import LearnerOptions, ObjectiveOptions, learning_rate
from workers.messages import (
    BatchCompletion,
    BatchPair,
    Completion,
    FloatArray,
    IntArray,
    UpdateBatch,
    probe_completion,
)
from workers.models.load import load_policy
from workers.options import PolicyOptions
from workers.sampler import logprobs_of
from workers.weight_sync.buckets import Receipt, WeightPush, pack


@dataclass(slots=True)
class _PairStatistics:
    """Columns of what an update logs, one entry a pair."""

    loss: list[float]
    chosen_logps: list[float]
    rejected_logps: list[float]
    chosen_logratio: list[float]
    rejected_logratio: list[float]
    log_weight: list[float]
    tokens: list[int]


class Learner:
    """Policy, frozen reference and optimizer of one process.

    ``version`` counts updates applied. Dropout is off: a completion has one log-probability.
    """

    def __init__(
        self,
        policy: PolicyOptions,
        options: LearnerOptions,
        objective: ObjectiveOptions,
        updates: int,
    ) -> None:
        self.version = 0
        self._sent = Receipt(-1, "")
        self._options = options
        self._beta = objective.beta
        self._updates = updates
        self._objective = build_objective(objective)
        self._policy = load_policy(policy)
        self._reference = copy.deepcopy(self._policy).requires_grad_(False)
        self._score_policy = CompletionScorer(self._policy)
        self._score_reference = CompletionScorer(self._reference)
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

    @torch.no_grad()
    def score_reference(self, batches: Sequence[UpdateBatch]) -> list[list[FloatArray]]:
        """Reference log-probabilities of every completion, [tokens] each, batch by batch.

        Scored in the micro-batches in which ``update`` will score the policy, so that policy =
        reference gives a log-ratio of exactly 0.
        """
        return [self._scores(self._score_reference, batch) for batch in batches]

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
        budget = self._options.tokens_per_micro_batch
        for rows, _ in rows_by_tokens(batch.completions, batch.pairs, budget):
            padded = pad_rows([batch.completions[row] for row in rows])
            found = scorer(padded.ids_BT, padded.starts_B, padded.lengths_B)
            for row, logprobs in zip(rows, found, strict=True):
                scores[row] = logprobs.numpy()
        return scores

    def update(self, batch: UpdateBatch) -> dict[str, float | int | None]:
        """One optimizer step on the mean loss of the batch's pairs; version += 1.

        Also when no pair was left to learn from: then no step is taken and the measures are None.
        Every completion must carry ``reference_logprobs``. Returns the update record.
        """
        began = time.perf_counter()
        rate = learning_rate(self._options, self.version, self._updates)
        statistics = _PairStatistics([], [], [], [], [], [], [])
        for rows, pairs in rows_by_tokens(
            batch.completions, batch.pairs, self._options.tokens_per_micro_batch
        ):
            if pairs:
                self._accumulate(batch, rows, [batch.pairs[p] for p in pairs], statistics)
        gradient_norm = None
        if batch.pairs:
            gradient_norm = self._step(rate)
        lags = [self.version - batch.completions[p.chosen].completion.version for p in batch.pairs]
        self.version += 1
        return _record(statistics, self._beta, lags) | {
            "grad_norm": gradient_norm,
            "learning_rate": rate,
            "seconds": time.perf_counter() - began,
        }

    def _accumulate(
        self,
        batch: UpdateBatch,
        rows: Sequence[int],
        pairs: Sequence[BatchPair],
        statistics: _PairStatistics,
    ) -> None:
        items = [batch.completions[row] for row in rows]
        padded = pad_rows(items)
        logprobs = self._score_policy(padded.ids_BT, padded.starts_B, padded.lengths_B)
        logps_B = torch.stack(
            [
                row.sum() if item.learn else row.sum().detach()
                for row, item in zip(logprobs, items, strict=True)
            ]
        )
        place = {row: index for index, row in enumerate(rows)}
        chosen = torch.tensor([place[pair.chosen] for pair in pairs])
        rejected = torch.tensor([place[pair.rejected] for pair in pairs])
        reference_B = torch.stack([_reference_logprobs(item).sum() for item in items])
        lags_B = torch.tensor([self.version - item.completion.version for item in items])
        logps = PairLogps(
            policy_chosen=logps_B[chosen],
            policy_rejected=logps_B[rejected],
            ref_chosen=reference_B[chosen],
            ref_rejected=reference_B[rejected],
            chosen_tokens=padded.lengths_B[chosen],
            rejected_tokens=padded.lengths_B[rejected],
            label_prob=torch.tensor([pair.label_prob for pair in pairs]),
            lag=lags_B[chosen],
        )
        loss = self._objective(logps).loss
        if loss.requires_grad:  # not where every completion is only contrasted with
            (loss.sum() / len(batch.pairs)).backward()  # type: ignore[no-untyped-call]

        behaviour_B = torch.stack([_behaviour_logprobs(item).sum() for item in items])
        # A lag of 0 means weight 1 by definition: the policy that sampled is the policy.
        log_weight_B = torch.where(lags_B == 0, 0.0, logps_B.detach() - behaviour_B)
        statistics.loss += loss.tolist()
        statistics.chosen_logps += logps.policy_chosen.tolist()
        statistics.rejected_logps += logps.policy_rejected.tolist()
        statistics.chosen_logratio += logps.chosen_logratio.tolist()
        statistics.rejected_logratio += logps.rejected_logratio.tolist()
        statistics.log_weight += (log_weight_B[chosen] + log_weight_B[rejected]).tolist()
        statistics.tokens += (logps.chosen_tokens + logps.rejected_tokens).tolist()

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
        """Write policy, reference and optimizer so that ``load`` goes on bit for bit."""
        torch.save(
            {
                "version": self.version,
                "policy": self._policy.state_dict(),
                "reference": self._reference.state_dict(),
                "optimizer": self._optimizer.state_dict(),
            },
            directory / "learner.pt",
        )

    def load(self, directory: Path) -> int:
        """Take up a checkpoint's state; returns its version."""
        state = torch.load(directory / "learner.pt", weights_only=True)
        self._policy.load_state_dict(state["policy"])
        self._reference.load_state_dict(state["reference"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.version = int(state["version"])
        return self.version

    def adopt(self, policy: PolicyOptions, version: int) -> None:
        """Take the weights of another model of the same shape as the policy's."""
        self._policy.load_state_dict(load_policy(policy).state_dict())
        self.version = version

    def export(self, directory: Path) -> None:
        """Write the policy in Hugging Face format (weights and config, safetensors)."""
        self._policy.save_pretrained(directory)


def _reference_logprobs(item: BatchCompletion) -> Tensor:
    logprobs = item.completion.reference_logprobs
    if logprobs is None:
        raise ValueError(
            f"completion {item.completion.sample} of prompt {item.completion.position} "
            "was never scored by the reference"
        )
    return torch.from_numpy(logprobs)


def _behaviour_logprobs(item: BatchCompletion) -> Tensor:
    return torch.from_numpy(item.completion.behaviour_logprobs)


def _record(
    statistics: _PairStatistics, beta: float, lags: Sequence[int]
) -> dict[str, float | int | None]:
    """The update record's measures, means over pairs; None where no pair was left."""
    if not lags:
        names = ["loss", "margin", "accuracy", "rewards_chosen", "rewards_rejected"]
        names += ["chosen_logps", "rejected_logps", "lag_mean", "lag_max", "ess", "ess_per_token"]
        return dict.fromkeys(names) | {"pairs": 0, "tokens": 0}
    chosen = np.array(statistics.chosen_logratio)
    rejected = np.array(statistics.rejected_logratio)
    log_weight = np.array(statistics.log_weight)
    tokens = np.array(statistics.tokens)
    return {
        "loss": float(np.mean(statistics.loss)),
        "margin": float(np.mean(beta * (chosen - rejected))),
        "accuracy": float(np.mean(chosen > rejected)),
        "rewards_chosen": float(np.mean(beta * chosen)),
        "rewards_rejected": float(np.mean(beta * rejected)),
        "chosen_logps": float(np.mean(statistics.chosen_logps)),
        "rejected_logps": float(np.mean(statistics.rejected_logps)),
        "lag_mean": float(np.mean(lags)),
        "lag_max": max(lags),
        "ess": effective_sample_share(log_weight),
        "ess_per_token": effective_sample_share(log_weight / tokens),
        "pairs": len(lags),
        "tokens": int(tokens.sum()),
    }


def effective_sample_share(log_weight: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """ESS/n = (Σw)² / (n Σw²) of weights given by their logarithms, [n]; 1 when all are equal."""
    weight = np.exp(log_weight - log_weight.max())
    return float(weight.sum() ** 2 / (len(weight) * (weight**2).sum()))
