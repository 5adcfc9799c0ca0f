"""Alarms on policies that leak (geometry D), where every probability is known; and the way back.

A tabular completion is one token, so its mean reference log-probability takes 40 values, and the
band, the central 98 % of the reference's own samples, is a set of tokens: below it lie those that
the reference says less than about once in a hundred times, the bad four among them, and perhaps a
rare good one. A round of 128 by the reference holds one or two such completions by chance, hence
thresholds above 2 %. That the completions below the band are bad the alarm cannot know: in some
worlds the best completion is a rare one, and a sound policy that says it trips the alarm as well.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.brake import Brake
from pipeline.drift import Drift
from pipeline.drift_options import DriftOptions
from pipeline.probes import Probes, probe
from pipeline.resampling import Dial, RoundPlan, whole_run
from pipeline.resampling_options import ResamplingOptions
from tests.lessons import batches
from tests.tabular import TabularGenerator, TabularLearner, TabularPolicy, Worlds
from tests.test_out_of_distribution import BAD, BETA, GOOD, OFFLINE, SAMPLING, every, worlds_of
from workers.learner.objectives import build_objective
from workers.messages import Completion, FloatArray, Round, UpdateBatch

UPDATES = 320
LOOK_EVERY = 16
LOOK_PROMPTS = 64
"""Two completions of each: 128, as in a round of 64 prompts."""
FIRST_PROMPTS = 512
NO_PROMPT = np.zeros(0, np.int64)
BOUNDS = {"off_reference_unlikely": 0.03, "bad_mass": 0.01}


@pytest.fixture(autouse=True)
def _no_search_for_cycles() -> Iterator[None]:
    """Rounds of records hold none, and looking for them takes longer than learning."""
    gc.disable()
    yield
    gc.enable()


def bad_mass(policy: TabularPolicy) -> Tensor:
    """The probability of the bad four, [W]."""
    return policy.logprobs().detach().exp()[:, GOOD:].sum(-1)


def learn(
    worlds: Worlds,
    policy: TabularPolicy,
    options: ResamplingOptions,
    updates: int,
    first_by: TabularPolicy | None = None,
) -> Iterator[int]:
    """DPO as in the study, its version after each update; ``first_by`` samples the first round."""
    dial = Dial(options, updates, SAMPLING.prompts_per_update)
    plans = list(whole_run(dial))
    prompts = plans[-1].start + plans[-1].prompts
    own = TabularGenerator(worlds, policy, prompts)
    old = TabularGenerator(worlds, first_by or policy, prompts)
    objective = build_objective({"name": "dpo", "beta": BETA})
    learner = TabularLearner(worlds, policy, objective, learning_rate=0.02, adam_betas=(0.9, 0.99))
    for plan in plans:
        rounds = (own if plan.index else old).sample(plan, learner.version)
        learned = [
            batches(plan, round_, SAMPLING, objective.needs, seed)
            for seed, round_ in zip(worlds.seeds, rounds, strict=True)
        ]
        for update in zip(*learned, strict=True):
            learner.update(update)
            yield learner.version


# --- the alarm comes before the fall ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Look:
    """What a round of fresh completions showed after so many updates."""

    update: int
    score_mean: float
    score_error: float
    tripped: frozenset[str]


class Lookout:
    """Samples fresh rounds of a policy and has the real drift panel and brake look at them."""

    def __init__(self, worlds: Worlds, policy: TabularPolicy) -> None:
        self._worlds = worlds
        self._policy = policy
        prompts = FIRST_PROMPTS + LOOK_PROMPTS * (UPDATES // LOOK_EVERY)
        # Prompts of a stream of their own: none is learned from.
        elsewhere = replace(worlds, seeds=tuple(1000 + seed for seed in worlds.seeds))
        self._generator = TabularGenerator(elsewhere, policy, prompts)
        bad = [probe(NO_PROMPT, [token]) for token in range(GOOD, GOOD + BAD)]
        self._drifts = [Drift(probes=Probes(bad=bad)) for _ in worlds.seeds]
        self._brake = Brake(DriftOptions.model_validate({"bad": "bad.jsonl", "warn": BOUNDS}))
        self._next = 0
        self._rounds = 0

    def look(self, version: int) -> list[Look]:
        """One round of each world, by the policy as it is now."""
        prompts = LOOK_PROMPTS if self._rounds else FIRST_PROMPTS
        plan = RoundPlan(self._rounds, 0, self._next, prompts)
        self._next, self._rounds = self._next + prompts, self._rounds + 1
        rounds = self._generator.sample(plan, version)
        return [self._look(world, round_) for world, round_ in enumerate(rounds)]

    def _look(self, world: int, round_: Round) -> Look:
        logprobs_V = self._policy.logprobs().detach()[world].numpy()

        def score_policy(asked: Sequence[UpdateBatch]) -> list[list[FloatArray]]:
            return [
                [logprobs_V[item.completion.ids].astype(np.float32) for item in batch.completions]
                for batch in asked
            ]

        panel = self._drifts[world].of(self._scored(world, round_), score_policy)
        return Look(
            round_.version,
            panel["score_mean"],
            panel["score_std"] / math.sqrt(panel["completions"]),
            frozenset(alarm.measure for alarm in self._brake.tripped(panel)),
        )

    def _scored(self, world: int, round_: Round) -> Round:
        """With the reference's log-probabilities; the judge's scores are the true rewards."""
        reference_V = self._worlds.reference_WV[world].numpy().astype(np.float32)

        def score(completion: Completion) -> Completion:
            return replace(completion, reference_logprobs=reference_V[completion.ids])

        return replace(round_.with_completions(score), reference_version=0)


def watched(options: ResamplingOptions) -> list[list[Look]]:
    """Of each of twenty worlds what was seen, from update 0, every 16 updates."""
    worlds = worlds_of(range(20))
    policy = TabularPolicy(worlds)
    lookout = Lookout(worlds, policy)
    looks = [lookout.look(0)]
    for version in learn(worlds, policy, options, UPDATES):
        if version % LOOK_EVERY == 0:
            looks.append(lookout.look(version))
    return [list(of_world) for of_world in zip(*looks, strict=True)]


def alarm(looks: Sequence[Look], measure: str) -> float:
    """The update of the first alarm; infinity where there is none."""
    return next((look.update for look in looks if measure in look.tripped), math.inf)


def fall(looks: Sequence[Look]) -> float:
    """When the mean score is below the best so far by three standard errors of the difference."""
    best = looks[0]
    for look in looks:
        noise = math.hypot(look.score_error, best.score_error)
        if look.score_mean < best.score_mean - 3.0 * noise:
            return look.update
        best = max(best, look, key=lambda one: one.score_mean)
    return math.inf


def test_the_alarm_comes_before_the_judged_score_falls() -> None:
    """Offline, 128 fresh completions every 16 updates; in each of twenty worlds all is lost.

    As measured, the score has fallen after 96 to 288 updates (median 136). More than 1 % on known
    bad completions shows 32 to 80 updates before that (median 48); more than 3 % of the samples
    below the band 0 to 112 before (median 32), in two worlds with the fall and in none after it.
    In 17 worlds most of those samples are bad ones; in three the first alarm is of good ones that
    the reference hardly says, as in the next test, and the leak comes to it later.
    """
    found = watched(OFFLINE)
    before = {measure: [fall(w) - alarm(w, measure) for w in found] for measure in BOUNDS}
    assert all(math.isfinite(fall(world)) for world in found)
    # Where bad completions are known, their probability is exact: never late, in no world.
    assert min(before["bad_mass"]) >= LOOK_EVERY
    # The share of samples is a count in 128: other draws may bring a tie.
    assert min(before["off_reference_unlikely"]) >= 0
    assert sum(ahead > 0 for ahead in before["off_reference_unlikely"]) >= 17


def test_the_score_of_fresh_pairs_does_not_fall_and_few_alarms_sound() -> None:
    """The same worlds resampled every 16 updates: the alarms are not those of any learning.

    As measured, a leak begins in three worlds (more than 1 % on bad completions) and is taken
    back, in two of them with an alarm of samples below the band. In two others that alarm sounds of
    good completions which the reference hardly says, in one of them of nearly all samples in the
    end: far from the reference, and right. The measure tells where to look, not what is there.
    """
    found = watched(every(16))
    tripped = {measure: sum(math.isfinite(alarm(w, measure)) for w in found) for measure in BOUNDS}
    assert not any(math.isfinite(fall(world)) for world in found)
    assert tripped["bad_mass"] <= 5
    assert tripped["off_reference_unlikely"] <= 9
    assert not any("bad_mass" in world[-1].tripped for world in found)


# --- what has leaked comes back once it is judged --------------------------------------------

DIALS = (1, 4, 16, 64)
WORLDS_BACK = 10


@pytest.fixture(scope="module")
def leaked() -> tuple[Worlds, TabularPolicy]:
    """Each world's policy as it was when offline learning had put half of it on the bad four."""
    worlds = worlds_of(range(WORLDS_BACK))
    policy, kept = TabularPolicy(worlds), TabularPolicy(worlds)
    left = set(range(WORLDS_BACK))
    for _ in learn(worlds, policy, OFFLINE, 256):
        for world in sorted(left):
            if bad_mass(policy)[world] > 0.5:
                left.remove(world)
                copy(policy, kept, world)
        if not left:
            break
    assert not left
    return worlds, kept


def copy(policy: TabularPolicy, to: TabularPolicy, world: int | slice) -> None:
    with torch.no_grad():
        to.weights_WD[world] = policy.weights_WD[world]
        to.offsets_WV[world] = policy.offsets_WV[world]


def recovery(
    leaked: tuple[Worlds, TabularPolicy], updates_per_round: int, unseen: bool
) -> list[float]:
    """Of each world the update after which less than 1 % is on the bad four.

    ``unseen``: the round under way, K updates of it, was sampled by the reference, as offline's
    was: the leak is neither in it nor judged until it is over. Infinity where 256 are not enough.
    """
    worlds, kept = leaked
    policy = TabularPolicy(worlds)
    copy(kept, policy, slice(None))
    found = [math.inf] * WORLDS_BACK
    first_by = TabularPolicy(worlds) if unseen else None
    for version in learn(worlds, policy, every(updates_per_round), 256, first_by):
        for world, mass in enumerate(bad_mass(policy).tolist()):
            if mass < 0.01:
                found[world] = min(found[world], version)
        if max(found) < math.inf:
            break
    return found


def test_a_leak_is_given_back_once_it_is_sampled_and_judged(
    leaked: tuple[Worlds, TabularPolicy],
) -> None:
    """From half of the probability on the bad four to less than 1 %, learned on-policy.

    Updates until then, as measured in ten worlds, median (least to most):

    ====  =====================  =====================
    K     the leak is sampled    a round by the
          at once                reference is under way
    ====  =====================  =====================
    1     32 (19 to 57)          36 (20 to 64)
    4     32 (18 to 60)          40 (25 to 63)
    16    25 (18 to 42)          48 (39 to 52)
    64    22 (18 to 27)          142 (91 to 167)
    ====  =====================  =====================

    Once the leak is in the pairs, how old they get makes no difference: they all say the same of
    it, and to overshoot does no harm. What a large K costs is that the leak goes unseen, and grows,
    until the next round is sampled.
    """
    at_once = {k: recovery(leaked, k, unseen=False) for k in DIALS}
    unseen = {k: recovery(leaked, k, unseen=True) for k in DIALS}
    for k in DIALS:
        for found in (at_once[k], unseen[k]):
            assert max(found) < math.inf
    assert max(at_once[64]) <= 64  # within the first round
    medians = [statistics.median(unseen[k]) for k in DIALS]
    assert medians == sorted(medians)
    slower = [many > 64 > one for one, many in zip(unseen[1], unseen[64], strict=True)]
    assert sum(slower) >= WORLDS_BACK - 1
