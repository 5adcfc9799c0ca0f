"""What a run learned from, as a preference set that other trainers read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from judges.errors import UserError
from judges.interface import Text
from pipeline.ledger import Ledger
from pipeline.resampling import Dial, whole_run
from pipeline.run_directory import CONFIG_FILE, read_run_config
from pipeline.tracking import METRICS_FILE, metrics
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


@dataclass(frozen=True, slots=True)
class Exported:
    """How many pairs were ``written``, or labelled completions (``labels``).

    ``unlearned`` of them were sampled and judged but not learned from: their rounds ended early.
    """

    written: int
    labels: bool
    unlearned: int

    def told(self, out: Path) -> str:
        """In a line: how many are in the file ``out``."""
        kind = "labelled completions" if self.labels else "pairs"
        line = f"{self.written} {kind} written to {out}"
        if not self.unlearned:
            return line
        return (
            f"{line}; {self.unlearned} of them were sampled and judged but not learned from: "
            "rounds ended early (which ones is not recorded)"
        )


def export_pairs(run_dir: Path, out: Path) -> Exported:
    """Write the learned pairs of the run's ledger to ``out`` (.parquet or .jsonl); how many.

    They are those that were judged to be learned from. Where a round ended early, its last ones
    were not, and are here all the same: metrics.jsonl says how many there were, nothing says which.
    The same holds for the rounds that an unfinished run has not come to the end of, uncounted.

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
    positions = _positions(run_dir, ledger)
    rows = [row | {"positions": positions} for round_ in ledger for row in _learned(round_)]
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
    return Exported(len(rows), "label" in rows[0], _unlearned(run_dir))


def _positions(run_dir: Path, ledger: Ledger) -> int:
    """How many prompts the run drew.

    A sampled round holds every prompt it drew; one of given pairs only those that the set has, so
    that its plan says how many there would have been.
    """
    drawn = 1 + max((g.prompt.position for round_ in ledger for g in round_.groups), default=0)
    if not all(round_.given for round_ in ledger) or not (run_dir / CONFIG_FILE).is_file():
        return drawn
    cfg, _ = read_run_config(run_dir)
    size = cfg.sampling.prompts_per_update
    dial = Dial(cfg.resampling, cfg.run.updates, size, cfg.run.seed)
    plans = islice(whole_run(dial), len(ledger))
    return max(drawn, sum(plan.prompts for plan in plans))


def _unlearned(run_dir: Path) -> int:
    """Examples that rounds which ended early left unused."""
    if not (run_dir / METRICS_FILE).is_file():
        return 0
    rounds = (record for record in metrics(run_dir) if record["kind"] == "round")
    return sum((record.get("resampling") or {}).get("unused_pairs", 0) for record in rounds)


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
