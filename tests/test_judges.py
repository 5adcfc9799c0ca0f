"""What a judge may look like, and how its answer is read."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from textblob import TextBlob
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from judges.build import build_judge
from judges.errors import UserError
from judges.interface import Outcome, Score, Verdict, text_of
from judges.lexicon import polarity, sentiment
from judges.members import MemberOptions, read_member

TEXTS = [
    "I love this, it is wonderful!",
    "The worst, most horrible day of her life.",
    "The door is made of wood.",
    "",
]


@pytest.fixture
def plugin(tmp_path):
    """Write a plug-in file and return its path."""

    def write(source: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(textwrap.dedent(source))
        return str(path)

    return write


def test_sentiment_is_vaders_compound():
    vader = SentimentIntensityAnalyzer()
    expected = [vader.polarity_scores(text)["compound"] for text in TEXTS]
    scores = sentiment(prompts=["p"] * 4, completions=TEXTS)
    assert scores == expected
    assert expected[0] == 0.8478
    assert expected[1] < -0.5
    assert expected[2:] == [0.0, 0.0]


def test_polarity_is_textblobs():
    expected = [TextBlob(text).sentiment.polarity for text in TEXTS]
    scores = polarity(prompts=["p"] * 4, completions=TEXTS)
    assert scores == expected
    assert expected[:2] == [0.75, -0.5]
    assert expected[2:] == [0.0, 0.0]


def test_text_of_chat_is_its_messages_contents():
    chat = [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c"}]
    assert text_of(chat) == "a\nb\nc"
    assert text_of("a") == "a"


@pytest.mark.parametrize("judge", [sentiment, polarity])
def test_lexicons_read_chat_like_text(judge):
    texts = [*TEXTS, "It was\ngood"]
    chat = [[{"role": "assistant", "content": text}] for text in texts]
    scores = judge(prompts=[], completions=chat)
    assert scores == judge(prompts=[], completions=texts)
    assert scores[-1] > 0


def test_importing_judges_loads_no_library():
    program = (
        "import sys, judges.build, judges.lexicon, workers.judge_worker, pipeline.pairing; "
        "print({'torch', 'ray', 'vllm', 'textblob', 'vaderSentiment'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("element", "value"),
    [
        (1, 1.0),
        (-0.25, -0.25),
        (True, 1.0),
        (False, 0.0),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3.0),
        (np.bool_(True), 1.0),
        (np.array(2.0), 2.0),
        (torch.tensor(1.5), 1.5),
        (torch.tensor(1.5, requires_grad=True), 1.5),
        (Score(0.25), 0.25),
        (Score(torch.tensor(2.0)), 2.0),
    ],
)
def test_numbers_are_scores(element, value):
    score = Score.read(element)
    assert score == Score(value, None)
    assert type(score.value) is float


@pytest.mark.parametrize(
    ("element", "reason"),
    [
        (None, "returned None"),
        (float("nan"), "returned NaN"),
        (np.float32("nan"), "returned NaN"),
        (torch.tensor(float("nan")), "returned NaN"),
        (float("inf"), "returned an infinite number"),
        (-float("inf"), "returned an infinite number"),
        (10**400, "returned an infinite number"),
        ("0.7", "returned text"),
        (1j, "returned a complex"),
        (Fraction(1, 2), "returned a Fraction"),
        ([0.7], "returned a list"),
        (np.array([0.7]), "returned a ndarray"),
        (Score(None), "returned None"),
        (Score(float("nan")), "returned NaN"),
        (Score(None, "timed out"), "timed out"),
        (Score(float("nan"), "unparseable"), "unparseable"),
        (Score("7", "said 7"), "said 7"),
    ],
)
def test_anything_else_is_invalid_with_its_reason(element, reason):
    assert Score.read(element) == Score(None, reason)


def test_a_valid_scores_reason_is_kept():
    assert Score.read(Score(3, "polite")) == Score(3.0, "polite")


def test_verdicts_from_probabilities():
    assert Verdict.from_probability(0.8) == Verdict(Outcome.PREFERENCE, 0.8)
    assert Verdict.from_probability(0.5) == Verdict(Outcome.TIE, 0.5)
    assert Verdict.from_probability(float("nan")).outcome is Outcome.INVALID
    assert Verdict.from_probability(0.0).first_better == 1e-6
    assert Verdict.from_probability(1.0).first_better == 1 - 1e-6
    assert Verdict.from_probability(0.75).swapped() == Verdict(Outcome.PREFERENCE, 0.25)
    with pytest.raises(ValueError, match=r"P\(first better\)=1\.5"):
        Verdict.from_probability(1.5)


def test_built_in_by_name():
    judge = build_judge("sentiment", {})
    assert not judge.compares
    assert judge.ask({}, prompts=["p"], completions=[TEXTS[0]]) == [0.8478]


def test_function_gets_its_args_by_keyword(plugin):
    path = plugin(
        """
        def score(prompts, completions, *, weight, bias=0):
            return [weight * len(c) + bias for c in completions]
        """
    )
    judge = build_judge(f"{path}:score", {"weight": 3, "bias": 1})
    assert judge.ask({}, prompts=["p", "p"], completions=["ab", "abcd"]) == [7, 13]


def test_only_the_columns_in_the_signature_are_handed_over(plugin):
    path = plugin(
        """
        def score(completions, answer, hint=None):
            return [f"{c}{a}{hint}" for c, a in zip(completions, answer)]
        """
    )
    judge = build_judge(f"{path}:score", {})
    columns = {"answer": ["1", "2"], "unknown": [0, 0]}
    assert judge.ask(columns, prompts=["p", "q"], completions=["a", "b"]) == ["a1None", "b2None"]


def test_kwargs_take_every_column(plugin):
    path = plugin("def score(completions, **kwargs):\n    return [sorted(kwargs.items())]\n")
    judge = build_judge(f"{path}:score", {})
    returned = judge.ask({"answer": ["1"], "id": [7]}, prompts=["p"], completions=["a"])
    assert returned == [[("answer", ["1"]), ("id", [7]), ("prompts", ["p"])]]


@pytest.mark.parametrize("signature", ["completions, k", "completions, **kwargs"])
def test_an_arg_goes_before_a_column_of_its_name(plugin, signature):
    body = "kwargs['k']" if "kwargs" in signature else "k"
    path = plugin(f"def score({signature}):\n    return [{body}]\n")
    judge = build_judge(f"{path}:score", {"k": "arg"})
    assert judge.ask({"k": ["column"]}, prompts=["p"], completions=["a"]) == ["arg"]


def test_a_column_never_replaces_the_texts(plugin):
    path = plugin("def score(prompts, completions, **kwargs):\n    return [prompts, completions]\n")
    judge = build_judge(f"{path}:score", {})
    columns = {"prompts": ["x"], "completions": ["y"]}
    assert judge.ask(columns, prompts=["p"], completions=["a"]) == [["p"], ["a"]]


def test_class_is_constructed_once_with_its_args(plugin):
    path = plugin(
        """
        built = []

        class Judge:
            def __init__(self, weight, bias=0):
                built.append(weight)
                self.weight = weight

            def score(self, prompts, completions):
                return [self.weight * len(c) + len(built) for c in completions]
        """
    )
    judge = build_judge(f"{path}:Judge", {"weight": 10})
    assert judge.ask({}, prompts=["p"], completions=["ab"]) == [21]
    assert judge.ask({}, prompts=["p"], completions=["abc"]) == [31]


def test_the_shape_is_read_from_the_signature(plugin):
    path = plugin(
        """
        def compare(prompts, first, second, **columns):
            return [0.9]

        def named_otherwise(*, first, second):
            return [0.8]

        class WithCompare:
            def compare(self, prompts, first, second):
                return [0.7]

        class Callable:
            def __call__(self, prompts, completions):
                return [0.6]

        class Both:
            def compare(self, prompts, first, second):
                return [0.5]

            def score(self, prompts, completions):
                return [0.4]
        """
    )
    texts = {"prompts": ["p"], "first": ["a"], "second": ["b"]}
    for name, p in [("compare", 0.9), ("named_otherwise", 0.8), ("WithCompare", 0.7)]:
        judge = build_judge(f"{path}:{name}", {})
        assert judge.compares
        assert judge.ask({}, **texts) == [p]
    for name, score in [("Callable", 0.6), ("Both", 0.4)]:
        judge = build_judge(f"{path}:{name}", {})
        assert not judge.compares
        assert judge.ask({}, prompts=["p"], completions=["a"]) == [score]


def user_error(name, args, key="judge.name"):
    with pytest.raises(UserError) as caught:
        build_judge(name, args, key=key)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_name_tells_the_nearest_and_the_plugin_form():
    message = user_error("sentimnet", {}, key="evaluation.judges")
    assert message.startswith("evaluation.judges=sentimnet: ")
    assert "did you mean sentiment?" in message
    assert "path/to/file.py:name or installed.module:name" in message


def test_args_that_do_not_fit_are_named(plugin):
    path = plugin(
        """
        def score(prompts, completions, weight=1):
            return []

        class Judge:
            def __init__(self, model):
                pass

            def score(self, prompts, completions):
                return []
        """
    )
    unknown = user_error(f"{path}:score", {"wieght": 2})
    assert unknown.startswith("judge.args.wieght: ")
    assert "did you mean weight?" in unknown
    assert user_error(f"{path}:Judge", {"modle": 2}).startswith("judge.args.modle: ")
    assert user_error(f"{path}:Judge", {}).endswith("needs model: give it there")
    assert user_error("sentiment", {"weight": 2}).startswith("judge.args.weight: ")
    assert user_error(f"{path}:score", {"prompts": []}).startswith("judge.args.prompts: ")


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("http", {"url": 3}),
        ("http", {"url": "http://127.0.0.1", "batch_size": "x"}),
        ("http", {"url": "http://127.0.0.1", "headers_env": "x"}),
        ("served_reward_model", {"url": 7, "model": "m"}),
        ("served_reward_model", {"url": "http://127.0.0.1", "model": "m", "api_key_env": 3}),
        ("llm_pairwise", {"template": 3}),
        ("self_rewarding", {"temperature": "x"}),
    ],
)
def test_a_built_in_judges_arg_of_a_wrong_type_is_a_mistake(name, args):
    offered = {"complete": lambda: None, "calls": lambda: None}
    with pytest.raises(UserError, match=rf"^judge\.args: {name}: [^\n]+$"):
        build_judge(name, args, offered=offered)


def test_what_a_plugins_constructor_raises_passes_through(plugin):
    path = plugin("class Judge:\n    def __init__(self):\n        raise TypeError('mine')\n")
    with pytest.raises(TypeError, match=r"^mine$"):
        build_judge(f"{path}:Judge", {})


def test_a_members_client_is_told_like_a_judges():
    def told(client):
        raw = {"name": "llm_pairwise", "client": client}
        with pytest.raises(UserError) as caught:
            read_member(MemberOptions, raw, "members[0]")
        return str(caught.value)

    client = {"kind": "openai", "model": "m"}
    unknown = told({**client, "logprob": True})
    assert unknown.startswith("members[0].client.logprob: unknown key (did you mean logprobs?)")
    assert told({"kind": "openai"}) == "members[0].client.model: missing: give it there"
    assert "secret" not in told({**client, "extra_body": "http://bob:secret@host/v1"})


def test_signatures_that_no_judge_has(plugin):
    path = plugin(
        """
        def texts(texts): ...
        def positional(completions, k, /): ...
        class Neither: ...
        """
    )
    assert "it takes (texts)" in user_error(f"{path}:texts", {})
    assert "positional-only" in user_error(f"{path}:positional", {})
    assert "no method score, compare" in user_error(f"{path}:Neither", {})


def test_a_column_the_prompts_lack_is_named_with_those_they_have(plugin):
    path = plugin("def score(prompts, completions, answer, **kwargs):\n    return []\n")
    judge = build_judge(f"{path}:score", {})
    with pytest.raises(UserError) as caught:
        judge.ask({"answers": [1], "id": [2]}, prompts=["p"], completions=["a"])
    message = str(caught.value)
    assert "needs the column answer, and the prompts have answers, id" in message
    assert "did you mean answers?" in message
    assert "judge.args.answer" in message
