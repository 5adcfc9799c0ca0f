"""Checkpoints: everything a killed run needs to go on as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from judges.errors import UserError
from pipeline.learner import RemoteLearner
from pipeline.resampling import RoundPlan
from pipeline.storage import Storage

CURSOR_FILE = "cursor.json"
"""Is written last: with it, a checkpoint is whole."""


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

    def __init__(
        self, directory: Path, every: int, keep: int, storage: Storage | None = None
    ) -> None:
        """``storage`` keeps them; None: they last where they are."""
        self._storage = storage or Storage(directory.parent)
        self._directory = directory
        self._every = every
        self._keep = keep

    def due(self, update: int) -> bool:
        """Whether a checkpoint is wanted after this update."""
        return update % self._every == 0

    def save(self, learner: RemoteLearner, cursor: Cursor) -> Path:
        """Write a checkpoint at the cursor, then remove the oldest beyond ``keep``."""
        final = self._directory / f"update-{cursor.update:06d}"
        if final in self.all():
            return final
        with self._storage.appearing(final, CURSOR_FILE) as (here, at_the_learner):
            learner.save(at_the_learner)
            (here / CURSOR_FILE).write_text(cursor.to_json())
        for old in self.all()[: -self._keep]:
            self._storage.forget(old, CURSOR_FILE)
        return final

    def all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = self._storage.whole(self._directory, CURSOR_FILE)
        return sorted((path for path in found if path.match("update-*")), key=_update_of)

    def latest_update(self) -> int:
        """Updates applied in the newest checkpoint; 0 where there is none."""
        found = self.all()
        return _update_of(found[-1]) if found else 0

    def restore(self, learner: RemoteLearner) -> Cursor:
        """Load the newest checkpoint into the learner; the run's beginning where there is none."""
        found = self.all()
        if not found:
            return Cursor()
        text = self._storage.read(found[-1] / CURSOR_FILE)
        if text is None:
            raise UserError(f"{found[-1]}: has no {CURSOR_FILE}: remove this checkpoint")
        learner.load(self._storage.seen_as(found[-1]))
        return Cursor.from_json(text)


def _update_of(path: Path) -> int:
    return int(path.name.removeprefix("update-"))
