"""Who takes the next work unit, among workers of which some are slow and some may be gone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from pipeline.handles import WorkerDied
from pipeline.replica import Replica, Unit

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
"""Workers that a unit may be lost with before the run stops: it may be what they die of."""


class Fleet:
    """Generators that come and go: one that dies leaves what it owes to those that are left.

    What they owe is the same whoever samples it, so a run's numbers are. ``say`` is told who
    leaves and who joins.
    """

    def __init__(self, replicas: Sequence[Replica], say: Callable[[str], object]) -> None:
        self._replicas = replicas
        self._say = say
        for replica in replicas:
            replica.fleet = self
            replica.arrive()

    def here(self) -> list[Replica]:
        """Those that can be given work; waits until there is one."""
        told = False
        while True:
            for replica in self._replicas:
                if not replica.present and replica.arrive():
                    self._say(f"{replica.name} joined ({self._count()})")
            if present := [replica for replica in self._replicas if replica.present]:
                return present
            if not told:
                self._say("no generator is left: waiting until a node has room for one")
            told = True
            time.sleep(LOOK)

    def left(self, replica: Replica, owed: Sequence[Unit], error: WorkerDied) -> None:
        """A replica is gone: what it owed is done by others, or by itself where it comes back.

        Raises WorkerDied for a unit that was lost with ``DEATHS`` workers.
        """
        self._say(f"{replica.name} left ({error}; {self._count()})")
        for unit in owed:
            if unit.attempt >= DEATHS:
                raise WorkerDied(
                    f"{error} ({DEATHS} workers ended while the same prompts were theirs to sample)"
                ) from error
        for unit in owed:
            least_busy(self.here(), unit.prompts).take_over(unit)

    def _count(self) -> str:
        present = sum(replica.present for replica in self._replicas)
        return f"{present} of {len(self._replicas)}"


def those_here(replicas: Sequence[Replica]) -> list[Replica]:
    """Those that can be given work: all of them, where they do not come and go."""
    for replica in replicas:
        if replica.fleet is not None:
            replica.fleet.here()
            break
    return [replica for replica in replicas if replica.present]
