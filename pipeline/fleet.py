"""Who takes the next work unit, among workers of which some are slow and some may be gone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

from pipeline.handles import WorkerDied
from pipeline.replica import Replica, Unit
from pipeline.stopping import Stop
from workers.weight_sync.buckets import SyncError

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


LOOK = 1.0
"""Seconds between two looks for a generator, when none is left."""

DEATHS = 5
"""Workers that a unit may be lost with, besides those that are gone together and not noticed yet,
before the run stops: it may be what they die of."""

BUILDS = 3
"""Times that a worker is tried which cannot be built, or proved, where it comes to be."""


class Fleet:
    """Generators that come and go: one that dies leaves what it owes to those that are left.

    What they owe is the same whoever samples it, so a run's numbers are. ``say`` is told who
    leaves and who joins; ``stop`` ends the waiting for one.
    """

    def __init__(
        self, replicas: Sequence[Replica], say: Callable[[str], object], stop: Stop
    ) -> None:
        self._replicas = replicas
        self._say = say
        self._stop = stop
        self._failures: Counter[str] = Counter()
        for replica in replicas:
            replica.fleet = self
            replica.present = False
        for replica in replicas:
            self._arrives(replica)

    def here(self) -> list[Replica]:
        """Those that can be given work; waits until there is one.

        Raises KeyboardInterrupt where the run is asked to stop meanwhile, and what building them
        raised where none is left to wait for.
        """
        told = False
        while True:
            for replica in self._replicas:
                if not replica.present and self._arrives(replica):
                    self._say(f"{replica.name} joined ({self._count()})")
            if present := [replica for replica in self._replicas if replica.present]:
                return present
            if not self._hopeful():
                raise SyncError("no generator is left: each failed too often")
            if not told:
                self._say("no generator is left: waiting until a node has room for one")
            told = True
            if self._stop.requested:
                raise KeyboardInterrupt
            time.sleep(LOOK)

    def _arrives(self, replica: Replica) -> bool:
        """Whether it has come. One that cannot be built where it comes to be stops nobody else."""
        if self._failures[replica.name] == BUILDS:
            return False
        try:
            return replica.arrive()
        except Exception as error:
            self._failures[replica.name] += 1
            said = " ".join(str(error).split()) or type(error).__name__
            if self._failures[replica.name] < BUILDS:
                self._say(f"{replica.name} could not join ({said}): it is tried again")
                replica.begin_anew()
                return False
            self._say(f"{replica.name} could not join ({said}): it is left out from here on")
            if not self._hopeful():
                raise
            return False

    def _hopeful(self) -> bool:
        """Whether some generator has not failed too often."""
        return any(self._failures[replica.name] < BUILDS for replica in self._replicas)

    def left(self, replica: Replica, owed: Sequence[Unit], error: SyncError | WorkerDied) -> None:
        """A replica is gone: what it owed is done by others, or by itself where it comes back.

        Raises WorkerDied for a unit that was lost with too many workers.
        """
        self._say(f"{replica.name} left ({error}; {self._count()})")
        if isinstance(error, SyncError):
            self._failures[replica.name] += 1
        most = DEATHS + len(self._replicas)
        for unit in owed:
            unit.lost += 1
            if unit.lost == most:
                raise WorkerDied(
                    f"{error} ({most} workers ended while the same prompts were theirs to sample)"
                ) from error
        for unit in owed:
            least_busy(self.here(), unit.prompts).take_over(unit)

    def _count(self) -> str:
        present = sum(replica.present for replica in self._replicas)
        return f"{present} of {len(self._replicas)}"


def those_here(replicas: Sequence[Replica]) -> list[Replica]:
    """Those that can be given work: all of them, where they do not come and go.

    Waits, where they do, until there is one.
    """
    for replica in replicas:
        if replica.fleet is not None:
            replica.fleet.here()
            break
    return [replica for replica in replicas if replica.present]
