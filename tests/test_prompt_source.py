"""Prompt sources: what is read, and what a mistake in it says."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from judges.errors import UserError
from pipeline.prompt_source import PromptSource
from pipeline.prompts import PromptOptions, PromptStream
from tests.prompt_helpers import ENCODER, contents, numbered, stream_of, write_jsonl

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


# What is read


def test_splits_of_a_file(tmp_path: Path) -> None:
    rows = [
        {"prompt": "once", "split": "train", "answer": 1},
        {"prompt": "upon", "split": "heldout", "answer": 2},
        {"prompt": "time"},
    ]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    for streaming in (False, True):
        train = stream_of(path, streaming=streaming).take(0, 2)
        assert {prompt.content for prompt in train} == {"once", "time"}
        (heldout,) = stream_of(path, split="heldout", streaming=streaming).take(0, 1)
        assert (heldout.content, heldout.columns) == ("upon", {"answer": 2})


def test_json_csv_and_parquet(tmp_path: Path) -> None:
    array = tmp_path / "p.json"
    array.write_text("\ufeff\n" + json.dumps([{"prompt": "a\nb", "n": 1}], indent=2))
    table = tmp_path / "p.csv"
    table.write_text('\ufeffprompt,n\n"a\nb",1\n')
    columns = {"prompt": ["a\nb"], "n": [1], "day": [date(2024, 2, 29)]}
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    for path, expected in [
        (array, {"n": 1}),
        (table, {"n": "1"}),
        (tmp_path / "p.parquet", {"n": 1, "day": "2024-02-29"}),
    ]:
        for streaming in (False, True):
            (prompt,) = stream_of(path, streaming=streaming).take(0, 1)
            assert (prompt.content, prompt.columns) == ("a\nb", expected)


def test_json_lines_in_a_json_file_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('{"prompt": "once"}\n\n{"prompt": "upon"}\n')
    assert sorted(contents(stream_of(path), 0, 2)) == ["once", "upon"]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = numbered(tmp_path / "p.jsonl", 1, "old")
    for streaming in (False, True):
        numbered(path, 1, "old")
        assert contents(stream_of(path, streaming=streaming), 0, 1) == ["old0"]
        numbered(path, 1, "new")
        assert contents(stream_of(path, streaming=streaming), 0, 1) == ["new0"]


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_directory(tmp_path: Path, streaming: bool, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"prompt": "once", "n": 1}, {"prompt": "upon", "n": 2}])
    numbered(folder / "test.jsonl", 1, "t")
    train = stream_of(folder, streaming=streaming).take(0, 2)
    assert {(prompt.content, prompt.columns["n"]) for prompt in train} == {("once", 1), ("upon", 2)}
    assert contents(stream_of(folder, split="test", streaming=streaming), 0, 1) == ["t0"]
    with pytest.raises(UserError, match=r"no rows of split 'val'.*prompts\.split.*test, train"):
        stream_of(folder, split="val", streaming=streaming).take(0, 1)
    numbered(folder / "test.jsonl", 1, "changed")
    assert contents(stream_of(folder, split="test", streaming=streaming), 0, 1) == ["changed0"]
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_a_directory_may_name_their_split(tmp_path: Path, streaming: bool) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"prompt": "once", "split": "train"}, {"prompt": "upon", "split": "heldout"}]
    write_jsonl(folder / "stories.jsonl", rows)
    for split, content in [("train", "once"), ("heldout", "upon")]:
        stream = stream_of(folder, split=split, streaming=streaming)
        assert contents(stream, 0, 2) == [content, content]
    with pytest.raises(UserError, match="no rows"):
        stream_of(folder, split="val", streaming=streaming).take(0, 1)


def test_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(*args: Any, streaming: bool) -> Any:
        asked.append((*args, streaming))
        rows = datasets.Dataset.from_list([{"question": f"q{i}", "answer": i} for i in range(5)])
        return {"train": rows.to_iterable_dataset(num_shards=2) if streaming else rows}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for streaming in (False, True):
        options = {"subset": "main", "column": "question", "streaming": streaming}
        stream = stream_of("openai/gsm8k", **options)
        stream.check()
        for epoch in range(2):
            prompts = stream.take(5 * epoch, 5)
            found = {(prompt.content, prompt.columns["answer"]) for prompt in prompts}
            assert found == {(f"q{i}", i) for i in range(5)}
        assert asked[-1] == ("openai/gsm8k", "main", streaming)
        with pytest.raises(UserError, match=r"no rows of split 'test'.*there are train"):
            stream_of("openai/gsm8k", **options, split="test").take(0, 1)


def test_an_unreachable_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'a/b-v1.5'\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        stream_of("a/b-v1.5")
    assert str(caught.value) == (
        "prompts.path=a/b-v1.5: no such path here, and not loadable from the Hugging Face hub "
        "(Couldn't reach 'a/b-v1.5'); check the name, prompts.subset and the network"
    )


# Mistakes


def message_of(path: Path, *, column: str = "prompt", take: bool = False, **options: Any) -> str:
    def read() -> None:
        stream = stream_of(path, column=column, **options)
        if take:
            stream.take(0, 20)
        stream.check()

    with pytest.raises(UserError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"prompts.path={path}")
    return message.removeprefix(f"prompts.path={path}")


@pytest.mark.parametrize("name", ["nope.jsonl", "nope.txt", "nope"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    expected = f": no such file; mend the path (relative ones start at {Path.cwd()})"
    assert message_of(tmp_path / name) == expected


def test_missing_relative_file() -> None:
    with pytest.raises(UserError, match=r"^prompts\.path=nope\.jsonl: no such file"):
        stream_of("nope.jsonl")


GOOD = '{"prompt": "once"}\n'


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.jsonl", "", ": no rows (split train); fill it or choose another"),
        ("e.json", "[]", ": no rows (split train); fill it or choose another"),
        ("e.csv", "prompt,n\n", ": no rows (split train); fill it or choose another"),
        (
            "b.jsonl",
            GOOD + '\n{"prompt": "upon}\n' + GOOD,
            " line 3: broken JSON (Unterminated string starting at, column 12); "
            "mend or remove the line",
        ),
        ("o.jsonl", GOOD + "[1, 2]\n", ' line 2: [1, 2] is no JSON object; write {"prompt": …}'),
        ("o.json", '[{"prompt": "a"}, 7]', ' row 2: 7 is no JSON object; write {"prompt": …}'),
        (
            "b.json",
            '[\n{"prompt": "a"},\n{"prompt" "b"}\n]',
            " line 3: broken JSON (Expecting ':' delimiter, column 11); mend it",
        ),
        (
            "b.csv",
            "prompt,n\na,1\nb,2,3\n",
            " row 2: more fields than the header; quote its commas",
        ),
        (
            "q.csv",
            'prompt,n\na,1\n"b"c,2\n',
            " row 2: broken CSV (',' expected after '\"'); mend it",
        ),
        (
            "x.txt",
            "once\n",
            ": a prompt file ends in .jsonl, .json, .csv, .parquet; convert or rename it",
        ),
        (
            "s.jsonl",
            '{"prompt": "a", "split": "test"}\n{"prompt": "b", "split": "val"}\n',
            ": no rows of split 'train'; set prompts.split: there are test, val",
        ),
    ],
)
def test_broken_files(
    tmp_path: Path, name: str, content: str, message: str, streaming: bool
) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert message_of(path, streaming=streaming, take=streaming) == message


def test_broken_bytes(tmp_path: Path) -> None:
    lines = tmp_path / "p.jsonl"
    lines.write_bytes(GOOD.encode() + b'{"prompt": "caf\xe9 au lait"}\n')
    assert message_of(lines).startswith(" line 2: not UTF-8 (")
    table = tmp_path / "p.csv"
    table.write_bytes(b"prompt\ncaf\xe9 au lait\n")
    assert message_of(table).startswith(": not UTF-8 (")
    parquet = tmp_path / "p.parquet"
    parquet.write_bytes(b"PAR1 this is not it")
    assert message_of(parquet).startswith(": broken Parquet (")


def test_a_file_without_splits_is_train(tmp_path: Path) -> None:
    path = numbered(tmp_path / "p.jsonl", 3)
    expected = ": no rows of split 'heldout'; set prompts.split: there are train"
    assert message_of(path, split="heldout") == expected
    assert message_of(path, split="heldout", streaming=True, take=True) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_column(tmp_path: Path, streaming: bool) -> None:
    row = {"questions": "q", "answer": "a", "split": "train"}
    path = write_jsonl(tmp_path / "p.jsonl", [row])
    assert message_of(path, column="question", streaming=streaming) == (
        ": no column 'question'; set prompts.column: "
        "the nearest is 'questions', there are answer, questions"
    )
    assert message_of(path, column="xyz", streaming=streaming) == (
        ": no column 'xyz'; set prompts.column: there are answer, questions"
    )


SURROGATE = "a\ud83d"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "the prompt is null; fill it in or remove the row"),
        ("", "the prompt is empty; fill it in or remove the row"),
        (" \n", "the prompt is empty; fill it in or remove the row"),
        ([], "the prompt is empty; fill it in or remove the row"),
        (["", "b"], "the prompt is empty; fill it in or remove the row"),
        (
            7,
            "the prompt is of type int; "
            "give text, a list of {role, content} messages or a list of turns",
        ),
        (
            [{"role": "user", "content": "a"}, {"role": "user", "text": "b"}],
            "message 2 of the prompt has no text 'content'; "
            'write {"role": "user", "content": "…"}',
        ),
        (
            [{"from": "human", "value": "a"}],
            'message 1 of the prompt has no text \'role\'; write {"role": "user", "content": "…"}',
        ),
        (
            [{"role": "system", "content": "a"}],
            "the policy's chat template refuses the messages (no system); change their roles",
        ),
        (SURROGATE, "the prompt has half a surrogate pair at character 1; remove it"),
        (
            "cat " * 229,
            "the prompt has 230 tokens, with sampling.max_new_tokens=64 the model's context is "
            "256: shorten it to 192, or set max_new_tokens to at most 26, or choose a policy with "
            "a longer context",
        ),
        (
            "cat " * 255,
            "the prompt has 256 tokens, with sampling.max_new_tokens=64 the model's context is "
            "256: shorten it to 192, or choose a policy with a longer context",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, value: Any, message: str, streaming: bool) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}, {"prompt": value}])
    assert message_of(path, streaming=streaming, take=streaming) == f" row 3: {message}"


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_of_csv_and_parquet(tmp_path: Path, streaming: bool) -> None:
    table, parquet = tmp_path / "p.csv", tmp_path / "p.parquet"
    table.write_text('prompt,n\n"a\nb",1\nc,2\n,3\n')
    pq.write_table(pa.table({"prompt": ["a", "b", None]}), parquet)
    for path, what in [(table, "empty"), (parquet, "null")]:
        message = message_of(path, streaming=streaming, take=streaming)
        assert message == f" row 3: the prompt is {what}; fill it in or remove the row"


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = numbered(tmp_path / "p.jsonl", 1)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    expected = ": cannot be read ([Errno 13] Permission denied); check the file"
    assert message_of(path) == expected


def test_a_row_number_counts_rows_of_other_splits(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "split": "test"}, {"prompt": "b", "split": "train"}, {"prompt": None}]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    assert message_of(path).startswith(" row 3: the prompt is null")


def test_messages_where_text_is_asked_for(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": [{"role": "user", "content": "a"}]}])
    assert message_of(path, chat=False) == (
        " row 1: the prompt is a list of messages; drop chat: false or give text"
    )


def test_errors_name_the_key_and_the_source(tmp_path: Path) -> None:
    good = numbered(tmp_path / "p.jsonl", 2)
    bad = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "a"}, {"prompt": 3}])
    options = PromptOptions(mixture=[PromptSource(path=str(good)), PromptSource(path=str(bad))])
    stream = PromptStream(options, ENCODER, 0, key="evaluation.prompts")
    with pytest.raises(UserError) as caught:
        stream.check()
    start = f"evaluation.prompts.mixture[1].path={bad} row 2: the prompt is of type int"
    assert str(caught.value).startswith(start)


@pytest.mark.usefixtures("hub_cache")
def test_a_directory_that_holds_no_data(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    assert message_of(tmp_path / "set").startswith(": the directory cannot be read as a dataset (")
