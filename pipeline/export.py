"""What a run learned from, as a preference set that other trainers read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from judges.errors import UserError
from judges.interface import Text
from pipeline.ledger import Ledger
from workers.messages import Completion, Fate, Round

OF_A_SIDE = {
    "ids": pa.list_(pa.int64()),
    "logprobs": pa.list_(pa.float32()),
    "sampling_logprobs": pa.list_(pa.float32()),
    "sample": pa.int64(),
    "seed": pa.int64(),
    "finished": pa.bool_(),
    "reference_share": pa.float64(),
}
"""What is kept of each completion, beside its text."""

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def export_pairs(run_dir: Path, out: Path) -> int:
    """Write every learned pair of the run's ledger to ``out`` (.parquet or .jsonl); how many.

    Columns: prompt, chosen, rejected (text; for chat the messages and one assistant message each,
    TRL's conversational form), label_prob (P(chosen is better)), prompt_ids, round, version,
    position, positions (how many the run drew) and, of each side, ``chosen_…`` and ``rejected_…``,
    what a replay needs: ids (the tokens as sampled), logprobs, sampling_logprobs (null where the
    same), sample (its index), seed, finished, reference_share (0 unless an opponent wrote it, as in
    XPO). Where a run mixes text and chat, text becomes a user message: a set has one form. A run
    that labelled completions one by one has completion and label (desirable) instead, and
    ``completion_…``.
    Raises UserError for another suffix, an existing file and a run that learned from nothing.
    """
    if out.suffix not in (".parquet", ".jsonl"):
        raise UserError(f"--out {out}: ends in neither .parquet nor .jsonl; choose one")
    if out.exists():
        raise UserError(f"--out {out}: exists already and is not overwritten; choose another name")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: no such directory {out.parent}; make it first")
    ledger = Ledger(run_dir / "ledger")
    if not len(ledger):
        raise UserError(f"{run_dir}: no ledger with a round in it; give a run's directory")
    rows = [row for round_ in ledger for row in _learned(round_)]
    positions = 1 + max(group.prompt.position for round_ in ledger for group in round_.groups)
    rows = [row | {"positions": positions} for row in rows]
    if not rows:
        raise UserError(
            f"{run_dir}: nothing was learned from in {len(ledger)} rounds; see `dropped` in "
            f"{run_dir / 'metrics.jsonl'} for the reasons"
        )
    chat = any(not isinstance(row["prompt"], str) for row in rows)
    if chat:
        rows = [_conversational(row) for row in rows]
    temporary = out.with_name(out.name + ".tmp")
    with temporary.open("wb") as file:
        if out.suffix == ".parquet":
            schema = _schema(chat, paired="chosen" in rows[0])
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(out)
    return len(rows)


def _learned(round_: Round) -> Iterator[dict[str, Any]]:
    for group in round_.groups:
        by_sample = {completion.sample: completion for completion in group.completions}
        origin = {
            "prompt": group.prompt.content,
            "prompt_ids": group.prompt.ids.tolist(),
            "round": round_.index,
            "version": round_.version,
            "position": group.prompt.position,
        }
        for pair in group.pairs:
            if pair.fate is not Fate.LEARN:
                continue
            chosen, rejected = by_sample[pair.chosen], by_sample[pair.rejected]
            yield origin | {
                **_side("chosen", chosen),
                **_side("rejected", rejected),
                "label_prob": pair.label_prob,
            }
        for label in group.labels:
            if label.fate is Fate.LEARN:
                completion = by_sample[label.sample]
                yield origin | _side("completion", completion) | {"label": label.desirable}


def _side(name: str, completion: Completion) -> dict[str, Any]:
    behaviour = completion.behaviour_logprobs
    tempered = not np.array_equal(behaviour, completion.logprobs)
    recorded = bool(np.isfinite(completion.logprobs).all())
    return {
        name: completion.text,
        f"{name}_ids": completion.ids.tolist(),
        f"{name}_logprobs": completion.logprobs.tolist() if recorded else None,
        f"{name}_sampling_logprobs": behaviour.tolist() if recorded and tempered else None,
        f"{name}_sample": completion.sample,
        f"{name}_seed": completion.seed,
        f"{name}_finished": completion.finished,
        f"{name}_reference_share": completion.reference_share,
    }


def _conversational(row: dict[str, Any]) -> dict[str, Any]:
    prompt: Text = row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answers = {
        side: [{"role": "assistant", "content": row[side]}]
        for side in ("chosen", "rejected", "completion")
        if side in row
    }
    return (
        row | answers | {"prompt": [{"role": m["role"], "content": m["content"]} for m in messages]}
    )


def _schema(chat: bool, paired: bool) -> pa.Schema:
    content = MESSAGES if chat else pa.string()
    sides = ("chosen", "rejected") if paired else ("completion",)
    return pa.schema(
        {
            **dict.fromkeys(("prompt", *sides), content),
            **({"label_prob": pa.float64()} if paired else {"label": pa.bool_()}),
            "prompt_ids": pa.list_(pa.int64()),
            **{f"{side}_{name}": kind for side in sides for name, kind in OF_A_SIDE.items()},
            **dict.fromkeys(("round", "version", "position", "positions"), pa.int64()),
        }
    )
