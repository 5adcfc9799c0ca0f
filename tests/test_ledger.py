"""The ledger: exact round trips, files others can read, and kills at any point of an append."""

from __future__ import annotations

import json
import math
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.ledger import Ledger
from workers.messages import Completion, Fate, Judgement, Label, Pair, Prompt, PromptGroup, Round

ULP = np.nextafter(np.float32(-0.1), np.float32(0))
"""A float32 that decimal rounding would lose."""


def make_completion(position: int, sample: int, **changes: Any) -> Completion:
    completion = Completion(
        position=position,
        sample=sample,
        seed=2**63 - 1 - sample,
        version=12,
        ids=np.array([5, 31999, 2], np.int64),
        logprobs=np.array([-1.5, ULP, -0.0], np.float32),
        sampling_logprobs=None,
        finished=True,
        text=" once\n“π”",
    )
    return replace(completion, **changes)


def make_round(index: int = 0) -> Round:
    """A scored text prompt, and a compared chat prompt whose second completion is INVALID."""
    text = PromptGroup(
        prompt=Prompt(
            position=40,
            ids=np.array([1, 7], np.int64),
            content='["not", "chat"]',
            columns={
                "answer": "18",
                "n": 3,
                "share": 0.1,
                "none": None,
                "tags": ["a", {"b": True}],
            },
        ),
        completions=(
            make_completion(40, 0),
            make_completion(40, 1, ids=np.array([9], np.int64), logprobs=np.float32([-7]), text=""),
        ),
        judgement=Judgement(40, np.array([1 / 3, -1e300]), ("good", None)),
        pairs=(Pair(40, 0, 1, 0.7310585786300049, Fate.LEARN),),
    )
    chat = PromptGroup(
        prompt=Prompt(
            position=38,
            ids=np.array([1], np.int64),
            content=[{"role": "user", "content": "“π”?"}, {"role": "assistant", "content": ""}],
        ),
        completions=tuple(
            make_completion(
                38,
                sample,
                sampling_logprobs=np.array([-0.25, ULP, 0], np.float32) if sample else None,
                finished=sample == 2,
            )
            for sample in range(3)
        ),
        judgement=Judgement(
            38,
            np.array([0.9, math.nan, 0.2]),
            (None, "timed out", None),
            wins=np.array([[0.5, math.nan, 0.9], [math.nan] * 3, [0.1, math.nan, 0.5]]),
        ),
        pairs=(
            Pair(38, 2, 0, 0.9, Fate.TRUNCATED),
            Pair(38, 0, 1, math.nan, Fate.INVALID),
            Pair(38, 1, 2, 0.5, Fate.TIE),
        ),
    )
    seconds = {"generate": 0.1 + 0.2, "judge": 3e-9}
    return Round(index, 12, (text, chat), "sentiment", seconds, logprob_gap=1e-5 / 3)


def require_equal(a: Any, b: Any, path: str = "round") -> None:
    """The same types, values and bits, all the way down."""
    if isinstance(a, np.ndarray):
        assert isinstance(b, np.ndarray), path
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), path
    elif isinstance(a, (Round, PromptGroup, Prompt, Completion, Judgement, Pair, Label)):
        assert type(a) is type(b), path
        for field in fields(a):
            require_equal(getattr(a, field.name), getattr(b, field.name), f"{path}.{field.name}")
    elif isinstance(a, (tuple, list)):
        assert (type(a), len(a)) == (type(b), len(b)), path
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            require_equal(left, right, f"{path}[{index}]")
    else:
        assert (type(a), repr(a)) == (type(b), repr(b)), path


def test_round_trip_is_exact(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    ledger.append(make_round())
    require_equal(make_round(), Ledger(tmp_path / "ledger").read(0))


def scored(round_: Round, version: int = 3) -> Round:
    """Every completion with reference log-probabilities of its own, one of them −∞."""

    def logprobs(c: Completion) -> np.ndarray[Any, Any]:
        values = np.linspace(-c.sample - 0.1, ULP, len(c.ids), dtype=np.float32)
        values[0] = -math.inf if c.sample == 1 else values[0]
        return values

    groups = [
        replace(
            g, completions=tuple(replace(c, reference_logprobs=logprobs(c)) for c in g.completions)
        )
        for g in round_.groups
    ]
    return replace(round_, groups=tuple(groups), reference_version=version)


def test_what_the_reference_says_comes_later_and_is_exact(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(make_round())
    ledger.append_reference(scored(make_round()))
    require_equal(scored(make_round()), Ledger(tmp_path).read(0))
    rows = pq.read_table(tmp_path / "round-000000.reference.parquet").to_pylist()
    assert [(row["position"], row["sample"], row["reference_version"]) for row in rows] == [
        (40, 0, 3),
        (40, 1, 3),
        (38, 0, 3),
        (38, 1, 3),
        (38, 2, 3),
    ]
    assert rows[1]["reference_logprobs"][0] == -math.inf


def test_a_round_is_scored_once_and_only_if_it_is_there(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    with pytest.raises(KeyError, match="round 0 is not in"):
        ledger.append_reference(scored(make_round()))
    ledger.append(make_round())
    ledger.append_reference(make_round())  # no reference scored it
    assert not list(tmp_path.glob("*.reference.parquet"))
    ledger.append_reference(scored(make_round()))
    with pytest.raises(RuntimeError, match="a round is scored by one reference"):
        ledger.append_reference(scored(make_round(), version=4))
    assert ledger.read(0).reference_version == 3


def test_labels_and_opponents_come_back(tmp_path: Path) -> None:
    round_ = make_round()
    first = round_.groups[0]
    labels = (Label(40, 0, True, Fate.LEARN), Label(40, 1, False, Fate.MARGIN))
    opponent = replace(first.completions[1], reference_share=0.25)
    changed = replace(first, labels=labels, completions=(first.completions[0], opponent))
    round_ = replace(round_, groups=(changed, round_.groups[1]))
    Ledger(tmp_path).append(round_)
    require_equal(round_, Ledger(tmp_path).read(0))
    rows = pq.read_table(tmp_path / "round-000000.parquet").to_pylist()
    assert [(r["desirable"], r["fate"], r["reference_share"]) for r in rows[:3]] == [
        (True, "learn", 0.0),
        (False, "margin", 0.25),
        (None, None, 0.0),
    ]


def test_versions_of_last_tokens_and_corrected_gaps_come_back(tmp_path: Path) -> None:
    changes = ({"last_version": 13}, {"gap_log_weight": 1e-5 / 3}, {"gap_log_weight": 0.0})
    first, second = make_round().groups
    both = [*first.completions, *second.completions]
    changed = [replace(c, **change) for c, change in zip(both, (*changes, {}, {}), strict=True)]
    groups = (
        replace(first, completions=tuple(changed[:2])),
        replace(second, completions=tuple(changed[2:])),
    )
    round_ = replace(make_round(), groups=groups)
    Ledger(tmp_path).append(round_)
    require_equal(round_, Ledger(tmp_path).read(0))
    rows = pq.read_table(tmp_path / "round-000000.parquet").to_pylist()
    assert [(row["last_version"], row["gap_log_weight"]) for row in rows] == [
        (13, None),
        (None, 1e-5 / 3),
        (None, 0.0),
        (None, None),
        (None, None),
    ]


def test_a_ledger_of_before_these_columns_is_read(tmp_path: Path) -> None:
    Ledger(tmp_path).append(make_round())
    path = tmp_path / "round-000000.parquet"
    old = pq.read_table(path).drop_columns(["last_version", "gap_log_weight"])
    pq.write_table(old, path)
    require_equal(make_round(), Ledger(tmp_path).read(0))


def test_equality_sees_one_bit() -> None:
    group = make_round().groups[0]
    logprobs = np.array([-1.5, -0.1, -0.0], np.float32)
    other = replace(group, completions=(make_completion(40, 0, logprobs=logprobs),))
    with pytest.raises(AssertionError, match="completions"):
        require_equal(group, other)


def test_arrays_read_are_writable(tmp_path: Path) -> None:
    Ledger(tmp_path).append(make_round())
    completion = Ledger(tmp_path).read(0).completions[0]
    assert completion.ids.flags.writeable
    assert completion.logprobs.flags.writeable


def test_header(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(make_round(0))
    ledger.append(make_round(1))
    header = ledger.header(1)
    assert (header.index, header.version, header.judge) == (1, 12, "sentiment")
    assert header.seconds["generate"] == 0.1 + 0.2


def test_a_round_without_groups(tmp_path: Path) -> None:
    empty = replace(make_round(), groups=())
    Ledger(tmp_path).append(empty)
    require_equal(empty, Ledger(tmp_path).read(0))


def test_length_membership_and_iteration(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run" / "ledger")
    assert (len(ledger), list(ledger), 0 in ledger) == (0, [], False)
    assert not (tmp_path / "run").exists()
    for index in (0, 1, 3):
        ledger.append(make_round(index))
    assert len(ledger) == 2
    assert [round_.index for round_ in ledger] == [0, 1]
    assert [index in ledger for index in range(5)] == [True, True, False, True, False]
    ledger.append(make_round(2))
    assert len(ledger) == 4
    with pytest.raises(KeyError, match="round 4 is not in"):
        ledger.read(4)


def test_files_are_named_as_documented(tmp_path: Path) -> None:
    Ledger(tmp_path).append(make_round(7))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["round-000007.pairs.parquet", "round-000007.parquet"]


def test_an_existing_round_is_refused_and_kept(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(make_round())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError, match="never written twice"):
        ledger.append(replace(make_round(), version=99))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# What others read


def test_completions_file(tmp_path: Path) -> None:
    Ledger(tmp_path).append(make_round())
    rows = pq.read_table(tmp_path / "round-000000.parquet").to_pylist()
    assert [(row["position"], row["sample"]) for row in rows] == [
        (40, 0),
        (40, 1),
        (38, 0),
        (38, 1),
        (38, 2),
    ]
    first, last = rows[0], rows[4]
    expected = {
        "round": 0,
        "prompt": '["not", "chat"]',
        "chat": False,
        "prompt_ids": [1, 7],
        "ids": [5, 31999, 2],
        "text": " once\n“π”",
        "logprobs": [-1.5, float(ULP), 0.0],
        "sampling_logprobs": None,
        "version": 12,
        "seed": 2**63 - 1,
        "finished": True,
        "score": 1 / 3,
        "reason": "good",
        "wins": None,
    }
    assert {name: first[name] for name in expected} == expected
    assert json.loads(first["columns"])["tags"] == ["a", {"b": True}]
    assert "“π”?" in last["prompt"]
    assert json.loads(last["prompt"])[0] == {"role": "user", "content": "“π”?"}
    assert (last["chat"], last["wins"][0], last["wins"][2]) == (True, 0.1, 0.5)
    assert math.isnan(rows[3]["score"])
    assert rows[3]["reason"] == "timed out"


def test_pairs_file(tmp_path: Path) -> None:
    Ledger(tmp_path).append(make_round(5))
    rows = pq.read_table(tmp_path / "round-000005.pairs.parquet").to_pylist()
    names = ("round", "position", "chosen", "rejected", "judge", "order", "fate")
    assert [tuple(row[name] for name in names) for row in rows] == [
        (5, 40, 0, 1, "sentiment", 0, "learn"),
        (5, 38, 2, 0, "sentiment", 0, "truncated"),
        (5, 38, 0, 1, "sentiment", 0, "invalid"),
        (5, 38, 1, 2, "sentiment", 1, "tie"),
    ]
    assert rows[0]["label_prob"] == 0.7310585786300049
    assert math.isnan(rows[2]["label_prob"])


def test_pandas_and_datasets_read_it(tmp_path: Path) -> None:
    import datasets
    import pandas as pd

    Ledger(tmp_path / "ledger").append(make_round())
    for name, rows in [("round-000000.parquet", 5), ("round-000000.pairs.parquet", 4)]:
        path = str(tmp_path / "ledger" / name)
        assert len(pd.read_parquet(path)) == rows
        read = datasets.Dataset.from_parquet(path, cache_dir=str(tmp_path / "cache"))
        assert len(read) == rows
        assert read["position"][0] == 40


# Kills


class Killed(BaseException):
    """Stands for the process's end at this very point."""


@pytest.mark.parametrize("kill_at", range(1, 6))
def test_a_kill_at_any_step_leaves_no_half_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    """Steps of an append: fsync and rename of the pairs, fsync of the directory, then the same
    for the completions. Only past the second rename is the round there."""
    ledger = Ledger(tmp_path)
    ledger.append(make_round(0))
    steps = 0

    def dying(function: Any) -> Any:
        def step(*args: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == kill_at:
                raise Killed
            return function(*args)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dying(os.fsync))
        patch.setattr(Path, "replace", dying(Path.replace))
        with pytest.raises(Killed):
            ledger.append(make_round(1))
    restarted = Ledger(tmp_path)
    assert (len(restarted), 1 in restarted) == (1, False)
    assert len(list(tmp_path.iterdir())) > 2
    changed = replace(make_round(1), version=77)
    restarted.append(changed)
    require_equal(changed, restarted.read(1))
    assert not list(tmp_path.glob("*.tmp"))


def test_everything_is_on_disk_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is synced before it gets its name, its name before the next file begins."""
    events: list[str] = []
    fsync, rename = os.fsync, Path.replace

    def logged_fsync(descriptor: int) -> None:
        events.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def logged_rename(self: Path, target: Path) -> Path:
        events.append(f"{self.name} -> {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "replace", logged_rename)
    (tmp_path / "run").mkdir()
    Ledger(tmp_path / "run" / "ledger").append(make_round())
    pairs, completions = "round-000000.pairs.parquet", "round-000000.parquet"
    assert events == [
        "sync run",
        f"sync {pairs}.tmp",
        f"{pairs}.tmp -> {pairs}",
        "sync ledger",
        f"sync {completions}.tmp",
        f"{completions}.tmp -> {completions}",
        "sync ledger",
    ]


def test_truncated_leftovers_do_not_count(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    (tmp_path / "round-000000.parquet.tmp").write_bytes(b"PAR1 half")
    (tmp_path / "round-000000.pairs.parquet").write_bytes(b"of an earlier life")
    assert (len(ledger), 0 in ledger) == (0, False)
    ledger.append(make_round())
    require_equal(make_round(), ledger.read(0))
    assert len(list(tmp_path.iterdir())) == 2


# Rounds that do not fit the format


def refused(**changes: Any) -> Round:
    round_ = make_round()
    return replace(round_, groups=(replace(round_.groups[0], **changes),))


GROUP = make_round().groups[0]


@pytest.mark.parametrize(
    ("round_", "message"),
    [
        (replace(make_round(), groups=(GROUP, GROUP)), "stands there twice"),
        (refused(completions=()), "position 40 has none"),
        (refused(completions=(make_completion(41, 0),) * 2), "others' parts"),
        (refused(pairs=(Pair(41, 0, 1, 0.5, Fate.TIE),)), "others' parts"),
        (refused(judgement=Judgement(40, np.zeros(3), (None,) * 3)), "2 completions, not as many"),
        (
            refused(judgement=Judgement(40, np.zeros(2), (None,) * 2, wins=np.zeros((2, 3)))),
            "2 completions, not as many",
        ),
    ],
)
def test_inconsistent_rounds_are_refused(tmp_path: Path, round_: Round, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ledger(tmp_path).append(round_)
    assert len(Ledger(tmp_path)) == 0


def test_other_precision_is_refused(tmp_path: Path) -> None:
    """Rounding on the way in would make a resumed run differ from an uninterrupted one."""
    completion = make_completion(40, 0, logprobs=np.zeros(3, np.float64))
    with pytest.raises(TypeError, match="float64: the ledger keeps float32"):
        Ledger(tmp_path).append(refused(completions=(completion, make_completion(40, 1))))
    assert 0 not in Ledger(tmp_path)
