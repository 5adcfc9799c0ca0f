"""Several judges as one: sums of standardised scores, votes, vetoes, and who may say nothing."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from judges.asking import Asker, Question
from judges.budget import BudgetSpent
from judges.completing import Ask, Reply
from judges.desk import Desk
from judges.errors import UserError
from judges.interface import Score
from judges.options import JudgeOptions
from tests.judge_helpers import desk, worker_of
from workers.messages import Completion, Prompt

HERE = "tests.test_ensemble"


def table(completions, values):
    """A judge that scores by a table."""
    return [values[text] for text in completions]


def prefers(first, second, values, first_place=0.0):
    """A judge that compares by a table, and is the fonder of the first the higher that number."""
    return [
        None
        if values[a] is None or values[b] is None
        else 1 / (1 + math.exp(values[b] - values[a] - first_place))
        for a, b in zip(first, second, strict=True)
    ]


def said(completions, values):
    """Whatever the table holds for all of them together."""
    return values


def says(first, second, p):
    return [p] * len(first)


def answer_length(completions, answer):
    return [float(len(text)) for text in answer]


def token_count(completions, completion_ids):
    return [float(len(ids)) for ids in completion_ids]


def first_token(first, second, completion_ids):
    """Prefers the completion with the lower first token."""
    return [0.5 + 0.5 * np.sign(b[0] - a[0]) for a, b in completion_ids]


def member(name: str, values: Any = None, *, of: str = "table", **more: Any) -> dict[str, Any]:
    args = {} if values is None else {"args": {"values": values}}
    return {"name": f"{HERE}:{of}", "alias": name} | args | more


def built(name: str, members: Sequence[Any], **args: Any) -> Asker:
    options = JudgeOptions(name=name, args={"members": members, **args})
    return desk().asker(options)


def scores_of(members: Sequence[Any], texts: Sequence[str]) -> list[Score]:
    asked = [Question("p", (text,), {}) for text in texts]
    return asyncio.run(built("ensemble", members).ask(asked))


def votes_of(
    members: Sequence[Any],
    *pairs: tuple[str, str],
    columns: Mapping[str, Any] | None = None,
    **args,
) -> list[Score]:
    asked = [Question("p", pair, columns or {}) for pair in pairs]
    return asyncio.run(built("vote", members, **args).ask(asked))


def values_of(scores: Sequence[Score]) -> list[float | None]:
    return [score.value for score in scores]


def completion(text: str, ids: Sequence[int] = (1,)) -> Completion:
    return Completion(
        position=0,
        sample=0,
        seed=0,
        version=0,
        ids=np.array(ids),
        logprobs=np.zeros(len(ids), np.float32),
        sampling_logprobs=None,
        finished=True,
        text=text,
    )


LOW_HIGH = member("a", {"a": 0, "b": 0, "c": 2, "d": 2})  # mean 1, std 1: z = −1 −1 1 1
ODD_EVEN = member("b", {"a": 10, "b": 30, "c": 10, "d": 30})  # mean 20, std 10: z = −1 1 −1 1


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((1, 1), [-1, 0, 0, 1]),
        ((1, 3), [-1, 0.5, -0.5, 1]),
        ((-1, 3), [-0.5, 1, -1, 0.5]),
        ((0, 2), [-1, 1, -1, 1]),
    ],
)
def test_a_sum_of_standardised_scores_by_weight(weights, expected):
    members = [m | {"weight": w} for m, w in zip((LOW_HIGH, ODD_EVEN), weights, strict=True)]
    scores = scores_of(members, "abcd")
    assert values_of(scores) == pytest.approx(expected, abs=1e-12)
    assert [score.reason for score in scores] == [
        "a: 0, b: 10",
        "a: 0, b: 30",
        "a: 2, b: 10",
        "a: 2, b: 30",
    ]


def test_every_prompt_of_the_call_counts_for_the_mean():
    worker = worker_of(name="ensemble", args={"members": [ODD_EVEN, LOW_HIGH]})
    prompts = [Prompt(at, np.array([1]), f"p{at}") for at in range(2)]
    groups = [[completion("a"), completion("b")], [completion("c"), completion("d")]]
    judged = worker.judge(prompts, groups, chat=False)
    assert [j.scores.tolist() for j in judged] == [[-1, 0], [0, 1]]


def test_a_call_of_batch_size_is_standardised_by_itself():
    options = JudgeOptions(name="ensemble", args={"members": [LOW_HIGH]}, batch_size=2)
    asked = [Question("p", (text,), {}) for text in "acbd"]
    scores = asyncio.run(desk().asker(options).ask(asked))
    assert values_of(scores) == [-1, 1, -1, 1]
    scores = asyncio.run(desk().asker(options).ask([asked[i] for i in (0, 2, 1, 3)]))
    assert values_of(scores) == [0, 0, 0, 0]


@pytest.mark.parametrize("value", [0.0, 0.1, -1e300, 5e-324])
def test_a_member_whose_scores_are_all_the_same_adds_nothing(value):
    same = member("same", dict.fromkeys("abc", value))
    varied = member("varied", {"a": 1, "b": 2, "c": 3})
    root = math.sqrt(1.5)  # of 1, 2, 3: mean 2, variance 2/3
    scores = scores_of([same, varied], "abc")
    assert values_of(scores) == pytest.approx([-root / 2, 0, root / 2], abs=1e-12)
    assert values_of(scores_of([same], "abc")) == [0, 0, 0]
    assert 0.1 + 0.2 != 0.3
    rounded = member("rounded", {"a": 0.1 + 0.2, "b": 0.3, "c": 0.3})
    assert values_of(scores_of([rounded], "abc")) == [0, 0, 0]


def test_scores_at_the_limits_of_a_double():
    huge = member("huge", {"a": 1.7e308, "b": -1.7e308})
    tiny = member("tiny", {"a": 5e-324, "b": 0.0})
    assert values_of(scores_of([huge], "ab")) == [1, -1]
    assert values_of(scores_of([tiny], "ab")) == [1, -1]


finite = st.floats(-100, 100).map(lambda x: round(x, 3))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_units_of_a_member_and_the_order_of_completions_make_no_difference(data):
    texts = [str(at) for at in range(data.draw(st.integers(1, 6)))]
    one, other = (
        dict(zip(texts, data.draw(st.lists(finite, min_size=6)), strict=False)) for _ in range(2)
    )
    scale, offset = data.draw(st.floats(0.1, 10)), data.draw(st.floats(-10, 10))
    moved = {text: value * scale + offset for text, value in one.items()}
    plain = scores_of([member("a", one), member("b", other)], texts)
    assert values_of(scores_of([member("a", moved), member("b", other)], texts)) == pytest.approx(
        values_of(plain), abs=1e-6
    )
    order = data.draw(st.permutations(range(len(texts))))
    shuffled = scores_of([member("a", one), member("b", other)], [texts[i] for i in order])
    assert shuffled == [plain[i] for i in order]
    if len(texts) > 1:
        assert abs(math.fsum(values_of(plain))) < 1e-9


def test_what_a_member_finds_invalid_is_invalid_and_does_not_count_for_its_mean():
    # mean 3; deviations −2 −2 4; variance 24/3 = 8.
    holey = member("holey", {"a": 1, "b": 1, "c": None, "d": 7})
    scores = scores_of([holey, LOW_HIGH], "abcd")
    assert scores[2] == Score(None, "holey: returned None")
    root = math.sqrt(2)
    expected = [(-1 / root - 1) / 2, (-1 / root - 1) / 2, None, (root + 1) / 2]
    assert [scores[i].value for i in (0, 1, 3)] == pytest.approx(
        [expected[i] for i in (0, 1, 3)], abs=1e-12
    )


def test_a_member_that_fails_fails_all_and_one_that_declines_declines():
    fails = member("fails", 7, of="said")
    declines = member("declines", [Score(None, "skipped", declined=True), 1.0], of="said")
    half = member("half", {"a": float("nan"), "b": 1})
    assert (
        scores_of([LOW_HIGH, fails], "ab")
        == [Score(None, "fails: returned a int for 2 completions")] * 2
    )
    assert scores_of([declines, LOW_HIGH], "ab")[0] == Score(
        None, "declines: skipped", declined=True
    )
    # A failure goes before a refusal, whichever member comes first.
    assert scores_of([declines, half], "ab")[0] == Score(None, "half: returned NaN")
    assert scores_of([half, declines], "ab")[0] == Score(None, "half: returned NaN")


def test_a_veto_puts_a_completion_below_every_other():
    guard = member("guard", {"a": 1, "b": 0.5, "c": 0.4, "d": 0}, veto_below=0.5, weight=0)
    scores = scores_of([LOW_HIGH, guard], "abcd")
    assert values_of(scores) == [-1, -1, -100, -100]
    assert scores[2].reason == "vetoed by guard: 0.4 is below 0.5"
    # Vetoed scores still count for the mean of their member, and INVALID is not vetoed.
    holey = member("holey", {"a": 1, "b": 1, "c": 1, "d": None})
    assert scores_of([guard, holey], "abcd")[3] == Score(None, "holey: returned None")


def test_a_veto_is_below_an_outlier_among_very_many():
    count = 20_001
    texts = [str(at) for at in range(count)]
    values = dict.fromkeys(texts, 1.0) | {"0": 0.0}  # z = −√(n − 1) = −141.42…
    guard = dict.fromkeys(texts, 1.0) | {"1": 0.0}
    scores = scores_of(
        [member("a", values), member("guard", guard, veto_below=0.5, weight=0)], texts
    )
    assert scores[0].value == pytest.approx(-math.sqrt(20_000), rel=1e-9)
    assert scores[1].value == -math.sqrt(20_001)
    assert scores[1].value < scores[0].value


# Votes: a member that scores by a table, one more, and one that compares by its own.
ABC = {"a": 1.0, "b": 2.0, "c": 2.0}
CBA = {"a": 3.0, "b": 2.0, "c": 1.0}


def test_most_members_decide_and_as_many_for_each_is_a_tie():
    up, down = member("up", ABC), member("down", CBA)
    compares = member("compares", {"a": 0, "b": 1, "c": -1}, of="prefers")
    verdicts = votes_of([up, down, compares], ("a", "b"), ("b", "c"), ("a", "c"))
    assert verdicts == [
        Score(0.0, "up: second, down: first, compares: second"),
        Score(1.0, "up: tie, down: first, compares: first"),
        Score(1.0, "up: second, down: first, compares: first"),
    ]
    assert votes_of([up, down], ("a", "b")) == [Score(0.5, "up: second, down: first")]


@pytest.mark.parametrize(("p", "vote"), [(0.51, 1.0), (0.5, 0.5), (0.49, 0.0), (0, 0.0), (1, 1.0)])
def test_a_comparing_member_votes_for_the_likelier(p, vote):
    compares = {"name": f"{HERE}:says", "args": {"p": p}}
    assert values_of(votes_of([compares], ("a", "b"))) == [vote]
    # Asked in the texts' own order, so the same answer is about the other completion.
    assert values_of(votes_of([compares], ("b", "a"))) == [1 - vote]


def test_a_number_that_is_no_probability_is_no_vote():
    compares = {"name": f"{HERE}:says", "alias": "p", "args": {"p": 1.5}}
    assert votes_of([compares], ("a", "b")) == [
        Score(None, "p: returned 1.5: a probability lies in [0, 1]")
    ]


def test_too_little_agreement_abstains():
    members = [member(f"m{at}", values) for at, values in enumerate((ABC, ABC, CBA))]
    [verdict] = votes_of(members, ("a", "b"), min_agreement=0.7)
    said = "m0: second, m1: second, m2: first"
    assert verdict == Score(None, f"abstained: agreement is below 0.7 ({said})", declined=True)
    assert values_of(votes_of(members, ("a", "b"), min_agreement=0.6)) == [0.0]
    # 2 of 3 for b over c are ties: one vote decides, with a third of the members behind it.
    assert values_of(votes_of(members, ("b", "c"), min_agreement=0.3)) == [1.0]
    assert votes_of(members, ("b", "c"), min_agreement=0.4)[0].declined
    # As many for each: nobody voted for the tie.
    assert values_of(votes_of(members[1:], ("a", "b"))) == [0.5]
    assert votes_of(members[1:], ("a", "b"), min_agreement=0.01)[0].declined
    assert values_of(votes_of(members[:2], ("b", "c"), min_agreement=1.0)) == [0.5]


@pytest.mark.parametrize(("agreeing", "count", "share"), [(7, 10, 0.7), (14, 25, 0.56)])
def test_a_share_that_is_just_reached_is_reached(agreeing, count, share):
    members = [member(f"m{at}", ABC if at < agreeing else CBA) for at in range(count)]
    assert values_of(votes_of(members, ("a", "b"), min_agreement=share)) == [0.0]
    assert votes_of(members, ("a", "b"), min_agreement=share + 1e-9)[0].declined


def test_a_preference_against_a_veto_is_no_verdict():
    careful = member("careful", CBA, veto=True)
    others = [member("m0", ABC), member("m1", ABC)]
    against, tie, with_it = votes_of([*others, careful], ("a", "b"), ("b", "b"), ("b", "c"))
    said = "m0: second, m1: second, careful: first"
    assert against == Score(None, f"abstained: vetoed by careful ({said})", declined=True)
    assert tie == Score(0.5, "the same completion twice")
    assert with_it.value == 1.0
    # A tie of its own is no vote against, and a tie of all is no preference to veto.
    indifferent = member("careful", {"a": 0, "b": 0}, veto=True)
    assert values_of(votes_of([*others, indifferent], ("a", "b"))) == [0.0]
    assert values_of(votes_of([others[0], careful], ("a", "b"))) == [0.5]
    assert values_of(
        votes_of([others[0], indifferent | {"args": {"values": ABC}}], ("b", "c"))
    ) == [0.5]


def test_a_member_without_a_verdict_leaves_none():
    holey = member("holey", {"a": None, "b": 1, "c": 1})
    shy = member("shy", [Score(None, "skipped", declined=True), 1.0], of="said")
    votes = [member("m0", ABC), member("m1", ABC), holey]
    assert votes_of(votes, ("a", "b"), ("b", "c")) == [
        Score(None, "holey: returned None"),
        Score(0.5, "m0: tie, m1: tie, holey: tie"),
    ]
    assert votes_of([member("m0", ABC), shy], ("a", "b")) == [
        Score(None, "shy: skipped", declined=True)
    ]
    assert votes_of([shy, holey], ("a", "b")) == [Score(None, "holey: returned None")]
    both = member("both", [Score(None, "skipped", declined=True), None], of="said")
    assert votes_of([both], ("a", "b")) == [Score(None, "both: returned None")]


tables = st.fixed_dictionaries(
    dict.fromkeys("abcd", st.sampled_from([None, -1.0, 0.0, 0.25, 1.0, 3.0]))
)


@settings(max_examples=60, deadline=None)
@given(
    scoring=st.lists(tables, max_size=3),
    comparing=st.lists(st.tuples(tables, st.sampled_from([0.0, 2.0])), min_size=1, max_size=2),
    veto=st.booleans(),
    min_agreement=st.sampled_from([0.0, 0.5, 0.7, 1.0]),
)
def test_swapping_the_completions_swaps_every_verdict(scoring, comparing, veto, min_agreement):
    members = [
        *(member(f"s{at}", values) for at, values in enumerate(scoring)),
        *(
            {
                "name": f"{HERE}:prefers",
                "alias": f"c{at}",
                "args": {"values": values, "first_place": bias},
            }
            for at, (values, bias) in enumerate(comparing)
        ),
    ]
    members[0]["veto"] = veto
    pairs = list(itertools.product("abcd", repeat=2))
    verdicts = votes_of(members, *pairs, min_agreement=min_agreement)
    swapped = votes_of(members, *(pair[::-1] for pair in pairs), min_agreement=min_agreement)
    for pair, one, other in zip(pairs, verdicts, swapped, strict=True):
        assert one.declined == other.declined
        assert (one.value is None) == (other.value is None)
        assert one.value is None or one.value == 1 - other.value
        assert pair[0] != pair[1] or one.value == 0.5


COUNTING = """
from collections import Counter

asked = Counter()

def score(prompts, completions, answer=None):
    asked.update(zip(prompts, completions, answer or completions, strict=True))
    return [float(len(completion)) for completion in completions]

def compare(prompts, first, second):
    asked.update(zip(prompts, first, second, strict=True))
    return [1.0] * len(first)

def asked_so_far(completions):
    return [float(sum(asked.values()))] * len(completions)
"""


@pytest.fixture
def counting(tmp_path: Path) -> str:
    path = tmp_path / "counting.py"
    path.write_text(COUNTING)
    return str(path)


def asked_by(path: str) -> Counter[tuple[str, ...]]:
    from judges.plugins import load_plugin

    return load_plugin(f"{path}:score", key="k").__globals__["asked"]


def test_a_vote_asks_each_distinct_question_once_a_call(counting):
    texts = ["a", "bb", "ccc", "a"]
    questions = [
        Question(prompt, pair, {"answer": "x", "other": at})
        for prompt in ("p", "q")
        for at, pair in enumerate(itertools.combinations(texts, 2))
    ]
    asyncio.run(built("vote", [f"{counting}:score"]).ask(questions))
    distinct = {(prompt, text, "x") for prompt in "pq" for text in texts}
    assert asked_by(counting) == dict.fromkeys(distinct, 1)
    asked_by(counting).clear()
    verdicts = asyncio.run(built("vote", [f"{counting}:compare"]).ask(questions))
    pairs = [("a", "bb"), ("a", "ccc"), ("bb", "ccc")]
    assert asked_by(counting) == {(prompt, *pair): 1 for prompt in "pq" for pair in pairs}
    # It always prefers the text it was shown first: of (bb, a) and (ccc, a) that is the second.
    assert values_of(verdicts[:6]) == [1, 1, 0.5, 1, 0, 0]


def test_the_same_text_with_another_answer_is_another_question(counting):
    questions = [Question("p", ("a", "bb"), {"answer": answer}) for answer in "xy"]
    asyncio.run(built("vote", [f"{counting}:score"]).ask(questions))
    expected = {("p", text, answer) for text in ("a", "bb") for answer in "xy"}
    assert asked_by(counting) == dict.fromkeys(expected, 1)


def test_a_cached_member_is_asked_once_for_ever(counting, tmp_path):
    cached = {"name": f"{counting}:score", "cache": str(tmp_path / "kept.sqlite")}
    questions = [Question("p", (text,), {}) for text in ("a", "bbb")]
    for _ in range(2):
        asker = built("ensemble", [cached])
        assert values_of(asyncio.run(asker.ask(questions))) == [-1, 1]
    assert sum(asked_by(counting).values()) == 2
    assert asker.counts["cached"] == 2
    assert asker.counts["calls"] == 0


def test_what_members_ask_is_counted(counting):
    asker = built("vote", [{"name": f"{counting}:score", "batch_size": 1}])
    asyncio.run(asker.ask([Question("p", ("a", "bbb"), {})]))
    # Each of the two completions in a call of its own; the pair itself is one more question.
    assert {n: asker.counts[n] for n in ("asked", "calls")} == {"asked": 3, "calls": 2}


def test_a_label_budget_counts_a_question_to_an_ensemble_once(tmp_path, counting):
    options = JudgeOptions(
        name="ensemble", args={"members": [f"{counting}:score"]}, budget={"labels": 3}
    )
    asker = desk(tmp_path).asker(options, budget=options.budget)
    ask = [Question("p", (text,), {}) for text in ("a", "bbb")]
    assert values_of(asyncio.run(asker.ask(ask))) == [-1, 1]
    # What was asked before has another score among others: it does not come from a cache.
    longer = [*ask[1:], Question("p", ("ccccc",), {})]
    assert values_of(asyncio.run(asker.ask(longer))) == [-1, 1]
    with pytest.raises(BudgetSpent, match=r"judge\.budget\.labels=3: 3 are spent"):
        asyncio.run(asker.ask([*ask, Question("p", ("dd",), {})]))
    assert sum(asked_by(counting).values()) == 4


def test_members_charge_the_account_of_the_ensemble(tmp_path):
    def build(options, calls, account):
        async def complete(asks: Sequence[Ask]) -> list[Reply]:
            account.check()
            account.charge(tokens=10 * len(asks), usd=0.0)
            return [Reply("Score: 3")] * len(asks)

        return complete

    client = {"kind": "openai", "model": "m"}
    inner = {"name": "self_rewarding", "client": client, "cache": "off"}
    members = [inner, {"name": "length_control", "args": {"judge": inner}}]
    options = JudgeOptions(
        name="ensemble", args={"members": members}, budget={"tokens": 35, "labels": 100}
    )
    asker = Desk(build, tmp_path).asker(options, budget=options.budget)
    [score] = asyncio.run(asker.ask([Question("p", ("a",), {})]))
    assert score.reason == "self_rewarding: 3, length_control: 3"
    [score] = asyncio.run(asker.ask([Question("p", ("b",), {})]))
    with pytest.raises(BudgetSpent, match=r"judge\.budget\.tokens=35: 40 are spent"):
        asyncio.run(asker.ask([Question("p", ("c",), {})]))


def test_an_ensemble_of_a_run_in_object_storage_says_where_its_account_is(tmp_path, counting):
    """Two machines, one account; without a budget an ensemble has no use for a cache."""
    kept = tmp_path / "shared.sqlite"
    ensemble = {"name": "ensemble", "args": {"members": [f"{counting}:score"]}, "cache": str(kept)}
    options = JudgeOptions(**ensemble, budget={"labels": 1})
    one, other = (
        Desk(lambda *_: None, tmp_path / machine, url="s3://bucket/x") for machine in ("a", "b")
    )
    asker = one.asker(options, budget=options.budget)
    assert len(asyncio.run(asker.ask([Question("p", ("a",), {})]))) == 1
    asker = other.asker(options, budget=options.budget)
    with pytest.raises(BudgetSpent, match=r"judge\.budget\.labels=1: 1 are spent"):
        asyncio.run(asker.ask([Question("p", ("b",), {})]))
    unlimited = JudgeOptions(**ensemble)
    with pytest.raises(UserError, match=r"judge\.cache: ensemble asks its members"):
        other.asker(unlimited, budget=unlimited.budget)


TOGETHER = """
import asyncio

both = asyncio.Barrier(2)

async def one(completions):
    await both.wait()
    return [1.0] * len(completions)

async def other(completions):
    await both.wait()
    return [2.0] * len(completions)
"""


@pytest.mark.parametrize("whole", ["ensemble", "vote"])
def test_members_are_asked_at_the_same_time(tmp_path, whole):
    path = tmp_path / "together.py"
    path.write_text(TOGETHER)
    members = [{"name": f"{path}:{name}", "timeout": 30} for name in ("one", "other")]
    texts = ("a",) if whole == "ensemble" else ("a", "b")
    [score] = asyncio.run(built(whole, members).ask([Question("p", texts, {})]))
    assert score.value is not None, score.reason


def test_a_column_that_a_member_needs_is_asked_for_before_anything_is(tmp_path):
    inner = {"name": "ensemble", "args": {"members": [f"{HERE}:answer_length"]}}
    for whole, args in (
        ("ensemble", {"members": ["sentiment", inner]}),
        ("vote", {"members": ["sentiment", inner]}),
        ("length_control", {"judge": inner}),
    ):
        place = "judge" if whole == "length_control" else r"members\[1\]"
        place = rf"judge\.args\.{place}\.args\.members\[0\]"
        line = (
            rf"^{place}\.name={HERE}:answer_length: it needs the column answer, and the prompts "
            rf"have answers \(did you mean answers\?\): add the column, or give "
            rf"{place}\.args\.answer$"
        )
        worker = worker_of(name=whole, args=args)
        lacking = Prompt(0, np.array([1]), "p", {"answers": "x"})
        with pytest.raises(UserError, match=line):
            worker.check([lacking])
        worker.check([Prompt(0, np.array([1]), "p", {"answer": "x"})])


def test_members_read_the_columns_and_the_tokens():
    columns = {"answer": "four"}
    prompt = Prompt(0, np.array([1]), "p", columns)
    group = [completion("a", [5, 6, 7]), completion("b", [3]), completion("b", [4, 4])]
    counts, answers = f"{HERE}:token_count", f"{HERE}:answer_length"
    [judged] = worker_of(name="ensemble", args={"members": [counts, answers]}).judge(
        [prompt], [group], chat=False
    )
    assert judged.reasons[0] == f"{counts}: 3, {answers}: 4"
    assert judged.scores.argsort().tolist() == [1, 2, 0]
    # Of a pair each member is told whose tokens are whose, whatever order it is asked in.
    nested = {"name": "vote", "args": {"members": [f"{HERE}:first_token"]}}
    for members in ([counts], [nested, counts]):
        [judged] = worker_of(name="vote", args={"members": members}).judge(
            [prompt], [group[:2]], chat=False
        )
        assert judged.wins[0, 1] == (1.0 if len(members) == 1 else 0.5)
    [judged] = worker_of(name="vote", args={"members": [f"{HERE}:first_token"]}).judge(
        [prompt], [group[1::-1]], chat=False
    )
    assert judged.wins[0, 1] == 1.0


def test_chat_reaches_the_members():
    prompt = Prompt(0, np.array([1]), [{"role": "user", "content": "p"}])
    group = [completion("I love it"), completion("I hate it")]
    for name, args in (
        ("ensemble", {"members": ["sentiment", "polarity"]}),
        ("vote", {"members": ["sentiment", "polarity"]}),
        ("length_control", {"judge": "sentiment", "slope": 0}),
    ):
        [judged] = worker_of(name=name, args=args).judge([prompt], [group], chat=True)
        assert judged.scores[0] > judged.scores[1]


def test_ensembles_of_ensembles():
    # z of a and b is ±1 whatever they score, so the inner sum is up, and up + up − 3·down = …
    inner = {"name": "ensemble", "args": {"members": [member("up", {"a": 0, "b": 9})]}}
    outer = [inner | {"weight": 1}, member("down", {"a": 2, "b": 1}, weight=3)]
    scores = scores_of(outer, "ab")
    assert values_of(scores) == [0.5, -0.5]
    controlled = {"name": "length_control", "args": {"judge": inner, "slope": 0}}
    votes = [inner, controlled, {"name": "vote", "args": {"members": [member("down", ABC)]}}]
    assert values_of(votes_of(votes, ("a", "b"))) == [0.0]


@pytest.mark.parametrize(
    ("whole", "args", "line"),
    [
        ("ensemble", {}, "judge.args: ensemble needs members: give it there"),
        ("ensemble", {"members": []}, "judge.args.members: must be a list of judges"),
        ("vote", {"members": "sentiment"}, "judge.args.members: must be a list of judges"),
        ("vote", {"members": {"name": "x"}}, "judge.args.members: must be a list of judges"),
        (
            "ensemble",
            {"members": ["polarity", {"name": "sentiment", "weigth": 2}]},
            "judge.args.members[1].weigth: unknown key (did you mean weight?)",
        ),
        (
            "vote",
            {"members": [{"name": "sentiment", "weight": 2}]},
            "judge.args.members[0].weight: unknown key",
        ),
        ("vote", {"members": [{"veto": True}]}, "judge.args.members[0].name: missing"),
        ("vote", {"members": [3]}, "judge.args.members[0]=3: must be a judge's name"),
        (
            "ensemble",
            {"members": [{"name": "sentiment", "weight": "x"}]},
            "judge.args.members[0].weight=x: must be a valid number",
        ),
        (
            "ensemble",
            {"members": [{"name": "sentiment", "veto_below": math.nan}]},
            "judge.args.members[0].veto_below=nan: must be a finite number",
        ),
        (
            "ensemble",
            {"members": [{"name": "sentiment", "weight": 0}, {"name": "polarity", "weight": 0}]},
            "judge.args.members: all weights are 0",
        ),
        (
            "vote",
            {"members": ["sentiment", {"name": "polarity", "alias": "sentiment"}]},
            "judge.args.members[1]: sentiment stands for two members: give one an alias",
        ),
        (
            "ensemble",
            {"members": ["sentimant"]},
            "judge.args.members[0].name=sentimant: no such judge (did you mean sentiment?)",
        ),
        (
            "ensemble",
            {"members": [{"name": "vote", "args": {"members": ["sentiment"]}}]},
            "judge.args.members[0].name=vote: it compares two completions",
        ),
        (
            "length_control",
            {"judge": {"name": "vote", "args": {"members": ["sentiment"]}}},
            "judge.args.judge.name=vote: it compares two completions",
        ),
        (
            "vote",
            {"members": [{"name": "ensemble", "args": {"members": [{"name": "x", "k": 1}]}}]},
            "judge.args.members[0].args.members[0].k: unknown key",
        ),
        (
            "vote",
            {"members": [{"name": "llm_pairwise", "client": {"kind": "openai", "modle": "m"}}]},
            "judge.args.members[0].client.model: missing: give it there\n"
            "judge.args.members[0].client.modle: unknown key",
        ),
        (
            "vote",
            {"members": [{"name": "llm_pairwise", "client": {"kind": "policy"}}]},
            "judge.args.members[0]: client.kind=policy: a member is not given the policy's weights",
        ),
        (
            "vote",
            {"members": [{"name": "llm_pairwise", "client": {"kind": "x"}}]},
            "judge.args.members[0].client: kind must be openai, transformers, vllm or policy",
        ),
        (
            "vote",
            {"members": [{"name": "ensemble", "args": {"members": ["sentiment"]}, "timeout": 3}]},
            "judge.args.members[0].timeout: ensemble asks its members: write it there",
        ),
        (
            "vote",
            {"members": ["sentiment"], "min_agreement": 1.1},
            "judge.args.min_agreement=1.1: write a share from 0 to 1",
        ),
        (
            "vote",
            {"members": ["sentiment"], "min_agreement": True},
            "judge.args.min_agreement=True: write a share from 0 to 1",
        ),
    ],
)
def test_mistakes_say_where_they_are(whole, args, line):
    with pytest.raises(UserError) as caught:
        desk().asker(JudgeOptions(name=whole, args=args))
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value).removeprefix(line)


@pytest.mark.parametrize("knob", ["cache", "calls_per_minute", "concurrency", "retries", "timeout"])
def test_a_knob_of_asking_belongs_to_the_members(knob):
    value = "kept.sqlite" if knob == "cache" else 3
    options = JudgeOptions(name="vote", args={"members": ["sentiment"]}, **{knob: value})
    with pytest.raises(UserError, match=rf"^judge\.{knob}: vote asks its members: write it there"):
        desk().asker(options)
