"""A classifier's score of a completion is what transformers says of that one sequence."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from judges.build import build_judge
from judges.errors import UserError
from judges.interface import Score
from judges.pretrained import batches_by_tokens
from judges.reward_model import RewardModel
from tests import tiny
from tests.classifier_helpers import DECODERS, LETTERS, POSITIONS, TEMPLATE, direct, save_classifier

NO_PAD, EOS_PADS, UNKNOWN_PADS, NOT_A_TOKEN = None, 2, 0, -1
CLASSIFIERS = [
    *((family, pad) for family in DECODERS for pad in (NO_PAD, EOS_PADS)),
    ("llama", UNKNOWN_PADS),
    ("llama", NOT_A_TOKEN),
    ("bert", None),
    ("roberta", None),
]
SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "[PAD]", "[SEP]"]
"""Words that some of the tokenizers read as special tokens, the others as unknown words."""

words = st.lists(st.sampled_from(LETTERS + SPECIAL), max_size=18).map(" ".join)
items = st.lists(st.tuples(words, words), min_size=1, max_size=9)
sizes = st.integers(1, 250)

scored = pytest.approx
EXACT = {"abs": 1e-5, "rel": 0.0}


def values(scores: list[Score]) -> list[float | None]:
    return [score.value for score in scores]


def chat(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Where a classifier lies that was made as asked for; made once."""
    made: dict[str, Path] = {}

    def save(family: str, **options) -> Path:
        key = json.dumps([family, options])
        if key not in made:
            made[key] = save_classifier(tmp_path_factory.mktemp(family), family, **options)
        return made[key]

    return save


@pytest.fixture(scope="module")
def judges(classifier):
    """The judge of each of the classifiers, with where it lies; loaded once."""
    loaded: dict[tuple[str, int | None, bool], tuple[RewardModel, Path]] = {}

    def judge(family: str, pad: int | None, template: bool = False) -> tuple[RewardModel, Path]:
        key = family, pad, template
        if key not in loaded:
            directory = classifier(family, pad=pad, template=template)
            loaded[key] = RewardModel(str(directory)), directory
        return loaded[key]

    return judge


@pytest.mark.parametrize(("family", "pad"), CLASSIFIERS)
@settings(max_examples=40, deadline=None)
@given(items=items, size=sizes)
def test_texts_score_as_alone(judges, family, pad, items, size):
    judge, directory = judges(family, pad)
    judge._tokens_per_batch = size
    scores = judge.score([p for p, _ in items], [c for _, c in items])
    assert values(scores) == [scored(direct(directory, p + c)[0], **EXACT) for p, c in items]


@pytest.mark.parametrize(("family", "pad"), CLASSIFIERS)
@settings(max_examples=25, deadline=None)
@given(items=items, size=sizes)
def test_chats_score_as_alone_whether_they_come_as_chats_or_as_texts(
    judges, family, pad, items, size
):
    judge, directory = judges(family, pad, template=True)
    judge._tokens_per_batch = size
    expected = [scored(direct(directory, messages=chat(*i))[0], **EXACT) for i in items]
    prompts, completions = zip(*items, strict=True)
    assert values(judge.score(prompts, completions)) == expected
    as_chats = [chat(p) for p in prompts], [chat("", c)[1:] for c in completions]
    assert values(judge.score(*as_chats)) == expected


@pytest.mark.parametrize("family", ["bert", "roberta"])
@settings(max_examples=40, deadline=None)
@given(items=items, size=sizes)
def test_pairs_score_as_alone(classifier, family, items, size):
    directory = classifier(family)
    judge = RewardModel(str(directory), format="pair", tokens_per_batch=size)
    expected = [scored(direct(directory, p, c)[0], **EXACT) for p, c in items]
    prompts, completions = zip(*items, strict=True)
    assert values(judge.score(prompts, completions)) == expected
    assert values(judge.score([chat(p) for p in prompts], completions)) == expected


def test_the_second_of_a_pair_is_of_another_type(classifier):
    judge = RewardModel(str(classifier("bert")), format="pair")
    encoded = judge._encode("a b", "c")
    assert encoded["input_ids"] == [1, 4, 5, 2, 6, 2]
    assert encoded["token_type_ids"] == [0, 0, 0, 0, 1, 1]


def test_a_pair_is_not_its_joined_text(classifier):
    directory = classifier("bert")
    [pair] = values(RewardModel(str(directory), format="pair").score(["a b "], ["c"]))
    [text] = values(RewardModel(str(directory)).score(["a b "], ["c"]))
    assert pair != scored(text, abs=1e-3)


def test_an_eos_at_the_end_is_read_unless_the_model_takes_it_for_padding(judges):
    """What the same weights say of a text and of the text with its EOS."""
    says = {}
    for pad in (NO_PAD, EOS_PADS):
        judge, _ = judges("llama", pad)
        says[pad] = values(judge.score(["a b"] * 3, [" c", " c </s>", " c d e f </s>"]))
    assert says[EOS_PADS][0] == scored(says[EOS_PADS][1], **EXACT)
    assert says[NO_PAD][0] == scored(says[EOS_PADS][0], **EXACT)
    assert abs(says[NO_PAD][0] - says[NO_PAD][1]) > 1e-2


def test_format_text_leaves_a_template_aside(classifier):
    directory = classifier("llama", template=True)
    judge = RewardModel(str(directory), format="text")
    assert values(judge.score(["a b "], ["c"])) == [scored(direct(directory, "a b c")[0], **EXACT)]
    said = values(judge.score([chat("a b")], [chat("", "c")[1:]]))
    assert said == [scored(direct(directory, "a b\nc")[0], **EXACT)]


def test_conversations_of_several_turns(judges):
    judge, directory = judges("qwen2", NO_PAD, template=True)
    messages = chat("a", "b c", "d e f", "g")
    [said] = values(judge.score([messages[:3]], [messages[3:]]))
    assert said == scored(direct(directory, messages=messages)[0], **EXACT)


def test_what_the_template_refuses_is_invalid_alone(judges):
    judge, directory = judges("llama", NO_PAD, template=True)
    system = [{"role": "system", "content": "a"}]
    refused, said = judge.score([system, chat("a")], ["b", "b"])
    assert refused == Score(None, "the chat template refuses it: no system prompts")
    assert said.value == scored(direct(directory, messages=chat("a", "b"))[0], **EXACT)


def test_a_label_s_score_is_its_log_odds(classifier):
    directory = classifier("bert", labels=["bad", "fair", "good"])
    texts = ["a b c", "d", "e f"]
    for label, index in (("good", 2), ("bad", 0), (1, 1)):
        judge = RewardModel(str(directory), label=label)
        expected = []
        for text in texts:
            p = torch.tensor(direct(directory, text), dtype=torch.float64).softmax(-1)[index]
            expected.append(scored(float(torch.log(p / (1 - p))), **EXACT))
        assert values(judge.score([""] * 3, texts)) == expected


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_an_output_among_independent_ones_is_the_score_itself(classifier, kind):
    directory = classifier("llama", labels=["kind", "true"], problem_type=kind)
    judge = RewardModel(str(directory), label="true")
    assert values(judge.score([""], ["a b"])) == [scored(direct(directory, "a b")[1], **EXACT)]


def shapes_of(judge: RewardModel) -> list[tuple[int, int]]:
    """(rows, tokens) of every batch that the judge gives to its model from now on."""
    seen = []

    def note(_, args, inputs):
        seen.append(tuple(inputs["input_ids"].shape))

    judge._model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.parametrize("pad", [NO_PAD, EOS_PADS])
def test_batches_hold_as_many_tokens_as_they_may(classifier, pad):
    judge = RewardModel(str(classifier("llama", pad=pad)), tokens_per_batch=24)
    seen = shapes_of(judge)
    lengths = [4, 9, 2, 30, 4, 5, 2, 2, 2]  # one more with the BOS
    judge.score([""] * 9, [" ".join("a" * n) for n in lengths])
    assert seen == [(1, 31), (2, 10), (4, 5), (2, 3)]


def test_sequences_that_end_with_every_token_there_is(judges):
    """No id is left to pad with for all of them at once."""
    judge, directory = judges("llama", NO_PAD)
    judge._tokens_per_batch = 10**6
    texts = [f"{'a ' * (i % 5)}{word}" for i, word in enumerate(tiny.WORDS)]
    expected = [scored(direct(directory, text)[0], **EXACT) for text in texts]
    assert values(judge.score([""] * len(texts), texts)) == expected


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 120), st.integers(1, 8))
def test_every_sequence_is_in_one_batch_within_the_limits(lengths, tokens, most_rows):
    batches = list(batches_by_tokens(lengths, tokens, most_rows))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= most_rows
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= tokens
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize(
    ("family", "least"), [("gpt2", 1), ("llama", 1), ("bert", 2), ("roberta", 2)]
)
def test_too_long_is_invalid_and_never_cut(judges, family, least):
    judge, directory = judges(family, NO_PAD)
    fits = " ".join("a" * (POSITIONS - least))
    scores = judge.score(["", "", "b "], [fits, fits + " a", fits])
    assert scores[0].value == scored(direct(directory, fits)[0], **EXACT)
    reason = f"{POSITIONS + 1} tokens: the model takes {POSITIONS}"
    assert scores[1:] == [Score(None, reason)] * 2


def test_a_tokenizer_saved_with_truncation_and_padding_does_neither(classifier, tmp_path):
    directory = Path(shutil.copytree(classifier("bert"), tmp_path / "model"))
    path = directory / "tokenizer.json"
    saved = json.loads(path.read_text())
    saved["truncation"] = {
        "direction": "Right",
        "max_length": 5,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    saved["padding"] = {
        "strategy": {"Fixed": 40},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    path.write_text(json.dumps(saved))
    judge = RewardModel(str(directory))
    seen = shapes_of(judge)
    texts = ["a b c d e f g", "a"]
    expected = [scored(direct(classifier("bert"), text)[0], **EXACT) for text in texts]
    assert values(judge.score(["", ""], texts)) == expected
    assert seen == [(2, 9)]


def test_the_tokenizer_s_maximum_holds_unless_another_is_given(classifier, tmp_path):
    directory = Path(shutil.copytree(classifier("llama"), tmp_path / "model"))
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 6}))
    texts = [" ".join("a" * n) for n in (5, 6, 9, POSITIONS)]

    def reasons(**options):
        scores = RewardModel(str(directory), **options).score([""] * 4, texts)
        assert [score.value is None for score in scores] == [bool(s.reason) for s in scores]
        return [score.reason for score in scores]

    assert reasons() == [None, *(f"{n} tokens: the model takes 6" for n in (7, 10, POSITIONS + 1))]
    assert reasons(max_length=9) == [
        None,
        None,
        *(f"{n} tokens: the model takes 9" for n in (10, POSITIONS + 1)),
    ]
    beyond = f"{POSITIONS + 1} tokens: the model takes {POSITIONS}"
    assert reasons(max_length=10**6) == [None, None, None, beyond]


def test_no_tokens_are_invalid(judges, classifier, tmp_path):
    directory = Path(shutil.copytree(classifier("llama"), tmp_path / "model"))
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ messages[1]['content'] }}"
    tokenizer.save_pretrained(directory)
    assert RewardModel(str(directory)).score(["a", "a"], ["", "b"])[0] == Score(None, "no tokens")


def test_a_token_that_the_model_does_not_know_is_invalid_alone(classifier, tmp_path):
    directory = Path(shutil.copytree(classifier("llama"), tmp_path / "model"))
    tiny.tokenizer([*tiny.WORDS, "new"]).save_pretrained(directory)
    new, old = RewardModel(str(directory)).score(["a ", "a "], ["new b", "b"])
    assert new == Score(None, "token 24: the model knows 24")
    assert old.value == scored(direct(classifier("llama"), "a b")[0], **EXACT)


@pytest.mark.parametrize("family", ["xlnet", "t5"])
def test_models_that_padding_would_mislead_are_asked_one_at_a_time(classifier, caplog, family):
    directory = classifier(family)
    with caplog.at_level(logging.WARNING, "judges.reward_model"):
        judge = RewardModel(str(directory))
    assert [r.getMessage() for r in caplog.records if r.name == "judges.reward_model"] == [
        f"{directory}: its scores change with padding, or that cannot be told: "
        "sequences are scored one at a time"
    ]
    texts = ["a b c d", "e", "f </s> g", "h </s> i </s> j"]
    expected = [scored(direct(directory, text)[0], **EXACT) for text in texts]
    assert values(judge.score([""] * 4, texts)) == expected


@pytest.mark.parametrize(("family", "pad"), CLASSIFIERS)
def test_the_others_are_asked_in_batches(judges, family, pad):
    judge, _ = judges(family, pad)
    assert judge._batches


def test_nan_is_no_score(classifier, tmp_path):
    directory = save_classifier(tmp_path / "model", "llama")
    judge = RewardModel(str(directory))
    judge._model.score.weight.data.fill_(math.nan)
    assert [Score.read(s) for s in judge.score(["a"], ["b"])] == [Score(None, "returned NaN")]


def test_half_precision(judges):
    judge, directory = judges("llama", NO_PAD)
    half = RewardModel(str(directory), dtype="bfloat16")
    texts = ["a b", "c d e f", "g"]
    full = values(judge.score([""] * 3, texts))
    said = values(half.score([""] * 3, texts))
    assert said == scored(full, abs=0.1)
    assert said != full


def test_by_name(classifier):
    directory = classifier("bert", labels=2)
    judge = build_judge("reward_model", {"model": str(directory), "label": 1})
    assert not judge.compares
    low, high = direct(directory, "a b")
    [score] = judge.ask({"unread": [1]}, prompts=["a "], completions=["b"])
    assert score.value == scored(high - low, **EXACT)


def refused(**args) -> str:
    with pytest.raises(UserError) as caught:
        RewardModel(**args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_had_is_said_in_a_line(classifier, tiny_model, tmp_path):
    directory = str(classifier("bert", labels=["bad", "good"]))
    missing = refused(model=str(tmp_path / "none"))
    assert missing.startswith(f"model={tmp_path / 'none'}: cannot be loaded (")
    assert "give a directory that save_pretrained wrote" in missing
    assert "score.weight" in refused(model=str(tiny_model))
    assert "labels bad, good" in refused(model=directory)
    assert "(did you mean good?)" in refused(model=directory, label="goood")
    for label in (2, -1):
        assert refused(model=directory, label=label).startswith(f"label={label}: ")
    assert "label=x" in refused(model=str(classifier("bert")), label="x")
    assert "write auto, text, chat, pair" in refused(model=directory, label=0, format="chatt")
    assert "write float32, bfloat16, float16" in refused(model=directory, label=0, dtype="int8")
    assert refused(model=directory, label=0, device="gpu").startswith("device=gpu: ")


def test_a_chat_needs_a_template(judges):
    judge, directory = judges("llama", NO_PAD)
    for prompt, completion in ((chat("a"), "b"), ("a", chat("", "b")[1:])):
        with pytest.raises(UserError) as caught:
            judge.score([prompt], [completion])
        assert f"{directory}: its tokenizer has no chat template" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_template_of_these_tests_has_a_bos_of_its_own(judges):
    judge, _ = judges("llama", NO_PAD, template=True)
    assert TEMPLATE.startswith("{{ '<s> ' }}")
    ids = judge._encode("a", "b")["input_ids"]
    assert ids.count(1) == 1
