"""A worker that does not lose work: mended when it dies or holds other weights than were sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.handles import Future, Handle, WorkerDied
from workers.generator import SampledUnit, SampleRequest
from workers.messages import Completion, IntArray
from workers.weight_sync.buckets import Receipt, SyncError, WeightPush
from workers.weight_sync.proof import Proof

MENDS = 2
"""What is tried before a run stops: a failed push is made again, then the worker restarted."""


@dataclass(frozen=True, slots=True, eq=False)
class Shipment:
    """A version's weights on their way to every generator, and what each must then show."""

    version: int
    weights: Future[WeightPush]
    sent: Future[Receipt]
    expected: Future[Completion]


@dataclass(slots=True, eq=False)
class Delivery:
    """A shipment as one replica takes it."""

    replica: Replica
    shipment: Shipment
    loaded: Future[Receipt] = field(init=False)
    proving: Future[Proof] = field(init=False)
    proof: Proof | None = None

    def result(self) -> Proof:
        """Wait for the proof; a replica that fails it is mended, as for ``Unit.result``."""
        return self.replica.proved(self)


@dataclass(slots=True, eq=False)
class Unit:
    """A call's answer, on its way: a work unit's samples, or what a judge says of them.

    ``prompts`` it is about. ``attempt`` counts the times it was asked for, ``lives`` the workers
    that this replica had before the one that was asked last.
    """

    replica: Replica
    issue: Callable[[], Future[Any]]
    delivery: Delivery | None
    prompts: int = 0
    attempt: int = 0
    lives: int = 0
    owed: bool = True
    future: Future[Any] = field(init=False)

    def result(self) -> Any:
        """Wait for the answer and for the proof of the weights it rests on, if it does on any.

        A replica that died, or whose proof failed, is mended and asked again. Raises SyncError or
        WorkerDied where that does not help.
        """
        return self.replica.answered(self)


MEMORY = 0.9
"""Of what a replica is slower than the fastest, what is held against it each time it is passed
over."""

LEAST_PACE = 0.25
"""Of the usual: an answer that was cached says little of the next one."""


def least_busy(replicas: Sequence[Replica], prompts: int) -> Replica:
    """Who would be done first with a unit of so many prompts; of equals, the first.

    By the seconds that a prompt took each of late; one that has not answered yet counts as the
    others do. So a slow replica holds up nobody but the units it has, and gets fewer. One that is
    passed over is trusted more each time: what made it slow may be over.
    """
    known = [replica.pace for replica in replicas if replica.pace is not None]
    usual = sum(known) / len(known) if known else 1.0
    least = max(min(known, default=usual), usual * LEAST_PACE)

    def finish(replica: Replica) -> float:
        pace = usual if replica.pace is None else max(replica.pace, least)
        return (replica.backlog + prompts) * (least + (pace - least) * MEMORY**replica.passed_over)

    chosen = min(replicas, key=finish)
    for replica in replicas:
        replica.passed_over = 0 if replica is chosen else replica.passed_over + 1
    return chosen


class Replica:
    """One generator, or judge worker, and its journal: every call still owed an answer, in order.

    Restarted, it is given the journal again: the weights first, so the same seeds draw from the
    same version, and no completion is lost or comes twice.
    """

    def __init__(
        self,
        index: int,
        handle: Handle,
        probe_ids: IntArray,
        gap_limit: float,
        *,
        kind: str = "generator",
    ) -> None:
        self._name = f"{kind} {index}"
        self._handle = handle
        self.lives = 0
        self._probe_ids = probe_ids
        self._gap_limit = gap_limit
        self._journal: list[Delivery | Unit] = []
        self._deliveries = 0
        self._mends = 0
        self.pace: float | None = None
        """Seconds a prompt takes it, of late; None until it has answered."""
        self.passed_over = 0
        """Units that others were given since it was given one."""

    @property
    def backlog(self) -> int:
        """Prompts of the units that nobody has collected yet."""
        return sum(
            entry.prompts for entry in self._journal if isinstance(entry, Unit) and entry.owed
        )

    def push(self, shipment: Shipment) -> Delivery:
        """Send weights, in turn with the rounds; waits for nothing."""
        delivery = Delivery(self, shipment)
        self._journal.append(delivery)
        self._trim()
        self._issue(delivery)
        return delivery

    def sample(self, request: SampleRequest) -> Unit:
        """Ask for samples by the weights that were pushed last; waits for nothing."""

        def issue() -> Future[SampledUnit]:
            return self._handle.submit("sample", replace(request, after_push=self._deliveries))

        return self._ask(issue, len(request.prompts))

    def call(self, method: str, *args: object, prompts: int = 0) -> Unit:
        """Call any other method; waits for nothing. It rests on the weights that were pushed."""
        return self._ask(lambda: self._handle.submit(method, *args), prompts)

    def _ask(self, issue: Callable[[], Future[Any]], prompts: int) -> Unit:
        self._trim()
        deliveries = (e for e in reversed(self._journal) if isinstance(e, Delivery))
        unit = Unit(self, issue, next(deliveries, None), prompts)
        self._journal.append(unit)
        self._issue(unit)
        return unit

    def replace(self) -> None:
        """Put another worker in the place of this one, and ask it for everything that is owed."""
        self._handle.restart()
        self.lives += 1
        self.pace = None
        self._deliveries = 0
        self._reissue()

    def rest(self) -> None:
        """Let it give an accelerator's memory back until its next call."""
        self._handle.submit("rest")

    def oldest_version(self) -> int | None:
        """The oldest version whose weights a restart would need; None before the first push."""
        self._trim()
        versions = [e.shipment.version for e in self._journal if isinstance(e, Delivery)]
        return min(versions, default=None)

    def answered(self, unit: Unit) -> Any:
        """The answer to a call of this replica's."""
        while True:
            if unit.delivery is not None:
                self.proved(unit.delivery)
            try:
                found = unit.future.result()
            except (SyncError, WorkerDied) as error:
                self._mend(error)
            else:
                unit.owed = False
                self._mends = 0
                if unit.prompts:
                    own = found.seconds / unit.prompts
                    self.pace = own if self.pace is None else 0.5 * (self.pace + own)
                return found

    def proved(self, delivery: Delivery) -> Proof:
        """The proof of a delivery to this replica."""
        delivery.shipment.sent.result()  # a learner that died is not this replica's fault
        while delivery.proof is None:
            try:
                delivery.loaded.result()
                delivery.proof = delivery.proving.result()
            except (SyncError, WorkerDied) as error:
                self._mend(error)
        return delivery.proof

    def _issue(self, entry: Delivery | Unit) -> None:
        """Make an entry's calls."""
        if isinstance(entry, Unit):
            entry.attempt += 1
            entry.lives = self.lives
            entry.future = entry.issue()
            return
        self._deliveries += 1
        shipment = entry.shipment
        entry.proof = None
        entry.loaded = self._handle.submit("load", shipment.weights)
        entry.proving = self._handle.submit(
            "prove", self._probe_ids, shipment.sent, shipment.expected, self._gap_limit
        )

    def _mend(self, error: SyncError | WorkerDied) -> None:
        """Push again, or restart; then ask again for everything that is owed.

        Raises the error, with what was tried, after ``MENDS`` of them without a unit between.
        """
        died = isinstance(error, WorkerDied)
        if self._mends == MENDS:
            tried = f"restarted {MENDS} times" if died else "pushed again, then restarted"
            said = str(error) if died else f"{self._name} {error}"
            raise type(error)(f"{said} ({tried}, to no avail)") from error
        self._mends += 1
        if died or self._mends == MENDS:
            self.replace()
        else:
            self._reissue()

    def _reissue(self) -> None:
        self._trim()
        for entry in self._journal:
            self._issue(entry)

    def _trim(self) -> None:
        """Forget what nothing waits for: units answered, deliveries proved of which none is owed.

        The last delivery stays: a restarted worker needs its weights.
        """
        owed = [entry for entry in self._journal if isinstance(entry, Unit) and entry.owed]
        sources = {id(unit.delivery) for unit in owed}
        deliveries = [entry for entry in self._journal if isinstance(entry, Delivery)]
        needed = {id(d) for d in deliveries if d.proof is None or id(d) in sources}
        needed |= {id(entry) for entry in (*owed, *deliveries[-1:])}
        self._journal = [entry for entry in self._journal if id(entry) in needed]
