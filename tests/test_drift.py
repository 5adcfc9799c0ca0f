"""Drift measures against numbers derived by hand."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipeline.drift import Drift
from pipeline.drift_measures import (
    distinct_ngrams,
    entropy,
    eos_rate,
    kl_per_token,
    kl_to_reference,
    length_mean,
    repetition_rate,
    self_similarity,
)
from workers.messages import Completion, Fate, Judgement, Pair, Prompt, PromptGroup, Round

LN2 = math.log(2)
INDICES = itertools.count()


def completion(
    logprobs: Sequence[float],
    reference: Sequence[float] | None = None,
    ids: Sequence[int] | None = None,
    finished: bool = True,
) -> Completion:
    """A completion with these log-probabilities; its ids are 0, 1, 2, … unless given."""
    return Completion(
        position=0,
        sample=0,
        seed=0,
        version=0,
        ids=np.array(range(len(logprobs)) if ids is None else ids, dtype=np.int64),
        logprobs=np.array(logprobs, dtype=np.float32),
        sampling_logprobs=None,
        finished=finished,
        text="",
        reference_logprobs=None if reference is None else np.array(reference, dtype=np.float32),
    )


def round_of(
    completions: Sequence[Completion],
    version: int = 0,
    scores: Sequence[float] | None = None,
    fates: Sequence[Fate] = (),
    reference_version: int | None = 0,
) -> Round:
    """A round of one prompt, with an index of its own."""
    given = [0.0] * len(completions) if scores is None else scores
    judgement = Judgement(0, np.array(given, dtype=np.float64), (None,) * len(given))
    pairs = tuple(Pair(0, 0, 1, 1.0, fate) for fate in fates)
    prompt = Prompt(0, np.array([1], dtype=np.int64), "")
    group = PromptGroup(prompt, tuple(completions), judgement, pairs)
    index = next(INDICES)
    return Round(index, version, (group,), "judge", {}, reference_version=reference_version)


def prompted(*groups: tuple[int, Sequence[Sequence[int]]]) -> tuple[PromptGroup, ...]:
    """Prompts of one token, each with completions of these ids."""
    return tuple(
        PromptGroup(
            Prompt(position, np.array([token], np.int64), ""),
            tuple(completion([-1.0] * len(ids), ids=ids) for ids in samples),
            Judgement(position, np.zeros(len(samples)), (None,) * len(samples)),
            (),
        )
        for position, (token, samples) in enumerate(groups)
    )


def band_of(drift: Drift) -> tuple[Any, Any]:
    state = drift.state()
    return state["band"], state["reference_version"]


def spoken_by_reference(*means: float) -> list[Completion]:
    """Completions of one token each, with these reference log-probabilities."""
    return [completion([-1.0], [mean]) for mean in means]


# ln(1/2 : 1/4) + ln(1/4 : 1/4) = ln 2 over two tokens, and ln(1/2 : 4) = −3 ln 2 over one (a
# "probability" of 4 keeps the arithmetic in powers of two).
TWO = [
    completion([-LN2, -2 * LN2], [-2 * LN2, -2 * LN2]),
    completion([-LN2], [2 * LN2], finished=False),
]


def test_kl_is_a_mean_over_sequences_and_kl_per_token_over_tokens() -> None:
    assert kl_to_reference(TWO) == pytest.approx((LN2 - 3 * LN2) / 2, abs=1e-6)
    assert kl_per_token(TWO) == pytest.approx((LN2 - 3 * LN2) / 3, abs=1e-6)


def test_entropy_is_a_mean_over_tokens() -> None:
    assert entropy(TWO) == pytest.approx(4 * LN2 / 3, abs=1e-6)


def test_kl_and_entropy_are_exact_when_the_samples_are_the_policy() -> None:
    # π = (3/4, 1/4), reference = (1/2, 1/2): four samples in exactly π's proportions.
    samples = [completion([math.log(0.75)], [-LN2])] * 3 + [completion([math.log(0.25)], [-LN2])]
    exact_entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert entropy(samples) == pytest.approx(exact_entropy, abs=1e-6)
    assert kl_to_reference(samples) == pytest.approx(LN2 - exact_entropy, abs=1e-6)


def test_sums_are_taken_in_float64() -> None:
    # In float32, 2^24 + 1 is 2^24: a long completion's small terms would be lost.
    long = completion([-(2.0**24), -1.0], [0.0, 0.0])
    assert kl_to_reference([long]) == -(2.0**24) - 1
    assert entropy([long]) == (2.0**24 + 1) / 2


def test_one_completion_without_a_reference_leaves_no_kl() -> None:
    mixed = [*TWO, completion([-1.0])]
    assert kl_to_reference(mixed) is None
    assert kl_per_token(mixed) is None


def test_length_counts_tokens_and_eos_rate_completions() -> None:
    assert length_mean(TWO) == 1.5
    assert eos_rate(TWO) == 0.5


@pytest.mark.parametrize(
    ("ids", "rate"),
    [
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),  # 1234 2341 3412 4123 1234: four of five distinct
        ([7] * 5, 1 / 2),
        ([7] * 4, 0.0),
        ([7], 0.0),
        ([1, 2, 3, 4, 5, 6], 0.0),
        ([1, 2, 3, 1, 2, 3, 1], 1 / 4),  # 1231 2312 3123 1231
    ],
)
def test_repetition_of_known_sequences(ids: list[int], rate: float) -> None:
    assert repetition_rate([completion([-1.0] * len(ids), ids=ids)]) == pytest.approx(rate)


def test_repetition_is_a_mean_over_completions_not_over_4_grams() -> None:
    long = completion([-1.0] * 103, ids=range(103))
    looping = completion([-1.0] * 5, ids=[7] * 5)
    assert repetition_rate([long, looping]) == pytest.approx(1 / 4)


# Round 0: −100/8, −99/8, …, 0. Percentiles 1 and 99 of 101 values are the second from either end.
REFERENCE_SAMPLES = spoken_by_reference(*(-i / 8 for i in range(101)))
BAND = [-99 / 8, -1 / 8]


def test_band_is_the_central_98_percent_of_round_0() -> None:
    drift = Drift()
    share = drift.of(round_of(REFERENCE_SAMPLES))["off_reference_share"]
    assert band_of(drift) == (BAND, 0)
    assert share == pytest.approx(2 / 101)


def test_off_reference_counts_both_sides_by_the_mean_token() -> None:
    drift = Drift()
    drift.of(round_of(REFERENCE_SAMPLES))
    later = [
        *spoken_by_reference(BAND[0], BAND[1], -12.5, 0.0),  # on either edge, beyond either
        completion([-1.0, -1.0], [-12.0, -12.0]),  # the sum is beyond, the mean within
        completion([-1.0, -1.0], [-10.0, -10.0]),
        completion([-1.0, -1.0], [-0.125, 0.0]),  # the sum is within, the mean beyond
    ]
    measures = drift.of(round_of(later, version=3))
    assert measures["off_reference_unlikely"] == pytest.approx(1 / 7)
    assert measures["off_reference_likely"] == pytest.approx(2 / 7)
    assert measures["off_reference_share"] == pytest.approx(3 / 7)


def test_band_is_taken_once() -> None:
    drift = Drift()
    drift.of(round_of(REFERENCE_SAMPLES))
    drift.of(round_of(spoken_by_reference(-50.0, -51.0)))  # a second round in flight at version 0
    assert band_of(drift) == (BAND, 0)


def test_band_survives_a_checkpoint() -> None:
    drift, resumed = Drift(), Drift()
    drift.of(round_of(spoken_by_reference(-0.1, -0.3)))
    resumed.load(json.loads(json.dumps(drift.state())))
    assert resumed.state() == drift.state()
    later = round_of(spoken_by_reference(-0.2, -5.0), version=1)
    assert resumed.of(later)["off_reference_share"] == 0.5


def test_without_a_band_there_is_no_share() -> None:
    drift = Drift()
    assert drift.of(round_of(REFERENCE_SAMPLES, version=1))["off_reference_share"] is None
    unscored = round_of([completion([-1.0])], reference_version=None)
    assert drift.of(unscored)["off_reference_share"] is None
    assert band_of(drift) == (None, None)


def test_a_round_without_its_reference_has_no_share_even_with_a_band() -> None:
    drift = Drift()
    drift.of(round_of(REFERENCE_SAMPLES))
    measures = drift.of(round_of([completion([-1.0])], version=1))
    assert measures["off_reference_share"] is None
    assert measures["kl_to_reference"] is None


def test_scores_leave_invalid_ones_out() -> None:
    samples = spoken_by_reference(-1.0, -1.0, -1.0)
    measures = Drift().of(round_of(samples, scores=[1.0, math.nan, 3.0]))
    assert (measures["score_mean"], measures["score_std"]) == (2.0, 1.0)
    nothing = Drift().of(round_of(samples, scores=[math.nan] * 3))
    assert (nothing["score_mean"], nothing["score_std"]) == (None, None)


def test_pairs_are_counted_by_fate() -> None:
    fates = [Fate.LEARN, Fate.TIE, Fate.LEARN, Fate.TIE, Fate.TRUNCATED, Fate.LEARN]
    measures = Drift().of(round_of(TWO, fates=fates))
    assert (measures["prompts"], measures["completions"], measures["pairs"]) == (1, 2, 3)
    dropped = {
        "tie": 2,
        "invalid": 0,
        "unjudged": 0,
        "identical": 0,
        "margin": 0,
        "truncated": 1,
    }
    assert measures["dropped"] == dropped


def test_of_gives_each_measure_of_the_round() -> None:
    measures = Drift().of(round_of(TWO))
    assert measures["kl_to_reference"] == kl_to_reference(TWO)
    assert measures["kl_per_token"] == kl_per_token(TWO)
    assert measures["entropy"] == entropy(TWO)
    assert measures["length_mean"] == 1.5
    assert measures["eos_rate"] == 0.5
    assert measures["repetition_rate"] == 0.0


def test_nothing_is_divided_by_zero() -> None:
    empty = completion([], [])
    for completions, length in (([], None), ([empty], 0.0)):
        measures = Drift().of(round_of(completions))
        assert measures["kl_per_token"] is None
        assert measures["entropy"] is None
        assert measures["off_reference_share"] is None
        assert measures["length_mean"] == length


def test_distinct_ngrams_are_counted_over_the_whole_round() -> None:
    # 1234 2345, 1234: two of three; none reaches from one completion into the next.
    assert distinct_ngrams(
        [completion([-1.0] * len(ids), ids=ids) for ids in ([1, 2, 3, 4, 5], [1, 2, 3, 4])]
    ) == pytest.approx(2 / 3)
    assert distinct_ngrams([completion([-1.0] * 3)] * 2) is None
    assert distinct_ngrams([]) is None


def test_distinct_ngrams_are_those_of_a_set() -> None:
    rng = np.random.default_rng(0)
    # Few tokens, so that 4-grams recur, with ids as large as vocabularies have.
    vocabulary = np.array([0, 1, 65_536, 262_143])
    sequences = [rng.choice(vocabulary, rng.integers(0, 12)).tolist() for _ in range(60)]
    ngrams = [tuple(ids[i : i + 4]) for ids in sequences for i in range(len(ids) - 3)]
    found = distinct_ngrams([completion([-1.0] * len(ids), ids=ids) for ids in sequences])
    assert len(set(ngrams)) < len(ngrams)
    assert found == len(set(ngrams)) / len(ngrams)


def test_prompts_that_get_the_same_words_lower_distinct_ngrams_but_repeat_nothing() -> None:
    same = [completion([-1.0] * 8)] * 4
    assert repetition_rate(same) == 0.0
    assert distinct_ngrams(same) == 5 / 20


def test_self_similarity_is_of_completions_of_different_prompts() -> None:
    groups = prompted(
        (7, [[1, 2, 3], [1, 2, 3]]),  # 12 23, twice: not compared with each other
        (8, [[1, 2, 4]]),  # 12 24: one shared of three with each of them
        (8, [[1, 2, 4]]),  # the same prompt again, not compared with the one before
        (9, [[5]]),  # no 2-gram
    )
    assert self_similarity(groups) == pytest.approx(1 / 3)
    apart = prompted((7, [[1, 2, 3]]), (8, [[1, 2, 3]]), (9, [[4, 5]]))
    assert self_similarity(apart) == pytest.approx((1 + 0 + 0) / 3)
    assert self_similarity(prompted((7, [[1, 2], [1, 2]]))) is None


def test_self_similarity_compares_each_prompts_first_completions() -> None:
    many = prompted((7, [[1, 2]] * 64), (8, [[1, 2]] * 32 + [[3, 4]] * 32))
    assert self_similarity(many) == 1.0
    others_first = prompted((7, [[1, 2]] * 64), (8, [[1, 2]] * 31 + [[3, 4]] * 33))
    assert self_similarity(others_first) == 31 / 32


def test_length_is_measured_in_lengths_of_the_references_samples() -> None:
    drift = Drift()
    assert drift.of(round_of(TWO))["length_ratio"] == 1.0  # (2 + 1) / 2 tokens
    longer = [completion([-1.0] * 3, [-1.0] * 3)]
    assert drift.of(round_of(longer, version=1))["length_ratio"] == 2.0
    other = round_of(longer, version=5, reference_version=4)
    assert drift.of(other)["length_ratio"] is None
    assert Drift().of(round_of(longer, version=1))["length_ratio"] is None


SAMPLE_MEASURES = (
    *("score_mean", "score_std", "kl_to_reference", "kl_per_token", "entropy", "length_mean"),
    *("length_ratio", "eos_rate", "off_reference_unlikely", "off_reference_likely"),
    *("off_reference_share", "repetition_rate", "distinct_ngrams", "self_similarity"),
)


def test_a_given_round_has_counts_and_no_samples() -> None:
    drift = Drift()
    drift.of(round_of(REFERENCE_SAMPLES))
    samples = [completion([-1.0] * 4, [-1.0] * 4)] * 2
    given = replace(round_of(samples, scores=[1, 2], fates=[Fate.LEARN, Fate.TIE]), given=True)
    measures = drift.of(given)
    assert {name: measures[name] for name in SAMPLE_MEASURES} == dict.fromkeys(SAMPLE_MEASURES)
    assert (measures["prompts"], measures["completions"], measures["pairs"]) == (1, 2, 1)
    assert measures["dropped"]["tie"] == 1


def test_a_given_round_is_no_sample_of_the_reference() -> None:
    drift = Drift()
    drift.of(replace(round_of(REFERENCE_SAMPLES), given=True))
    assert band_of(drift) == (None, None)
    assert drift.of(round_of(TWO, version=1))["length_ratio"] is None


def test_a_rounds_panel_stays_what_it_was_when_the_round_began() -> None:
    drift, resumed = Drift(), Drift()
    round_ = round_of(TWO, scores=[1.0, 4.0], fates=[Fate.LEARN])
    round_ = replace(round_, judging={"tie_rate": 0.25, "flip_rate": None})
    panel = drift.of(round_)
    resumed.load(json.loads(json.dumps(drift.state())))
    changed = replace(round_of([]), index=round_.index)  # so that a second look would differ
    assert resumed.of(changed) == drift.of(changed) == panel
    assert panel["score_mean"] == 2.5
    assert panel["judging"] == {"tie_rate": 0.25, "flip_rate": None}
    assert resumed.of(round_of([]))["score_mean"] is None


def test_a_checkpoint_from_before_a_panel_was_kept_is_taken_up() -> None:
    drift = Drift()
    drift.load({"band": BAND, "reference_version": 0})
    later = drift.of(round_of(spoken_by_reference(-1.0, -20.0), version=1))
    assert (later["off_reference_share"], later["length_ratio"]) == (0.5, None)


# A world of three words, of which the reference says one once in a hundred thousand times.
WORLD = {"plain": 0.7, "good": 0.29999, "hack": 1e-5}
TASTE = {"plain": 0.0, "good": 1.0, "hack": -1.0}


def spoken(policy: dict[str, float], version: int) -> Round:
    """1000 samples in exactly the policy's proportions."""
    words = [word for word, prob in policy.items() for _ in range(round(1000 * prob))]
    samples = [
        completion([math.log(policy[word])], [math.log(WORLD[word])], [list(WORLD).index(word)])
        for word in words
    ]
    return round_of(samples, version, scores=[TASTE[word] for word in words])


def test_a_leak_shows_while_the_mean_score_still_rises() -> None:
    drift = Drift()
    before = drift.of(spoken({"plain": 0.7, "good": 0.3}, version=0))
    sound = drift.of(spoken({"plain": 0.5, "good": 0.5}, version=1))
    leaking = drift.of(spoken({"plain": 0.47, "good": 0.5, "hack": 0.03}, version=2))
    assert before["off_reference_unlikely"] == sound["off_reference_unlikely"] == 0.0
    assert leaking["off_reference_unlikely"] == pytest.approx(0.03)
    assert leaking["off_reference_likely"] == 0.0
    assert before["score_mean"] == pytest.approx(0.3)
    assert leaking["score_mean"] == pytest.approx(0.47)


def test_the_the_the_is_too_likely() -> None:
    drift = Drift()
    drift.of(round_of(spoken_by_reference(*(-1 - i / 50 for i in range(101)))))
    # "the" comes as a surprise once, and then the reference expects nothing else: −2.35/8 a token.
    the = completion([-0.01] * 8, [-2.0, *[-0.05] * 7], ids=[5] * 8)
    prose = completion([-1.0] * 8, [-2.0] * 8)
    measures = drift.of(round_of([the, *[prose] * 4], version=3))
    assert measures["off_reference_likely"] == 0.2
    assert measures["off_reference_unlikely"] == 0.0
    assert measures["repetition_rate"] == pytest.approx((1 - 1 / 5) / 5)
