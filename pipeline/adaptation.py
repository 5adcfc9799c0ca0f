"""Choosing how many updates a round feeds, so that its pairs stay fresh enough."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pipeline.resampling_options import AdaptiveOptions

MEMORY = 0.5
"""Of the staleness estimated so far, what the next round's own estimate leaves."""

FORGETTING = 0.8
"""And what a round that shows nothing (no pair of it was stale) leaves: so it is tried again."""


ROUNDING = 1e-9
"""So that a whole number found by logarithms and roots is not taken for the one below."""


class Adaptation:
    """Updates a round, set after each so that the last update's ESS comes out at the target.

    Normal log-weights have ESS = exp(−variance), and the variance that runs show grows with the
    lag, about as −ln ESS = c·lag (docs/resampling.md). From c the largest lag that keeps the
    target, and from that the updates, at most twice as many as in the round before. Without options
    the number never changes. ``ages``: a round of K updates has a largest lag of ages·K − 1.
    """

    def __init__(self, options: AdaptiveOptions | None, updates_per_round: int, ages: int) -> None:
        self._options = options
        self._ages = ages
        self._staleness: float | None = None
        self.updates_per_round = updates_per_round
        self.most = updates_per_round if options is None else options.max

    def observe(self, ages: Mapping[str, Any]) -> None:
        """A round is over; ``ages`` are of its last pairs: ``Watch.ages``."""
        if self._options is None:
            return
        lag, ess = ages["lag_max"], ages[f"policy_{self._options.measure}"]
        if lag and ess is not None and not math.isnan(ess):
            found = -math.log(max(ess, 1e-12)) / lag
            before = found if self._staleness is None else self._staleness
            self._staleness = MEMORY * before + (1.0 - MEMORY) * found
        elif self._staleness is not None:
            self._staleness *= FORGETTING
        self.updates_per_round = self._chosen(self._options)

    def _chosen(self, options: AdaptiveOptions) -> int:
        twice = 2 * self.updates_per_round
        lag = math.inf
        if self._staleness:
            lag = -math.log(options.target) / self._staleness
        wanted = min((lag + 1.0) / self._ages + ROUNDING, twice)
        return min(max(math.floor(wanted), options.min), options.max)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {"staleness": self._staleness, "updates_per_round": self.updates_per_round}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state`` gave."""
        self._staleness = state["staleness"]
        self.updates_per_round = state["updates_per_round"]
