"""What the generator adds to vLLM's own workers: taking a push, recording how tokens were drawn."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from workers.weight_sync.buckets import Receipt, SyncError, WeightPush, arriving

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class PushReceiver:
    """Methods of every vLLM worker, named by ``worker_extension_cls``, called by the generator."""

    model_runner: Any
    vllm_config: VllmConfig

    def receive_weights(self, push: WeightPush) -> Receipt | str:
        """Load a push bucket by bucket; answers with what was received, or what is wrong with it.

        The model is then unusable until the next push. Not raised: of another process's errors
        vLLM keeps neither the type nor the words.
        """
        began = time.perf_counter()
        model = self.model_runner.get_model()
        came = {slot.name for bucket in push.buckets for slot in bucket.slots}
        try:
            self.model_runner.reload_weights(weights_iterator=arriving(push))
        except SyncError as error:
            return str(error)
        self._repack_tied_head(model, came)
        return Receipt(push.version, push.checksum, time.perf_counter() - began)

    def _repack_tied_head(self, model: Any, came: set[str]) -> None:
        """A head that shares the embeddings is not reloaded: its packed copy would stay the old.

        On the CPU vLLM 0.32 multiplies by a repacked copy, made when the model was loaded.
        """
        head = getattr(model, "lm_head", None)
        if head is None or "lm_head.weight" in came:
            return
        head.quant_method.process_weights_after_loading(head)

    def record_sampling_logprobs(self) -> bool:
        """Let the log-probability as sampled stand beside the plain one; False if it cannot be.

        It then is the second column of what ``logprobs=1`` gives.
        """
        runner = self.model_runner
        if type(runner.sampler) is not Sampler:  # another model runner's, with other parts
            return False
        if runner.speculative_config is not None:  # its rejection sampler keeps the old one
            return False
        runner.sampler = TwoLogprobsSampler(runner.sampler)
        return True


class TwoLogprobsSampler(Sampler):  # type: ignore[misc]  # vLLM is not there for mypy
    """vLLM's sampler, giving a token's log-probability twice: plain, and as it was drawn."""

    def __init__(self, sampler: Sampler) -> None:
        super().__init__("processed_logprobs", sampler.use_fp64_gumbel)

    def forward(
        self,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        *args: Any,
        **kwargs: Any,
    ) -> SamplerOutput:
        """The output of vLLM's sampler; columns 0 and 1 are raw and processed, of the token."""
        raw_BV = self.compute_logprobs(logits)  # before the logits are worked on in place
        output = super().forward(logits, sampling_metadata, *args, **kwargs)
        tensors = output.logprobs_tensors
        if tensors is None:
            return output
        if tensors.logprobs.shape[1] < 2:
            raise SyncError("two log-probabilities a token need requests with logprobs=1")
        drawn = output.sampled_token_ids[:, :1].long()
        tensors.logprobs[:, 1] = tensors.logprobs[:, 0]
        tensors.logprobs[:, 0] = raw_BV.gather(-1, drawn)[:, 0]
        return output
