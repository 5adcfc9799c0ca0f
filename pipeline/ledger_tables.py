"""A round as Arrow tables of plain column types, and back, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from workers.messages import (
    BoolArray,
    Completion,
    Fate,
    FloatArray,
    Judgement,
    Label,
    Pair,
    Prompt,
    PromptGroup,
    Round,
)

COMPLETIONS_SCHEMA = pa.schema(
    [
        ("round", pa.int64()),
        ("position", pa.int64()),
        ("sample", pa.int64()),
        ("prompt", pa.string()),  # text, or the messages as JSON where chat
        ("chat", pa.bool_()),
        ("prompt_ids", pa.list_(pa.int64())),
        ("columns", pa.string()),  # JSON
        ("ids", pa.list_(pa.int64())),
        ("text", pa.string()),
        ("logprobs", pa.list_(pa.float32())),
        ("sampling_logprobs", pa.list_(pa.float32())),  # null: the same as logprobs
        ("reference_share", pa.float64()),
        ("version", pa.int64()),
        ("last_version", pa.int64()),  # null: the same as version
        ("gap_log_weight", pa.float64()),  # null: logprobs are as the generator gave them
        ("seed", pa.int64()),
        ("finished", pa.bool_()),
        ("score", pa.float64()),
        ("reason", pa.string()),
        ("wins", pa.list_(pa.float64())),  # P(this better than each of the prompt's); null: scored
        ("declined", pa.list_(pa.bool_())),  # beside score, or wins; null: nowhere
        ("desirable", pa.bool_()),  # null: not labelled without a partner
        ("fate", pa.string()),  # of that label
    ]
)
REFERENCE_SCHEMA = pa.schema(
    [
        ("round", pa.int64()),
        ("position", pa.int64()),
        ("sample", pa.int64()),
        ("reference_version", pa.int64()),
        ("reference_logprobs", pa.list_(pa.float32())),
    ]
)
PAIRS_SCHEMA = pa.schema(
    [
        ("round", pa.int64()),
        ("position", pa.int64()),
        ("chosen", pa.int64()),
        ("rejected", pa.int64()),
        ("label_prob", pa.float64()),
        ("judge", pa.string()),
        ("order", pa.int64()),  # the sample the judge was shown first
        ("fate", pa.string()),
    ]
)


def completions_table(round_: Round) -> pa.Table:
    """One row a completion, a prompt's together. Raises TypeError for arrays of another type."""
    rows = [
        (group, at, completion)
        for group in round_.groups
        for at, completion in enumerate(group.completions)
    ]
    contents = [group.prompt.content for group, _, _ in rows]
    all_wins = [group.judgement.wins for group, _, _ in rows]
    columns: dict[str, Any] = {
        "round": [round_.index] * len(rows),
        "position": [completion.position for _, _, completion in rows],
        "sample": [completion.sample for _, _, completion in rows],
        "prompt": [
            content
            if isinstance(content, str)
            else json.dumps([dict(message) for message in content], ensure_ascii=False)
            for content in contents
        ],
        "chat": [not isinstance(content, str) for content in contents],
        "prompt_ids": _list_array([group.prompt.ids for group, _, _ in rows], np.int64),
        "columns": [json.dumps(dict(group.prompt.columns)) for group, _, _ in rows],
        "ids": _list_array([completion.ids for _, _, completion in rows], np.int64),
        "text": [completion.text for _, _, completion in rows],
        "version": [completion.version for _, _, completion in rows],
        "last_version": [completion.last_version for _, _, completion in rows],
        "gap_log_weight": [completion.gap_log_weight for _, _, completion in rows],
        "reference_share": [completion.reference_share for _, _, completion in rows],
        "seed": [completion.seed for _, _, completion in rows],
        "finished": [completion.finished for _, _, completion in rows],
        "score": np.array([group.judgement.scores[at] for group, at, _ in rows], np.float64),
        "reason": [group.judgement.reasons[at] for group, at, _ in rows],
        "wins": _list_array(
            [
                None if wins is None else wins[at]
                for wins, (_, at, _) in zip(all_wins, rows, strict=True)
            ],
            np.float64,
        ),
        "declined": [_declined(group.judgement, at) for group, at, _ in rows],
    }
    labels = {(label.position, label.sample): label for label in round_.labels}
    found = [labels.get((completion.position, completion.sample)) for _, _, completion in rows]
    columns["desirable"] = [None if label is None else label.desirable for label in found]
    columns["fate"] = [None if label is None else label.fate.value for label in found]
    for name in ("logprobs", "sampling_logprobs"):
        arrays = [getattr(completion, name) for _, _, completion in rows]
        columns[name] = _list_array(arrays, np.float32)
    return _table(columns, COMPLETIONS_SCHEMA)


def reference_table(round_: Round) -> pa.Table:
    """One row a completion: what the reference of the round says of it."""
    completions = round_.completions
    columns: dict[str, Any] = {
        "round": [round_.index] * len(completions),
        "position": [completion.position for completion in completions],
        "sample": [completion.sample for completion in completions],
        "reference_version": [round_.reference_version] * len(completions),
        "reference_logprobs": _list_array(
            [completion.reference_logprobs for completion in completions], np.float32
        ),
    }
    return _table(columns, REFERENCE_SCHEMA)


def _table(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def pairs_table(round_: Round) -> pa.Table:
    """One row a pair, in the round's order."""
    rows = [
        {
            "round": round_.index,
            "position": pair.position,
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            "label_prob": pair.label_prob,
            "judge": round_.judge,
            "order": min(pair.chosen, pair.rejected),
            "fate": pair.fate.value,
        }
        for pair in round_.pairs
    ]
    return pa.Table.from_pylist(rows, schema=PAIRS_SCHEMA)


def reference_logprobs_of(table: pa.Table) -> dict[tuple[int, int], FloatArray]:
    """Log-probabilities [tokens] by position and sample."""
    columns = (_values(table.column(name)) for name in ("position", "sample", "reference_logprobs"))
    return {(position, sample): row for position, sample, row in zip(*columns, strict=True)}


def groups_of(completions: pa.Table, pairs: pa.Table) -> tuple[PromptGroup, ...]:
    """The groups of a round from its two tables."""
    pairs_at: dict[int, list[Pair]] = {}
    for row in pairs.to_pylist():
        pair = Pair(
            position=row["position"],
            chosen=row["chosen"],
            rejected=row["rejected"],
            label_prob=row["label_prob"],
            fate=Fate(row["fate"]),
        )
        pairs_at.setdefault(pair.position, []).append(pair)
    names = completions.column_names
    columns = [_values(completions.column(name)) for name in names]
    rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    return tuple(
        _group(list(members), tuple(pairs_at.get(position, ())))
        for position, members in groupby(rows, key=lambda row: row["position"])
    )


def _declined(judgement: Judgement, at: int) -> list[bool] | None:
    if judgement.declined is None:
        return None
    row: list[bool] = np.atleast_1d(judgement.declined[at]).tolist()
    return row


def _read_declined(rows: Sequence[Mapping[str, Any]]) -> BoolArray | None:
    if rows[0].get("declined") is None:  # ledgers of old lack the column
        return None
    stacked = np.stack([row["declined"] for row in rows]).astype(np.bool_)
    return stacked[:, 0] if rows[0]["wins"] is None else stacked


def _list_array(arrays: Sequence[npt.NDArray[Any] | None], dtype: npt.DTypeLike) -> pa.ListArray:
    """The arrays as one Arrow column, bit for bit; None is null. Raises TypeError."""
    for array in arrays:
        if array is not None and array.dtype != dtype:
            raise TypeError(f"an array of {array.dtype}: the ledger keeps {np.dtype(dtype)}")
    lengths = [0 if array is None else len(array) for array in arrays]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = [array for array in arrays if array is not None]
    return pa.ListArray.from_arrays(
        pa.array(offsets),
        pa.array(np.concatenate(values) if values else np.empty(0, dtype)),
        mask=pa.array([array is None for array in arrays], pa.bool_()),
    )


def _values(column: pa.ChunkedArray) -> list[Any]:
    """The column's values, with lists as writable numpy arrays of their own type."""
    if not pa.types.is_list(column.type):
        values: list[Any] = column.to_pylist()
        return values
    array = column.combine_chunks()
    offsets = array.offsets.to_numpy()
    flat = np.array(array.values.to_numpy(zero_copy_only=False))
    return [
        flat[start:end] if valid else None
        for start, end, valid in zip(
            offsets[:-1], offsets[1:], array.is_valid().to_pylist(), strict=True
        )
    ]


def _group(rows: list[dict[str, Any]], pairs: tuple[Pair, ...]) -> PromptGroup:
    first = rows[0]
    position = first["position"]
    content = json.loads(first["prompt"]) if first["chat"] else first["prompt"]
    own = ("sample", "seed", "version", "ids", "logprobs", "sampling_logprobs", "finished", "text")
    completions = [
        Completion(
            position=position,
            reference_share=row["reference_share"],
            last_version=row.get("last_version"),  # ledgers of old lack these two columns
            gap_log_weight=row.get("gap_log_weight"),
            **{name: row[name] for name in own},
        )
        for row in rows
    ]
    labels = [
        Label(position, row["sample"], row["desirable"], Fate(row["fate"]))
        for row in rows
        if row["desirable"] is not None
    ]
    judgement = Judgement(
        position=position,
        scores=np.array([row["score"] for row in rows], np.float64),
        reasons=tuple(row["reason"] for row in rows),
        wins=None if first["wins"] is None else np.stack([row["wins"] for row in rows]),
        declined=_read_declined(rows),
    )
    prompt = Prompt(position, first["prompt_ids"], content, json.loads(first["columns"]))
    return PromptGroup(prompt, tuple(completions), judgement, pairs, tuple(labels))
