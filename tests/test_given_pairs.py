"""Given preference sets as groups by position: tokens, epochs, what a run exported, real data."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from judges.errors import UserError
from pipeline.batch import update_batch
from pipeline.given_pairs import GivenPairs
from tests.pair_helpers import (
    EOS,
    TEMPLATE,
    assistant,
    given,
    ids_of,
    only,
    tokens,
    user,
    write,
)
from workers.learner.needs import Needs
from workers.messages import BatchLabel, BatchPair, Fate, Label, Pair, PromptGroup
from workers.models.resolve import resolve_model
from workers.seeds import derive_seed

DATA = Path(__file__).parents[2] / "shared/data"
HH = DATA / "hh_rlhf_harmless_test/test.jsonl.gz"
SHAREGPT = DATA / "dpo_en_demo/dpo_en_demo.json"
WORDS = "abcdefghijklmnop"


def text_row(prompt: str, chosen: str = " q", rejected: str = " r", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


# Tokens.


@pytest.mark.parametrize(
    ("prompt", "completion", "prompt_ids", "ids"),
    [
        ("a b", " c d", "<s> a b", "c d </s>"),
        ("a b ", "c d", "<s> a b", "c d </s>"),
        # Together "bc" is one word that nobody knows, so the completion is tokenised alone.
        ("a b", "c d", "<s> a b", "c d </s>"),
        # A text that ends already does not end twice.
        ("a b", " c </s>", "<s> a b", "c </s>"),
    ],
)
def test_text(tmp_path: Path, prompt: str, completion: str, prompt_ids: str, ids: str) -> None:
    group = only(given(tmp_path, [text_row(prompt, completion)]).take(0, 1, 0))
    assert tokens(group)[:2] == [ids_of(prompt_ids), ids_of(ids)]
    assert group.completions[0].finished


def test_a_tokenizer_without_an_end(tmp_path: Path) -> None:
    found = given(tmp_path, [text_row("a")])
    found._encoder._eos = None
    with pytest.raises(UserError, match="row 1: the policy's tokenizer has no EOS token"):
        found.check()


def test_a_turn_may_end_with_another_token_than_the_tokenizers_eos(tmp_path: Path) -> None:
    """As Gemma's and Llama 3's do: the model's generation config names it."""
    template = TEMPLATE.replace("</s>", "q")
    row = {"prompt": [user("a")], "chosen": [assistant("b c")], "rejected": [assistant("d")]}
    group = only(given(tmp_path, [row], template, ends=[ids_of("q")[0]]).take(0, 1, 0))
    assert tokens(group)[1:] == [ids_of("b c q"), ids_of("d q")]
    with pytest.raises(UserError, match="ends no turn of the assistant with '</s>'"):
        given(tmp_path, [row], template).check()


def test_arguments_of_the_template_go_to_prompts_and_completions(tmp_path: Path) -> None:
    template = "{% if terse %}o {% endif %}" + TEMPLATE.replace(
        "{{ m.content }} </s>", "{{ m.content }} {% if terse %}p {% endif %}</s>"
    )
    row = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
    found = []
    for args in ({"terse": True}, {"terse": False}, None):
        found.append(
            tokens(only(given(tmp_path, [row], template, template_args=args).take(0, 1, 0)))
        )
    assert found[0] == [ids_of("o u a t"), ids_of("b p </s>"), ids_of("c p </s>")]
    assert found[1] == found[2] == [ids_of("u a t"), ids_of("b </s>"), ids_of("c </s>")]


def test_what_was_only_written_has_no_log_probabilities_and_no_judge(tmp_path: Path) -> None:
    group = only(given(tmp_path, [text_row("a", " b c", " d")]).take(0, 1, 5))
    for completion, length in zip(group.completions, (3, 2), strict=True):
        assert completion.logprobs.dtype == np.float32
        assert completion.ids.dtype == np.int64
        assert np.isnan(completion.logprobs).tolist() == [True] * length
        assert np.isnan(completion.sampling_logprobs).tolist() == [True] * length
        assert (completion.version, completion.last_version) == (5, None)
        assert completion.reference_share == 0.0
    judgement = group.judgement
    assert np.isnan(judgement.scores).tolist() == [True, True]
    assert judgement.scores.dtype == np.float64
    assert judgement.declined is not None
    assert judgement.declined.tolist() == [True, True]
    assert judgement.reasons == (None, None)
    batch = update_batch([group], Needs())
    assert batch.examples == (BatchPair(0, 1, 1.0),)
    assert [item.completion.ids.tolist() for item in batch.completions] == tokens(group)[1:]


# Epochs.


def prompts_of(groups: list[PromptGroup]) -> str:
    return "".join(str(group.prompt.content) for group in groups)


def test_each_row_once_an_epoch_in_an_order_of_its_own(tmp_path: Path) -> None:
    rows = [text_row(word) for word in WORDS]
    pairs = given(tmp_path, rows, order="shuffled", run_seed=3)
    assert len(pairs) == 16
    epochs = [prompts_of(pairs.take(16 * epoch, 16, 0)) for epoch in range(3)]
    assert len({*epochs, WORDS}) == 4
    for epoch, found in enumerate(epochs):
        order = np.random.default_rng(derive_seed(3, "pairs", epoch)).permutation(16)
        assert found == "".join(WORDS[at] for at in order)
    other = given(tmp_path, rows, order="shuffled", run_seed=4)
    assert prompts_of(other.take(0, 16, 0)) != epochs[0]


@pytest.mark.parametrize("order", ["shuffled", "file"])
def test_positions_are_the_same_however_they_are_asked_for(tmp_path: Path, order: str) -> None:
    pairs = given(tmp_path, [text_row(word) for word in "abcde"], order=order)
    whole = pairs.take(0, 15, 0)
    assert [group.prompt.position for group in whole] == list(range(15))
    for start, count in ((12, 3), (0, 1), (3, 9), (5, 5), (4, 1), (7, 0)):
        found = pairs.take(start, count, 0)
        assert prompts_of(found) == prompts_of(whole[start : start + count])
        assert [only([g]).prompt.position for g in found] == list(range(start, start + count))
    if order == "file":
        assert prompts_of(whole) == "abcde" * 3


def test_rows_that_are_too_long_or_empty_are_dropped_where_that_is_asked(tmp_path: Path) -> None:
    rows = [
        text_row("a"),  # <s> a q </s>: 4 tokens
        text_row("a b", " c d"),  # 6
        text_row("b", rejected=""),
        text_row("c", rejected=" e f"),  # 5
        text_row("d", chosen=" "),
    ]
    limits: dict[str, Any] = {"too_long": "drop", "max_tokens": 5}
    for order in ("file", "shuffled"):
        pairs = given(tmp_path, rows, order=order, **limits)
        assert len(pairs) == 2  # also before the check
        pairs.check()
        assert pairs.left_out == {"too_long": 1, "empty": 2}
        assert sorted(prompts_of(pairs.take(0, 2, 0))) == ["a", "c"]
        assert sorted(prompts_of(pairs.take(2, 2, 0))) == ["a", "c"]
    message = r"row 2: prompt and completion have 6 tokens, there is room for 5: shorten the row"
    with pytest.raises(UserError, match=message):
        given(tmp_path, rows, max_tokens=5).check()
    assert prompts_of(given(tmp_path, rows, max_tokens=5).take(0, 1, 0)) == "a"  # not asked for yet
    with pytest.raises(UserError, match=r"no rows to learn from; left out: too_long 1, empty 2"):
        given(tmp_path, [rows[1], rows[2], rows[4]], **limits).check()


# What a run exported.


def exported(
    position: int, chosen: int, rejected: int, probs: float = 1.0, **more: Any
) -> dict[str, Any]:
    """A row of our export: sample s at position p has the ids p, s (and the end for an even s).

    Its text has no space between the two words: nobody knows them so, were it tokenised.
    """
    row: dict[str, Any] = {"prompt": "a text", "prompt_ids": [1, 3 + position]}
    for side, sample in (("chosen", chosen), ("rejected", rejected)):
        ids = [3 + position, 3 + sample, *([EOS] if sample % 2 == 0 else [])]
        row[side] = WORDS[position] + WORDS[sample]
        row[f"{side}_ids"] = ids
        row[f"{side}_logprobs"] = [-0.5 - sample] * len(ids)
        row[f"{side}_sampling_logprobs"] = None if sample == 0 else [-0.25] * len(ids)
        row[f"{side}_sample"] = sample
        row[f"{side}_finished"] = sample % 2 == 0
        row[f"{side}_seed"] = 100 * position + sample
        row[f"{side}_reference_share"] = 1.0 if sample == 3 else 0.0
    stream = {"position": position, "positions": 6, "round": 0, "version": 2}
    return row | {"label_prob": probs} | stream | more


def test_an_export_keeps_its_positions_and_shares_completions(tmp_path: Path) -> None:
    rows = [
        exported(4, 3, 1, 0.75),
        exported(1, 2, 0, topic="x"),
        exported(4, 1, 0),
        exported(4, 3, 0, 0.25),
    ]
    # Neither shuffled nor tokenised again, and there is no template.
    pairs = given(tmp_path, rows, order="shuffled", chat=True)
    pairs.check()
    assert len(pairs) == 6
    assert pairs.recorded
    found = pairs.take(0, 12, 9)
    assert [only([group]).prompt.position for group in found] == [1, 4, 7, 10]
    first, second = found[:2]
    assert [tokens(group) for group in found[2:]] == [tokens(first), tokens(second)]
    assert tokens(first) == [[1, 4], [4, 3, 2], [4, 5, 2]]
    assert first.pairs == (Pair(1, 1, 0, 1.0, Fate.LEARN),)
    assert first.prompt.columns == {"topic": "x"}
    assert tokens(second) == [[1, 7], [7, 3, 2], [7, 4], [7, 6]]  # samples 0, 1, 3
    assert second.pairs == (
        Pair(4, 2, 1, 0.75, Fate.LEARN),
        Pair(4, 1, 0, 1.0, Fate.LEARN),
        Pair(4, 2, 0, 0.25, Fate.LEARN),
    )
    assert [c.finished for c in second.completions] == [True, False, False]
    assert [c.seed for c in second.completions] == [400, 401, 403]
    assert [c.reference_share for c in second.completions] == [0.0, 0.0, 1.0]
    assert [c.text for c in second.completions] == ["ea", "eb", "ed"]
    assert [c.version for c in second.completions] == [9] * 3
    assert [c.logprobs.tolist() for c in second.completions] == [[-0.5] * 3, [-1.5] * 2, [-3.5] * 2]
    behaviour = [c.sampling_logprobs.tolist() for c in second.completions]
    assert behaviour == [[-0.5] * 3, [-0.25] * 2, [-0.25] * 2]
    batch = update_batch([second], Needs())  # each completion stands there once
    assert [item.completion.ids.tolist() for item in batch.completions] == [
        [7, 6],
        [7, 4],
        [7, 3, 2],
    ]
    assert batch.examples == (BatchPair(0, 1, 0.75), BatchPair(1, 2, 1.0), BatchPair(0, 2, 0.25))
    assert [g.prompt.position for g in pairs.take(10, 1, 0)] == [10]
    assert pairs.take(8, 2, 0) == []


def test_the_first_groups_are_those_that_there_are(tmp_path: Path) -> None:
    pairs = given(tmp_path, [exported(4, 3, 1), exported(1, 2, 0), exported(5, 2, 0)])
    assert [[g.prompt.position for g in pairs.first(n)] for n in (0, 1, 2, 3, 9)] == [
        [],
        [1],
        [1, 4],
        [1, 4, 5],
        [1, 4, 5],  # of one epoch
    ]
    assert {c.version for g in pairs.first(2, 7) for c in g.completions} == {7}
    assert {c.version for g in pairs.first(2) for c in g.completions} == {0}
    plain = given(tmp_path, [text_row(word) for word in "abc"], order="shuffled")
    assert prompts_of(plain.first(2)) == prompts_of(plain.take(0, 2, 0))
    assert prompts_of(plain.first(9)) == prompts_of(plain.take(0, 3, 0))
    long = [text_row("a"), text_row("b", " c d"), text_row("c")]
    dropping = given(tmp_path, long, too_long="drop", max_tokens=4)
    assert prompts_of(dropping.first(9)) == "ac"
    assert (dropping.rows, pairs.rows, plain.rows) == (2, 3, 3)


def row_of_another(tmp_path: Path, vocabulary: int | None, **columns: Any) -> str:
    """What is said of a set whose second row has these columns."""
    rows = [exported(0, 0, 1), exported(1, 2, 1) | columns]
    with pytest.raises(UserError) as told:
        given(tmp_path, rows, vocabulary=vocabulary).check()
    assert "\n" not in str(told.value)
    return str(told.value).partition(" row ")[2]


def test_ids_are_of_the_policys_vocabulary(tmp_path: Path) -> None:
    """The largest id of all is 5: position 1's prompt 4, samples 3 to 5."""
    rows = [exported(0, 0, 1), exported(1, 2, 1)]
    given(tmp_path, rows, vocabulary=6).check()
    message = "exported by a run of another model? train the same model"
    assert row_of_another(tmp_path, 5) == (
        f"2: chosen_ids: 5 is no token id of the policy's 5: {message}"
    )
    assert row_of_another(tmp_path, 24, rejected_ids=[24, 24]).startswith("2: rejected_ids: 24 is")
    assert row_of_another(tmp_path, 24, prompt_ids=[1, 99]).startswith("2: prompt_ids: 99 is")
    assert row_of_another(tmp_path, None, chosen_ids=[-1, 5, 2]) == (
        f"2: chosen_ids: -1 is no token id from 0 on: {message}"
    )
    with pytest.raises(UserError, match="row 2: chosen_ids: 5 is no token id of the policy's 5"):
        given(tmp_path, rows, vocabulary=5, too_long="drop").take(0, 2, 0)


def test_tokens_are_those_of_the_text(tmp_path: Path) -> None:
    said = row_of_another(tmp_path, 24, rejected="b a")  # its tokens are b b
    assert said == (
        "2: rejected_ids: the tokens are of another tokenizer, here they read 'b b': train the "
        "same model, or drop the columns …_ids to tokenise the text"
    )
    given(tmp_path, [exported(0, 0, 1) | {"chosen": " a\na "}]).check()
    rows = [exported(0, sample, 9) for sample in range(8)]
    later = exported(0, 8, 9) | {"chosen": "other"}  # only the first few are read back
    given(tmp_path, [*rows, later]).check()
    with pytest.raises(UserError, match="row 8: chosen_ids: the tokens are of another"):
        given(tmp_path, [*rows[:7], later]).check()


def test_a_tie_that_a_run_learned_from_is_learned_from_again(tmp_path: Path) -> None:
    row = exported(0, 2, 0, 0.5)
    row |= {"rejected_ids": row["chosen_ids"]}
    group = only(given(tmp_path, [row]).take(0, 1, 0))
    assert group.pairs == (Pair(0, 1, 0, 0.5, Fate.LEARN),)


def test_a_row_of_an_export_that_is_dropped_leaves_its_position(tmp_path: Path) -> None:
    rows = [exported(0, 1, 3), exported(2, 2, 0), exported(2, 1, 3)]  # 4, 5, 4 tokens
    pairs = given(tmp_path, rows, too_long="drop", max_tokens=4)
    pairs.check()
    assert (len(pairs), pairs.left_out) == (6, {"too_long": 1})
    groups = pairs.take(0, 6, 0)
    assert [tokens(group)[1:] for group in groups] == [[[3, 4], [3, 6]], [[5, 4], [5, 6]]]
    assert [len(group.pairs) for group in groups] == [1, 1]


def test_tokens_without_a_place_are_a_plain_set(tmp_path: Path) -> None:
    """Tokens are taken as they are, and what is not recorded of them is read off them."""
    names = ("prompt", "prompt_ids", "chosen", "chosen_ids", "rejected", "rejected_ids")
    rows = [{name: exported(at, 2, 1)[name] for name in names} | {"position": 5} for at in range(2)]
    pairs = given(tmp_path, rows)
    groups = pairs.take(0, 2, 0)
    assert len(pairs) == 2
    assert not pairs.recorded
    assert [tokens(g) for g in groups] == [[[1, 3 + p], [3 + p, 5, 2], [3 + p, 4]] for p in (0, 1)]
    for group in groups:
        assert [c.finished for c in group.completions] == [True, False]
        assert all(np.isnan(c.logprobs).all() for c in group.completions)
        assert all(np.isnan(c.sampling_logprobs).all() for c in group.completions)
        assert group.pairs[0].fate is Fate.LEARN


def test_labels_of_an_export(tmp_path: Path) -> None:
    def row(position: int, sample: int, label: bool) -> dict[str, Any]:
        pair = exported(position, sample, sample)
        record = {n.replace("chosen", "completion"): v for n, v in pair.items() if "chosen" in n}
        shared = ("prompt", "prompt_ids", "position", "positions", "round", "version")
        return record | {name: pair[name] for name in shared} | {"label": label}

    pairs = given(tmp_path, [row(3, 2, False), row(3, 0, True), row(0, 1, True)])
    assert (pairs.unpaired, len(pairs)) == (True, 6)
    first, second = (only([group]) for group in pairs.take(0, 6, 1))
    assert first.labels == (Label(0, 0, True, Fate.LEARN),)
    assert second.labels == (Label(3, 1, False, Fate.LEARN), Label(3, 0, True, Fate.LEARN))
    assert tokens(second) == [[1, 6], [6, 3, 2], [6, 5, 2]]
    assert second.completions[1].logprobs.tolist() == [-2.5] * 3
    batch = update_batch([second], Needs(records="unpaired"))
    labels = [(batch.completions[e.completion], e) for e in batch.examples]
    assert [(item.completion.seed, e) for item, e in labels] == [
        (302, BatchLabel(0, False, "a text")),
        (300, BatchLabel(1, True, "a text")),
    ]


# Real data, as other trainers tokenise it.


def real_tokenizer(name: str, data: Path) -> Any:
    if not data.exists():
        pytest.skip(f"no {data}")
    try:
        return AutoTokenizer.from_pretrained(resolve_model(name))
    except UserError as error:
        pytest.skip(str(error))


def real_pairs(data: Path, tokenizer: Any, **options: Any) -> GivenPairs:
    defaults: dict[str, Any] = {"chat": None, "order": "file", "too_long": "error"}
    sizes = {"max_tokens": 100_000, "run_seed": 0}
    return GivenPairs(str(data), tokenizer, **{**defaults, **sizes, **options})


def dialogues() -> list[tuple[str, str, str]]:
    """The file's prompts with both completions, found another way: by their common beginning."""
    found = []
    for line in gzip.decompress(HH.read_bytes()).splitlines():
        row = json.loads(line)
        ends = [row[side].rindex("\n\nAssistant:") + 12 for side in ("chosen", "rejected")]
        before = row["chosen"][: ends[0]]
        sides = row["chosen"][ends[0] :], row["rejected"][ends[1] :]
        if row["rejected"][: ends[1]] == before and all(side.strip() for side in sides):
            found.append((before, *sides))
    return found


@pytest.mark.slow
def test_hh_rlhf_as_text() -> None:
    tokenizer = real_tokenizer("stories15m", HH)
    pairs = real_pairs(HH, tokenizer)
    pairs.check()
    expected = dialogues()
    assert len(pairs) == len(expected) == 2303
    assert pairs.left_out == Counter(parted=5, empty=4)
    for group, (prompt, *sides) in zip(pairs.take(0, 2303, 0), expected, strict=True):
        assert group.prompt.content == prompt
        assert [c.text for c in group.completions] == sides
        ids = group.prompt.ids.tolist()
        assert ids == tokenizer(prompt)["input_ids"]
        for completion, side in zip(group.completions, sides, strict=True):
            # TRL: the tokens of prompt + completion + EOS after those of the prompt.
            together = tokenizer(prompt + side + tokenizer.eos_token)["input_ids"]
            assert [*ids, *completion.ids.tolist()] == together


@pytest.mark.parametrize(
    "data", [pytest.param(HH, marks=pytest.mark.slow), SHAREGPT], ids=["hh-rlhf", "sharegpt"]
)
def test_chat(data: Path) -> None:
    tokenizer = real_tokenizer("smollm2-135m-instruct", data)
    pairs = real_pairs(data, tokenizer)
    pairs.check()
    assert len(pairs) == (2303 if data is HH else 300)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for group in pairs.take(0, 300, 0):
        messages = list(group.prompt.content)
        assert messages[-1]["role"] == "user"
        written = tokenizer.apply_chat_template(messages, tokenize=False)
        opened = f"{written}<|im_start|>assistant\n"
        assert tokenizer.decode(group.prompt.ids) == opened
        for completion in group.completions:
            # TRL keeps the line break that the template writes after the end: never sampled.
            whole = tokenizer.apply_chat_template(
                [*messages, {"role": "assistant", "content": completion.text}], return_dict=False
            )
            ids = [*group.prompt.ids.tolist(), *completion.ids.tolist()]
            assert [*ids, *newline] == whole
            assert completion.ids[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(completion.ids[:-1]) == completion.text
    if data is SHAREGPT:
        rows = json.loads(SHAREGPT.read_text())
        found = [[c.text for c in group.completions] for group in pairs.take(0, 300, 0)]
        assert found == [[row["chosen"]["value"], row["rejected"]["value"]] for row in rows]


@pytest.mark.parametrize(("prompt", "chosen"), [("Once", " upon a time"), ("Once.\n", "Upon it")])
def test_a_space_before_the_completion_is_not_invented(
    stories15m: Path, tmp_path: Path, prompt: str, chosen: str
) -> None:
    """SentencePiece begins every text with a space: tokenised alone, a completion gets one more."""
    tokenizer = AutoTokenizer.from_pretrained(stories15m)
    path = write(tmp_path / "set.jsonl", [text_row(prompt, chosen, " there was a cat")])
    group = only(real_pairs(path, tokenizer).take(0, 1, 0))
    ids = group.completions[0].ids.tolist()[:-1]
    assert tokenizer.decode([*group.prompt.ids.tolist(), *ids]) == f"<s> {prompt}{chosen}"
    assert tokenizer(chosen, add_special_tokens=False)["input_ids"] != ids
