"""Probes: which texts are scored, and what is made of their log-probabilities."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from judges.errors import UserError
from pipeline.completion_encoder import CompletionEncoder
from pipeline.drift import Drift
from pipeline.drift_options import HeldOutOptions
from pipeline.probes import Probes, probe, read_bad, read_held_out
from tests.prompt_helpers import make_tokenizer, write_jsonl
from workers.messages import (
    BatchCompletion,
    Completion,
    Fate,
    FloatArray,
    Judgement,
    Label,
    Pair,
    Prompt,
    PromptGroup,
    Round,
    UpdateBatch,
)

A, B, C = 5, 7, 8
"""Words of the tokenizer: "once", "a", "time"."""


class Policy:
    """Every token ``id`` has log-probability −id · ``surprise`` after whatever prompt."""

    def __init__(self, surprise: float = 1.0) -> None:
        self.surprise = surprise
        self.asked: list[list[tuple[list[int], list[int]]]] = []

    def score(self, batches: Sequence[UpdateBatch]) -> list[list[FloatArray]]:
        self.asked += [[shown(item) for item in batch.completions] for batch in batches]
        return [
            [
                np.float32(-self.surprise) * c.completion.ids.astype(np.float32)
                for c in b.completions
            ]
            for b in batches
        ]


def shown(item: BatchCompletion) -> tuple[list[int], list[int]]:
    return item.prompt_ids.tolist(), item.completion.ids.tolist()


def of_prompt(prompt: Sequence[int], *completions: Sequence[int]) -> list[BatchCompletion]:
    return [probe(np.array(prompt, np.int64), ids) for ids in completions]


def group_of(
    position: int, *samples: Sequence[int], pairs: Any = (), labels: Any = ()
) -> PromptGroup:
    """A prompt whose one token is its position; pairs and labels are (first, second, fate)."""
    return PromptGroup(
        Prompt(position, np.array([position], np.int64), ""),
        tuple(
            Completion(
                position=position,
                sample=sample,
                seed=0,
                version=0,
                ids=np.array(ids, np.int64),
                logprobs=np.full(len(ids), -1, np.float32),
                sampling_logprobs=None,
                finished=True,
                text="",
            )
            for sample, ids in enumerate(samples)
        ),
        Judgement(position, np.zeros(len(samples)), (None,) * len(samples)),
        tuple(Pair(position, chosen, rejected, 1.0, fate) for chosen, rejected, fate in pairs),
        tuple(Label(position, sample, good, fate) for sample, good, fate in labels),
    )


def round_of(index: int, *groups: PromptGroup) -> Round:
    return Round(index, index, groups, "judge", {})


LEARN, TIE = Fate.LEARN, Fate.TIE
FIRST = round_of(
    0,
    group_of(3, [1, 2], [4], pairs=[(1, 0, LEARN)]),
    group_of(4, [9], [9, 9], pairs=[(0, 1, TIE)]),
    group_of(6, [1], [5, 5], pairs=[(0, 1, LEARN)]),
)
"""Chosen sum to 4 and 1, rejected to 3 and 10."""

NOTHING: Mapping[str, float | None] = dict.fromkeys(
    ("chosen_logps_change", "rejected_logps_change", "bad_mass", "bad_logps", "held_out_nll")
)


def test_the_first_rounds_pairs_are_followed() -> None:
    probes = Probes()
    policy = Policy(surprise=1.0)
    assert probes.measures(FIRST, policy.score) == NOTHING | {
        "chosen_logps_change": 0.0,
        "rejected_logps_change": 0.0,
    }
    taught = [([3], [4]), ([3], [1, 2]), ([6], [1]), ([6], [5, 5])]
    assert policy.asked == [taught]

    later = round_of(1, group_of(3, [1], [2], pairs=[(0, 1, LEARN)]))
    moved = Policy(surprise=1.5)
    measures = probes.measures(later, moved.score)
    assert moved.asked == [taught]
    assert measures["chosen_logps_change"] == -0.5 * (4 + 1) / 2
    assert measures["rejected_logps_change"] == -0.5 * (3 + 10) / 2


def test_no_more_than_8_pairs_are_followed() -> None:
    groups = [group_of(n, [1], [2], [3], pairs=[(0, 1, LEARN), (1, 2, LEARN)]) for n in range(7)]
    policy = Policy()
    Probes().measures(round_of(0, *groups), policy.score)
    (asked,) = policy.asked
    assert len(asked) == 16
    assert asked[-4:] == [([3], [1]), ([3], [2]), ([3], [2]), ([3], [3])]


def test_labels_have_sides_too() -> None:
    samples = [[1], [2], [3], [4]]
    labels = [(0, True, LEARN), (1, False, LEARN), (2, True, LEARN), (3, True, TIE)]
    probes = Probes()
    probes.measures(round_of(0, group_of(1, *samples, labels=labels)), Policy(1.0).score)
    measures = probes.measures(round_of(1), Policy(2.0).score)
    assert measures["chosen_logps_change"] == -(1 + 3) / 2
    assert measures["rejected_logps_change"] == -2.0


def test_no_more_than_8_labels_of_a_kind_are_followed() -> None:
    labels = [(n, n != 3, LEARN) for n in range(12)]
    policy = Policy()
    group = group_of(1, *[[n] for n in range(12)], labels=labels)
    Probes().measures(round_of(0, group), policy.score)
    desirable = [0, 1, 2, 4, 5, 6, 7, 8]
    assert policy.asked == [[([1], [n]) for n in [*desirable, 3]]]


def test_a_round_that_teaches_nothing_leaves_the_pairs_to_the_next() -> None:
    probes, policy = Probes(), Policy()
    tied = round_of(0, group_of(3, [1], [2], pairs=[(0, 1, TIE)]))
    assert probes.measures(tied, policy.score) == NOTHING
    assert policy.asked == []
    assert probes.measures(FIRST, policy.score)["chosen_logps_change"] == 0.0
    assert len(policy.asked) == 1


def test_without_a_policy_to_ask_nothing_is_known() -> None:
    assert Probes(of_prompt([1], [2]), of_prompt([1], [2])).measures(FIRST) == NOTHING


def test_bad_mass_is_a_mean_over_prompts_and_bad_logps_over_completions() -> None:
    # exp(−1) + exp(−2 − 3) of the first prompt, exp(−4) of the second.
    bad = [*of_prompt([1], [1], [2, 3]), *of_prompt([2], [4])]
    policy = Policy()
    measures = Probes(bad).measures(round_of(0), policy.score)
    mass = (math.exp(-1) + math.exp(-5) + math.exp(-4)) / 2
    assert measures["bad_mass"] == pytest.approx(mass, rel=1e-6)
    assert measures["bad_logps"] == pytest.approx(-(1 + 5 + 4) / 3, rel=1e-6)


def test_held_out_nll_is_a_mean_over_tokens() -> None:
    held_out = [*of_prompt([1], [1, 2, 3]), *of_prompt([1], [4])]
    measures = Probes((), held_out).measures(round_of(0), Policy().score)
    assert measures["held_out_nll"] == (1 + 2 + 3 + 4) / 4


def test_all_probes_are_scored_in_one_batch() -> None:
    policy = Policy()
    measures = Probes(of_prompt([1], [2]), of_prompt([3], [4, 6])).measures(FIRST, policy.score)
    (asked,) = policy.asked
    assert asked[4:] == [([1], [2]), ([3], [4, 6])]
    assert measures == {
        "chosen_logps_change": 0.0,
        "rejected_logps_change": 0.0,
        "bad_mass": pytest.approx(math.exp(-2)),
        "bad_logps": -2.0,
        "held_out_nll": 5.0,
    }


def test_a_resumed_run_follows_the_same_pairs() -> None:
    probes, resumed = Probes(), Probes()
    probes.measures(FIRST, Policy(0.1).score)  # sums that are no short decimals
    resumed.load(json.loads(json.dumps(probes.state())))
    assert resumed.state() == probes.state()
    later = round_of(1, group_of(3, [1], [2], pairs=[(0, 1, LEARN)]))
    unmoved = resumed.measures(later, Policy(0.1).score)
    assert unmoved["chosen_logps_change"] == unmoved["rejected_logps_change"] == 0.0
    moved = Policy(0.7).score
    assert resumed.measures(later, moved) == probes.measures(later, moved)


def test_drift_scores_a_round_once_and_a_resumed_run_not_again() -> None:
    drift, resumed = Drift(probes=Probes()), Drift(probes=Probes())
    policy = Policy(1.0)
    drift.of(FIRST, policy.score)
    second = round_of(1, group_of(3, [1], [2], pairs=[(0, 1, LEARN)]))
    policy.surprise = 2.0
    panel = drift.of(second, policy.score)
    assert panel["chosen_logps_change"] == -(4 + 1) / 2

    resumed.load(json.loads(json.dumps(drift.state())))
    policy.surprise = 3.0  # the policy has moved on within the round
    assert resumed.of(second, policy.score) == drift.of(second, policy.score) == panel
    assert len(policy.asked) == 2
    third = replace(second, index=2)
    assert resumed.of(third, policy.score)["chosen_logps_change"] == -2 * (4 + 1) / 2


TOKENIZER = make_tokenizer()
ENCODER = CompletionEncoder(TOKENIZER)
BOS, EOS = 1, 2


def bad_of(tmp_path: Path, *rows: Any, context: int = 64, **options: Any) -> list[BatchCompletion]:
    path = write_jsonl(tmp_path / "bad.jsonl", list(rows))
    return read_bad(str(path), ENCODER, context, **options)


def test_bad_completions_end_and_are_counted_once(tmp_path: Path) -> None:
    items = bad_of(
        tmp_path,
        {"prompt": "once", "completion": "a time"},
        {"prompt": "once", "completion": "a"},
        {"prompt": "once", "completion": "a"},
        {"prompt": "once a", "completion": "a"},
    )
    assert [shown(item) for item in items] == [
        ([BOS, A], [B, C, EOS]),
        ([BOS, A], [B, EOS]),
        ([BOS, A, B], [B, EOS]),
    ]
    assert not any(item.learn for item in items)


def test_bad_completions_of_a_chat_stand_in_its_template(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% if m.role == 'assistant' %} </s>{% endif %} {% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    user = [{"role": "user", "content": "once"}]
    path = write_jsonl(
        tmp_path / "bad.jsonl",
        [
            {"prompt": user, "completion": "a time"},
            {"prompt": user, "completion": [{"role": "assistant", "content": "a"}]},
            {"prompt": "once", "completion": [{"role": "assistant", "content": "time"}]},
        ],
    )
    items = read_bad(str(path), CompletionEncoder(tokenizer), 64)
    prompt = ENCODER.encode_prompt(user).tolist()
    assert [shown(item) for item in items] == [
        (prompt, [B, C, EOS]),
        (prompt, [B, EOS]),
        (prompt, [C, EOS]),
    ]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "once", "completions": "a"}, {}, "no completion (did you mean completions?)"),
        ({"prompt": "once", "completion": None}, {}, "the completion is null"),
        ({"prompt": "", "completion": "a"}, {}, "the prompt is empty"),
        (
            {"prompt": "once", "completion": "a a"},
            {"context": 4},
            "have 5 tokens, the context is 4",
        ),
        (
            {"prompt": "once", "completion": [{"role": "assistant", "content": "a"}]},
            {"chat": False},
            "drop chat: false or give text",
        ),
        (
            {"prompt": "once", "completion": [{"role": "user", "content": "a"}]},
            {},
            "not one message of the assistant",
        ),
    ],
)
def test_a_bad_row_that_is_none_is_named(
    tmp_path: Path, row: Any, options: Any, message: str
) -> None:
    with pytest.raises(UserError) as raised:
        bad_of(tmp_path, {"prompt": "once", "completion": "a"}, row, **options)
    assert str(raised.value).startswith(f"drift.bad={tmp_path / 'bad.jsonl'} row 2: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bad_files_that_are_missing_or_empty_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^drift.bad=.*nowhere.jsonl: no such file"):
        read_bad(str(tmp_path / "nowhere.jsonl"), ENCODER, 64)
    with pytest.raises(UserError, match=r"^drift.bad=.*bad.jsonl: no rows"):
        bad_of(tmp_path)


def held_out_of(
    tmp_path: Path, *rows: Any, context: int = 64, tokenizer: Any = TOKENIZER, **options: Any
) -> list[tuple[list[int], list[int]]]:
    path = write_jsonl(tmp_path / "text.jsonl", list(rows))
    given = HeldOutOptions(path=str(path), **options)
    return [shown(item) for item in read_held_out(given, tokenizer, context)]


def test_held_out_text_begins_with_bos_and_is_cut_to_the_context(tmp_path: Path) -> None:
    rows = [{"text": "once a time"}, {"text": ""}, {"text": "a"}, {"text": "time"}]
    assert held_out_of(tmp_path, *rows, context=3, count=2) == [([BOS], [A, B]), ([BOS], [B])]


def test_without_a_bos_the_first_token_is_the_prompt(tmp_path: Path) -> None:
    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": TOKENIZER(text, add_special_tokens=False)["input_ids"]}

    rows = [{"text": "once a time"}, {"text": "a"}]
    assert held_out_of(tmp_path, *rows, tokenizer=tokenizer) == [([A], [B, C])]


def test_held_out_text_may_be_of_a_split_and_column(tmp_path: Path) -> None:
    rows = [{"story": "a"}, {"story": "time", "split": "test"}]
    assert held_out_of(tmp_path, *rows, split="test", column="story") == [([BOS], [C])]


def test_held_out_text_that_is_none_is_named(tmp_path: Path) -> None:
    where = rf"^drift\.held_out\.path={tmp_path}/text\.jsonl"
    with pytest.raises(UserError, match=where + r" row 2: text is no text"):
        held_out_of(tmp_path, {"text": "a"}, {"text": 3})
    with pytest.raises(UserError, match=where + r": no text of more than one token"):
        held_out_of(tmp_path, {"text": ""})
    with pytest.raises(UserError, match=where + r": no column 'text'; set drift.held_out.column"):
        held_out_of(tmp_path, {"texts": "a"})
