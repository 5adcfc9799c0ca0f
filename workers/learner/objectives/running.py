"""A mean over everything seen so far."""

from __future__ import annotations

from collections.abc import Sequence


class RunningMean:
    """The mean of all values added; a checkpoint holds its two numbers."""

    def __init__(self, mean: float = 0.0, count: float = 0.0) -> None:
        self.mean = mean
        self._count = count

    def add(self, values: Sequence[float]) -> None:
        """Take these values in."""
        self._count += len(values)
        self.mean += sum(value - self.mean for value in values) / max(1.0, self._count)

    def state(self) -> dict[str, float]:
        """What ``RunningMean(**state)`` goes on from."""
        return {"mean": self.mean, "count": self._count}
