"""Verified pushes: no round is accepted from a generator that did not prove its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.handles import Future, Handle
from pipeline.learner import RemoteLearner
from workers.messages import Completion, IntArray
from workers.weight_sync.buckets import Receipt, SyncError

PROBE_PROMPT_TOKENS = 144
"""Longer than one prefix-cache block of vLLM on CPU (128), so that a stale cache would show."""

PROBE_NEW_TOKENS = 4

GAP_LIMIT = 1e-3
"""Largest difference of a token's log-probability between generator and learner, float32."""


@dataclass(frozen=True, slots=True, eq=False)
class _Push:
    """What the learner sent and computes itself, and what each generator answers."""

    sent: Future[Receipt]
    expected: Future[Completion]
    receipts: list[Future[Receipt]]
    probes: list[Future[Completion]]


class WeightSync:
    """Pushes the learner's weights to every generator and checks what came of it.

    A generator takes a push in turn with its rounds. The proof is its receipt (version, checksum
    of the tensors as they stand in it) and a probe, continued greedily by generator and learner.
    """

    def __init__(self, generators: Sequence[Handle], probe_ids: IntArray) -> None:
        self._generators = generators
        self._probe_ids = probe_ids
        self._pushes: dict[int, _Push] = {}
        self._gaps: dict[int, float] = {}
        self._held = -1
        self.seconds = 0.0
        """What packing and loading the version proved last took, without its transport."""

    def push(self, learner: RemoteLearner) -> None:
        """Send the learner's version to every generator, unless they hold it; waits for nothing."""
        if self._held == learner.version:
            return
        weights = learner.weights()
        self._pushes[learner.version] = _Push(
            learner.sent(),
            learner.probe(self._probe_ids, PROBE_NEW_TOKENS),
            [generator.submit("load", weights) for generator in self._generators],
            [
                generator.submit("probe", self._probe_ids, PROBE_NEW_TOKENS)
                for generator in self._generators
            ],
        )
        self._held = learner.version

    def prove(self, version: int) -> float:
        """Wait for the proof of a version; returns its log-probability gap in nats.

        The gap is the largest difference, over the probe's tokens and the generators, between a
        generator's log-probability and the learner's. Raises SyncError if a generator shows
        another version or checksum, or if the gap exceeds ``GAP_LIMIT``.
        """
        push = self._pushes.pop(version, None)
        self.seconds = 0.0
        if push is None:
            return self._gaps[version]
        sent, expected = push.sent.result(), push.expected.result()
        gaps, loading = [], []
        for index, (answer, probe) in enumerate(zip(push.receipts, push.probes, strict=True)):
            receipt = answer.result()
            _check_receipt(index, sent, receipt)
            loading.append(receipt.seconds)
            gaps.append(probe_gap(probe.result(), expected))
            if not gaps[-1] <= GAP_LIMIT:
                raise SyncError(
                    f"generator {index} holds version {version}, but its probe differs from the "
                    f"learner's by {gaps[-1]:.2g} nats a token (limit {GAP_LIMIT:g})"
                )
        self._gaps[version] = max(gaps)
        self.seconds = sent.seconds + max(loading)
        return self._gaps[version]


def _check_receipt(index: int, sent: Receipt, receipt: Receipt) -> None:
    if receipt != sent:
        raise SyncError(
            f"generator {index} answered a push of version {sent.version} (checksum "
            f"{sent.checksum}) with version {receipt.version} (checksum {receipt.checksum})"
        )


def probe_gap(probe: Completion, expected: Completion) -> float:
    """Largest log-probability difference of two greedy continuations, in nats.

    Past a first token in which they differ (a near tie) they are not comparable; at that token
    both log-probabilities are of the most likely token and must agree.
    """
    differing = np.flatnonzero(probe.ids != expected.ids)
    comparable = int(differing[0]) + 1 if len(differing) else len(probe.ids)
    return float(np.abs(probe.logprobs - expected.logprobs)[:comparable].max())
