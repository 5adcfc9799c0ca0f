"""Exported preference sets, read back by ``datasets``."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from judges.errors import UserError
from judges.interface import Text
from pipeline.config import parse_config
from pipeline.export import Exported, export_pairs
from pipeline.ledger import Ledger
from pipeline.run_directory import create_run_directory
from workers.messages import Completion, Fate, Judgement, Label, Pair, Prompt, PromptGroup, Round

CHAT: Text = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi?"}]


def group_of(
    position: int, content: Text, pairs: list[tuple[int, int, float, Fate]]
) -> PromptGroup:
    completions = tuple(
        Completion(
            position=position,
            sample=sample,
            seed=sample,
            version=4,
            ids=np.array([position, sample, 2], np.int64),
            logprobs=np.zeros(3, np.float32),
            sampling_logprobs=None,
            finished=True,
            text=f" “{position}”\n{sample}",
        )
        for sample in range(3)
    )
    return PromptGroup(
        prompt=Prompt(position, np.array([1, position], np.int64), content),
        completions=completions,
        judgement=Judgement(position, np.zeros(3), (None,) * 3),
        pairs=tuple(Pair(position, *pair) for pair in pairs),
    )


def write_run(run: Path, *contents: Text) -> Path:
    """Two rounds; a prompt has a learned pair (2 over 0), a tie and, in round 1, another."""
    ledger = Ledger(run / "ledger")
    learned, tie = (2, 0, 0.75, Fate.LEARN), (0, 1, 0.5, Fate.TIE)
    for index, extra in enumerate([[], [(1, 2, 0.6, Fate.LEARN)]]):
        groups = tuple(
            group_of(10 * index + at, content, [learned, tie, *extra])
            for at, content in enumerate(contents)
        )
        ledger.append(Round(index, 4 * index, groups, judge="j", seconds={}))
    return run


def load(path: Path, cache: Path) -> list[dict[str, Any]]:
    """The set as ``datasets`` reads it."""
    if path.suffix == ".parquet":
        read = datasets.Dataset.from_parquet(str(path), cache_dir=str(cache))
    else:
        files = str(path)
        read = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(cache))
    return list(read)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_text(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"set{suffix}"
    found = export_pairs(write_run(tmp_path / "run", "once"), out)
    assert found == Exported(written=3, labels=False, unlearned=0)
    assert found.told(out) == f"3 pairs written to {out}"
    rows = load(out, tmp_path / "cache")
    assert rows[0] == {
        "prompt": "once",
        "chosen": " “0”\n2",
        "rejected": " “0”\n0",
        "prompt_ids": [1, 0],
        "chosen_ids": [0, 2, 2],
        "rejected_ids": [0, 0, 2],
        "chosen_logprobs": [0.0, 0.0, 0.0],
        "rejected_logprobs": [0.0, 0.0, 0.0],
        "chosen_sampling_logprobs": None,
        "rejected_sampling_logprobs": None,
        "chosen_sample": 2,
        "rejected_sample": 0,
        "chosen_seed": 2,
        "rejected_seed": 0,
        "chosen_finished": True,
        "rejected_finished": True,
        "chosen_reference_share": 0.0,
        "rejected_reference_share": 0.0,
        "label_prob": 0.75,
        "round": 0,
        "version": 0,
        "position": 0,
        "positions": 11,
    }
    names = ("round", "version", "position", "chosen", "rejected", "label_prob")
    assert [tuple(row[name] for name in names) for row in rows[1:]] == [
        (1, 4, 10, " “10”\n2", " “10”\n0", 0.75),
        (1, 4, 10, " “10”\n1", " “10”\n2", 0.6),
    ]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_chat(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"set{suffix}"
    assert export_pairs(write_run(tmp_path / "run", CHAT), out).written == 3
    row = load(out, tmp_path / "cache")[0]
    assert row["prompt"] == CHAT
    assert row["chosen"] == [{"role": "assistant", "content": " “0”\n2"}]
    assert row["rejected"] == [{"role": "assistant", "content": " “0”\n0"}]
    assert row["chosen_ids"] == [0, 2, 2]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_text_beside_chat_becomes_chat(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"set{suffix}"
    assert export_pairs(write_run(tmp_path / "run", "once", CHAT), out).written == 6
    rows = load(out, tmp_path / "cache")
    assert rows[0]["prompt"] == [{"role": "user", "content": "once"}]
    assert rows[0]["chosen"] == [{"role": "assistant", "content": " “0”\n2"}]
    assert rows[1]["prompt"] == CHAT


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("content", ["once", CHAT])
def test_labels(tmp_path: Path, suffix: str, content: Text) -> None:
    labels = (Label(0, 2, True, Fate.LEARN), Label(0, 1, False, Fate.TIE))
    group = replace(group_of(0, content, []), labels=(*labels, Label(0, 0, False, Fate.LEARN)))
    Ledger(tmp_path / "ledger").append(Round(0, 4, (group,), judge="j", seconds={}))
    out = tmp_path / f"set{suffix}"
    told = export_pairs(tmp_path, out).told(out)
    assert told == f"2 labelled completions written to {out}"
    first, second = load(out, tmp_path / "cache")
    texts = [" “0”\n0", " “0”\n2"]
    if content is CHAT:
        assert first["prompt"] == CHAT
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    assert [first["completion"], second["completion"]] == texts
    assert (first["label"], second["label"]) == (False, True)
    assert (second["completion_ids"], second["version"], second["position"]) == ([0, 2, 2], 4, 0)


def message_of(run: Path, out: Path) -> str:
    with pytest.raises(UserError) as caught:
        export_pairs(run, out)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mistakes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "once")
    out = tmp_path / "set.csv"
    assert message_of(run, out) == f"--out {out}: ends in neither .parquet nor .jsonl; choose one"
    out = tmp_path / "set.jsonl"
    assert message_of(tmp_path, out) == (
        f"{tmp_path}: no ledger with a round in it; give a run's directory"
    )
    assert message_of(tmp_path / "nope", out).startswith(f"{tmp_path / 'nope'}: no ledger")
    assert not out.exists()
    nowhere = tmp_path / "no" / "set.jsonl"
    assert message_of(run, nowhere) == (
        f"--out {nowhere}: no such directory {tmp_path / 'no'}; make it first"
    )


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "once")
    out = tmp_path / "set.jsonl"
    out.write_text("mine")
    assert message_of(run, out) == (
        f"--out {out}: exists already and is not overwritten; choose another name"
    )
    assert out.read_text() == "mine"


def test_a_run_that_learned_from_nothing(tmp_path: Path) -> None:
    group = group_of(0, "once", [(0, 1, 0.5, Fate.TIE)])
    Ledger(tmp_path / "ledger").append(Round(0, 0, (group,), judge="j", seconds={}))
    out = tmp_path / "set.parquet"
    assert message_of(tmp_path, out) == (
        f"{tmp_path}: nothing was learned from in 1 rounds; see `dropped` in "
        f"{tmp_path / 'metrics.jsonl'} for the reasons"
    )
    assert not out.exists()


def test_json_lines_are_one_object_each(tmp_path: Path) -> None:
    out = tmp_path / "set.jsonl"
    export_pairs(write_run(tmp_path / "run", "once\u2028upon"), out)
    lines = out.read_bytes().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["once\u2028upon"] * 3


def test_pairs_that_a_round_ended_before_are_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "once")
    whole, ended, old = ({"unused_pairs": 0}, {"unused_pairs": 1}, None)
    records: list[dict[str, Any]] = [{"kind": "update", "pairs": 9}]
    records += [{"kind": "round", "resampling": found} for found in (whole, ended, old, ended)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = export_pairs(run, tmp_path / "set.jsonl")
    assert found == Exported(written=3, labels=False, unlearned=2)
    assert found.told(Path("x.jsonl")) == (
        "3 pairs written to x.jsonl; 2 of them were sampled and judged but not learned from: "
        "rounds ended early (which ones is not recorded)"
    )


def positions_of(path: Path) -> list[tuple[int, int]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["position"], row["positions"]) for row in rows]


def offline(run: Path, updates: int, positions: list[list[int]], **resampling: Any) -> Path:
    """A run on given pairs of 4 prompts an update, with rounds of these positions' prompts."""
    raw = {
        "run": {"dir": str(run), "updates": updates},
        "prompts": {"pairs": "given.jsonl"},
        "sampling": {"prompts_per_update": 4},
        "resampling": resampling,
    }
    create_run_directory(parse_config(raw, run.parent), {})
    for index, at in enumerate(positions):
        groups = tuple(group_of(position, "once", [(2, 0, 1.0, Fate.LEARN)]) for position in at)
        Ledger(run / "ledger").append(Round(index, 0, groups, "given", seconds={}, given=True))
    return run


def test_an_offline_run_drew_as_many_prompts_as_it_planned(tmp_path: Path) -> None:
    """What it lacked of them, since its set did, is no reason to call the stream shorter."""
    run = offline(tmp_path / "once", 3, [[1, 4]], updates_per_round=math.inf)  # 3 × 4
    export_pairs(run, tmp_path / "once.jsonl")
    assert positions_of(tmp_path / "once.jsonl") == [(1, 12), (4, 12)]
    run = offline(tmp_path / "often", 5, [[1], [9], []], updates_per_round=2)  # 8 + 8 + 4
    export_pairs(run, tmp_path / "often.jsonl")
    assert positions_of(tmp_path / "often.jsonl") == [(1, 20), (9, 20)]
    run = offline(tmp_path / "stopped", 5, [[1]], updates_per_round=2)
    export_pairs(run, tmp_path / "stopped.jsonl")
    assert positions_of(tmp_path / "stopped.jsonl") == [(1, 8)]


def test_an_offline_run_that_found_no_pair_at_all(tmp_path: Path) -> None:
    run = offline(tmp_path / "run", 3, [[]])
    assert "nothing was learned from in 1 rounds" in message_of(run, tmp_path / "set.jsonl")
