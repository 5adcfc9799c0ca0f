"""The vLLM generator: token ids in, ids and raw log-probabilities out, weights pushed live."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from judges.errors import UserError
from workers.detokenizer import completion_text
from workers.endings import Endings, endings_of
from workers.generator import GeneratorOptions, SampledUnit, SampleRequest, SamplingOptions
from workers.messages import Completion, FloatArray, IntArray, Prompt, probe_completion
from workers.models.resolve import resolve_model
from workers.options import PolicyOptions
from workers.step_gate import StepGate
from workers.vllm_engine import build_engine, first_line
from workers.weight_sync.buckets import Receipt, SyncError, WeightPush
from workers.weight_sync.proof import Proof, Standing


@dataclass(frozen=True, slots=True)
class _Row:
    """One completion on its way: its engine's name for it, and what it is a sample of."""

    request_id: str
    prompt: Prompt
    sample: int
    seed: int


class VllmGenerator:
    """Samples with a vLLM engine in this process; ``version`` is that of the last weights loaded.

    With ``generator.in_flight_updates`` a push may come from another thread while a unit is being
    sampled: it gets in between two steps, running requests are computed anew from their tokens and
    go on under the new weights, once these are proved.
    """

    def __init__(
        self,
        policy: PolicyOptions,
        sampling: SamplingOptions,
        options: GeneratorOptions,
        needs_sampling_logprobs: bool = False,
    ) -> None:
        """Raises UserError where ``needs_sampling_logprobs`` and the engine cannot give them."""
        from transformers import AutoTokenizer

        self.version = -1
        self._policy = policy
        self._sampling = sampling
        self._in_flight = options.in_flight_updates
        self._engine = build_engine(policy, options)
        self._engine.set_weight_version(str(self.version))
        location = resolve_model(policy.model)
        self._tokenizer = AutoTokenizer.from_pretrained(location)
        self._endings: Endings = endings_of(location, self._tokenizer, sampling)
        self._columns = 1
        if sampling.reshapes and all(self._engine.collective_rpc("record_sampling_logprobs")):
            self._columns = 2
        elif sampling.reshapes and needs_sampling_logprobs:
            raise UserError(
                "generator.backend=vllm: this engine does not tell the log-probabilities under the "
                f"reshaped distribution ({sampling.reshaped_by}), which importance weights need: "
                "sample at temperature 1 without truncation, or use generator.backend=transformers"
            )
        self._lora: Any = None
        self._standing = Standing()
        self._pushes = 0
        self._gate = StepGate()
        self._settled = threading.Condition()
        self._names = map(str, itertools.count())
        self._finished: dict[str, Any] = {}
        self._try()

    def _try(self) -> None:
        """Compute one token: what vLLM cannot run must show before a run has begun."""
        try:
            self._probe(np.zeros(1, np.int64), 1)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise UserError(
                f"generator.backend=vllm: vLLM cannot run policy.model={self._policy.model} with "
                f"these engine arguments ({first_line(error)}): change generator.engine, or use "
                "generator.backend=transformers"
            ) from error

    def load(self, push: WeightPush) -> Receipt:
        """Take a push, and drop every cached prefix of the weights before it.

        Requests under way are put back and computed anew from their tokens. Raises SyncError if
        the weights arrived corrupted or incomplete: nothing is sampled until a later push.
        """
        self._gate.close()
        try:
            self._wake()
            with self._standing.receiving():
                receipt = self._receive(push)
            self.version = push.version
            self._engine.set_weight_version(str(push.version))
            self._engine.reset_prefix_cache(reset_running_requests=True)
            self._standing.received = receipt
        finally:
            if not self._in_flight:  # else the proof, which follows, lets sampling go on
                self._gate.open()
        return receipt

    def _receive(self, push: WeightPush) -> Receipt:
        if self._policy.lora is not None:
            from workers.vllm_adapter import load_adapter

            self._lora, receipt = load_adapter(self._engine, push, self._policy)
            return receipt
        answers: list[Receipt | str] = self._engine.collective_rpc("receive_weights", args=(push,))
        receipts = []
        for answer in answers:  # one from each tensor-parallel worker
            if isinstance(answer, str):
                raise SyncError(answer)
            receipts.append(answer)
        return max(receipts, key=lambda receipt: receipt.seconds)

    def prove(
        self, prompt_ids: IntArray, sent: Receipt, expected: Completion, limit: float
    ) -> Proof:
        """Show that the last push is what is sampled: its receipt and a greedy continuation.

        Raises SyncError if either is not what the learner says; nothing is sampled then until a
        later push is proved.
        """
        if not self._in_flight:
            self._gate.close()
        try:
            self._wake()
            return self._standing.prove(
                sent, lambda: self._probe(prompt_ids, len(expected.ids)), expected, limit
            )
        finally:
            with self._settled:
                self._pushes += 1
                self._settled.notify_all()
            self._gate.open()

    def probe(self, prompt_ids: IntArray, new_tokens: int) -> Completion:
        """Greedy continuation of the probe, past any EOS, with its log-probabilities."""
        with self._gate.step():
            self._wake()
            return self._probe(prompt_ids, new_tokens)

    def next_tokens(self, prompts: Sequence[IntArray], top: int) -> list[dict[int, float]]:
        """The ``top`` most likely next tokens of each prompt and their log-probabilities, nats."""
        self._standing.check()
        names = [next(self._names) for _ in prompts]
        found = []
        with self._gate.step():
            self._wake()
            for name, ids in zip(names, prompts, strict=True):
                self._add(
                    name, ids, temperature=0.0, max_tokens=1, logprobs=top, flat_logprobs=False
                )
            while any(name not in self._finished for name in names):
                self._step()
        for name in names:
            [position] = self._finished.pop(name).logprobs
            ranked = sorted(position.items(), key=lambda item: -item[1].logprob)
            found.append({token: entry.logprob for token, entry in ranked[:top]})
        return found

    def _probe(self, prompt_ids: IntArray, new_tokens: int) -> Completion:
        name = next(self._names)
        with self._others_parked():
            self._add(name, prompt_ids, temperature=0.0, max_tokens=new_tokens)
            while name not in self._finished:
                self._step()
        output = self._finished.pop(name)
        logprobs = output.logprobs.logprobs[:: self._columns]
        return probe_completion(self.version, list(output.token_ids), logprobs)

    @contextmanager
    def _others_parked(self) -> Iterator[None]:
        """Requests under way wait, unseen by the scheduler: nothing is sampled before a proof.

        A push has put them all back into the waiting queue, where none holds a block.
        """
        from vllm.v1.core.sched.request_queue import create_request_queue

        scheduler = self._engine.engine_core.engine_core.scheduler
        waiting = scheduler.waiting
        scheduler.waiting = create_request_queue(scheduler.policy)
        try:
            yield
        finally:
            scheduler.waiting = waiting

    def sample(self, request: SampleRequest) -> SampledUnit:
        """Draw ``request.samples`` completions of each prompt, each by its own seed.

        Completions of one prompt share the cached blocks of its prefill. Raises SyncError where
        the last push, or one that came in on the way, did not arrive or was refuted; ValueError for
        reference shares.
        """
        began = time.perf_counter()
        if any(request.reference_shares):
            raise ValueError("a vLLM engine holds one model: it cannot draw from a mixture of two")
        self._wait_for(request.after_push)
        rows = [
            _Row(next(self._names), prompt, sample, request.seed(prompt, sample))
            for prompt in request.prompts
            for sample in range(request.samples)
        ]
        refuted = self._standing.refuted
        try:
            with self._gate.step():
                self._wake()
                for row in rows:
                    self._add_row(row, request.sampling or self._sampling)
            while any(row.request_id not in self._finished for row in rows):
                with self._gate.step():
                    self._standing.check(refuted)
                    self._step()
            with self._gate.step():
                self._standing.check(refuted)
        except BaseException:
            with self._gate.step():
                self._engine.abort_request([row.request_id for row in rows])
            for row in rows:
                self._finished.pop(row.request_id, None)
            raise
        done = [self._completion(row, self._finished.pop(row.request_id)) for row in rows]
        return request.answer(done, time.perf_counter() - began)

    def _wait_for(self, pushes: int) -> None:
        """A push that the request needs may still be on its way on the other thread."""
        if self._in_flight:
            with self._settled:
                self._settled.wait_for(lambda: self._pushes >= pushes)
        self._standing.check()

    def _add_row(self, row: _Row, options: SamplingOptions) -> None:
        self._add(
            row.request_id,
            row.prompt.ids,
            seed=row.seed,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k or 0,
            min_p=options.min_p,
            max_tokens=options.max_new_tokens,
            stop_token_ids=list(self._endings.token_ids),
            stop=list(self._endings.strings),
            detokenize=bool(self._endings.strings),
            include_stop_str_in_output=True,
            skip_special_tokens=True,
        )

    def _add(self, name: str, prompt_ids: IntArray, **parameters: Any) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        common = {
            "logprobs": self._columns - 1,
            "flat_logprobs": True,
            "ignore_eos": True,  # every token that ends a completion is a stop token
            "detokenize": False,
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }
        self._engine.add_request(
            name,
            {"prompt_token_ids": prompt_ids.tolist()},
            SamplingParams(**(common | parameters)),
            lora_request=self._lora,
        )

    def _step(self) -> None:
        for output in self._engine.step():
            if output.finished:
                self._finished[output.request_id] = output.outputs[0]

    def _completion(self, row: _Row, output: Any) -> Completion:
        ids = list(output.token_ids)
        both = np.array(output.logprobs.logprobs, np.float32).reshape(len(ids), self._columns)
        versions = [int(span.version) for span in output.weight_versions]
        return Completion(
            position=row.prompt.position,
            sample=row.sample,
            seed=row.seed,
            version=versions[0],
            last_version=versions[-1] if versions[-1] != versions[0] else None,
            ids=np.array(ids, np.int64),
            logprobs=np.ascontiguousarray(both[:, 0]),
            sampling_logprobs=self._sampling_logprobs(both),
            finished=output.finish_reason == "stop",
            text=completion_text(self._tokenizer, row.prompt.ids, ids),
        )

    def _sampling_logprobs(self, both_T2: FloatArray) -> FloatArray | None:
        """As drawn: NaN where the engine does not tell, so that no weight can rest on them."""
        if not self._sampling.reshapes:
            return None
        if self._columns == 1:
            return np.full(len(both_T2), np.nan, np.float32)
        return np.ascontiguousarray(both_T2[:, 1])

    def rest(self) -> None:
        """Give the accelerator's memory back until the next call: vLLM's sleep mode, level 1."""
        with self._gate.step():
            self._engine.sleep(level=1)

    def _wake(self) -> None:
        if self._engine.is_sleeping():
            self._engine.wake_up()
