"""A worker that does not lose work: mended when it dies or holds other weights than were sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pipeline.handles import Future, Handle, WorkerDied
from workers.generator import SampledUnit, SampleRequest
from workers.messages import Completion, IntArray
from workers.weight_sync.buckets import Receipt, SyncError, WeightPush
from workers.weight_sync.proof import Proof

if TYPE_CHECKING:
    from pipeline.fleet import Fleet

MENDS = 2
"""What is tried before a run stops: a failed push is made again, then the worker restarted."""


@dataclass(frozen=True, slots=True, eq=False)
class Shipment:
    """A version's weights on their way to every generator, what each must then show, and has."""

    version: int
    weights: Future[WeightPush]
    sent: Future[Receipt]
    expected: Future[Completion]
    proofs: list[Proof] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Delivery:
    """A shipment as one replica takes it; ``awaited`` by the weight sync, or by units alone."""

    replica: Replica
    shipment: Shipment
    awaited: bool = True
    loaded: Future[Receipt] = field(init=False)
    proving: Future[Proof] = field(init=False)
    proof: Proof | None = None

    def result(self) -> None:
        """Wait for the proof; a replica that fails it is mended, as for ``Unit.result``.

        One that left its fleet owes none.
        """
        self.replica.proved(self)


@dataclass(slots=True, eq=False)
class Unit:
    """A call's answer, on its way: a work unit's samples, or what a judge says of them.

    ``prompts`` it is about. ``attempt`` counts the times it was asked for, ``lost`` the replicas
    that left with it, ``lives`` the workers that its replica had before the one asked last.
    """

    replica: Replica
    issue: Callable[[Replica], Future[Any]]
    delivery: Delivery | None
    prompts: int = 0
    attempt: int = 0
    lost: int = 0
    lives: int = 0
    owed: bool = True
    round: int | None = None
    future: Future[Any] = field(init=False)

    def result(self) -> Any:
        """Wait for the answer and for the proof of the weights it rests on, if it does on any.

        A replica that died, or whose proof failed, is mended and asked again, or another one is.
        Raises SyncError or WorkerDied where that does not help.
        """
        while True:
            found, answered = self.replica.answered(self)
            if answered:
                return found


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
        self.name = f"{kind} {index}"
        self._handle = handle
        self.lives = 0
        self._probe_ids = probe_ids
        self._gap_limit = gap_limit
        self._journal: list[Delivery | Unit] = []
        self._deliveries = 0
        self._mends = 0
        self.fleet: Fleet | None = None
        """Who takes over when its worker dies; None: the worker is restarted, and waited for."""
        self.present = True
        """Whether it can be given work."""
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

    @property
    def rounds(self) -> set[int]:
        """Rounds of which it owes samples."""
        owed = (entry for entry in self._journal if isinstance(entry, Unit) and entry.owed)
        return {unit.round for unit in owed if unit.round is not None}

    @property
    def newest(self) -> Shipment | None:
        """What it was sent last, if anything."""
        delivery = self._last_delivery()
        return None if delivery is None else delivery.shipment

    def arrive(self) -> bool:
        """Whether its worker is built, and nothing more: it has yet to be sent weights."""
        try:
            self.present = self._handle.here()
        except WorkerDied:
            self._handle.begin_anew()
        return self.present

    def begin_anew(self) -> None:
        """Start another worker in its place; ``arrive`` tells when it is built."""
        self._handle.begin_anew()

    def push(self, shipment: Shipment, *, awaited: bool = True) -> Delivery:
        """Send weights, in turn with the rounds; waits for nothing."""
        delivery = Delivery(self, shipment, awaited)
        self._journal.append(delivery)
        self._trim()
        self._issue(delivery)
        return delivery

    def sample(self, request: SampleRequest) -> Unit:
        """Ask for samples by the weights that were pushed last; waits for nothing."""

        def issue(to: Replica) -> Future[SampledUnit]:
            return to._handle.submit("sample", replace(request, after_push=to._deliveries))

        return self._ask(issue, len(request.prompts), request.round)

    def call(self, method: str, *args: object, prompts: int = 0) -> Unit:
        """Call any other method; waits for nothing. It rests on the weights that were pushed."""
        return self._ask(lambda to: to._handle.submit(method, *args), prompts)

    def _ask(
        self, issue: Callable[[Replica], Future[Any]], prompts: int, round_: int | None = None
    ) -> Unit:
        self._trim()
        unit = Unit(self, issue, self._last_delivery(), prompts, round=round_)
        self._journal.append(unit)
        self._issue(unit)
        return unit

    def _last_delivery(self) -> Delivery | None:
        return next((e for e in reversed(self._journal) if isinstance(e, Delivery)), None)

    def take_over(self, unit: Unit) -> None:
        """Answer what another replica owed, by the weights that it was to be answered by."""
        newest = self.newest
        rests_on = None if unit.delivery is None else unit.delivery.shipment
        if rests_on is not None and newest is not rests_on:
            self.push(rests_on, awaited=False)
        unit.replica = self
        unit.delivery = self._last_delivery()
        self._journal.append(unit)
        self._issue(unit)
        if newest is not None and newest is not rests_on:
            self.push(newest, awaited=False)

    def replace(self) -> None:
        """Put another worker in the place of this one, and ask it for everything that is owed."""
        self._handle.restart()
        self.lives += 1
        self.pace = None
        self._deliveries = 0
        self._reissue()

    def rest(self) -> None:
        """Let it give an accelerator's memory back until its next call."""
        if self.present:
            self._handle.submit("rest")

    def oldest_version(self) -> int | None:
        """The oldest version whose weights a restart would need; None before the first push."""
        self._trim()
        versions = [e.shipment.version for e in self._journal if isinstance(e, Delivery)]
        return min(versions, default=None)

    def answered(self, unit: Unit) -> tuple[Any, bool]:
        """The answer to a call of this replica's, and True; False where it is another's by now."""
        while unit.replica is self:
            if unit.delivery is not None and not self.proved(unit.delivery):
                continue
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
                return found, True
        return None, False

    def proved(self, delivery: Delivery) -> bool:
        """Wait for the proof of a delivery; False where this replica left, and owes it no more."""
        delivery.shipment.sent.result()  # a learner that died is not this replica's fault
        while delivery.proof is None:
            if delivery not in self._journal:
                return False
            try:
                delivery.loaded.result()
                delivery.proof = delivery.proving.result()
                delivery.shipment.proofs.append(delivery.proof)
            except (SyncError, WorkerDied) as error:
                self._mend(error)
        return True

    def _issue(self, entry: Delivery | Unit) -> None:
        """Make an entry's calls."""
        if isinstance(entry, Unit):
            entry.attempt += 1
            entry.lives = self.lives
            entry.future = entry.issue(self)
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

        Raises the error, with what was tried, after ``MENDS`` of them without a unit between. One
        of a fleet leaves all to the others instead of being waited for.
        """
        died = isinstance(error, WorkerDied)
        if self.fleet is not None and (died or self._mends + 1 == MENDS):
            self._leave(self.fleet, error)
            return
        if self._mends == MENDS:
            tried = f"restarted {MENDS} times" if died else "pushed again, then restarted"
            said = str(error) if died else f"{self.name} {error}"
            raise type(error)(f"{said} ({tried}, to no avail)") from error
        self._mends += 1
        if died or self._mends == MENDS:
            self.replace()
        else:
            self._reissue()

    def _leave(self, fleet: Fleet, error: SyncError | WorkerDied) -> None:
        owed = [entry for entry in self._journal if isinstance(entry, Unit) and entry.owed]
        self._journal = []
        self._deliveries = self._mends = 0
        self.pace = None
        self.lives += 1
        self.present = False
        self._handle.begin_anew()
        fleet.left(self, owed, error)

    def _reissue(self) -> None:
        self._trim()
        for entry in self._journal:
            self._issue(entry)

    def _trim(self) -> None:
        """Forget what nothing waits for: units answered, deliveries that none of those owed rests
        on and whose proof is there, or not awaited.

        The last delivery stays: a restarted worker needs its weights.
        """
        owed = [entry for entry in self._journal if isinstance(entry, Unit) and entry.owed]
        sources = {id(unit.delivery) for unit in owed}
        deliveries = [entry for entry in self._journal if isinstance(entry, Delivery)]
        needed = {id(d) for d in deliveries if (d.awaited and d.proof is None) or id(d) in sources}
        needed |= {id(entry) for entry in (*owed, *deliveries[-1:])}
        self._journal = [entry for entry in self._journal if id(entry) in needed]
