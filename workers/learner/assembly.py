"""From a batch and the log-probabilities of its completions to the record an objective is given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from workers.learner.needs import Needs
from workers.learner.objectives import (
    PairLogps,
    RankedLogps,
    SampledLogps,
    TokenLogprobs,
    UnpairedLogps,
)
from workers.learner.objectives.records import Logps
from workers.messages import (
    BatchCompletion,
    BatchExample,
    BatchLabel,
    BatchPair,
    BatchRanking,
    BatchSample,
    UpdateBatch,
)


@dataclass(frozen=True, slots=True, eq=False)
class ScoredRows:
    """Some completions of a batch as the policy scored them: [tokens] each, by their index.

    ``log_collisions`` are log Σ_v p_v² at each token, where the objective weighs by them (WPO).
    """

    logprobs: Mapping[int, Tensor]
    log_collisions: Mapping[int, Tensor]


class Assembly:
    """Columns [B] over completions of a batch, from which each kind of record takes its own."""

    def __init__(self, batch: UpdateBatch, scored: ScoredRows, needs: Needs, version: int) -> None:
        rows = list(scored.logprobs)
        self._place = {row: index for index, row in enumerate(rows)}
        self._needs = needs
        items = [batch.completions[row] for row in rows]
        self._logprobs = [scored.logprobs[row] for row in rows]
        self._references = [reference_logprobs(item) for item in items] if needs.reference else None
        self._logps = torch.stack([logprobs.sum() for logprobs in self._logprobs])
        self._ref = None if self._references is None else _sums(self._references)
        self._tokens = torch.tensor([len(item.completion.ids) for item in items])
        self._lag = torch.tensor([version - item.completion.version for item in items])
        self._positions = torch.tensor([item.completion.position for item in items])
        self._from_reference = torch.tensor([item.completion.reference_share > 0 for item in items])
        self._behaviour = behaviour_logps(items, self._logps.detach(), version)
        self._wpo = wpo_weights(scored) if needs.collisions else None

    def record(
        self,
        examples: Sequence[BatchExample],
        mismatched: tuple[Tensor, Tensor] | None = None,
        density_ratio: Tensor | None = None,
    ) -> Logps:
        """The record of these examples; their completions must be among the scored rows."""
        match self._needs.records:
            case "pairs":
                return self._pairs(cast(Sequence[BatchPair], examples))
            case "unpaired":
                labels = cast(Sequence[BatchLabel], examples)
                return self._unpaired(labels, mismatched, density_ratio)
            case "ranked":
                return self._ranked(cast(Sequence[BatchRanking], examples))
            case "sampled":
                return self._sampled(cast(Sequence[BatchSample], examples))

    def _pairs(self, pairs: Sequence[BatchPair]) -> PairLogps:
        chosen = self._at([pair.chosen for pair in pairs])
        rejected = self._at([pair.rejected for pair in pairs])
        return PairLogps(
            policy_chosen=self._logps[chosen],
            policy_rejected=self._logps[rejected],
            ref_chosen=_take(self._ref, chosen),
            ref_rejected=_take(self._ref, rejected),
            chosen_tokens=self._tokens[chosen],
            rejected_tokens=self._tokens[rejected],
            label_prob=torch.tensor([pair.label_prob for pair in pairs]),
            behaviour_chosen=self._behaviour[chosen],
            behaviour_rejected=self._behaviour[rejected],
            wpo_chosen=_take(self._wpo, chosen),
            wpo_rejected=_take(self._wpo, rejected),
            prompt_ids=self._positions[chosen],
            lag=self._lag[chosen],
            chosen_from_reference=self._from_reference[chosen],
            chosen_logprobs=self._token_logprobs(chosen),
            rejected_logprobs=self._token_logprobs(rejected),
        )

    def _unpaired(
        self,
        labels: Sequence[BatchLabel],
        mismatched: tuple[Tensor, Tensor] | None,
        density_ratio: Tensor | None,
    ) -> UnpairedLogps:
        rows = self._at([label.completion for label in labels])
        return UnpairedLogps(
            policy=self._logps[rows],
            ref=_take(self._ref, rows),
            tokens=self._tokens[rows],
            desirable=torch.tensor([label.desirable for label in labels]),
            mismatched_policy=None if mismatched is None else mismatched[0],
            mismatched_ref=None if mismatched is None else mismatched[1],
            density_ratio=density_ratio,
            behaviour=self._behaviour[rows],
            prompt_ids=self._positions[rows],
            lag=self._lag[rows],
            logprobs=self._token_logprobs(rows),
        )

    def _ranked(self, rankings: Sequence[BatchRanking]) -> RankedLogps:
        ranks = [self._at(ranking.completions) for ranking in rankings]
        keep_GK = pad_sequence([torch.ones_like(r, dtype=torch.bool) for r in ranks], True)
        rows_GK = pad_sequence(ranks, batch_first=True)
        return RankedLogps(
            policy_GK=self._logps[rows_GK],
            ref_GK=_take(self._ref, rows_GK),
            tokens_GK=self._tokens[rows_GK],
            keep_mask_GK=keep_GK,
            behaviour_GK=self._behaviour[rows_GK],
            prompt_ids=self._positions[rows_GK[:, 0]],
            lag=self._lag[rows_GK[:, 0]],
            logprobs=self._token_logprobs(rows_GK.flatten()),
        )

    def _sampled(self, samples: Sequence[BatchSample]) -> SampledLogps:
        rows = self._at([sample.completion for sample in samples])
        return SampledLogps(
            policy=self._logps[rows],
            ref=_take(self._ref, rows),
            tokens=self._tokens[rows],
            win_prob=torch.tensor([sample.win_prob for sample in samples]),
            behaviour=self._behaviour[rows],
            prompt_ids=self._positions[rows],
            lag=self._lag[rows],
            logprobs=self._token_logprobs(rows),
        )

    def _at(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor([self._place[row] for row in rows])

    def _token_logprobs(self, rows: Tensor) -> TokenLogprobs | None:
        if not self._needs.per_token:
            return None
        policy = [self._logprobs[row] for row in rows.tolist()]
        reference = None
        if self._references is not None:
            reference = pad_sequence([self._references[row] for row in rows.tolist()], True)
        keep = [torch.ones_like(row, dtype=torch.bool) for row in policy]
        return TokenLogprobs(
            policy_BT=pad_sequence(policy, batch_first=True),
            ref_BT=reference,
            keep_mask_BT=pad_sequence(keep, batch_first=True),
        )


def reference_logprobs(item: BatchCompletion) -> Tensor:
    """[tokens]; raises ValueError where the reference has not scored the completion."""
    logprobs = item.completion.reference_logprobs
    if logprobs is None:
        raise ValueError(
            f"completion {item.completion.sample} of prompt {item.completion.position} "
            "was never scored by the reference"
        )
    return torch.from_numpy(logprobs)


def behaviour_logps(items: Sequence[BatchCompletion], logps: Tensor, version: int) -> Tensor:
    """[B] log-probabilities under the distribution each completion was really sampled from.

    At lag 0 the policy that sampled is the policy: its own ``logps`` [B], so that a weight is
    exactly 1, unless it sampled from another distribution than its plain softmax.
    """
    recorded = _sums([torch.from_numpy(item.completion.behaviour_logprobs) for item in items])
    itself = torch.tensor(
        [
            item.completion.version == version and item.completion.sampling_logprobs is None
            for item in items
        ]
    )
    return torch.where(itself, logps, recorded)


def gap_weights(
    items: Sequence[BatchCompletion], examples: Sequence[BatchExample], clip: float | None
) -> Tensor:
    """[E] min(clip, learner / generator) of each example's rows, float64 constants.

    The probabilities are of the policy's own samples, by ``gap_log_weight``: an opponent's was not
    drawn from the policy. 1 without a clip, and where a round was not corrected. Truncated
    importance sampling: Ionides, J. Comput. Graph. Stat. 17(2), 2008; against the mismatch of
    engine and learner: Yao et al., On the Rollout-Training Mismatch in Modern RL Systems, 2025.
    """
    if clip is None:
        return torch.ones(len(examples), dtype=torch.float64)
    own = {
        row: item.completion.gap_log_weight
        for row, item in enumerate(items)
        if item.completion.gap_log_weight is not None and not item.completion.reference_share
    }
    found = [[own[row] for row in example.rows if row in own] for example in examples]
    log_weights = torch.tensor([math.fsum(values) for values in found], dtype=torch.float64)
    corrected = torch.tensor([bool(values) for values in found])
    return torch.where(corrected, log_weights.exp().clamp(max=clip), 1.0)


def wpo_weights(scored: ScoredRows) -> Tensor:
    """ω = exp(mean_t[log p_t − log Σ_v p_v²]), [B], constant. Eq. 2, arXiv:2406.11827."""
    aligned = [
        (logprobs.detach() - scored.log_collisions[row]).mean()
        for row, logprobs in scored.logprobs.items()
    ]
    return torch.stack(aligned).exp()


def _sums(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack([row.sum() for row in rows])


def _take(column: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if column is None else column[rows]
