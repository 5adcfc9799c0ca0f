"""Every form of a preference set's row, by hand, and every mistake in one."""

from __future__ import annotations

import csv
import gzip
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from judges.errors import UserError
from tests.pair_helpers import TEMPLATE, assistant, given, ids_of, only, tokens, user, write
from workers.messages import Fate, Label, Pair

TEXT = {"prompt": "a b", "chosen": " c d", "rejected": " e"}
TEXT_TOKENS = [ids_of("<s> a b"), ids_of("c d </s>"), ids_of("e </s>")]
CHAT = {"prompt": [user("a b")], "chosen": [assistant("c d")], "rejected": [assistant("e")]}
CHAT_TOKENS = [ids_of("u a b t"), ids_of("c d </s>"), ids_of("e </s>")]
LONGER = [{"role": "system", "content": "g"}, user("a"), assistant("b"), user("c")]
LONGER_TOKENS = [ids_of("s g u a t b </s> r u c t"), ids_of("d </s>"), ids_of("e f </s>")]
SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "g"},
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b"},
        {"from": "user", "value": "c"},
    ],
    "chosen": {"from": "gpt", "value": "d"},
    "rejected": {"from": "assistant", "value": "e f"},
}
DIALOGUE = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
HH = {"chosen": f"{DIALOGUE} d", "rejected": f"{DIALOGUE} e f"}

FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], Any, list[list[int]]]] = {
    "text": (TEXT, {}, "a b", TEXT_TOKENS),
    "text, with a template": (TEXT, {"template": TEMPLATE}, "a b", TEXT_TOKENS),
    "text as chat": (TEXT, {"template": TEMPLATE, "chat": True}, [user("a b")], CHAT_TOKENS),
    "chat": (CHAT, {"template": TEMPLATE}, [user("a b")], CHAT_TOKENS),
    "chat, completions as text": (
        {"prompt": [user("a b")], "chosen": "c d", "rejected": "e"},
        {"template": TEMPLATE},
        [user("a b")],
        CHAT_TOKENS,
    ),
    "a text prompt, completions as messages": (
        CHAT | {"prompt": "a b"},
        {"template": TEMPLATE},
        [user("a b")],
        CHAT_TOKENS,
    ),
    "several turns": (
        {"prompt": LONGER, "chosen": [assistant("d")], "rejected": [assistant("e f")]},
        {"template": TEMPLATE},
        LONGER,
        LONGER_TOKENS,
    ),
    "implicit prompt": (
        {"chosen": [*LONGER, assistant("d")], "rejected": [*LONGER, assistant("e f")]},
        {"template": TEMPLATE},
        LONGER,
        LONGER_TOKENS,
    ),
    "implicit prompt, the first message beside it": (
        {"prompt": "a", "chosen": [*LONGER, assistant("d")]}
        | {"rejected": [*LONGER, assistant("e f")]},
        {"template": TEMPLATE},
        LONGER,
        LONGER_TOKENS,
    ),
    "sharegpt": (SHAREGPT, {"template": TEMPLATE}, LONGER, LONGER_TOKENS),
    "sharegpt, the system's word in a column": (
        SHAREGPT | {"system": "g", "conversations": SHAREGPT["conversations"][1:]},
        {"template": TEMPLATE},
        LONGER,
        LONGER_TOKENS,
    ),
    "hh-rlhf as chat": (
        HH,
        {"template": TEMPLATE},
        LONGER[1:],
        [LONGER_TOKENS[0][2:], *LONGER_TOKENS[1:]],
    ),
    # None of "Human:", "Assistant:" is a word of the tokenizer.
    "hh-rlhf as text": (
        HH,
        {},
        DIALOGUE,
        [ids_of("<s> <unk> a <unk> b <unk> c <unk>"), ids_of("d </s>"), ids_of("e f </s>")],
    ),
    "hh-rlhf as text, in spite of a template": (
        HH,
        {"template": TEMPLATE, "chat": False},
        DIALOGUE,
        [ids_of("<s> <unk> a <unk> b <unk> c <unk>"), ids_of("d </s>"), ids_of("e f </s>")],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_pair(tmp_path: Path, form: str) -> None:
    row, options, content, expected = FORMS[form]
    pairs = given(tmp_path, [row], **options)
    pairs.check()
    group = only(pairs.take(0, 1, version=7))
    assert group.prompt.content == content
    assert tokens(group) == expected
    assert group.pairs == (Pair(0, 0, 1, 1.0, Fate.LEARN),)
    assert group.labels == ()
    assert [(c.version, c.finished) for c in group.completions] == [(7, True)] * 2
    assert not pairs.unpaired
    assert not pairs.left_out


def test_what_people_read(tmp_path: Path) -> None:
    texts = []
    for row, template in ((TEXT, None), (CHAT, TEMPLATE), (HH, TEMPLATE), (HH, None)):
        group = only(given(tmp_path, [row], template).take(0, 1, 0))
        texts.append([completion.text for completion in group.completions])
    assert texts == [[" c d", " e"], ["c d", "e"], ["d", "e f"], [" d", " e f"]]


def test_turns_of_one_speaker_are_one_message(tmp_path: Path) -> None:
    before = "\n\nHuman: a\n\nAssistant: b\n\nAssistant:  c\n\nHuman: d\n\nAssistant:"
    row = {"chosen": f"{before} e", "rejected": f"{before} f"}
    group = only(given(tmp_path, [row], TEMPLATE).take(0, 1, 0))
    assert group.prompt.content == [user("a"), assistant("b\n\nc"), user("d")]
    assert tokens(group)[0] == ids_of("u a t b c </s> r u d t")


def test_dialogues_that_nothing_can_be_learned_from_are_left_out(tmp_path: Path) -> None:
    rows = [
        HH,
        HH | {"rejected": f"{DIALOGUE}  "},  # says nothing
        HH | {"rejected": "\n\nHuman: a\n\nAssistant: e"},  # ended a turn before
        HH | {"rejected": f"{DIALOGUE} e\n\nHuman: f\n\nAssistant: g"},  # went on
        HH | {"rejected": f"{DIALOGUE} e\n\nHuman: f"},
        {side: f"\n\nHuman: a\n\nAssistant: b\n\nAssistant: {side[0]}" for side in HH},
    ]
    pairs = given(tmp_path, rows, TEMPLATE)
    assert len(pairs) == 1
    assert pairs.left_out == {"parted": 3, "empty": 1, "turns": 1}
    # As text there are no turns to take: c of "chosen" is a word, and so is r of "rejected".
    pairs = given(tmp_path, rows)
    assert pairs.left_out == {"parted": 3, "empty": 1}
    assert tokens(only(pairs.take(1, 1, 0)))[1:] == [ids_of("c </s>"), ids_of("r </s>")]


LABELS = [(True, True), (False, False), (1, True), (0, False), (1.0, True), ("true", True)]
LABELS += [("False", False), ("1", True), ("0", False)]


@pytest.mark.parametrize(("label", "desirable"), LABELS)
def test_a_labelled_completion(tmp_path: Path, label: Any, desirable: bool) -> None:
    rows = [
        {"prompt": "a b", "completion": " c d", "label": label},
        {"prompt": [user("a b")], "completion": [assistant("c d")], "label": label},
        {"completion": f"{DIALOGUE} d", "label": label},
    ]
    pairs = given(tmp_path, rows, TEMPLATE)
    assert pairs.unpaired
    groups = [only([group]) for group in pairs.take(0, 3, 0)]
    expected = [TEXT_TOKENS[:2], CHAT_TOKENS[:2], [LONGER_TOKENS[0][2:], LONGER_TOKENS[1]]]
    assert [tokens(group) for group in groups] == expected
    for at, group in enumerate(groups):
        assert group.labels == (Label(at, 0, desirable, Fate.LEARN),)
        assert group.pairs == ()


def test_the_label_may_be_soft_and_the_other_columns_stay(tmp_path: Path) -> None:
    rows = [TEXT | {"label_prob": p, "source": "x", "split": "train"} for p in (0.25, 1, "0.5")]
    rows += [TEXT | {"label_prob": None, "rejected": TEXT["chosen"]}]
    groups = given(tmp_path, rows).take(0, 4, 0)
    assert [group.pairs[0].label_prob for group in groups] == [0.25, 1.0, 0.5, 1.0]
    assert [group.pairs[0].fate for group in groups] == [Fate.LEARN] * 3 + [Fate.IDENTICAL]
    assert [group.prompt.columns for group in groups] == [{"source": "x"}] * 3 + [{}]


def test_rows_of_another_split_are_not_read(tmp_path: Path) -> None:
    rows = [TEXT, TEXT | {"split": "heldout", "chosen": 3}, TEXT | {"split": "train"}]
    assert len(given(tmp_path, rows)) == 2
    path = write(tmp_path / "heldout.jsonl", [TEXT, CHAT | {"split": "heldout"}])
    assert (
        tokens(only(given(path, template=TEMPLATE, split="heldout").take(0, 1, 0))) == CHAT_TOKENS
    )
    with pytest.raises(UserError, match=r"set\.jsonl: no rows of split gone; fill it"):
        given(tmp_path, rows, split="gone")


def test_every_kind_of_file(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in (TEXT, TEXT | {"label_prob": 0.5}))
    array = json.dumps([TEXT, TEXT | {"label_prob": 0.5}])
    (tmp_path / "set.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "set.json.gz").write_bytes(gzip.compress(array.encode()))
    (tmp_path / "set.json").write_text(array)
    table = pa.Table.from_pylist([TEXT | {"label_prob": None}, TEXT | {"label_prob": 0.5}])
    pq.write_table(table, tmp_path / "set.parquet")
    with (tmp_path / "set.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*TEXT, "label_prob"])
        writer.writeheader()
        writer.writerows([TEXT | {"label_prob": 1}, TEXT | {"label_prob": 0.5}])
    for name in ("set.jsonl.gz", "set.json.gz", "set.json", "set.parquet", "set.csv"):
        groups = given(tmp_path / name).take(0, 2, 0)
        assert [tokens(group) for group in groups] == [TEXT_TOKENS] * 2, name
        assert [group.pairs[0].label_prob for group in groups] == [1.0, 0.5]


RECORDED = {
    "prompt": "a",
    "chosen": "b",
    "rejected": "c",
    "prompt_ids": [1, 3],
    "chosen_ids": [4, 2],
    "rejected_ids": [5, 2],
    "position": 0,
    "positions": 2,
    "chosen_sample": 0,
    "rejected_sample": 1,
}

MISTAKES: list[tuple[Any, dict[str, Any], str]] = [
    ({"prompt": "a", "chosen": "b"}, {}, "row 2: no rejected, or null: a row has prompt, chosen"),
    ({"prompt": "a", "chosen": "b", "rejceted": "c"}, {}, "did you mean rejceted?"),
    ({"chosen": [assistant("b")], "rejected": [assistant("c")]}, {}, "no prompt, or null"),
    ({"chosen": "b", "rejected": "c"}, {}, "no prompt, and chosen is no dialogue that begins"),
    ({"chosen": "\n\nHuman: b", "rejected": "c"}, {}, "has '\\n\\nAssistant:'"),
    ({"prompt": "a", "completion": "b"}, {}, "no label, or null"),
    ({"prompt": "a", "completion": "b", "label": "yes"}, {}, "label=yes: not true or false"),
    ({"prompt": "a", "completion": "b", "label": 0.5}, {}, "label=0.5: not true or false"),
    (TEXT | {"prompt": " "}, {}, "the prompt is empty"),
    (TEXT | {"chosen": 3}, {}, "the chosen is of type int"),
    (TEXT | {"rejected": []}, {}, "the rejected is an empty list"),
    (TEXT | {"label_prob": 0}, {}, "label_prob=0: not in (0, 1]"),
    (TEXT | {"label_prob": 1.01}, {}, "label_prob=1.01: not in (0, 1]"),
    (TEXT | {"label_prob": float("nan")}, {}, "label_prob=nan: not in (0, 1]"),
    (TEXT | {"label_prob": "sure"}, {}, "label_prob=sure: not in (0, 1]"),
    (TEXT | {"label_prob": True}, {}, "label_prob=True: not in (0, 1]"),
    (TEXT | {"rejected": " "}, {}, "a completion is empty: fill it in, or set too_long: drop"),
    (TEXT, {"max_tokens": 5}, "prompt and completion have 6 tokens, there is room for 5"),
    (TEXT | {"chosen": "c </s> d"}, {}, "the completion has '</s>' in its text"),
    (TEXT, {"template_args": {"kind": True}}, "a text prompt passes no chat template"),
    (CHAT, {}, "the policy's tokenizer has no chat template"),
    (CHAT, {"template": TEMPLATE, "chat": False}, "drop chat: false or give text"),
    (CHAT | {"prompt": "a"}, {"template": TEMPLATE, "chat": False}, "the chosen is a list of"),
    (CHAT | {"chosen": [user("c")]}, {"template": TEMPLATE}, "a message of role 'user'"),
    (CHAT | {"chosen": [user("c"), assistant("d")]}, {"template": TEMPLATE}, "has 2 messages"),
    (CHAT | {"chosen": [assistant("c </s>")]}, {"template": TEMPLATE}, "has '</s>' in its text"),
    (
        CHAT,
        {"template": TEMPLATE.replace("</s> ", "")},
        "ends no turn of the assistant with '</s>'",
    ),
    (CHAT, {"template": TEMPLATE.replace("%}t {% endif", "%}t q {% endif")}, "generation prompt"),
    (
        {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("b")]},
        {"template": TEMPLATE},
        "chosen and rejected part before their last message",
    ),
    (
        {"prompt": [user("a")]} | {s: [user("a"), assistant(s)] for s in ("chosen", "rejected")},
        {"template": TEMPLATE},
        "leave the prompt out",
    ),
    (SHAREGPT, {"template": TEMPLATE, "chat": False}, "drop chat: false or give text"),
    (SHAREGPT | {"conversations": "a"}, {}, "conversations: of type str"),
    (
        SHAREGPT | {"conversations": [{"from": "tool", "value": "a"}]},
        {},
        "from one of human, user, gpt",
    ),
    (SHAREGPT | {"chosen": {"from": "gpt"}}, {}, "chosen: not of the form"),
    (SHAREGPT | {"chosen": {"from": "human", "value": "a"}}, {}, "a message of role 'user'"),
    (RECORDED | {"rejected_ids": None}, {}, "some of prompt_ids, chosen_ids, rejected_ids"),
    (RECORDED | {"chosen_ids": "4 2"}, {}, "chosen_ids: not a list of int64 numbers"),
    (RECORDED | {"chosen_logprobs": [-1.0]}, {}, "chosen_logprobs has 1 values for 2 tokens"),
    *(
        (
            RECORDED | {column: [-1.0, value]},
            {},
            f"{column}: {value:g} is no log-probability (finite, 0 at most): export it again",
        )
        for column in ("chosen_logprobs", "rejected_sampling_logprobs")
        for value in (math.nan, -math.inf, 0.0011)
    ),
    (RECORDED | {"chosen_sample": -1}, {}, "chosen_sample=-1: not a whole number"),
    (RECORDED | {"position": 2}, {}, "position=2: not below positions=2"),
    (RECORDED | {"prompt_ids": []}, {}, "the prompt has no tokens"),
    (RECORDED | {"chosen_ids": []}, {}, "a completion is empty"),
]


def test_a_log_probability_may_be_rounded_above_0(tmp_path: Path) -> None:
    row = RECORDED | {"chosen_logprobs": [0.0, 0.001], "rejected_logprobs": [-1e4, -0.5]}
    group = only(given(tmp_path, [row]).take(0, 1, 0))
    assert [c.logprobs.tolist() for c in group.completions] == [
        [0.0, pytest.approx(0.001)],
        [-1e4, -0.5],
    ]


@pytest.mark.parametrize(("row", "options", "said"), MISTAKES, ids=[said for *_, said in MISTAKES])
def test_a_mistake_is_told_with_its_row(
    tmp_path: Path, row: Any, options: dict[str, Any], said: str
) -> None:
    (tmp_path / "set.jsonl").write_text("\n" + json.dumps(row) + "\n")  # its second line
    with pytest.raises(UserError) as caught:
        given(tmp_path / "set.jsonl", **options).check()
    line = str(caught.value)
    assert line.startswith(f"prompts.pairs={tmp_path / 'set.jsonl'} row 2: ")
    assert said in line
    assert "\n" not in line


def test_a_mistake_in_the_file(tmp_path: Path) -> None:
    def message(path: Path, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            given(path, **options).check()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "gone.jsonl: no such file; mend the path" in message(tmp_path / "gone.jsonl")
    assert "no such file" in message(tmp_path)
    assert "set.jsonl: no rows of split train" in message(write(tmp_path / "set.jsonl", []))
    (tmp_path / "set.txt").write_text("a")
    assert "ends in .jsonl, .json, .csv, .parquet" in message(tmp_path / "set.txt")
    packed = gzip.compress(b"{}\n" * 99)
    for name, content in (
        ("cut", packed[:-9]),
        ("not", b"{}\n"),
        ("bad", packed[:12] + b"\xff" * 9),
    ):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(content)
        assert "cannot be unpacked" in message(tmp_path / f"{name}.jsonl.gz")
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(b"{}\n{\n"))
    assert f"{tmp_path}/lines.jsonl.gz row 1: no chosen" in message(tmp_path / "lines.jsonl.gz")
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(b"{\n"))
    assert "broken.jsonl.gz line 1: broken JSON" in message(tmp_path / "broken.jsonl.gz")
    labelled = {"prompt": "a", "completion": "b", "label": True}
    mixed = write(tmp_path / "mixed.jsonl", [TEXT, labelled])
    assert "row 2: pairs and single completions with a label in one set" in message(mixed)
    joined = write(tmp_path / "joined.jsonl", [RECORDED, RECORDED | {"positions": 3}])
    assert "row 2: positions=3, before it 2: one set is the export of one run" in message(joined)
    joined = write(tmp_path / "joined.jsonl", [RECORDED, TEXT])
    assert "row 2: positions=None, before it 2" in message(joined)
    other = write(tmp_path / "other.jsonl", [RECORDED, RECORDED | {"prompt_ids": [1]}])
    assert "row 2: the prompt of position 0 has other tokens" in message(other)
    other = write(tmp_path / "other.jsonl", [RECORDED, RECORDED | {"rejected_ids": [2]}])
    assert "row 2: sample 1 of position 0 has other tokens than in a row before" in message(other)
