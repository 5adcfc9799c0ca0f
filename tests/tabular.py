"""Generator and learner of policies over single tokens, where every number can be computed.

A world has its own tokens, rewards and policy. Worlds are learned side by side as one tensor: they
never touch, because the loss is a sum over worlds and Adam works element by element. In shapes, W
is worlds, V tokens, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.resampling import RoundPlan
from workers.learner.objectives import Objective, PairLogps
from workers.messages import (
    Completion,
    Fate,
    FloatArray,
    IntArray,
    Judgement,
    Pair,
    Prompt,
    PromptGroup,
    Round,
    UpdateBatch,
)
from workers.seeds import derive_seed


@dataclass(frozen=True, slots=True, eq=False)
class Worlds:
    """Tokens with features [W, V, D], true rewards [W, V] and reference log-probabilities [W, V].

    ``seeds`` [W] name the worlds: a world's draws do not depend on the others beside it.
    """

    seeds: tuple[int, ...]
    features_WVD: Tensor
    rewards_WV: Tensor
    reference_WV: Tensor

    def optimum(self, beta: float) -> Tensor:
        """The probabilities p0·exp(r/β), normalised, [W, V]."""
        return torch.softmax(self.reference_WV + self.rewards_WV / beta, -1)


class TabularPolicy:
    """Logits log p0 + Fθ + δ, from θ = 0 and δ = 0."""

    def __init__(self, worlds: Worlds) -> None:
        features = worlds.features_WVD
        self._worlds = worlds
        self.weights_WD = features.new_zeros(features.shape[::2]).requires_grad_()
        self.offsets_WV = features.new_zeros(features.shape[:2]).requires_grad_()

    def logprobs(self) -> Tensor:
        """Log-probability of every token [W, V], differentiable."""
        carried_WV = torch.einsum("wvd,wd->wv", self._worlds.features_WVD, self.weights_WD)
        logits_WV = self._worlds.reference_WV + carried_WV + self.offsets_WV
        return logits_WV.log_softmax(-1)


class TabularGenerator:
    """Draws two tokens for each prompt, and Bradley–Terry labels from the true rewards.

    A draw is a function of world, prompt position and the policy's probabilities: of nothing that
    ran before. ``prompts`` are in the stream, all of them the empty prompt.
    """

    def __init__(self, worlds: Worlds, policy: TabularPolicy, prompts: int) -> None:
        self._worlds = worlds
        self._policy = policy
        self._rewards_WV = worlds.rewards_WV.numpy()
        empty = np.zeros(0, np.int64)
        self._prompts = [Prompt(position, empty, "") for position in range(prompts)]
        self._ids = [np.array([token], np.int64) for token in range(self._rewards_WV.shape[1])]
        # For each prompt: the first token, the second, the label.
        self._uniforms = [
            np.random.default_rng(derive_seed(seed, "sampling")).random((prompts, 3))
            for seed in worlds.seeds
        ]

    def sample(self, plan: RoundPlan, version: int) -> list[Round]:
        """The planned round of each world, by the policy as it is now."""
        logprobs_WV = self._policy.logprobs().detach().numpy()
        return [self._round(world, plan, version, row) for world, row in enumerate(logprobs_WV)]

    def _round(self, world: int, plan: RoundPlan, version: int, logprobs_V: FloatArray) -> Round:
        prompts = slice(plan.start, plan.start + plan.prompts)
        uniforms = self._uniforms[world][prompts]
        cumulative_V = np.exp(logprobs_V).cumsum()
        drawn = np.searchsorted(cumulative_V / cumulative_V[-1], uniforms[:, :2], side="right")
        scores = self._rewards_WV[world][drawn]
        first_better = 1.0 / (1.0 + np.exp(scores[:, 1] - scores[:, 0]))
        first_wins = uniforms[:, 2] < first_better

        recorded = logprobs_V.astype(np.float32)[:, None]
        groups: list[PromptGroup] = []
        for prompt, tokens, judged, won in zip(
            self._prompts[prompts], drawn.tolist(), scores, first_wins.tolist(), strict=True
        ):
            position = prompt.position
            completions = tuple(
                _completion(position, sample, version, self._ids[token], recorded[token])
                for sample, token in enumerate(tokens)
            )
            fate = Fate.IDENTICAL if tokens[0] == tokens[1] else Fate.LEARN
            pair = Pair(position, *((0, 1) if won else (1, 0)), 1.0, fate)
            judgement = Judgement(position, judged, (None, None))
            groups.append(PromptGroup(prompt, completions, judgement, (pair,)))
        return Round(plan.index, version, tuple(groups), "bradley_terry", {})


def _completion(
    position: int, sample: int, version: int, ids: IntArray, logprobs: FloatArray
) -> Completion:
    return Completion(position, sample, 0, version, ids, logprobs, None, True, "")


class TabularLearner:
    """An objective and Adam on a tabular policy; the reference is the initial policy."""

    def __init__(
        self,
        worlds: Worlds,
        policy: TabularPolicy,
        objective: Objective,
        *,
        learning_rate: float,
        adam_betas: tuple[float, float],
    ) -> None:
        self.version = 0
        self._reference_WV = worlds.reference_WV
        self._policy = policy
        self._objective = objective
        parameters = [policy.weights_WD, policy.offsets_WV]
        self._optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=adam_betas)

    def update(self, batches: Sequence[UpdateBatch]) -> Tensor:
        """One step in every world on its own batch; the mean loss of each world's pairs, [W].

        A world whose batch is empty gets the loss 0.
        """
        worlds, chosen, rejected, label_probs = [], [], [], []
        for world, batch in enumerate(batches):
            tokens = [int(item.completion.ids[0]) for item in batch.completions]
            for pair in batch.examples:
                worlds.append(world)
                chosen.append(tokens[pair.chosen])
                rejected.append(tokens[pair.rejected])
                label_probs.append(pair.label_prob)
        world_B = torch.tensor(worlds, dtype=torch.int64)
        chosen_B = torch.tensor(chosen, dtype=torch.int64)
        rejected_B = torch.tensor(rejected, dtype=torch.int64)

        policy_WV = self._policy.logprobs()
        one_token_B = torch.ones_like(world_B)
        logps = PairLogps(
            policy_chosen=policy_WV[world_B, chosen_B],
            policy_rejected=policy_WV[world_B, rejected_B],
            ref_chosen=self._reference_WV[world_B, chosen_B],
            ref_rejected=self._reference_WV[world_B, rejected_B],
            chosen_tokens=one_token_B,
            rejected_tokens=one_token_B,
            label_prob=torch.tensor(label_probs, dtype=policy_WV.dtype),
        )
        loss_B = self._objective(logps).loss
        pairs_W = torch.bincount(world_B, minlength=len(batches)).clamp_min(1)
        loss_W = policy_WV.new_zeros(len(batches)).index_add(0, world_B, loss_B) / pairs_W
        self._optimizer.zero_grad()
        loss_W.sum().backward()
        self._optimizer.step()
        self.version += 1
        return loss_W.detach()
