"""The proof of a push: what a generator shows before anything it samples is accepted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from workers.messages import Completion
from workers.weight_sync.buckets import Receipt, SyncError


@dataclass(frozen=True, slots=True)
class Proof:
    """A generator holds ``version``, received as ``checksum``, and samples it.

    ``gap`` is the largest difference of its probe's log-probabilities from the learner's, in nats
    a token; ``seconds`` what packing and loading took.
    """

    version: int
    checksum: str
    gap: float
    seconds: float


class Standing:
    """Whether a generator may sample: not while its last push is missing, corrupted or refuted."""

    def __init__(self) -> None:
        self.received: Receipt | None = None
        self.refuted = 0
        """How often a push did not arrive or was refuted."""
        self._failure: str | None = None

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """A push is being loaded: whatever was received before is no more."""
        self.received = None
        with self._noting():
            yield

    def prove(
        self, sent: Receipt, probe: Callable[[], Completion], expected: Completion, limit: float
    ) -> Proof:
        """``proof_of`` what was received and is sampled; a failed one is remembered."""
        with self._noting():
            if self.received is None:
                raise SyncError(self._failure or "has received no weights")
            proof = proof_of(self.received, sent, probe(), expected, limit)
        self._failure = None
        return proof

    def check(self, refuted: int | None = None) -> None:
        """Raises SyncError where the generator may not sample.

        ``refuted`` is what it was when sampling began: tokens of a push that was refuted since,
        and made up for by a later one, are no use either.
        """
        if self._failure is not None:
            raise SyncError(f"does not sample: it {self._failure}")
        if refuted not in (None, self.refuted):
            raise SyncError("does not go on: a push that came in meanwhile was refuted")

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except SyncError as error:
            self._failure = str(error)
            self.refuted += 1
            raise


def proof_of(
    received: Receipt, sent: Receipt, probe: Completion, expected: Completion, limit: float
) -> Proof:
    """Compare what a generator has and samples with what the learner sent and computes.

    Raises SyncError if version or checksum differ, or the probe by more than ``limit`` nats.
    """
    if received != sent:
        raise SyncError(
            f"answered a push of version {sent.version} (checksum {sent.checksum}) with version "
            f"{received.version} (checksum {received.checksum})"
        )
    gap = probe_gap(probe, expected)
    if not gap <= limit:
        raise SyncError(
            f"holds version {sent.version}, but its probe differs from the learner's by {gap:.2g} "
            f"nats a token (limit {limit:g})"
        )
    return Proof(sent.version, sent.checksum, gap, sent.seconds + received.seconds)


def probe_gap(probe: Completion, expected: Completion) -> float:
    """Largest log-probability difference of two greedy continuations, in nats.

    Past a first token in which they differ (a near tie) they are not comparable; at that token
    both log-probabilities are of the most likely token and must agree.
    """
    differing = np.flatnonzero(probe.ids != expected.ids)
    comparable = int(differing[0]) + 1 if len(differing) else len(probe.ids)
    return float(np.abs(probe.logprobs - expected.logprobs)[:comparable].max())
