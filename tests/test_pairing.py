"""Who is contrasted with whom, which of the two is chosen, and why a pair is not learned from."""

from __future__ import annotations

import math
import textwrap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from judges.errors import UserError
from judges.interface import Outcome, Verdict
from judges.links import hard as hard_link
from pipeline.pairing import Pairing, PairingOptions
from workers.messages import Completion, Fate, Judgement, Pair, Prompt

NAN = float("nan")


def completion(sample: int, ids, finished: bool) -> Completion:
    return Completion(
        position=0,
        sample=sample,
        seed=0,
        version=0,
        ids=np.array(ids),
        logprobs=np.zeros(len(ids), dtype=np.float32),
        sampling_logprobs=None,
        finished=finished,
        text="",
    )


def pairs_of(
    scores=None,
    *,
    wins=None,
    ids=None,
    finished=None,
    position=0,
    drop_truncated=False,
    run_seed=0,
    **options,
) -> list[Pair]:
    """The pairs of one prompt, whose completions differ and are finished unless told."""
    if wins is not None:
        wins = np.array(wins, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            scores = [np.mean(r[~np.isnan(r)]) if not np.isnan(r).all() else NAN for r in wins]
    n = len(scores)
    ids = [[i] for i in range(n)] if ids is None else ids
    finished = [True] * n if finished is None else finished
    completions = [completion(i, ids[i], finished[i]) for i in range(n)]
    judgement = Judgement(position, np.array(scores, dtype=np.float64), (None,) * n, wins)
    pairing = Pairing(
        PairingOptions(**options), link="hard", drop_truncated=drop_truncated, run_seed=run_seed
    )
    prompt = Prompt(position, np.array([1]), "p")
    return list(pairing.pairs(prompt, completions, judgement))


def wins_of(p: float) -> list[list[float]]:
    return [[NAN, p], [1.0 - p, NAN]]


def only(pairs: list[Pair]) -> tuple[int, int, float, Fate]:
    [pair] = pairs
    return pair.chosen, pair.rejected, pair.label_prob, pair.fate


def test_hard_link():
    assert hard_link(2.0, 1.0) == Verdict(Outcome.PREFERENCE, 1.0)
    assert hard_link(1.0, 2.0) == Verdict(Outcome.PREFERENCE, 0.0)
    assert hard_link(1.0, 1.0) == Verdict(Outcome.TIE, 0.5)
    assert hard_link(NAN, 1.0).outcome is Outcome.INVALID
    assert hard_link(1.0, NAN).outcome is Outcome.INVALID


@pytest.mark.parametrize(
    ("scores", "chosen", "rejected"),
    [
        ([1.0, 2.0], 1, 0),
        ([0.3, -1.0, 0.7, 0.1], 2, 1),
        ([NAN, 2.0, 1.0, 3.0], 3, 2),
        ([2.0, 1.0, 2.0, 1.0], 0, 1),
        ([1.0, 2.0, 2.0, 1.0], 1, 0),
    ],
)
def test_best_worst_takes_the_extremes_and_of_equals_the_lowest_index(scores, chosen, rejected):
    assert only(pairs_of(scores)) == (chosen, rejected, 1.0, Fate.LEARN)


def test_a_hard_label_is_exactly_one():
    assert pairs_of([1.0, 0.0], position=17) == [Pair(17, 0, 1, 1.0, Fate.LEARN)]


def test_all_equal_is_one_tie_between_the_first_two():
    assert only(pairs_of([1.0, 1.0, 1.0])) == (0, 1, 0.5, Fate.TIE)
    assert only(pairs_of([NAN, 1.0, 1.0])) == (1, 2, 0.5, Fate.TIE)


@pytest.mark.parametrize("strategy", ["best_worst", "best_random"])
@pytest.mark.parametrize(
    ("scores", "indices"),
    [([NAN, NAN, NAN], (0, 1)), ([NAN, NAN, 5.0], (2, 0)), ([1.0, NAN], (0, 1))],
)
def test_with_fewer_than_two_valid_scores_one_invalid_pair_is_counted(strategy, scores, indices):
    chosen, rejected, label_prob, fate = only(pairs_of(scores, strategy=strategy))
    assert (chosen, rejected) == indices
    assert math.isnan(label_prob)
    assert fate is Fate.INVALID


@pytest.mark.parametrize("strategy", ["best_worst", "best_random", "random", "all"])
@pytest.mark.parametrize("scores", [[], [1.0], [NAN]])
def test_fewer_than_two_completions_make_no_pair(strategy, scores):
    assert pairs_of(scores, strategy=strategy) == []


def test_best_random_draws_the_others_evenly_from_the_derived_seed():
    def draw(position, run_seed=0):
        return only(
            pairs_of(
                [1.0, NAN, 3.0, 2.0, 0.0],
                strategy="best_random",
                position=position,
                run_seed=run_seed,
            )
        )

    drawn = [draw(position) for position in range(300)]
    assert all(d[0] == 2 and d[2:] == (1.0, Fate.LEARN) for d in drawn)
    counts = np.bincount([d[1] for d in drawn], minlength=5)
    assert counts[1] == counts[2] == 0
    assert counts[[0, 3, 4]].min() > 70  # 100 expected, standard deviation 8
    assert drawn == [draw(position) for position in range(300)]
    assert drawn != [draw(position, run_seed=1) for position in range(300)]


def test_random_pairs_are_drawn_whatever_the_scores():
    def drawn(scores, run_seed=0):
        pairs = [
            only(pairs_of(scores, strategy="random", position=position, run_seed=run_seed))
            for position in range(600)
        ]
        return [frozenset(pair[:2]) for pair in pairs]

    scored = drawn([1.0, 2.0, 3.0, 4.0])
    assert scored == drawn([4.0, NAN, 1.0, 1.0])
    assert scored != drawn([1.0, 2.0, 3.0, 4.0], run_seed=1)
    assert len(set(scored)) == 6
    assert all(len(pair) == 2 for pair in scored)
    assert min(scored.count(pair) for pair in set(scored)) > 60  # 100 expected, deviation 9


def test_a_random_pair_with_an_invalid_completion_is_invalid():
    assert only(pairs_of([1.0, NAN], strategy="random"))[3] is Fate.INVALID
    assert only(pairs_of([1.0, 2.0], strategy="random")) == (1, 0, 1.0, Fate.LEARN)


def test_all_pairs_each_once():
    pairs = pairs_of([1.0, 3.0, NAN, 1.0], strategy="all")
    fates = [(p.chosen, p.rejected, p.fate) for p in pairs]
    assert fates == [
        (1, 0, Fate.LEARN),
        (0, 2, Fate.INVALID),
        (0, 3, Fate.TIE),
        (1, 2, Fate.INVALID),
        (1, 3, Fate.LEARN),
        (2, 3, Fate.INVALID),
    ]


def test_a_comparing_judge_gives_soft_labels():
    wins = [[NAN, 0.9, 0.5], [0.1, NAN, 0.25], [0.5, 0.75, NAN]]
    pairs = pairs_of(wins=wins, strategy="all")
    assert [(p.chosen, p.rejected, p.label_prob, p.fate) for p in pairs] == [
        (0, 1, 0.9, Fate.LEARN),
        (0, 2, 0.5, Fate.TIE),
        (2, 1, 0.75, Fate.LEARN),
    ]


def test_best_worst_of_a_comparing_judge_ranks_by_mean_wins_and_labels_by_the_comparison():
    # Mean wins .7, .175, .625: best 0, worst 1.
    wins = [[NAN, 0.9, 0.5], [0.1, NAN, 0.25], [0.5, 0.75, NAN]]
    assert only(pairs_of(wins=wins)) == (0, 1, 0.9, Fate.LEARN)
    # Mean wins .65, .55, .30 of a judge that is not transitive: best 0, worst 2, yet 2 beats 0.
    wins = [[NAN, 0.9, 0.4], [0.1, NAN, 1.0], [0.6, 0.0, NAN]]
    assert only(pairs_of(wins=wins)) == (2, 0, 0.6, Fate.LEARN)


def test_a_missing_comparison_is_invalid_though_both_have_scores():
    wins = [[NAN, NAN, 1.0], [NAN, NAN, 0.25], [0.0, 0.75, NAN]]
    pairs = pairs_of(wins=wins, strategy="all")
    assert [p.fate for p in pairs] == [Fate.INVALID, Fate.LEARN, Fate.LEARN]


def test_stated_probabilities_are_clipped():
    assert only(pairs_of(wins=wins_of(1.0))) == (0, 1, 1 - 1e-6, Fate.LEARN)
    assert only(pairs_of(wins=wins_of(0.0))) == (1, 0, 1 - 1e-6, Fate.LEARN)


def test_margin_of_scores():
    assert only(pairs_of([1.0, 1.25], min_margin=0.5)) == (1, 0, 1.0, Fate.MARGIN)
    assert only(pairs_of([1.0, 1.5], min_margin=0.5)) == (1, 0, 1.0, Fate.LEARN)
    assert only(pairs_of([1.0, 1.0], min_margin=0.5))[3] is Fate.TIE


def test_margin_of_a_comparing_judge_is_twice_the_distance_from_a_half():
    assert only(pairs_of(wins=wins_of(0.625), min_margin=0.5))[3] is Fate.MARGIN
    assert only(pairs_of(wins=wins_of(0.375), min_margin=0.5))[3] is Fate.MARGIN
    assert only(pairs_of(wins=wins_of(0.75), min_margin=0.5)) == (0, 1, 0.75, Fate.LEARN)
    assert only(pairs_of(wins=wins_of(0.25), min_margin=0.5)) == (1, 0, 0.75, Fate.LEARN)


def test_identical_ids_are_no_pair_whatever_the_judge_says():
    assert only(pairs_of([1.0, 2.0], ids=[[3, 4], [3, 4]]))[3] is Fate.IDENTICAL
    assert only(pairs_of([1.0, 2.0], ids=[[3, 4], [3, 4, 5]]))[3] is Fate.LEARN


@pytest.mark.parametrize("finished", [[False, True], [True, False], [False, False]])
def test_truncated_completions_are_dropped_only_when_asked(finished):
    dropped = pairs_of([1.0, 2.0], finished=finished, drop_truncated=True)
    assert only(dropped) == (1, 0, 1.0, Fate.TRUNCATED)
    assert only(pairs_of([1.0, 2.0], finished=finished)) == (1, 0, 1.0, Fate.LEARN)


def test_a_pair_has_the_first_fate_that_holds():
    alike, cut = [[1], [1]], [False, True]

    def fate(scores, **rest):
        return only(pairs_of(scores, drop_truncated=True, min_margin=5.0, **rest))[3]

    assert fate([NAN, 1.0], ids=alike, finished=cut) is Fate.INVALID
    assert fate([1.0, 1.0], ids=alike, finished=cut) is Fate.IDENTICAL
    assert fate([1.0, 1.0], finished=cut) is Fate.TRUNCATED
    assert fate([1.0, 1.0]) is Fate.TIE
    assert fate([1.0, 2.0]) is Fate.MARGIN
    assert fate([1.0, 6.0]) is Fate.LEARN


scores_ = st.one_of(st.just(NAN), st.floats(allow_nan=False, allow_infinity=False))
probabilities = st.one_of(
    st.just(NAN), st.floats(0.0, 1.0), st.sampled_from([0.5, np.nextafter(0.5, 0), 5e-324])
)
ids_ = st.lists(st.integers(0, 1), min_size=1, max_size=2)
setting = {
    "ids": st.tuples(ids_, ids_),
    "finished": st.tuples(st.booleans(), st.booleans()),
    "drop_truncated": st.booleans(),
    "min_margin": st.sampled_from([0.0, 0.5]),
}


def assert_swapped(pair: Pair, mirrored: Pair) -> None:
    assert mirrored.fate is pair.fate
    np.testing.assert_equal(mirrored.label_prob, pair.label_prob)
    if pair.label_prob > 0.5:
        assert (mirrored.chosen, mirrored.rejected) == (1 - pair.chosen, 1 - pair.rejected)
    else:
        assert pair.fate is not Fate.LEARN


@given(scores=st.tuples(scores_, scores_), rest=st.fixed_dictionaries(setting))
def test_swapping_two_scored_completions_swaps_the_verdict(scores, rest):
    mirror = rest | {key: rest[key][::-1] for key in ("ids", "finished")}
    [pair] = pairs_of(scores, strategy="all", **rest)
    [mirrored] = pairs_of(scores[::-1], strategy="all", **mirror)
    assert_swapped(pair, mirrored)
    if any(math.isnan(score) for score in scores):
        assert pair.fate is Fate.INVALID


@given(p=probabilities, rest=st.fixed_dictionaries(setting))
def test_swapping_two_compared_completions_swaps_the_verdict(p, rest):
    mirror = rest | {key: rest[key][::-1] for key in ("ids", "finished")}
    wins = np.array(wins_of(p))
    [pair] = pairs_of(wins=wins, strategy="all", **rest)
    [mirrored] = pairs_of(wins=wins[::-1, ::-1], strategy="all", **mirror)
    assert_swapped(pair, mirrored)
    if math.isnan(p):
        assert pair.fate is Fate.INVALID


@given(
    scores=st.lists(scores_, min_size=2, max_size=5),
    strategy=st.sampled_from(["best_worst", "best_random", "random", "all"]),
)
def test_what_is_learned_has_two_valid_scores_and_the_higher_is_chosen(scores, strategy):
    pairs = pairs_of(scores, strategy=strategy)
    assert len(pairs) == (len(scores) * (len(scores) - 1) // 2 if strategy == "all" else 1)
    for pair in pairs:
        if pair.fate is Fate.LEARN:
            assert scores[pair.chosen] > scores[pair.rejected]
            assert pair.label_prob == 1.0
        else:
            assert not scores[pair.chosen] > scores[pair.rejected]


@pytest.fixture
def rule(tmp_path):
    """Write a plug-in strategy and return its spec."""

    def write(source: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(textwrap.dedent(source))
        return f"{path}:rule"

    return write


def test_a_plugin_proposes_and_the_verdict_chooses(rule):
    spec = rule(
        """
        def rule(scores, shift, step=1):
            assert scores == [1.0, None, 3.0], scores
            return [(0, shift), (shift - step, shift)]
        """
    )
    pairs = pairs_of([1.0, NAN, 3.0], strategy=spec, args={"shift": 2})
    assert [(p.chosen, p.rejected, p.fate) for p in pairs] == [
        (2, 0, Fate.LEARN),
        (1, 2, Fate.INVALID),
    ]


def test_a_plugin_may_return_numpy_indices(rule):
    spec = rule(
        """
        import numpy as np

        def rule(scores):
            order = np.argsort(scores)
            return np.stack([order[-1:], order[:1]], axis=1)
        """
    )
    assert only(pairs_of([1.0, 0.0, 5.0], strategy=spec)) == (2, 1, 1.0, Fate.LEARN)
    assert type(pairs_of([1.0, 0.0], strategy=spec)[0].chosen) is int


@pytest.mark.parametrize("returned", ["(0, 3)", "(-1, 0)", "(1, 1)"])
def test_a_proposal_that_is_no_pair(rule, returned):
    spec = rule(f"def rule(scores):\n    return [{returned}]\n")
    with pytest.raises(UserError) as caught:
        pairs_of([1.0, 2.0, 3.0], strategy=spec)
    assert str(caught.value).startswith(f"pairing.strategy={spec}: proposed {returned} for 3 ")
    assert "different indices from 0 to 2" in str(caught.value)


@pytest.mark.parametrize("returned", ["None", "[0, 1]", "[(0, 1, 2)]", "[(0.0, 1.0)]", "['ab']"])
def test_proposals_that_are_not_pairs(rule, returned):
    spec = rule(f"def rule(scores):\n    return {returned}\n")
    with pytest.raises(UserError, match="for 3 completions: return a list of pairs"):
        pairs_of([1.0, 2.0, 3.0], strategy=spec)


def test_a_strategy_that_is_not_there_or_takes_other_args(rule):
    with pytest.raises(UserError, match=r"^pairing\.strategy=best_wurst: .*mean best_worst\?"):
        pairs_of([1.0], strategy="best_wurst")
    with pytest.raises(UserError, match=r"^pairing\.args\.k: best_worst takes no arguments"):
        pairs_of([1.0], strategy="best_worst", args={"k": 1})
    spec = rule("def rule(scores, shift):\n    return []\n")
    with pytest.raises(UserError, match=r"^pairing\.args\.shfit: .*did you mean shift\?"):
        pairs_of([1.0], strategy=spec, args={"shfit": 1})
    with pytest.raises(UserError, match=r"^pairing\.args: .* needs shift"):
        pairs_of([1.0], strategy=spec)


def test_options_are_closed_and_frozen():
    with pytest.raises(ValidationError):
        PairingOptions(stratgy="all")
    with pytest.raises(ValidationError):
        PairingOptions(min_margin=-0.1)
    with pytest.raises(ValidationError):
        PairingOptions().strategy = "all"
    assert all(field.description for field in PairingOptions.model_fields.values())


def links(pairs: list[Pair], fate: Fate) -> list[tuple[int, int]]:
    return [(pair.chosen, pair.rejected) for pair in pairs if pair.fate is fate]


def test_a_ranking_is_a_chain_from_the_best():
    found = pairs_of([0.5, 2.0, 1.0, 2.0, NAN, -3.0], strategy="ranking")
    # 1 and 3 are equal: the lower index stands in the chain 1 > 2 > 0 > 5.
    assert links(found, Fate.LEARN) == [(1, 2), (2, 0), (0, 5)]
    assert links(found, Fate.TIE) == [(1, 3)]
    assert links(found, Fate.INVALID) == [(1, 4)]
    assert [pair.label_prob for pair in found[:4]] == [1.0, 1.0, 1.0, 0.5]
    assert links(pairs_of([1.0, 0.0], strategy="ranking"), Fate.LEARN) == [(0, 1)]
    (pair,) = pairs_of([NAN, NAN], strategy="ranking")
    assert pair.fate is Fate.INVALID


def test_a_ranking_has_no_gaps():
    scores = [4.0, 3.0, 2.9, 2.0, 1.0, 0.0]
    found = pairs_of(
        scores,
        strategy="ranking",
        min_margin=0.5,
        finished=[False, True, True, True, False, True],
        ids=[[0], [1], [2], [3], [4], [3]],
        drop_truncated=True,
    )
    # 0 and 4 are truncated, 2 is too near to 1, 5 says what 3 says.
    assert links(found, Fate.LEARN) == [(1, 3)]
    assert links(found, Fate.MARGIN) == [(1, 2)]
    assert sorted(links(found, Fate.TRUNCATED)) == [(0, 1), (3, 4)]
    assert links(found, Fate.IDENTICAL) == [(3, 5)]


def test_a_ranking_of_a_comparing_judge_is_by_mean_wins():
    # 0 wins most on average, though 1 beats it.
    wins = [[0.5, 0.4, 1.0], [0.6, 0.5, 0.6], [0.0, 0.4, 0.5]]
    found = pairs_of(wins=wins, strategy="ranking")
    assert links(found, Fate.LEARN) == [(0, 1), (1, 2)]


@pytest.mark.parametrize("strategy", [{"strategy": "ranking"}, {"strategy": "threshold"}])
@pytest.mark.parametrize("other", [{"ties": "keep"}, {"max_pairs": 2}])
def test_rankings_and_labels_take_neither_ties_nor_a_limit(strategy, other):
    threshold = {"threshold": 0.5} if strategy["strategy"] == "threshold" else {}
    with pytest.raises(ValidationError, match="takes neither ties nor max_pairs"):
        PairingOptions(**strategy, **other, **threshold)


def test_ties_may_be_kept_as_even_chances():
    (pair,) = pairs_of([1.0, 1.0], ties="keep")
    assert (pair.fate, pair.label_prob) == (Fate.LEARN, 0.5)
    (pair,) = pairs_of(wins=[[0.5, 0.5], [0.5, 0.5]], ties="keep", min_margin=0.3)
    assert (pair.fate, pair.label_prob) == (Fate.LEARN, 0.5)
    (pair,) = pairs_of([1.0, 0.9], ties="keep", min_margin=0.3)
    assert (pair.fate, pair.label_prob) == (Fate.LEARN, 0.5)
    (pair,) = pairs_of([1.0, 0.0], ties="keep", ids=[[4], [4]])
    assert (pair.fate, pair.label_prob) == (Fate.LEARN, 0.5)
    (pair,) = pairs_of([1.0, 0.0], ties="keep", finished=[True, False], drop_truncated=True)
    assert pair.fate is Fate.TRUNCATED
    (pair,) = pairs_of([NAN, NAN], ties="keep")
    assert pair.fate is Fate.INVALID


def test_no_more_pairs_than_asked_for_drawn_evenly():
    scores = [1.0, 1.0, 0.0, 0.0]  # right against wrong: four pairs, two ties
    assert len(links(pairs_of(scores, strategy="all"), Fate.LEARN)) == 4
    counts: dict[tuple[int, int], int] = {}
    for position in range(400):
        found = pairs_of(scores, strategy="all", max_pairs=3, position=position)
        assert len(links(found, Fate.TIE)) == 2
        kept = links(found, Fate.LEARN)
        assert len(set(kept)) == 3
        assert kept == sorted(kept)
        for pair in kept:
            counts[pair] = counts.get(pair, 0) + 1
    assert set(counts) == {(0, 2), (0, 3), (1, 2), (1, 3)}
    # 300 each expected; the standard deviation is √(400·¾·¼) ≈ 8.7.
    assert all(abs(count - 300) < 40 for count in counts.values())
    again = [pairs_of(scores, strategy="all", max_pairs=3, position=7) for _ in range(2)]
    assert links(again[0], Fate.LEARN) == links(again[1], Fate.LEARN)


@pytest.mark.parametrize("drop_truncated", [False, True])
def test_a_threshold_labels_completions_one_by_one(drop_truncated):
    options = PairingOptions(strategy="threshold", threshold=0.5, min_margin=0.25)
    pairing = Pairing(options, link="hard", drop_truncated=drop_truncated, run_seed=0)
    scores = [0.75, 0.5, NAN, 0.125, 0.625, 2.0]
    completions = [completion(i, [i], finished=i != 5) for i in range(6)]
    judged = Judgement(0, np.array(scores), (None,) * 6)
    labels = pairing.labels(Prompt(0, np.array([1]), "p"), completions, judged)
    last = Fate.TRUNCATED if drop_truncated else Fate.LEARN
    assert [(label.sample, label.fate) for label in labels] == [
        (0, Fate.LEARN),
        (1, Fate.TIE),
        (2, Fate.INVALID),
        (3, Fate.LEARN),
        (4, Fate.MARGIN),
        (5, last),
    ]
    assert [label.desirable for label in labels if label.sample in (0, 3, 5)] == [True, False, True]
    assert pairing.pairs(Prompt(0, np.array([1]), "p"), completions, judged) == ()
    plain = Pairing(PairingOptions(), link="hard", drop_truncated=False, run_seed=0)
    assert plain.labels(Prompt(0, np.array([1]), "p"), completions, judged) == ()


def test_a_ranking_leaves_out_what_lacks_a_comparison():
    # 0 against 1 failed: 1 is left out, and 0 is ranked by what is left.
    wins = [[NAN, NAN, 0.9], [NAN, NAN, 0.6], [0.1, 0.4, NAN]]
    found = pairs_of(wins=wins, strategy="ranking")
    assert [(p.chosen, p.rejected) for p in found if p.fate is Fate.LEARN] == [(0, 2)]
    assert [(p.chosen, p.rejected, p.fate) for p in found[1:]] == [(0, 1, Fate.INVALID)]
