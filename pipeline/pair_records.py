"""What our export recorded of a completion, beside its text: tokens and log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from judges.errors import UserError
from pipeline.prompt_files import Row
from workers.messages import FloatArray, IntArray

RECORD = (
    "ids",
    "logprobs",
    "sampling_logprobs",
    "sample",
    "finished",
    "seed",
    "reference_share",
)
"""What our export says of a side, in columns ``chosen_ids``, ``chosen_logprobs`` and so on."""

ROUNDING = 1e-3
"""How far above 0 a log-probability may lie that was computed in low precision."""


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """A completion as a run sampled it: tokens ``ids`` [T], and what was recorded of them.

    ``logprobs`` [T] under the plain softmax; ``sampling_logprobs`` [T] under the distribution it
    was drawn from, None where that is the same. ``finished`` None: not recorded.
    """

    ids: IntArray
    logprobs: FloatArray | None
    sampling_logprobs: FloatArray | None
    sample: int | None
    finished: bool | None
    seed: int
    reference_share: float


def sampled_side(row: Row, name: str) -> Sampled | None:
    """What is recorded of a side; None where that has no tokens. Raises UserError."""
    ids = numbers_of(row, f"{name}_ids", np.int64)
    if ids is None:
        return None
    recorded = {
        field: numbers_of(row, f"{name}_{field}", np.float32)
        for field in ("logprobs", "sampling_logprobs")
    }
    for field, values in recorded.items():
        if values is not None and len(values) != len(ids):
            raise UserError(
                f"{name}_{field} has {len(values)} values for {len(ids)} tokens: "
                "give one a token, or leave the column out"
            )
        if values is not None:
            _require_logprobs(values, f"{name}_{field}")
    finished = row.get(f"{name}_finished")
    return Sampled(
        ids,
        recorded["logprobs"],
        recorded["sampling_logprobs"],
        count_of(row, f"{name}_sample"),
        None if finished is None else bool(finished),
        count_of(row, f"{name}_seed") or 0,
        float(row.get(f"{name}_reference_share", 0.0)),
    )


def _require_logprobs(values: FloatArray, name: str) -> None:
    wrong = values[~(np.isfinite(values) & (values <= ROUNDING))]
    if len(wrong):
        raise UserError(
            f"{name}: {wrong[0]:g} is no log-probability (finite, 0 at most): export it again, or "
            "leave the column out"
        )


def require_known(ids: IntArray, name: str, vocabulary: int | None) -> None:
    """Raises UserError for an id that is none of the policy's, which has so many (None: any)."""
    wrong = ids[(ids < 0) | (ids >= (np.inf if vocabulary is None else vocabulary))]
    if len(wrong):
        size = "from 0 on" if vocabulary is None else f"of the policy's {vocabulary}"
        raise UserError(
            f"{name}: {wrong[0]} is no token id {size}: exported by a run of another model? train "
            "the same model"
        )


def numbers_of(row: Row, name: str, dtype: type[np.generic]) -> Any:
    """[T] numbers of a column; None where it is missing. Raises UserError for anything else."""
    if name not in row:
        return None
    kinds = int if dtype is np.int64 else (int, float)
    values = row[name]
    if not isinstance(values, list) or not all(
        isinstance(value, kinds) and not isinstance(value, bool) for value in values
    ):
        raise UserError(f"{name}: not a list of {np.dtype(dtype).name} numbers: export it again")
    return np.array(values, dtype)


def count_of(row: Row, name: str) -> int | None:
    """A whole number from 0 on; None where the column is missing. Raises UserError."""
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"{name}={value}: not a whole number from 0 on: mend or remove the column")
    return value
