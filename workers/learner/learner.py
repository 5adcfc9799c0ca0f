"""The learner: scores completions, takes updates, and hands out its weights."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from judges.errors import UserError
from workers.generator import SampledUnit
from workers.judge_worker import JudgedUnit, largest
from workers.learner.correction_options import Correction
from workers.learner.implicit_reward import implicit_rewards
from workers.learner.logprobs import CompletionScorer, score_batch
from workers.learner.loss import BatchLoss
from workers.learner.options import LearnerOptions, ReferenceOptions, learning_rate
from workers.learner.pairwise_options import Options
from workers.learner.reference import Reference
from workers.learner.statistics import update_measures
from workers.messages import (
    Completion,
    DoubleArray,
    FloatArray,
    IntArray,
    Judgement,
    Prompt,
    UpdateBatch,
    probe_completion,
)
from workers.models.load import load_policy
from workers.models.lora import (
    load_model_state,
    merged,
    model_state,
    read_adapter,
    trainable,
    write_adapter,
)
from workers.options import PolicyOptions
from workers.places import StorageFailed, to_read, to_write
from workers.sampler import logprobs_of
from workers.weight_sync.buckets import Receipt, WeightPush
from workers.weight_sync.staging import Staging
from workers.weight_sync.transport import TransportName, build_transport, push_of


class Learner:
    """Policy, reference and optimizer of one process.

    ``version`` counts updates applied. Dropout is off: a completion has one log-probability. A
    reference is kept where the objective needs one or ``keep_reference`` asks for it. With LoRA
    the adapters alone are learned, pushed and saved. ``gap_clip`` is the largest weight of a loss
    against a corrected generator's gap; None weighs none. ``correction`` weighs what an older
    policy wrote.
    """

    def __init__(
        self,
        policy: PolicyOptions,
        options: LearnerOptions,
        objective: Options,
        updates: int,
        reference: ReferenceOptions | None = None,
        keep_reference: bool = False,
        transport: TransportName = "object_store",
        push_dtype: str = "float32",
        gap_clip: float | None = None,
        correction: Correction | None = None,
    ) -> None:
        self.version = 0
        self._sent = Receipt(-1, "")
        self._transport = build_transport(transport)
        self._staging = Staging(self._transport.device)
        self._push_dtype: torch.dtype = getattr(torch, push_dtype)
        self._options = options
        self._objective_options = objective
        self._updates = updates
        self._base_model, self._lora = policy.model, policy.lora
        self._device = device_of(options.gpus)
        self._policy = load_policy(policy).to(self._device)
        self._score_policy = CompletionScorer(self._policy)
        self._reference: Reference | None = None
        if objective.needs.reference or keep_reference:
            self._reference = Reference(self._policy, reference or ReferenceOptions())
        tokens = options.tokens_per_micro_batch
        self._loss = BatchLoss(
            objective, self._score_policy, self._reference, tokens, gap_clip, correction
        )
        self._optimizer = torch.optim.AdamW(
            trainable(self._policy).values(),
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

    def score_reference(self, batches: Sequence[UpdateBatch]) -> list[list[FloatArray | None]]:
        """Reference log-probabilities of every completion, [tokens] each, batch by batch.

        Scored in the micro-batches in which ``update`` will score the policy, so that policy =
        reference gives a log-ratio of exactly 0. None each where there is no reference.
        """
        if self._reference is None:
            return [[None] * len(batch.completions) for batch in batches]
        tokens = self._options.tokens_per_micro_batch
        return [list(score_batch(self._reference.score, batch, tokens)) for batch in batches]

    @torch.no_grad()
    def probe(self, prompt_ids: IntArray, new_tokens: int) -> Completion:
        """Greedy continuation of the probe, by full forward passes: nothing is cached."""
        ids = torch.from_numpy(prompt_ids).to(self._device)
        logprobs = []
        for _ in range(new_tokens):
            logits = self._policy(ids[None], use_cache=False, logits_to_keep=1).logits[:, -1]
            token = logits.argmax(-1)
            logprobs.append(float(logprobs_of(logits, token)))
            ids = torch.cat([ids, token])
        return probe_completion(self.version, ids[len(prompt_ids) :].tolist(), logprobs)

    def score_policy(self, batch: UpdateBatch) -> list[FloatArray]:
        """The current policy's log-probabilities of every completion, [tokens] each."""
        return score_batch(self._score_policy, batch, self._options.tokens_per_micro_batch)

    def implicit_reward(
        self, prompts: Sequence[Prompt], sampled: SampledUnit, beta: float
    ) -> JudgedUnit:
        """β (log π − log π_ref) of every completion, by the policy as it is now.

        Raises ValueError where there is no reference.
        """
        began = time.perf_counter()
        judgements = tuple(
            Judgement(prompt.position, beta * rewards, (None,) * len(rewards))
            for prompt, rewards in zip(prompts, self._log_ratios(prompts, sampled), strict=True)
        )
        asked = sum(len(group) for group in sampled.completions)
        return JudgedUnit(judgements, time.perf_counter() - began, {"asked": asked})

    def least_sure(
        self, prompts: Sequence[Prompt], sampled: SampledUnit, count: int
    ) -> frozenset[int]:
        """The ``count`` prompts (indices) whose best and worst implicit reward differ least."""
        ratios = self._log_ratios(prompts, sampled)
        return largest([-float(np.ptp(of_prompt)) for of_prompt in ratios], count)

    def _log_ratios(self, prompts: Sequence[Prompt], sampled: SampledUnit) -> list[DoubleArray]:
        if self._reference is None:
            raise ValueError("an implicit reward needs a reference")

        def reference(batch: UpdateBatch) -> list[FloatArray | None]:
            return self.score_reference([batch])[0]

        return implicit_rewards(prompts, sampled, self.score_policy, reference)

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
                scored = self._loss.backward(batch, self.version)
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

    @torch.no_grad()
    def reset(self) -> dict[str, Any]:
        """Put the policy back to its reference, in place of an optimizer step; version += 1.

        The optimizer forgets its moments, the objective what it remembers. Elastic reset
        (arXiv:2312.07551) where the reference is a moving average. Raises ValueError where there is
        no reference.
        """
        if self._reference is None:
            raise ValueError("a reset needs a reference")
        began = time.perf_counter()
        self._reference.give_to(self._policy)
        self._optimizer.state.clear()
        self._loss.forget()
        batch = UpdateBatch((), ())
        measures = update_measures(batch, None, self._objective_options, self.version)
        self.version += 1
        return measures | {
            "reference_version": self._reference.version,
            "grad_norm": None,
            "learning_rate": 0.0,
            "seconds": time.perf_counter() - began,
        }

    def _step(self, rate: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(
            trainable(self._policy).values(), self._options.max_grad_norm
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

    def weights(self, keep_from: int = 0) -> WeightPush:
        """The policy's weights at this version, in the precision they are sampled in.

        Tied tensors travel once; with LoRA only the adapters do. Versions below ``keep_from`` are
        no longer to be had.
        """
        began = time.perf_counter()
        self._transport.release(keep_from)
        self._staging.release(keep_from)
        packed = self._staging.pack(self.version, trainable(self._policy), self._push_dtype)
        push = push_of(self.version, packed, self._transport)
        self._sent = Receipt(push.version, push.checksum, time.perf_counter() - began)
        return push

    def sent(self) -> Receipt:
        """What a generator's receipt must say after the last push."""
        return self._sent

    def look(self, place: str) -> tuple[str, str]:
        """This machine's name, and the text at a place (a path or a URL), or why it is unread."""
        try:
            with to_read(place) as path:
                return socket.gethostname(), path.read_text()
        except (OSError, UserError, StorageFailed) as error:
            return socket.gethostname(), " ".join(str(error).split())

    def save(self, place: str | Path) -> None:
        """Write policy, reference, optimizer and the objective's memory: ``load`` goes on bit for
        bit. The place is a directory or a URL."""
        state = {
            "version": self.version,
            "policy": model_state(self._policy),
            "reference": self._reference and self._reference.state(),
            "optimizer": self._optimizer.state_dict(),
            "loss": self._loss.state(),
        }
        with to_write(f"{place}/learner.pt") as path:
            torch.save(state, path)

    def load(self, place: str | Path) -> int:
        """Take up a checkpoint's state; returns its version."""
        with to_read(f"{place}/learner.pt") as path:
            state = torch.load(path, map_location="cpu", weights_only=True)
        load_model_state(self._policy, state["policy"])
        if self._reference is not None:
            self._reference.load(state["reference"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._loss.load(state["loss"])
        self.version = int(state["version"])
        return self.version

    def adopt(self, policy: PolicyOptions, version: int) -> None:
        """Take the weights of another model of the same shape as the policy's.

        It may stand under a URL. With LoRA its adapters, as ``export`` wrote them: a push carries
        no other base. Raises UserError if they are not there or do not fit.
        """
        with to_read(policy.model) as path:
            if self._lora is None:
                here = policy.model_copy(update={"model": str(path)})
                self._policy.load_state_dict(load_policy(here).state_dict())
            else:
                read_adapter(self._policy, path / "adapter")
        self.version = version

    def export(self, place: str | Path) -> None:
        """Write the policy in Hugging Face format (weights and config, safetensors).

        With LoRA the adapters are merged into it; ``adapter/`` holds them alone in PEFT's format.
        """
        with to_write(str(place)) as directory:
            merged(self._policy).save_pretrained(directory)
            if self._lora is not None:
                write_adapter(self._policy, self._lora, self._base_model, directory / "adapter")


def device_of(gpus: float) -> torch.device:
    """The GPU that this process was given, or the CPU. Raises UserError where there is none."""
    if not gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"learner.gpus={gpus:g}: torch {torch.__version__} finds no GPU for the learner: set "
            "it to 0, or install a CUDA build of torch where a GPU is"
        )
    return torch.device("cuda")
