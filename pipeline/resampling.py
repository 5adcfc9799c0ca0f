"""The resampling dial: how many updates a round feeds, with whose prompts, how stale they get."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.adaptation import Adaptation
from pipeline.resampling_options import ALL, ResamplingOptions
from workers.messages import Round
from workers.seeds import derive_seed


@dataclass(frozen=True, slots=True)
class Share:
    """``take`` of the ``prompts`` that round ``index`` sampled from position ``start`` on."""

    index: int
    start: int
    prompts: int
    take: int


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """Round ``index`` samples the prompts ``start .. start + prompts`` and feeds ``updates``.

    ``shares`` say which prompts those updates learn from in one pass, its own first; empty: its
    own, all of them.
    """

    index: int
    updates: int
    start: int
    prompts: int
    shares: tuple[Share, ...] = ()

    @property
    def slots(self) -> int:
        """Prompts learned from in one pass."""
        return sum(share.take for share in self.shares) if self.shares else self.prompts

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RoundPlan:
        """What ``dataclasses.asdict`` gave, after JSON."""
        shares = tuple(Share(**share) for share in value["shares"])
        return cls(**{**value, "shares": shares})


class Dial:
    """Admits rounds until they feed the whole run.

    Unless rounds end early, sampling, judging and learning budgets are the same at every setting
    (DESIGN: the dial keeps the budget); with ``replay`` shares fewer prompts are sampled, and as
    many learned from.
    """

    def __init__(
        self, options: ResamplingOptions, updates: int, prompts_per_update: int, run_seed: int = 0
    ) -> None:
        self._options = options
        self._updates = updates
        self._prompts_per_update = prompts_per_update
        self._run_seed = run_seed
        self._adaptation = Adaptation(options.adaptive, self._per_round(), self._ages())
        most = self._adaptation.most
        span = min(most * options.passes, updates)
        self.lag_bound = (options.rounds_in_flight + 1) * int(span) - 1
        self._planned = 0
        self._start = 0
        self._sampled: list[tuple[int, int]] = []

    def _per_round(self) -> int:
        """Updates' worth of prompts that a round samples, at first."""
        per_round = self._options.updates_per_round
        whole_run = math.ceil(self._updates / self._options.passes)
        return whole_run if math.isinf(per_round) else min(int(per_round), whole_run)

    def _ages(self) -> int:
        """The largest lag of a round of K updates is so many times K, less one."""
        return (self._options.rounds_in_flight + 1) * self._options.passes

    def admit(self) -> RoundPlan | None:
        """The next round, cut to fit the run; None when those admitted feed all of it."""
        left = self._updates - self._planned
        if left <= 0:
            return None
        passes = self._options.passes
        updates = min(self._adaptation.updates_per_round * passes, left)
        slots = math.ceil(updates / passes) * self._prompts_per_update
        index = len(self._sampled)
        plan = RoundPlan(index, updates, self._start, *self._mixed(index, slots))
        self._planned += updates
        self._start += plan.prompts
        self._sampled.append((plan.start, plan.prompts))
        return plan

    def ended(self, plan: RoundPlan, updates: int, ages: Mapping[str, Any]) -> None:
        """A round is over after so many updates; what it did not feed is planned again.

        ``ages`` are measures of its pairs in the last of them: ``Watch.ages``.
        """
        self._planned -= plan.updates - updates
        self._adaptation.observe(ages)

    def check_lag(self, version: int, round_: Round) -> None:
        """Raise RuntimeError if the learner is further ahead of a round than admission allows."""
        lag = version - round_.version
        if not 0 <= lag <= self.lag_bound:
            raise RuntimeError(
                f"round {round_.index} was sampled by version {round_.version}, the learner is at "
                f"{version}: lag {lag} is outside [0, {self.lag_bound}]"
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {
            "planned": self._planned,
            "start": self._start,
            "sampled": self._sampled,
            "adaptation": self._adaptation.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state`` gave."""
        self._planned = state["planned"]
        self._start = state["start"]
        self._sampled = [(start, prompts) for start, prompts in state["sampled"]]
        self._adaptation.load(state["adaptation"])

    def _mixed(self, index: int, slots: int) -> tuple[int, tuple[Share, ...]]:
        """How many prompts round ``index`` samples to learn from ``slots``, and their shares."""
        replay = self._options.replay
        if replay == ALL:
            return self._of_everything(index, slots)
        if len(replay) == 1 or not index:
            return slots, ()
        wanted = slots - _apportioned(replay, slots)[0]
        earlier = self._takes(index, replay[1 : index + 1], wanted)
        fresh = slots - sum(share.take for share in earlier)
        own = Share(index, self._start, fresh, fresh)
        return fresh, (own, *earlier)

    def _takes(self, index: int, shares: Sequence[float], wanted: int) -> list[Share]:
        """Of the rounds before, newest first; where rounds are missing yet, more of the others."""
        found = []
        for back, take in enumerate(_apportioned(shares, wanted), start=1):
            start, prompts = self._sampled[index - back]
            found.append(Share(index - back, start, prompts, min(take, prompts)))
        return found

    def _of_everything(self, index: int, slots: int) -> tuple[int, tuple[Share, ...]]:
        """Each prompt sampled so far, and those of this round, is as likely as any other."""
        rounds = [*self._sampled, (self._start, slots)]
        rng = np.random.default_rng(derive_seed(self._run_seed, "accumulated", index))
        prompts = [count for _, count in rounds]
        takes = rng.multivariate_hypergeometric(prompts, slots).tolist()
        shares = [
            Share(i, *place, take)
            for i, (place, take) in enumerate(zip(rounds, takes, strict=True))
        ]
        own, earlier = shares[-1], [share for share in shares[:-1] if share.take]
        return slots, (own, *earlier) if index else ()


def _apportioned(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to ``weights`` that sum to ``total`` (largest remainders)."""
    whole = sum(weights)
    exact = [weight * total / whole for weight in weights]
    found = [math.floor(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda i: (found[i] - exact[i], i))
    for i in order[: total - sum(found)]:
        found[i] += 1
    return found


def whole_run(dial: Dial) -> Iterator[RoundPlan]:
    """Every round of a run in which none ends early."""
    while (plan := dial.admit()) is not None:
        yield plan
