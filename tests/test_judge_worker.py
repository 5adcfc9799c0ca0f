"""A judge's answer becomes scores, or INVALID with the reason: never a 0 or a coin flip."""

from __future__ import annotations

import textwrap

import numpy as np
import pytest
from pydantic import ValidationError

from judges.errors import UserError
from judges.lexicon import sentiment
from judges.options import JudgeOptions
from tests.judge_helpers import worker_of
from workers.generator import SampledUnit
from workers.judge_worker import JudgeWorker
from workers.messages import Completion, Judgement, Prompt, PromptGroup
from workers.verdicts import JudgeFailed, refuse_invalid_rounds

NAN = float("nan")


def prompt(position: int, content="p", **columns) -> Prompt:
    return Prompt(position, np.array([1]), content, columns)


def completion(text: str, position: int = 0, sample: int = 0) -> Completion:
    return Completion(
        position=position,
        sample=sample,
        seed=0,
        version=0,
        ids=np.array([1]),
        logprobs=np.zeros(1, dtype=np.float32),
        sampling_logprobs=None,
        finished=True,
        text=text,
    )


def completions(*texts: str) -> list[Completion]:
    return [completion(text, sample=sample) for sample, text in enumerate(texts)]


@pytest.fixture
def worker(tmp_path):
    """A worker around the ``judge`` of a plug-in's source."""

    def build(source: str, **args) -> JudgeWorker:
        path = tmp_path / "mine.py"
        path.write_text(textwrap.dedent(source))
        return worker_of(name=f"{path}:judge", args=args)

    return build


def judge(built, *texts: str, **columns) -> Judgement:
    [judgement] = built.judge([prompt(0, **columns)], [completions(*texts)], chat=False)
    return judgement


def test_default_judge_is_sentiment():
    texts = ("I love it", "I hate it")
    judgement = judge(worker_of(), *texts)
    assert judgement.scores.tolist() == sentiment(prompts=[], completions=texts)
    assert judgement.scores[0] > 0 > judgement.scores[1]
    assert judgement.reasons == (None, None)
    assert judgement.wins is None


def test_one_call_for_the_whole_list_with_columns_aligned(worker):
    built = worker(
        """
        def judge(prompts, completions, answer, calls=[]):
            calls.append(1)
            assert prompts == ["two", "two", "three", "three", "three"], prompts
            assert completions == ["a", "b", "c", "d", "e"], completions
            assert answer == [20, 20, None, None, None], answer
            return [float(i + 10 * len(calls)) for i in range(5)]
        """
    )
    judgements = built.judge(
        [prompt(7, "two", answer=20), prompt(9, "three")],
        [completions("a", "b"), completions("c", "d", "e")],
        chat=False,
    )
    assert [j.position for j in judgements] == [7, 9]
    assert [j.scores.tolist() for j in judgements] == [[10, 11], [12, 13, 14]]


def test_trl_reward_functions_run_unchanged(worker):
    # The shape of TRL's GRPO rewards: chat messages, dataset columns, the rest in kwargs.
    built = worker(
        """
        import re

        def judge(completions, ground_truth, **kwargs):
            matches = [re.search(r"<(.*?)>", c[0]["content"]) for c in completions]
            contents = [match.group(1) if match else "" for match in matches]
            return [1.0 if c == gt else 0.0 for c, gt in zip(contents, ground_truth)]
        """
    )
    messages = [{"role": "user", "content": "2+2?"}]
    [judgement] = built.judge(
        [prompt(0, messages, ground_truth="4")], [completions("<4>", "<5>", "4")], chat=True
    )
    assert judgement.scores.tolist() == [1.0, 0.0, 0.0]


def test_chat_form(worker):
    built = worker(
        """
        def judge(prompts, completions):
            assert prompts == [
                [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
                [{"role": "user", "content": "plain"}],
            ], prompts
            assert completions == [
                [{"role": "assistant", "content": "a"}],
                [{"role": "assistant", "content": "b"}],
            ], completions
            prompts[0][0]["content"] = "overwritten"
            return [1, 2]
        """
    )
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    judgements = built.judge(
        [prompt(0, messages), prompt(1, "plain")],
        [completions("a"), completions("b")],
        chat=True,
    )
    assert [j.scores.tolist() for j in judgements] == [[1], [2]]
    assert messages[0]["content"] == "s"


def test_judge_unit_takes_its_form_from_the_prompts(worker):
    built = worker(
        """
        def judge(prompts, completions):
            return [1.0 if isinstance(c, str) and isinstance(p, str) else 2.0
                    for p, c in zip(prompts, completions)]
        """
    )
    sampled = SampledUnit((tuple(completions("a", "b")),), seconds=0.0)
    plain = built.judge_unit([prompt(3, "p")], sampled)
    chat = built.judge_unit([prompt(3, [{"role": "user", "content": "p"}])], sampled)
    assert [j.scores.tolist() for j in plain.judgements] == [[1.0, 1.0]]
    assert [j.scores.tolist() for j in chat.judgements] == [[2.0, 2.0]]
    assert plain.judgements[0].position == 3
    assert 0 < plain.seconds < 60


def test_async_functions(worker):
    built = worker(
        """
        import asyncio

        async def one(c):
            await asyncio.sleep(0)
            return len(c)

        async def judge(completions, **kwargs):
            return await asyncio.gather(*[one(c) for c in completions])
        """
    )
    assert judge(built, "a", "bbb").scores.tolist() == [1, 3]
    assert judge(built, "cc", "d").scores.tolist() == [2, 1]


def test_async_classes_are_constructed_once(worker):
    built = worker(
        """
        built = []

        class judge:
            def __init__(self, k):
                built.append(k)
                self.k = k

            async def score(self, prompts, completions):
                return [self.k * len(c) + len(built) for c in completions]
        """,
        k=10,
    )
    assert judge(built, "a").scores.tolist() == [11]
    assert judge(built, "bb").scores.tolist() == [21]


def test_elements_that_are_no_numbers_are_invalid(worker):
    built = worker(
        """
        from judges.interface import Score

        def judge(completions, **kwargs):
            return [None, float("nan"), float("inf"), "7", True, 0.5, Score(2, "kind"),
                    Score(None, "timed out")]
        """
    )
    judgement = judge(built, *"abcdefgh")
    expected = [NAN, NAN, NAN, NAN, 1.0, 0.5, 2.0, NAN]
    np.testing.assert_array_equal(judgement.scores, expected)
    assert judgement.scores.dtype == np.float64
    assert judgement.reasons == (
        "returned None",
        "returned NaN",
        "returned an infinite number",
        "returned text",
        None,
        None,
        "kind",
        "timed out",
    )


@pytest.mark.parametrize(
    "returned",
    ["np.array([1.5, 2.5], dtype=np.float32)", "torch.tensor([1.5, 2.5])", "(1.5, 2.5)"],
)
def test_arrays_and_tensors_of_scores(worker, returned):
    built = worker(
        f"import numpy as np, torch\ndef judge(completions, **kwargs):\n    return {returned}\n"
    )
    assert judge(built, "a", "b").scores.tolist() == [1.5, 2.5]


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ("[1, 2, 3]", "returned 3 values for 4 completions"),
        ("[1, 2, 3, 4, 5]", "returned 5 values for 4 completions"),
        ("[]", "returned 0 values for 4 completions"),
        ("None", "returned a NoneType for 4 completions"),
        ("3.0", "returned a float for 4 completions"),
        ("'1234'", "returned a str for 4 completions"),
        ("b'1234'", "returned a bytes for 4 completions"),
        ("dict.fromkeys('abcd')", "returned a dict for 4 completions"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_failed_call_makes_every_element_invalid(worker, returned, reason):
    built = worker(f"def judge(completions, **kwargs):\n    return {returned}\n")
    judgements = built.judge(
        [prompt(0), prompt(1)], [completions("a"), completions("b", "c", "d")], chat=False
    )
    assert [len(j.scores) for j in judgements] == [1, 3]
    assert all(np.isnan(j.scores).all() for j in judgements)
    assert [j.reasons for j in judgements] == [(reason,), (reason,) * 3]


def test_an_async_judge_that_raises(worker):
    built = worker("async def judge(completions, **kwargs):\n    raise RuntimeError('30 s')\n")
    judgement = judge(built, "a", "b")
    assert np.isnan(judgement.scores).all()
    assert judgement.reasons == ("RuntimeError: 30 s",) * 2


def test_a_missing_column_is_the_users_mistake(worker):
    built = worker("def judge(prompts, completions, answer):\n    return [1.0]\n")
    with pytest.raises(UserError, match="needs the column answer, and the prompts have question"):
        built.check([prompt(0, question="q")])
    built.check([prompt(0, question="q"), prompt(1, answer="x")])
    assert judge(built, "a", question="q").scores.tolist() == [1.0]  # given as None
    assert judge(built, "a", answer="x").scores.tolist() == [1.0]


def test_a_prompt_without_completions_asks_nothing(worker):
    built = worker("def judge(prompts, completions, missing_column):\n    return []\n")
    [judgement] = built.judge([prompt(0)], [[]], chat=False)
    assert judgement.scores.shape == (0,)


COMPARE_BY_TABLE = """
def judge(prompts, first, second):
    table = {"ab": 0.9, "ac": 0.5, "bc": 0.2, "xy": 0.25}
    assert prompts == ["three"] * 3 + ["two"], prompts
    return [table[a + b] for a, b in zip(first, second)]
"""


def test_comparing_judge_gets_every_pair_once_in_one_call(worker):
    three, two = worker(COMPARE_BY_TABLE).judge(
        [prompt(4, "three"), prompt(5, "two")],
        [completions("a", "b", "c"), completions("x", "y")],
        chat=False,
    )
    # a beats b at .9 and ties with c; b beats c at .2: mean wins .7, (.1 + .2)/2, (.5 + .8)/2.
    np.testing.assert_allclose(
        three.wins, [[NAN, 0.9, 0.5], [0.1, NAN, 0.2], [0.5, 0.8, NAN]], rtol=0, atol=1e-15
    )
    np.testing.assert_allclose(three.scores, [0.7, 0.15, 0.65], rtol=0, atol=1e-15)
    np.testing.assert_array_equal(two.wins, [[NAN, 0.25], [0.75, NAN]])
    assert two.scores.tolist() == [0.25, 0.75]
    assert (three.position, two.position) == (4, 5)


def test_invalid_comparisons_are_left_out_of_the_mean(worker):
    built = worker(
        """
        from judges.interface import Score

        def judge(first, second):
            table = {"ab": None, "ac": Score(1.0, "shorter"), "ad": float("nan"),
                     "bc": 1.5, "bd": -0.1, "cd": 0.25}
            return [table[a + b] for a, b in zip(first, second)]
        """
    )
    judgement = judge(built, *"abcd")
    np.testing.assert_array_equal(
        judgement.wins,
        [[NAN, NAN, 1, NAN], [NAN, NAN, NAN, NAN], [0, NAN, NAN, 0.25], [NAN, NAN, 0.75, NAN]],
    )
    # b has no valid comparison left.
    np.testing.assert_array_equal(judgement.scores, [1.0, NAN, 0.125, 0.75])
    assert judgement.reasons == (
        "against 1: returned None\nagainst 3: returned NaN\nagainst 2: shorter",
        "against 0: returned None\n"
        "against 2: returned 1.5: a probability lies in [0, 1]\n"
        "against 3: returned -0.1: a probability lies in [0, 1]",
        "against 1: returned 1.5: a probability lies in [0, 1]\nagainst 0: shorter",
        "against 0: returned NaN\nagainst 1: returned -0.1: a probability lies in [0, 1]",
    )


def test_a_comparing_judge_that_fails(worker):
    wrong_count = judge(worker("def judge(first, second):\n    return [0.9]\n"), *"abc")
    assert np.isnan(wrong_count.wins).all()
    assert np.isnan(wrong_count.scores).all()
    assert wrong_count.reasons[0] == (
        "against 1: returned 1 values for 3 comparisons\n"
        "against 2: returned 1 values for 3 comparisons"
    )


def test_comparing_judge_in_chat_form(worker):
    built = worker(
        """
        def judge(prompts, first, second):
            assert first == [[{"role": "assistant", "content": "a"}]]
            return [1.0 if second == [[{"role": "assistant", "content": "b"}]] else None]
        """
    )
    [judgement] = built.judge([prompt(0)], [completions("a", "b")], chat=True)
    assert judgement.scores.tolist() == [1.0, 0.0]


def group(scores, wins=None, reason=None, text="once upon a time") -> PromptGroup:
    n = len(scores)
    judgement = Judgement(
        0,
        np.array(scores, dtype=np.float64),
        tuple(reason if np.isnan(s) else None for s in scores),
        None if wins is None else np.array(wins, dtype=np.float64),
    )
    return PromptGroup(prompt(0), tuple(completions(*[text] * n)), judgement, ())


def test_too_many_invalid_scores_stop_the_run():
    groups = [group([1.0, NAN]), group([NAN, NAN], reason="returned\nNone", text="x" * 100)]
    refuse_invalid_rounds(groups, 0.75, "mine")
    with pytest.raises(JudgeFailed) as caught:
        refuse_invalid_rounds(groups[::-1], 0.74, "mine")
    message = str(caught.value)
    assert message.startswith("judge.name=mine: 3 of the round's 4 scores are INVALID")
    assert f"{'x' * 80!r} (returned None)" in message
    assert "judge.max_invalid_share=0.74" in message


def test_no_invalid_score_is_too_many_for_no_share():
    refuse_invalid_rounds([group([1.0, 0.0])], 0.0, "mine")
    refuse_invalid_rounds([], 0.0, "mine")
    with pytest.raises(JudgeFailed, match="1 of the round's 2 scores"):
        refuse_invalid_rounds([group([1.0, NAN])], 0.0, "mine")


def test_of_a_comparing_judge_comparisons_are_counted():
    # One of three comparisons failed; every completion still has a score.
    wins = [[NAN, NAN, 1.0], [NAN, NAN, 0.5], [0.0, 0.5, NAN]]
    groups = [group([1.0, 0.5, 0.25], wins)]
    refuse_invalid_rounds(groups, 0.34, "mine")
    with pytest.raises(JudgeFailed, match="1 of the round's 3 comparisons are INVALID"):
        refuse_invalid_rounds(groups, 0.33, "mine")


def test_options_are_closed_and_frozen():
    with pytest.raises(ValidationError):
        JudgeOptions(nmae="sentiment")
    with pytest.raises(ValidationError):
        JudgeOptions(max_invalid_share=1.5)
    with pytest.raises(ValidationError):
        JudgeOptions().name = "polarity"
    assert all(field.description for field in JudgeOptions.model_fields.values())
