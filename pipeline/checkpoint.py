"""Checkpoints: everything a killed run needs to go on as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.durable import sync_to_disk
from pipeline.learner import RemoteLearner
from pipeline.resampling import RoundPlan


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a run stands: updates applied, and those that the round it learns from has fed.

    ``rounds`` are the plans of that round and of those in flight; ``dial``, ``drift`` and ``watch``
    what those remember. ``metrics_bytes`` is the length of metrics.jsonl at that moment.
    """

    update: int = 0
    batch: int = 0
    metrics_bytes: int = 0
    rounds: tuple[RoundPlan, ...] = ()
    dial: Mapping[str, Any] | None = None
    drift: Mapping[str, Any] | None = None
    watch: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        """As a checkpoint keeps it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Cursor:
        """What ``to_json`` gave."""
        value = json.loads(text)
        return cls(**{**value, "rounds": tuple(map(RoundPlan.from_json, value["rounds"]))})


class Checkpoints:
    """The ``checkpoints/`` directory of a run; each appears whole or not at all."""

    def __init__(self, directory: Path, every: int, keep: int) -> None:
        self._directory = directory
        self._every = every
        self._keep = keep

    def due(self, update: int) -> bool:
        """Whether a checkpoint is wanted after this update."""
        return update % self._every == 0

    def save(self, learner: RemoteLearner, cursor: Cursor) -> Path:
        """Write a checkpoint at the cursor, then remove the oldest beyond ``keep``."""
        final = self._directory / f"update-{cursor.update:06d}"
        if final.exists():
            return final
        partial = self._directory / f".partial-{final.name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        learner.save(partial)
        (partial / "cursor.json").write_text(cursor.to_json())
        for path in (*partial.iterdir(), partial):
            sync_to_disk(path)
        os.replace(partial, final)
        sync_to_disk(self._directory)
        for old in self.all()[: -self._keep]:
            shutil.rmtree(old)
        return final

    def all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(self._directory.glob("update-*"), key=_update_of)

    def latest_update(self) -> int:
        """Updates applied in the newest checkpoint; 0 where there is none."""
        found = self.all()
        return _update_of(found[-1]) if found else 0

    def restore(self, learner: RemoteLearner) -> Cursor:
        """Load the newest checkpoint into the learner; the run's beginning where there is none."""
        found = self.all()
        if not found:
            return Cursor()
        cursor = Cursor.from_json((found[-1] / "cursor.json").read_text())
        learner.load(found[-1])
        return cursor


def _update_of(path: Path) -> int:
    return int(path.name.removeprefix("update-"))
