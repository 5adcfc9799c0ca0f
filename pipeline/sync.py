"""Verified pushes: no round is accepted from a generator that did not prove its weights."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.fleet import those_here
from pipeline.learner import RemoteLearner
from pipeline.replica import Delivery, Replica, Shipment
from workers.messages import IntArray

PROBE_PROMPT_TOKENS = 144
"""Longer than one prefix-cache block of vLLM on CPU (128), so that a stale cache would show."""

PROBE_NEW_TOKENS = 4


class WeightSync:
    """Pushes the learner's weights to every generator and learns what came of it.

    A generator takes a push in turn with its rounds. The proof is its receipt (version, checksum
    of what it received) and a probe, continued greedily by generator and learner.
    """

    def __init__(self, replicas: Sequence[Replica], probe_ids: IntArray) -> None:
        self._replicas = replicas
        self._probe_ids = probe_ids
        self._deliveries: dict[int, list[Delivery]] = {}
        self._gaps: dict[int, float] = {}
        self._shipment: Shipment | None = None
        self.seconds = 0.0
        """What packing and loading the version proved last took, without its transport."""

    def push(self, learner: RemoteLearner) -> None:
        """Send the learner's version to every generator that does not hold it.

        Waits for nothing, but for a generator where none is left.
        """
        present = those_here(self._replicas)
        shipment = self._shipment
        if shipment is None or shipment.version != learner.version:
            versions = [v for r in self._replicas if (v := r.oldest_version()) is not None]
            shipment = self._shipment = Shipment(
                learner.version,
                learner.weights(min(versions, default=learner.version)),
                learner.sent(),
                learner.probe(self._probe_ids, PROBE_NEW_TOKENS),
            )
        deliveries = [r.push(shipment) for r in present if r.newest is not shipment]
        self._deliveries.setdefault(learner.version, []).extend(deliveries)

    def prove(self, version: int) -> float:
        """Wait for the proof of a version by every generator; returns its gap in nats.

        The gap is the largest difference, over the probe's tokens and the generators, between a
        generator's log-probability and the learner's. A generator that fails is pushed to again,
        then restarted. Raises SyncError where that does not help.
        """
        deliveries = self._deliveries.pop(version, [])
        self.seconds = 0.0
        if deliveries:
            for delivery in deliveries:
                delivery.result()
            proofs = deliveries[0].shipment.proofs
            self._gaps[version] = max(proof.gap for proof in proofs)
            self.seconds = max(proof.seconds for proof in proofs)
        return self._gaps[version]
