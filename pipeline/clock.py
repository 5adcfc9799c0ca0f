"""Where a round's time goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from workers.messages import Round


class Clock:
    """Wall-clock seconds of the loop, by stage, from one ``start`` to the next."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """A round begins."""
        self._began = time.perf_counter()
        self._spent: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time spent inside towards a stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent[name] += time.perf_counter() - began

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that passed in a worker towards a stage."""
        self._spent[name] += seconds

    def record(self, round_: Round) -> dict[str, object]:
        """The round record's ``seconds`` by stage and sampled tokens a second.

        Nothing was sampled for given pairs: None a second. ``generate`` and ``judge`` were spent in
        the workers, ``learn`` in the loop, ``sync`` in both, ``idle`` is what no stage explains;
        evaluation is not the round's. When stages overlap they sum to more than the wall-clock time
        and ``idle`` is 0.
        """
        wall = time.perf_counter() - self._began - self._spent["evaluate"]
        seconds = {
            "generate": round_.seconds["generate"],
            "judge": round_.seconds["judge"],
            "learn": self._spent["learn"],
            "sync": self._spent["sync"],
        }
        tokens = sum(len(completion.ids) for completion in round_.completions)
        return {
            "seconds": {**seconds, "idle": max(0.0, wall - sum(seconds.values()))},
            "tokens_per_second": None if round_.given else tokens / wall,
        }
