"""Judges built as a run builds them, without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from judges.completing import Complete
from judges.desk import Desk
from judges.options import JudgeOptions
from workers.judge_worker import JudgeWorker, asker_of


def desk(folder: Path | None = None, complete: Complete | None = None) -> Desk:
    """A desk whose AI judges ask ``complete``, whatever their client."""

    def build(*_: object) -> Complete:
        assert complete is not None
        return complete

    return Desk(build, folder)


def worker_of(
    folder: Path | None = None, complete: Complete | None = None, **options: Any
) -> JudgeWorker:
    """A worker of the judge with these options."""
    return JudgeWorker(asker_of(JudgeOptions(**options), desk(folder, complete)))
