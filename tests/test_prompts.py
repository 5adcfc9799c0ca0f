"""Prompt streams: options, order, mixtures, and the ids of a prompt."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from judges.errors import UserError
from pipeline.prompt_source import PromptSource
from pipeline.prompts import PromptEncoder, PromptOptions, PromptStream
from tests.prompt_helpers import (
    CHAT_TEMPLATE,
    ENCODER,
    contents,
    make_tokenizer,
    numbered,
    stream_of,
    write_jsonl,
)
from workers.seeds import derive_seed

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either path or mixture"),
        ({"path": "a.jsonl", "mixture": [{"path": "b.jsonl"}]}, "either path or mixture"),
        ({"mixture": [{"path": "b.jsonl"}], "column": "q"}, "set column in its sources"),
        ({"mixture": [{"path": "b.jsonl"}, {}]}, r"mixture\[1\] needs a path"),
        ({"path": "a.jsonl", "colum": "q"}, "Extra inputs"),
        ({"path": "a.jsonl", "weight": 0}, "greater than 0"),
        ({"path": "a.jsonl", "weight": float("inf")}, "finite"),
    ],
)
def test_options_refuse(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PromptOptions(**options)


def test_resolved_options_are_accepted_again() -> None:
    for options in (
        PromptOptions(path="a.jsonl"),
        PromptOptions(mixture=[PromptSource(path="b.jsonl", weight=2.0)]),
    ):
        assert PromptOptions(**options.model_dump(mode="json")) == options


def test_every_option_is_described() -> None:
    assert all(field.description for field in PromptOptions.model_fields.values())


def test_import_is_light() -> None:
    heavy = "{'torch', 'datasets', 'transformers', 'ray', 'vllm', 'pyarrow'}"
    code = f"import sys, pipeline.prompts; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


# Order


def test_order_is_the_permutation_of_the_derived_seed(tmp_path: Path) -> None:
    path = numbered(tmp_path / "p.jsonl", 7)
    expected = [
        f"p{row}"
        for epoch in range(3)
        for row in np.random.default_rng(derive_seed(5, "heldout", epoch, 0)).permutation(7)
    ]
    stream = PromptStream(PromptOptions(path=str(path)), ENCODER, 5, purpose="heldout")
    prompts = stream.take(0, 21)
    assert [prompt.content for prompt in prompts] == expected
    assert [prompt.position for prompt in prompts] == list(range(21))
    assert len(stream) == 7


@pytest.mark.parametrize("streaming", [False, True])
def test_every_prompt_once_an_epoch_in_a_fresh_order(tmp_path: Path, streaming: bool) -> None:
    path = numbered(tmp_path / "p.jsonl", 20)
    stream = stream_of(path, streaming=streaming, shuffle_buffer=8)
    epochs = [contents(stream, 20 * epoch, 20) for epoch in range(3)]
    everything = {f"p{i}" for i in range(20)}
    assert all(set(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [f"p{i}" for i in range(20)] not in epochs


@pytest.mark.parametrize("kind", ["rows", "stream", "mixture", "mixed with a stream"])
def test_a_position_has_one_prompt_however_it_is_taken(tmp_path: Path, kind: str) -> None:
    a = {"path": str(numbered(tmp_path / "a.jsonl", 9, "a"))}
    b = {"path": str(numbered(tmp_path / "b.jsonl", 4, "b")), "weight": 0.5}
    options: dict[str, Any] = {
        "rows": a,
        "stream": a | {"streaming": True, "shuffle_buffer": 4},
        "mixture": {"mixture": [a, b]},
        "mixed with a stream": {"mixture": [a, b | {"streaming": True}], "shuffle_buffer": 3},
    }[kind]

    def fresh(run_seed: int = 3) -> PromptStream:
        return PromptStream(PromptOptions(**options), ENCODER, run_seed)

    whole = contents(fresh(), 0, 60)
    stream = fresh()
    assert contents(stream, 0, 10) + contents(stream, 10, 10) == whole[:20]
    assert contents(stream, 37, 5) == whole[37:42]
    assert contents(stream, 2, 30) == whole[2:32]
    assert contents(stream, 32, 0) == []
    assert contents(fresh(), 50, 10) == whole[50:]
    assert contents(fresh(4), 0, 60) != whole


def test_consecutive_takes_do_not_start_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = stream_of(numbered(tmp_path / "p.jsonl", 50))
    epochs: list[int] = []
    walk = stream._epoch
    monkeypatch.setattr(stream, "_epoch", lambda epoch: epochs.append(epoch) or walk(epoch))
    for start in range(0, 100, 10):
        stream.take(start, 10)
    assert epochs == [0, 1]


# Mixtures


def mixture(tmp_path: Path, streaming: bool, sizes: dict[str, int], weights: dict[str, float]):  # type: ignore[no-untyped-def]
    sources = [
        PromptSource(
            path=str(numbered(tmp_path / f"{name}.jsonl", size, name)),
            weight=weights[name],
            streaming=streaming,
        )
        for name, size in sizes.items()
    ]
    return PromptStream(PromptOptions(mixture=sources), ENCODER, run_seed=1)


@pytest.mark.parametrize("streaming", [False, True])
def test_mixture_shares_follow_the_weights(tmp_path: Path, streaming: bool) -> None:
    sizes, weights = {"a": 30, "b": 500, "c": 70}, {"a": 1.0, "b": 2.0, "c": 5.0}
    stream = mixture(tmp_path, streaming, sizes, weights)
    count = 4000
    drawn = Counter(content[0] for content in contents(stream, 0, count))
    for name, weight in weights.items():
        share = weight / 8.0
        four_sigma = 4 * (share * (1 - share) / count) ** 0.5
        assert drawn[name] / count == pytest.approx(share, abs=four_sigma)


@pytest.mark.parametrize("streaming", [False, True])
def test_mixture_repeats_no_row_before_its_source_is_used_up(
    tmp_path: Path, streaming: bool
) -> None:
    sizes = {"a": 5, "b": 40}
    stream = mixture(tmp_path, streaming, sizes, {"a": 1.0, "b": 1.0})
    drawn: dict[str, list[str]] = {"a": [], "b": []}
    for content in contents(stream, 0, 60):
        drawn[content[0]].append(content)
    assert len(drawn["a"]) > 10
    assert len(set(drawn["a"][:5])) == len(set(drawn["a"][5:10])) == 5
    assert len(set(drawn["b"])) == len(drawn["b"])


def test_mixture_epoch_has_every_row_and_ends_with_the_last(tmp_path: Path) -> None:
    sizes = {"a": 5, "b": 40}
    stream = mixture(tmp_path, False, sizes, {"a": 1.0, "b": 1.0})
    epoch = contents(stream, 0, len(stream))
    assert set(epoch) == {f"{name}{i}" for name, size in sizes.items() for i in range(size)}
    assert epoch.count(epoch[-1]) == 1
    assert sum(content[0] == "b" for content in epoch) == 40


def test_mixed_sources_keep_their_own_columns(tmp_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "once", "answer": 18}])
    b = write_jsonl(tmp_path / "b.jsonl", [{"question": "upon", "answer": "x", "tags": ["t"]}])
    sources = [PromptSource(path=str(a)), PromptSource(path=str(b), column="question", chat=True)]
    prompts = PromptStream(PromptOptions(mixture=sources), ENCODER, 0).take(0, 20)
    seen = {json.dumps([p.content, dict(p.columns)]) for p in prompts}
    assert seen == {
        json.dumps(["once", {"answer": 18}]),
        json.dumps([[{"role": "user", "content": "upon"}], {"answer": "x", "tags": ["t"]}]),
    }


# What a prompt may be, and its ids


@pytest.mark.parametrize(
    ("value", "chat", "content", "ids"),
    [
        ("once upon", None, "once upon", [1, 5, 6]),
        ("once upon", False, "once upon", [1, 5, 6]),
        ("once upon", True, [{"role": "user", "content": "once upon"}], [3, 5, 6, 4]),
        (["a cat", "a dog"], None, [{"role": "user", "content": "a cat"}], [3, 7, 9, 4]),
        (["a cat", "a dog"], False, "a cat", [1, 7, 9]),
        (
            [
                {"role": "user", "content": "cat"},
                {"role": "assistant", "content": "dog", "name": None},
                {"role": "user", "content": "time"},
            ],
            None,
            [
                {"role": "user", "content": "cat"},
                {"role": "assistant", "content": "dog"},
                {"role": "user", "content": "time"},
            ],
            [3, 9, 4, 10, 3, 8, 4],
        ),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_prompt_forms(
    tmp_path: Path, value: Any, chat: bool | None, content: Any, ids: list[int], streaming: bool
) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"turns": value, "id": 81}])
    stream = stream_of(path, column="turns", chat=chat, streaming=streaming)
    (prompt,) = stream.take(0, 1)
    assert prompt.content == content
    assert prompt.ids.tolist() == ids
    assert prompt.ids.dtype == np.int64
    assert prompt.columns == {"id": 81}


def test_checked_rows_are_not_tokenised_again(tmp_path: Path) -> None:
    calls = []

    class Counting(PromptEncoder):
        def encode(self, content: Any) -> Any:
            calls.append(content)
            return super().encode(content)

    path = numbered(tmp_path / "p.jsonl", 6)
    stream = PromptStream(PromptOptions(path=str(path)), Counting(make_tokenizer(), 32, 8), 0)
    stream.check()
    stream.take(0, 30)
    assert calls == [f"p{i}" for i in range(6)]


def test_mt_bench_and_gsm8k() -> None:
    questions = SHARED / "mt_bench" / "question.jsonl"
    grade_school = SHARED / "gsm8k" / "test.jsonl"
    if not (questions.is_file() and grade_school.is_file()):
        pytest.skip(f"{SHARED}: not on this machine")
    encoder = PromptEncoder(make_tokenizer(), 1024, 64)
    stream = PromptStream(PromptOptions(path=str(questions), column="turns"), encoder, 0)
    stream.check()
    assert len(stream) == 80
    first = {prompt.columns["question_id"]: prompt for prompt in stream.take(0, 80)}[81]
    assert first.content[0]["content"].startswith("Compose an engaging travel blog post")  # type: ignore[index]
    assert first.columns == {"question_id": 81, "category": "writing"}
    options = PromptOptions(path=str(grade_school), column="question")
    stream = PromptStream(options, encoder, 0)
    assert len(stream) == 1319
    answers = {prompt.content: prompt.columns["answer"] for prompt in stream.take(0, 1319)}
    robe = "A robe takes 2 bolts of blue fiber and half that much white fiber."
    (answer,) = [a for q, a in answers.items() if isinstance(q, str) and q.startswith(robe)]
    assert answer.endswith("#### 3")


def test_a_policy_without_chat_template(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": ["a"]}])
    encoder = PromptEncoder(make_tokenizer(chat_template=None), 256, 64)
    stream = PromptStream(PromptOptions(path=str(path)), encoder, 0)
    with pytest.raises(UserError) as caught:
        stream.check()
    assert str(caught.value) == (
        f"prompts.path={path} row 1: a chat prompt, but the policy's tokenizer has no chat "
        "template; use a chat model, or plain text prompts with chat: false"
    )


def test_a_prompt_that_fits_exactly() -> None:
    encoder = PromptEncoder(make_tokenizer(), context=10, max_new_tokens=6)
    assert encoder.encode("a cat dog").tolist() == [1, 7, 9, 10]
    with pytest.raises(UserError, match=r"5 tokens.*at most 5"):
        encoder.encode("a cat dog time")
    with pytest.raises(
        UserError, match=r"max_new_tokens=20 .* 10: set max_new_tokens to at most 8"
    ):
        PromptEncoder(make_tokenizer(), context=10, max_new_tokens=20).encode("a")


def test_a_prompt_without_tokens() -> None:
    silent = make_tokenizer("{{ '' }}")
    with pytest.raises(UserError, match="no tokens"):
        PromptEncoder(silent, 10, 2).encode([{"role": "user", "content": "a"}])


def test_a_stream_has_no_length(tmp_path: Path) -> None:
    stream = stream_of(numbered(tmp_path / "p.jsonl", 3), streaming=True)
    with pytest.raises(UserError, match=r"prompts\.streaming=true: a stream's length is not known"):
        len(stream)


# Arguments of the chat template


THINKING = CHAT_TEMPLATE + "{% if enable_thinking is defined and enable_thinking %} time{% endif %}"


def with_args(
    path: Path, args: dict[str, Any], template: str | None = THINKING, **options: Any
) -> PromptStream:
    encoder = PromptEncoder(make_tokenizer(template), 256, 64, args)
    return PromptStream(
        PromptOptions(path=str(path), chat_template_args=args, **options), encoder, 0
    )


@pytest.mark.parametrize(
    ("args", "ids"),
    [
        ({}, [3, 9, 4]),
        ({"enable_thinking": False}, [3, 9, 4]),
        ({"enable_thinking": True}, [3, 9, 4, 8]),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_arguments_reach_the_chat_template(
    tmp_path: Path, args: dict[str, Any], ids: list[int], streaming: bool
) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": ["cat"]}])
    (prompt,) = with_args(path, args, streaming=streaming).take(0, 1)
    assert prompt.ids.tolist() == ids


LOOPING = CHAT_TEMPLATE + "{% for i in range(count) %} time{% endfor %}"


@pytest.mark.parametrize(
    ("prompt", "args", "template", "said"),
    [
        ("cat", {"enable_thinking": True}, THINKING, "a text prompt passes no chat template, so "),
        ("cat", {"enable_thinking": True}, None, "a text prompt passes no chat template, so "),
        (["cat"], {"enable_thinking": True}, None, "a chat prompt, but the policy's tokenizer has"),
        (["cat"], {"enable_thinkin": True}, THINKING, "chat_template_args.enable_thinkin: the pol"),
        (["cat"], {"count": "two"}, LOOPING, "the policy's chat template refuses chat_template_a"),
        (["cat"], {"count": 1, "tools": ["f"]}, LOOPING + "{{ tools }}", "the policy's chat templ"),
    ],
)
def test_arguments_that_no_template_takes(
    tmp_path: Path, prompt: Any, args: dict[str, Any], template: str | None, said: str
) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": prompt}])
    with pytest.raises(UserError) as caught:
        with_args(path, args, template).check()
    assert str(caught.value).startswith(f"prompts.path={path} row 1: {said}")
    assert "\n" not in str(caught.value)


def test_arguments_are_beside_a_mixture(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": ["cat"]}])
    options = PromptOptions(
        mixture=[PromptSource(path=str(path))], chat_template_args={"enable_thinking": True}
    )
    encoder = PromptEncoder(make_tokenizer(THINKING), 256, 64, options.chat_template_args)
    (prompt,) = PromptStream(options, encoder, 0).take(0, 1)
    assert prompt.ids.tolist() == [3, 9, 4, 8]


def test_what_a_smaller_window_says() -> None:
    encoder = PromptEncoder(make_tokenizer(), context=10, max_new_tokens=6, cut=True)
    with pytest.raises(UserError) as caught:
        encoder.encode("a cat dog time")
    assert str(caught.value) == (
        "the prompt has 5 tokens, with sampling.max_new_tokens=6 generator.max_model_len is 10: "
        "shorten it to 4, or set max_new_tokens to at most 5, or raise that"
    )
