"""The judges by rule and the small models: what they say of texts whose score is known."""

from __future__ import annotations

import json
import math
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import profanity_check
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from judges.answers import ExactAnswer
from judges.build import build_judge
from judges.errors import UserError
from judges.interface import Score

GSM8K = Path(__file__).parents[2] / "shared/data/gsm8k"
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0}},
    "required": ["age"],
    "additionalProperties": False,
}
RANGES: list[tuple[str, dict[str, Any], float, float]] = [
    ("exact_answer", {}, 0.0, 1.0),
    ("exact_answer", {"pattern": r"(\S+)\s*$"}, 0.0, 1.0),
    ("regex", {"pattern": r"\\boxed|\d"}, 0.0, 1.0),
    ("json_schema", {"schema": {"items": {"multipleOf": 0.5}}}, 0.0, 1.0),
    ("length_window", {"min": 3, "max": 5}, 0.0, 1.0),
    ("length_window", {"max": 5, "unit": "characters"}, 0.0, 1.0),
    ("repetition", {"n": 1}, -1.0, 0.0),
    ("language", {"language": ["en", "zh"]}, 0.0, 1.0),
    ("readability", {}, -math.inf, 121.22),
    ("readability", {"measure": "flesch_kincaid_grade"}, -3.4, math.inf),
    ("profanity", {}, 0.0, 1.0),
]


def ask(name: str, completions: list[Any], columns: Any = None, **args: Any) -> list[Score]:
    judge = build_judge(name, args)
    prompts = ["p"] * len(completions)
    answered = judge.ask(columns or {}, prompts=prompts, completions=completions)
    return [Score.read(score) for score in answered]


def values(name: str, completions: list[Any], columns: Any = None, **args: Any) -> list[Any]:
    return [score.value for score in ask(name, completions, columns, **args)]


def exact(completion: str, answer: Any, **args: Any) -> float | None:
    return values("exact_answer", [completion], {"answer": [answer]}, **args)[0]


def refused(name: str, **args: Any) -> str:
    with pytest.raises(UserError) as caught:
        build_judge(name, args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("#### 42", "42"),
        ("#### 42", 42),
        ("#### 42", 42.0),
        ("6 * 7\n####42.", "He pays.\n#### 42"),
        ("####\n42", "42"),
        ("#### 1 \nNo:\n#### 42 dollars", "42"),
        ("#### 42\n#### Notes\nNone.", "42"),
        ("##### 42", "42"),
        ("#### $1,200.00", "1200"),
        (r"#### \$18 a day", "18"),
        ("#### Lily\nThe end.", "lily"),
        ("#### -$5", "-5"),
        ("#### 12,34", "1234"),
        ("#### .5", "1/2"),
        ("#### 3/4 of it", "0.75"),
        ("#### 7, as 8 is too many", "7"),
        ("#### 50%", r"50\%"),
        ("#### ten  Past  two", "Ten past two"),
        ("#### 10:30", "10:30"),
        (r"\boxed{42}", "42"),
        (r"so \boxed {42} or \boxed{43}", "43"),
        (r"\boxed{43} and #### 42", "42"),
        (r"#### 43 and \boxed{42}", "42"),
        (r"#### \boxed{42}", "42"),
        (r"\boxed{\frac{1}{2}}", "1/2"),
        (r"\boxed{\frac{1}{2}}", 0.5),
        (r"\boxed{-\dfrac12}", "-0.5"),
        (r"\boxed{$\tfrac{1,000}{2}$}", "500"),
        (r"\boxed{1.0}", "1"),
        (r"\boxed{10{,}000}", "10000"),
        (r"\boxed{10\,000}", r"\boxed{10\!000}"),
        (r"\boxed{−3}", "-3"),
        (r"\boxed{\left(1,\, 2\right)}", "(1, 2)"),
        (r"\boxed{(1,2)}", "( 1, 2 )"),
        (r"\boxed{\text{(B)}}", "(b)"),
        (r"\boxed{\sqrt{x^{2}+1}}", r"We find \boxed{\sqrt{x^{2} + 1}}."),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{]1, 2\}}", r"]1,2\}"),
        (r"\boxed{5} then \boxed{6", "5"),
    ],
)
def test_the_same_answer_written_otherwise_is_right(completion: str, answer: Any) -> None:
    assert exact(completion, answer) == 1.0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("#### 42", "43"),
        ("#### 42", "4"),
        ("#### 4.2", "42"),
        ("#### 42\n#### 43", "42"),
        ("#### 10:30", "10"),
        ("#### 10^2", "10"),
        ("#### 1.5.2", "1.5"),
        ("#### 1/0", "1"),
        ("#### 1/2/3", "1/2"),
        (r"\boxed{42} \boxed{}", "42"),
        (r"\boxed{1, 200}", "1200"),
        (r"\boxed{1,2}", "12"),
        (r"\boxed{1 1/2}", "11/2"),
        (r"\boxed{1\frac{1}{2}}", "11/2"),
        (r"\boxed{\frac{1}{0}}", "0"),
        (r"\boxed{x \rightarrow 2}", "x arrow 2"),
        (r"\boxed{1e5}", "100000"),
        (r"\boxed{1e999999999}", "1"),
        ("#### " + "9" * 5000, "9" * 4999),
    ],
)
def test_another_answer_is_wrong(completion: str, answer: Any) -> None:
    assert exact(completion, answer) == 0.0


@pytest.mark.parametrize("completion", ["", "42", "It is 42.", "#### ", r"\boxed{42", "### 42"])
def test_a_completion_without_an_answer_is_wrong(completion: str) -> None:
    scores = ask("exact_answer", [completion], {"answer": ["42"]})
    assert scores == [Score(0.0, "no final answer")]


def test_a_row_without_an_answer_is_invalid() -> None:
    scores = ask("exact_answer", ["#### 1"] * 4, {"answer": [None, " $.", ["1"], "1"]})
    assert scores == [
        Score(None, "the row has no answer"),
        Score(None, "the row has no answer"),
        Score(None, "the row's answer is a list, not text or a number"),
        Score(1.0),
    ]


def test_a_pattern_finds_the_answer_by_its_first_group() -> None:
    pattern = r"Answer: (\w+)|Result: (\w+)"
    assert exact("Answer: A. Answer: b.", "B", pattern=pattern) == 1.0
    assert exact("Answer: A. Answer: b.", "A", pattern=pattern) == 0.0
    assert exact("Answer: A. Result: b.", "A", pattern=pattern) == 1.0
    assert exact("#### A", "A", pattern=pattern) == 0.0
    assert exact("Answer: 1200", "#### 1,200", pattern=pattern) == 1.0
    assert refused("exact_answer", pattern=r"\d+").startswith(r"judge.args.pattern=\d+: it has no ")
    assert refused("exact_answer", pattern="(") == (
        "judge.args.pattern=(: not a regular expression (missing ) at position 1): mend it"
    )


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"no {GSM8K}: it is not part of the repository")
@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_every_gsm8k_answer(split: str, count: int) -> None:
    lines = (GSM8K / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    worked = [json.loads(line)["answer"] for line in lines]
    assert len(worked) == count
    bare = [int(answer.rpartition("####")[2].replace(",", "")) for answer in worked]
    judge = ExactAnswer()
    prompts = [""] * count
    assert judge.score(prompts, worked, worked) == [1.0] * count
    assert judge.score(prompts, worked, bare) == [1.0] * count
    boxed = [rf"It is $\boxed{{{number:,}.0}}$." for number in bare]
    assert judge.score(prompts, boxed, worked) == [1.0] * count
    for other in ([n + 1 for n in bare], [-n - 1 for n in bare], [n * 10 + 1 for n in bare]):
        perturbed = [f"#### {number}" for number in other]
        assert judge.score(prompts, perturbed, worked) == [0.0] * count


@given(st.integers(-(10**9), 10**9), st.integers(0, 4))
def test_a_number_is_itself_however_it_is_written(digits: int, places: int) -> None:
    value = Fraction(digits, 10**places)
    sign = "-" if value < 0 else ""
    whole, rest = divmod(abs(digits), 10**places)
    decimal = f"{sign}{whole:,}." + f"{rest:0{places}d}" * (places > 0)
    fraction = rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    for written in (decimal, f"${decimal}0" if places else decimal, str(value), fraction):
        for answer in (f"#### {written}", rf"\boxed{{{written}}}"):
            assert exact(answer, str(value)) == 1.0
            assert exact(answer, str(value + 1)) == 0.0


def test_a_pattern_is_found_or_not() -> None:
    assert values("regex", ["a1", "a", "\n1", ""], pattern=r"\d") == [1.0, 0.0, 1.0, 0.0]
    assert values("regex", ["Yes", "oh yes"], pattern=r"(?i)\Ayes\Z") == [1.0, 0.0]
    assert refused("regex", pattern=5) == "judge.args.pattern=5: not text: write it in quotes"
    assert refused("regex", pattern="a\n[").startswith("judge.args.pattern=a [: not a regular ")
    assert refused("regex") == "judge.args: regex needs pattern: give it there"
    assert "takes no such argument" in refused("regex", pattern="a", invert=True)


@pytest.mark.parametrize("name", ["regex", "exact_answer"])
def test_a_pattern_that_takes_too_long_is_invalid(name: str) -> None:
    started = time.process_time()
    scores = ask(name, ["a" * 5000 + "!", "aa"], {"answer": ["a"] * 2}, pattern="((a|aa)+)$")
    assert time.process_time() - started < 5
    assert scores[0] == Score(None, "the pattern takes more than 1 s on this completion")
    assert scores[1].value is not None


@pytest.mark.parametrize("as_file", [False, True])
def test_json_is_valid_under_the_schema_or_says_why(tmp_path: Path, as_file: bool) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA), encoding="utf-8")
    valid = [' {"age": 3}\n', '```json\n{"age": 3}\n```', '```\n{"age": 3}```\n']
    invalid = {
        '{"age": -1}': "$.age: -1 is less than the minimum of 0",
        '{"age": "3"}': "$.age: '3' is not of type 'integer'",
        "{}": "$: 'age' is a required property",
        "": "not JSON: Expecting value: line 1 column 1 (char 0)",
        'It is {"age": 3}': "not JSON: Expecting value: line 1 column 1 (char 0)",
        '{"age": NaN}': "not JSON: NaN is no number of JSON",
        '{"age": 1e999}': "not JSON: the number 1e999 is too large",
        "[" * 100_000: "JSON that is nested too deep",
    }
    scores = ask("json_schema", [*valid, *invalid], schema=str(path) if as_file else SCHEMA)
    assert scores == [Score(1.0)] * 3 + [Score(0.0, reason) for reason in invalid.values()]


def test_a_long_reason_is_cut_and_on_one_line() -> None:
    (score,) = ask("json_schema", [json.dumps(["a\n"] * 1000)], schema={"type": "string"})
    assert score.value == 0.0
    assert score.reason is not None
    assert score.reason.startswith("$: ['a")
    assert len(score.reason) == 201
    (digits,) = ask("json_schema", ["1" * 5000], schema={})
    assert digits.value == 0.0


def test_what_a_validator_cannot_check_is_invalid() -> None:
    huge, deep = "1" * 4000, "[" * 400 + "]" * 400
    (overflow,) = ask("json_schema", [huge], schema={"multipleOf": 0.01})
    (recursion,) = ask("json_schema", [deep], schema={"items": {"$ref": "#"}})
    for score, error in ((overflow, "OverflowError"), (recursion, "RecursionError")):
        assert score.value is None
        assert f"cannot be checked: {error}" in str(score.reason)


def test_a_schema_is_checked_at_once_and_nothing_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", unreachable)
    remote = "http://127.0.0.1:9/schema.json"
    hidden = {"$ref": "#/more/0", "more": [{"$ref": remote}]}
    for schema in ({"$ref": remote}, {"items": {"not": {"$ref": remote}}}, hidden):
        assert f"$ref {remote}, and nothing is fetched" in refused("json_schema", schema=schema)
    assert "at $ref #/$defs/b" in refused("json_schema", schema={"$ref": "#/$defs/b", "$defs": {}})
    reason = "$.type: 'text' is not valid under any of the given schemas"
    assert refused("json_schema", schema={"type": "text"}) == (
        f"judge.args.schema: not a JSON Schema ({reason}): mend it"
    )
    assert "is not a 'regex'" in refused("json_schema", schema={"pattern": "("})
    assert "$schema is text" in refused("json_schema", schema={"$schema": 7})
    assert "not a schema" in refused("json_schema", schema=[1])
    missing, broken = tmp_path / "missing.json", tmp_path / "broken.json"
    broken.write_text("{", encoding="utf-8")
    assert "No such file" in refused("json_schema", schema=str(missing))
    assert f"judge.args.schema={broken}: not JSON" in refused("json_schema", schema=str(broken))
    tree = {"$ref": "#/$defs/a", "$defs": {"a": {"properties": {"$ref": {"$ref": "#/$defs/a"}}}}}
    old = {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "minimum": 1,
        "exclusiveMinimum": True,
    }
    assert values("json_schema", ['{"$ref": {}}'], schema=tree) == [1.0]
    assert values("json_schema", ["1", "2"], schema=old) == [0.0, 1.0]


def test_length_is_1_in_the_window_and_falls_off_outside() -> None:
    lengths = [0, 1, 2, 3, 4, 6, 7, 8, 16]
    texts = [" \n".join(["word"] * length) + " " for length in lengths]
    expected = [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 6 / 7, 0.75, 0.375]
    assert values("length_window", texts, min=4, max=6) == expected
    assert values("length_window", texts, min=4) == [0.0, 0.25, 0.5, 0.75] + [1.0] * 5
    assert values("length_window", ["", " ab ", "abcd"], max=2, unit="characters") == [1, 1, 0.5]
    assert refused("length_window") == (
        "judge.args: length_window has no bound: give it min, max or both"
    )
    assert refused("length_window", min=3, max=2).startswith("judge.args.min=3: it is above max=2")
    assert "unit=tokens: no such unit" in refused("length_window", max=2, unit="tokens")
    for wrong in (0, -1, 1.5, True, "3"):
        assert f"judge.args.max={wrong}: not a length" in refused("length_window", max=wrong)


def test_repetition_is_minus_the_share_of_ngrams_seen_before() -> None:
    texts = ["a b c d a b c d", "a b c d\na b  c d a", "a a a a a", "a b c d", "a b c d e", ""]
    assert values("repetition", texts) == [-1 / 5, -2 / 6, -1 / 2, 0.0, 0.0, 0.0]
    assert values("repetition", ["a a a a", "a b a", "a"], n=1) == [-3 / 4, -1 / 3, 0.0]
    assert [math.copysign(1, value) for value in values("repetition", ["", "a b c d e"])] == [1, 1]
    for wrong in (0, True, 2.0):
        assert f"judge.args.n={wrong}: not a number of words" in refused("repetition", n=wrong)


def test_language_is_told_or_declined() -> None:
    german, english = "Das Haus am See ist schön.", "The door is made of wood, I believe."
    japanese, danish = "今日は天気がいいですね", "Det er en hest"
    scores = ask("language", [german, english, japanese, "Hm.", "", "12 + 3 = 15"], language="de")
    assert [score.value for score in scores] == [1.0, 0.0, 0.0, None, None, None]
    assert [score.declined for score in scores] == [False] * 3 + [True] * 3
    assert scores[0].reason == "de 0.98"
    assert str(scores[1].reason).startswith("en 0.9")
    assert str(scores[3].reason).startswith("no language is likely: ")
    asked = values("language", [german, english, japanese], language=["ja", "en"])
    assert asked == [0.0, 1.0, 1.0]
    alone = [ask("language", [danish], language=code)[0] for code in ("da", "no", "nn")]
    assert [score.declined for score in alone] == [True] * 3
    assert values("language", [danish], language=["da", "no", "nn"]) == [1.0]


def test_a_language_that_cannot_be_told_is_refused() -> None:
    assert refused("language", language="xx").startswith(
        "judge.args.language=xx: no such language: write one of ace, af, "
    )
    assert "no such language" in refused("language", language=["de", "zxx"])
    assert 'write "no" in quotes' in refused("language", language=False)
    assert 'write "no" in quotes' in refused("language", language=["de", False])
    assert "judge.args.language=[]" in refused("language", language=[])


@pytest.mark.parametrize(
    ("word", "syllables"),
    [
        ("a", 1),
        ("cake", 1),
        ("table", 2),
        ("agree", 2),
        ("jumped", 1),
        ("played", 1),
        ("wanted", 2),
        ("makes", 1),
        ("boxes", 2),
        ("apples", 2),
        ("you", 1),
        ("beauty", 2),
        ("education", 4),
        ("DON'T", 1),
        ("TV", 1),
    ],
)
def test_syllables(word: str, syllables: int) -> None:
    # One sentence of one word: 206.835 - 1.015 - 84.6 a syllable.
    expected = 205.82 - 84.6 * syllables
    assert values("readability", [word]) == [pytest.approx(expected)]


def test_readability_by_hand() -> None:
    cat = "The cat sat on the mat."  # 6 words, 1 sentence, 6 syllables
    school = 'I agree ("yes!") with him.\n\nEducation, 2.5 times, matters'  # 8, 3, 13
    ease = [206.835 - 1.015 * 6 - 84.6, 206.835 - 1.015 * 8 / 3 - 84.6 * 13 / 8]
    assert values("readability", [cat, school]) == pytest.approx(ease)
    grade = [0.39 * 6 + 11.8 - 15.59, 0.39 * 8 / 3 + 11.8 * 13 / 8 - 15.59]
    measured = values("readability", [cat, school], measure="flesch_kincaid_grade")
    assert measured == pytest.approx(grade)
    silent = Score(None, "there are no words in it", declined=True)
    assert ask("readability", ["", "3 + 4 = 7.", "__"]) == [silent] * 3
    assert refused("readability", measure="smog") == (
        "judge.args.measure=smog: no such measure: "
        "write flesch_reading_ease or flesch_kincaid_grade"
    )


def test_profanity_is_how_clean_a_text_is() -> None:
    texts = ["You are a fucking idiot", "Have a lovely day", ""]
    scores = values("profanity", texts)
    assert scores == [1.0 - p for p in profanity_check.predict_prob(texts)]
    assert scores[0] < 0.01
    assert min(scores[1:]) > 0.9
    assert values("profanity", []) == []


def test_a_missing_profanity_model_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    message = refused("profanity")
    assert message.startswith("judge.name=profanity: alt-profanity-check cannot be loaded (")
    assert message.endswith("): pip install --upgrade alt-profanity-check")


@pytest.mark.filterwarnings("ignore")
def test_a_profanity_model_of_another_scikit_learn_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "profanity_check.py").write_text(
        "import warnings\n"
        "from sklearn.exceptions import InconsistentVersionWarning\n"
        "warnings.warn(InconsistentVersionWarning(\n"
        "    estimator_name='SVC', current_sklearn_version='2', original_sklearn_version='1'))\n"
        "predict_prob = None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "profanity_check")
    assert "SVC from version 1 when using version 2" in refused("profanity")


PIECES = ["####", r"\boxed{", "{", "}", "\\", r"\frac", r"\text{", "1", ",", ".", "/", "$", "\n"]
GARBAGE = st.one_of(
    st.text(st.characters()),
    st.lists(st.sampled_from([*PIECES, "```json\n", "```", "[", "]", "-", "e9", " "])).map("".join),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists, max_leaves=5
    ).map(json.dumps),
)
BUILT = [(build_judge(name, args), low, high) for name, args, low, high in RANGES]


@settings(deadline=None)
@given(st.lists(st.tuples(GARBAGE, GARBAGE), min_size=1, max_size=3))
def test_garbage_gets_a_score_in_range_or_a_reason(pairs: list[tuple[str, str]]) -> None:
    texts, answers = [text for text, _ in pairs], [answer for _, answer in pairs]
    chat = [[{"role": "assistant", "content": text}] for text in texts]
    for judge, low, high in BUILT:
        columns = {"answer": answers}
        scores = judge.ask(columns, prompts=texts, completions=texts)
        assert scores == judge.ask(columns, prompts=texts, completions=chat)
        assert len(scores) == len(texts)
        for score in map(Score.read, scores):
            if score.value is None:
                assert score.reason
                assert not score.reason.startswith("returned ")
            else:
                assert low - 1e-9 <= score.value <= high + 1e-9


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 15_000,
        r"\boxed" + " " * 100_000,
        r"\text{" * 15_000,
        "#" * 100_000,
        "#### " * 20_000,
        "#### 1" + ",1" * 50_000 + ":1",
        "#### " + "1" * 100_000 + ":1",
        "#### " + "1" * 100_000,
        r"\boxed{\frac{1}{" + "9" * 100_000 + "}}",
        "{}" * 50_000,
        "." * 100_000,
        "\n" * 50_000 + " " * 50_000,
        '."' * 50_000,
        "a" * 100_000,
        "```" * 30_000,
        "[" * 100_000,
    ],
    ids=lambda text: text[:10],
)
def test_no_text_is_worth_a_wait(text: str) -> None:
    for judge, _, _ in BUILT:
        started = time.process_time()
        judge.ask({"answer": ["1"]}, prompts=["p"], completions=[text])
        assert time.process_time() - started < 10, judge.name
