"""Geometry D: worlds of forty completions, four of them bad, that all but never are said at first.

A completion is one token and a policy a table of logits, so true reward and probability are sums,
not estimates. The bad four have much of a feature that goes with quality among the other 36 (say,
length), and what a policy learns of that feature carries over to them. In shapes, S is settings of
the dial, W worlds, V completions, D features, B pairs of an update, L = S·W policies side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, log_softmax, softmax

from workers.messages import BoolArray, DoubleArray, IntArray
from workers.seeds import derive_seed

GOOD, BAD, FEATURES = 36, 4, 6
UPDATES, PAIRS_PER_UPDATE = 1024, 16
BETA = 0.1
LEARNING_RATE, ADAM_BETAS, ADAM_EPSILON = 0.02, (0.9, 0.99), 1e-8


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of the dial: a round feeds ``updates_per_round``·``passes`` updates."""

    label: str
    updates_per_round: int
    passes: int = 1


SETTINGS = (
    Setting("offline, 256 pairs", UPDATES // 64, passes=64),
    Setting("offline, 16,384 pairs", UPDATES),
    Setting("every 256 updates", 256),
    Setting("every 16 updates", 16),
    Setting("every update", 1),
)
"""From offline to fully on-policy. The second samples as many pairs as the last, all from p0."""


@dataclass(frozen=True, slots=True, eq=False)
class Worlds:
    """Features [W, V, D], true rewards [W, V] and reference log-probabilities [W, V].

    The bad four are the last. ``seeds`` name the worlds: none depends on those beside it.
    """

    seeds: tuple[int, ...]
    features_WVD: DoubleArray
    rewards_WV: DoubleArray
    reference_WV: DoubleArray

    def optimum(self, beta: float = BETA) -> DoubleArray:
        """The best that DPO can learn, p0·exp(r/β) normalised, [W, V]. Eq. 4, arXiv:2305.18290."""
        return np.asarray(softmax(self.reference_WV + self.rewards_WV / beta, -1))

    def reward(self, probs: DoubleArray) -> DoubleArray:
        """Expected true reward [..., W] of policies [..., W, V]."""
        return np.asarray((probs * self.rewards_WV).sum(-1))


def draw_worlds(seeds: Sequence[int]) -> Worlds:
    """A geometry for each seed."""
    drawn = [_geometry(seed) for seed in seeds]
    features, rewards, logits = (np.stack(part) for part in zip(*drawn, strict=True))
    return Worlds(tuple(seeds), features, rewards, np.asarray(log_softmax(logits, -1)))


def _geometry(seed: int) -> tuple[DoubleArray, DoubleArray, DoubleArray]:
    """Features [V, D], true rewards [V] and initial logits [V] of a world."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((GOOD + BAD, FEATURES))
    direction = rng.standard_normal(FEATURES)
    direction /= np.linalg.norm(direction)
    good = features[:GOOD]
    rewards = 1.2 * good @ direction + 2.0 * good[:, 0] + 0.3 * rng.standard_normal(GOOD)
    logits = 0.7 * rng.standard_normal(GOOD)
    features[GOOD:] *= 0.3
    features[GOOD:, 0] = 6.0 + rng.random(BAD)
    return (
        features,
        np.concatenate([rewards, np.full(BAD, rewards.min() - 1.0)]),
        np.concatenate([logits, -9.0 + 0.5 * rng.standard_normal(BAD)]),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Completions [L, B] by number; a pair of two identical ones is not learned from."""

    chosen: IntArray
    rejected: IntArray

    @property
    def learn_mask(self) -> BoolArray:
        return np.not_equal(self.chosen, self.rejected)

    def take(self, columns: IntArray) -> Pairs:
        """Of each row its own columns [L, B']."""
        return Pairs(
            np.take_along_axis(self.chosen, columns, 1),
            np.take_along_axis(self.rejected, columns, 1),
        )

    @property
    def bad_mask(self) -> BoolArray:
        """Those learned from that hold one of the bad four."""
        return np.asarray(self.learn_mask & (np.maximum(self.chosen, self.rejected) >= GOOD))


class Policies:
    """Logits log p0 + Fθ + δ of each of L policies, from θ = δ = 0, and their Adam."""

    def __init__(self, features_LVD: DoubleArray, reference_LV: DoubleArray) -> None:
        self._features_LVD = features_LVD
        self._reference_LV = reference_LV
        lanes, completions, features = features_LVD.shape
        self._weights = np.zeros((lanes, features + completions))  # θ, then δ
        self._first_moment = np.zeros_like(self._weights)
        self._second_moment = np.zeros_like(self._weights)
        self._updates = 0

    def _moved(self) -> DoubleArray:
        """Fθ + δ [L, V]: log π − log p0 but for a constant, which a pair's difference drops."""
        theta, delta = np.split(self._weights, [self._features_LVD.shape[2]], axis=1)
        return np.asarray(np.einsum("lvd,ld->lv", self._features_LVD, theta) + delta)

    def probs(self) -> DoubleArray:
        """Probabilities [L, V]."""
        return np.asarray(softmax(self._reference_LV + self._moved(), -1))

    def update(self, pairs: Pairs) -> None:
        """One step of Adam down the mean DPO loss of each policy's own pairs."""
        logits_LV = dpo_gradient(self._moved(), pairs)
        theta_LD = np.einsum("lvd,lv->ld", self._features_LVD, logits_LV)
        gradient = np.concatenate([theta_LD, logits_LV], axis=1)
        self._updates += 1
        first, second = ADAM_BETAS
        self._first_moment += (1.0 - first) * (gradient - self._first_moment)
        self._second_moment += (1.0 - second) * (gradient**2 - self._second_moment)
        mean = self._first_moment / (1.0 - first**self._updates)
        scale = np.sqrt(self._second_moment / (1.0 - second**self._updates)) + ADAM_EPSILON
        self._weights -= LEARNING_RATE * mean / scale


def dpo_gradient(logratios_LV: DoubleArray, pairs: Pairs, beta: float = BETA) -> DoubleArray:
    """∂loss/∂logits [L, V] of the mean DPO loss over each policy's pairs; 0 where it has none.

    ``logratios_LV`` is log π − log π_ref, to which any constant may be added: −β·σ(−βd) goes to
    the chosen's logit and the opposite to the rejected's. Eq. 7, arXiv:2305.18290, differentiated.
    """
    lanes, completions = logratios_LV.shape
    learn_mask = pairs.learn_mask
    chosen, rejected = (
        np.take_along_axis(logratios_LV, side, 1) for side in (pairs.chosen, pairs.rejected)
    )
    count_L1 = np.maximum(learn_mask.sum(1, keepdims=True), 1)
    pull_LB = learn_mask * beta * expit(-beta * (chosen - rejected)) / count_L1
    cells = np.arange(lanes)[:, None] * completions
    gradient = np.zeros(lanes * completions)
    for side, sign in ((pairs.chosen, -1.0), (pairs.rejected, 1.0)):
        gradient += sign * np.bincount((cells + side).ravel(), pull_LB.ravel(), gradient.size)
    return gradient.reshape(lanes, completions)


class Sampler:
    """Draws pairs and their Bradley–Terry labels; the same prompt has the same luck everywhere.

    A draw is a function of world, position in the prompt stream and the policy: so settings differ
    by what they sample from, and by nothing else.
    """

    def __init__(self, worlds: Worlds, prompts: int) -> None:
        self._rewards_WV = worlds.rewards_WV
        # For each prompt: the first completion, the second, the label.
        self._uniforms = [
            np.random.default_rng(derive_seed(seed, "sampling")).random((prompts, 3))
            for seed in worlds.seeds
        ]

    def sample(self, probs_WV: DoubleArray, start: int, prompts: int) -> Pairs:
        """A judged pair for each of these prompts in every world, [W, prompts]."""
        drawn = [
            _judged(uniforms[start : start + prompts], probs_V, rewards_V)
            for uniforms, probs_V, rewards_V in zip(
                self._uniforms, probs_WV, self._rewards_WV, strict=True
            )
        ]
        chosen, rejected = (np.stack(side) for side in zip(*drawn, strict=True))
        return Pairs(chosen, rejected)


def _judged(
    uniforms: DoubleArray, probs_V: DoubleArray, rewards_V: DoubleArray
) -> tuple[IntArray, IntArray]:
    """Chosen and rejected [B] of uniform numbers [B, 3]."""
    cumulative_V = probs_V.cumsum()
    drawn = np.searchsorted(cumulative_V / cumulative_V[-1], uniforms[:, :2], side="right")
    first, second = drawn.T
    first_wins = uniforms[:, 2] < expit(rewards_V[first] - rewards_V[second])
    return np.where(first_wins, first, second), np.where(first_wins, second, first)


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """The policies after ``update`` updates.

    Probabilities [S, W, V]; true reward, judged pairs so far, and those of them that held one of
    the bad four, each [S, W].
    """

    update: int
    probs_SWV: DoubleArray
    reward_SW: DoubleArray
    judged_SW: IntArray
    judged_bad_SW: IntArray

    @property
    def bad_mass(self) -> DoubleArray:
        """Probability of the bad four together, [S, W]."""
        return np.asarray(self.probs_SWV[..., GOOD:].sum(-1))

    @property
    def leaked(self) -> IntArray:
        """Worlds with more than 1 % on the bad four, [S]."""
        return np.asarray((self.bad_mass > 0.01).sum(-1))


def learn(
    worlds: Worlds, settings: Sequence[Setting] = SETTINGS, *, every: int = 16
) -> Iterator[Snapshot]:
    """1024 updates of DPO at each setting of the dial: before the first and after ``every``."""
    shape = (len(settings), len(worlds.seeds))
    policies = Policies(
        np.tile(worlds.features_WVD, (len(settings), 1, 1)),
        np.tile(worlds.reference_WV, (len(settings), 1)),
    )
    sampler = Sampler(worlds, UPDATES * PAIRS_PER_UPDATE)
    feeds = [_Feed(setting, worlds.seeds, sampler) for setting in settings]
    for update in range(UPDATES + 1):
        probs_SWV = policies.probs().reshape(*shape, -1)
        if update % every == 0 or update == UPDATES:
            judged, with_bad = (
                np.stack(counts)
                for counts in zip(
                    *[(feed.judged_W, feed.judged_bad_W) for feed in feeds], strict=True
                )
            )
            yield Snapshot(update, probs_SWV, worlds.reward(probs_SWV), judged, with_bad)
        if update < UPDATES:
            batches = [
                feed.batch(update, probs_WV)
                for feed, probs_WV in zip(feeds, probs_SWV, strict=True)
            ]
            policies.update(
                Pairs(
                    np.concatenate([batch.chosen for batch in batches]),
                    np.concatenate([batch.rejected for batch in batches]),
                )
            )


class _Feed:
    """The pairs of each update at one setting, in the order in which a run learns from them."""

    def __init__(self, setting: Setting, seeds: Sequence[int], sampler: Sampler) -> None:
        self._setting = setting
        self._prompts = setting.updates_per_round * PAIRS_PER_UPDATE
        self._seeds = seeds
        self._sampler = sampler
        nothing = np.zeros((len(seeds), 0), np.int64)
        self._round, self._order_WB = Pairs(nothing, nothing), nothing
        self.judged_W = np.zeros(len(seeds), np.int64)
        self.judged_bad_W = np.zeros(len(seeds), np.int64)

    def batch(self, update: int, probs_WV: DoubleArray) -> Pairs:
        """The pairs [W, B] of this update; a round that begins is sampled from ``probs_WV``."""
        pass_number, in_pass = divmod(update, self._setting.updates_per_round)
        round_number, passed = divmod(pass_number, self._setting.passes)
        if in_pass == 0:
            if passed == 0:
                start = round_number * self._prompts
                self._round = self._sampler.sample(probs_WV, start, self._prompts)
                self.judged_W = self.judged_W + self._round.learn_mask.sum(1)
                self.judged_bad_W = self.judged_bad_W + self._round.bad_mask.sum(1)
            orders = [self._order(seed, round_number, passed) for seed in self._seeds]
            self._order_WB = np.stack(orders)
        first = in_pass * PAIRS_PER_UPDATE
        return self._round.take(self._order_WB[:, first : first + PAIRS_PER_UPDATE])

    def _order(self, seed: int, round_number: int, passed: int) -> IntArray:
        """The first pass in stream order, each later one in an order of its own."""
        if passed == 0:
            return np.arange(self._prompts)
        rng = np.random.default_rng(derive_seed(seed, "pass", round_number, passed))
        return rng.permutation(self._prompts)
