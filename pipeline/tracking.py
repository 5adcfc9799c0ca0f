"""Tracking: what is measured, as JSON lines, in TensorBoard and in Weights & Biases.

``metrics.jsonl`` is the record; the dashboards are views of it and can be built again from it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from judges.errors import UserError
from pipeline.dashboards import TENSORBOARD_DIR, WANDB_ID, TensorBoard, Wandb, WandbOptions
from pipeline.storage import Storage

SCHEMA = 1
METRICS_FILE = "metrics.jsonl"

UPDATE_KEYS = (
    "loss",
    "margin",
    "accuracy",
    "rewards_chosen",
    "rewards_rejected",
    "chosen_logps",
    "rejected_logps",
    "reference_version",
    "grad_norm",
    "learning_rate",
    "lag_mean",
    "lag_max",
    "ess",
    "ess_per_token",
    "policy_ess",
    "policy_ess_per_token",
    "kl_from_sampler",
    "lags",
    "replayed",
    "pairs",
    "tokens",
    "objective",
    "seconds",
)
ROUND_KEYS = (
    "version",
    "reference_version",
    "prompts",
    "completions",
    "pairs",
    "dropped",
    "score_mean",
    "score_std",
    "kl_to_reference",
    "kl_per_token",
    "entropy",
    "length_mean",
    "length_ratio",
    "eos_rate",
    "off_reference_share",
    "off_reference_unlikely",
    "off_reference_likely",
    "repetition_rate",
    "distinct_ngrams",
    "self_similarity",
    "chosen_logps_change",
    "rejected_logps_change",
    "bad_mass",
    "bad_logps",
    "held_out_nll",
    "logprob_gap",
    "gap_weight",
    "judging",
    "resampling",
    "alarms",
    "seconds",
    "tokens_per_second",
)
EVALUATION_KEYS = (
    "judge",
    "win",
    "tie",
    "loss",
    "win_rate",
    "win_rate_ci",
    "quality",
    "quality_baseline",
    "kl_to_reference",
)

Record: TypeAlias = Mapping[str, Any]


class TrackingOptions(BaseModel):
    """Where metrics go besides metrics.jsonl."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensorboard: bool = Field(default=True, description="Write scalars to RUN/tensorboard.")
    wandb: WandbOptions | None = Field(
        default=None, description="Also log to Weights & Biases (extra: freshpairs[wandb])."
    )


class Listener(Protocol):
    """Is told of each record as it is written: schema, kind, update, round, then the rest."""

    def record(self, record: Record) -> None: ...


class Tracker:
    """Writes the records of one run.

    Each line says the ``update`` it belongs to (updates applied so far) and the ``round`` (rounds
    finished before it: the index of the round being learned from), counted from the lines of the
    file, so they need no keeping. A file that is already there is continued.

    ``storage`` is given them at each checkpoint, at each round's end and at the end, not at every
    update: an object cannot be appended to. None: they last where they are.
    """

    def __init__(
        self,
        run_dir: Path,
        options: TrackingOptions,
        listeners: Sequence[Listener] = (),
        storage: Storage | None = None,
    ) -> None:
        self._storage = storage or Storage(run_dir)
        self._dashboards = run_dir / TENSORBOARD_DIR
        self._tensorboard = TensorBoard(self._dashboards) if options.tensorboard else None
        self._wandb = Wandb(run_dir, options.wandb) if options.wandb else None
        if self._wandb is not None:
            self._storage.keep(run_dir / WANDB_ID)
        self._listeners = tuple(listeners)
        self._path = run_dir / METRICS_FILE
        self._file = self._path.open("ab")
        self.cut(self._path.read_bytes().rfind(b"\n") + 1)

    def update(self, record: Record) -> None:
        """One optimizer step: exactly ``UPDATE_KEYS``; the objective's own measures nest."""
        _check_keys("update", record, UPDATE_KEYS)
        self._updates += 1
        self._write("update", {key: record[key] for key in UPDATE_KEYS})

    def round(self, record: Record) -> None:
        """One round that is over: exactly ``ROUND_KEYS``; ``dropped`` and ``seconds`` nest."""
        _check_keys("round", record, ROUND_KEYS)
        self._write("round", {key: record[key] for key in ROUND_KEYS})
        self._rounds += 1
        self._storage.keep(self._path)

    def evaluation(self, record: Record) -> None:
        """One judge's evaluation: ``EVALUATION_KEYS`` and whatever else was measured."""
        _check_keys("evaluation", record, EVALUATION_KEYS, more=True)
        self._write("evaluation", record)

    def position(self) -> int:
        """Bytes of metrics.jsonl so far, which last: what a checkpoint keeps for ``cut``."""
        os.fsync(self._file.fileno())
        self._keep()
        return os.fstat(self._file.fileno()).st_size

    def cut(self, position: int) -> None:
        """Go back to a checkpoint: forget every line after ``position``, in TensorBoard too.

        Raises UserError where the file no longer reaches that far.
        """
        kept = self._path.read_bytes()[:position]
        if len(kept) < position or kept[-1:] not in (b"", b"\n"):
            raise UserError(
                f"{self._path}: no line ends at byte {position}, where the checkpoint was written: "
                "the file was changed; restore it, or start a new run"
            )
        self._file.truncate(position)
        os.fsync(self._file.fileno())
        records = [json.loads(line) for line in kept.splitlines()]
        self._updates = sum(record["kind"] == "update" for record in records)
        self._rounds = sum(record["kind"] == "round" for record in records)
        self._lines = len(records)
        if self._tensorboard is not None:
            self._tensorboard.rebuild(records)

    def close(self) -> None:
        """Write out what is still buffered."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.close()
        self._keep()

    def _keep(self) -> None:
        self._storage.keep(self._path)
        if self._tensorboard is not None:
            self._storage.keep(self._dashboards)

    def _write(self, kind: str, record: Record) -> None:
        place = {"schema": SCHEMA, "kind": kind, "update": self._updates, "round": self._rounds}
        line = _json_value(place | dict(record))
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()
        self._lines += 1
        if self._tensorboard is not None:
            self._tensorboard.write(line)
        if self._wandb is not None:
            self._wandb.write(line, self._lines)
        for listener in self._listeners:
            listener.record(line)


def metrics(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The records of a run in order; a torn last line (killed, or still writing) is left out."""
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{run_dir}: holds no {METRICS_FILE}; name the directory of a run")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: not JSON ({error}); mend the line") from error


def _check_keys(kind: str, record: Record, keys: Sequence[str], more: bool = False) -> None:
    missing = sorted(set(keys) - set(record))
    unknown = [] if more else sorted(set(record) - set(keys))
    if missing or unknown:
        raise ValueError(f"{kind} record: missing {missing}, unknown {unknown}")


def _json_value(value: Any) -> Any:
    """The same in JSON's types, NaN and infinities as null."""
    match value:
        case np.generic():
            return _json_value(value.item())
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: _json_value(item) for key, item in value.items()}
        case list() | tuple():
            return [_json_value(item) for item in value]
    return value
