"""Dashboards: a run's metrics in TensorBoard and in Weights & Biases."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from judges.errors import UserError

TENSORBOARD_DIR = "tensorboard"
WANDB_ID = "wandb/id"

Record: TypeAlias = Mapping[str, Any]


class WandbOptions(BaseModel):
    """Where in Weights & Biases a run goes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    project: str = Field(description="Weights & Biases project.")
    name: str | None = Field(default=None, description="Name shown there; null is the run's name.")
    mode: Literal["online", "offline", "disabled"] | None = Field(
        default=None, description="null leaves it to the WANDB_MODE environment variable."
    )


def _scalars(record: Record) -> dict[str, float]:
    """The numbers of a record by path: ``round/dropped/tie``, ``evaluation/JUDGE/win_rate``."""
    kind = record["kind"]
    prefix = f"evaluation/{record['judge']}" if kind == "evaluation" else kind
    found: dict[str, float] = {}
    for key, value in record.items():
        match value:
            case _ if key in ("schema", "update", "round"):
                continue
            case int() | float():
                found[f"{prefix}/{key}"] = value
            case dict():
                found |= {f"{prefix}/{key}/{part}": x for part, x in value.items() if x is not None}
            case [int() | float() as low, int() | float() as high]:
                found |= {f"{prefix}/{key}/low": low, f"{prefix}/{key}/high": high}
    return found


class TensorBoard:
    """Scalars over updates."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: Any = None

    def rebuild(self, records: Sequence[Record]) -> None:
        """Start again from these records: event files cannot be cut."""
        from tensorboardX import SummaryWriter  # here, for it imports torch

        self.close()
        for stale in self._directory.glob("events.out.tfevents.*"):
            stale.unlink()
        self._writer = SummaryWriter(str(self._directory), max_queue=1000, flush_secs=10)
        for record in records:
            self.write(record)

    def write(self, record: Record) -> None:
        for path, value in _scalars(record).items():
            self._writer.add_scalar(path, value, record["update"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Wandb:
    """The same scalars in Weights & Biases, as one run however often it is resumed.

    Its step is the line of metrics.jsonl. It takes each step once, so lines written again after a
    resume, equal to those it has, change nothing there.
    """

    def __init__(self, run_dir: Path, options: WandbOptions) -> None:
        wandb = wandb_module()
        id_file = run_dir / WANDB_ID
        if not id_file.exists():
            id_file.parent.mkdir(exist_ok=True)
            id_file.write_text(uuid.uuid4().hex)
        try:
            self._run = wandb.init(
                project=options.project,
                name=options.name or run_dir.name,
                mode=options.mode,
                dir=str(run_dir),
                id=id_file.read_text(),
                resume="allow",
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"tracking.wandb.project={options.project}: {reason}; "
                "`wandb login`, or set tracking.wandb.mode=offline"
            ) from error
        self._run.define_metric("*", step_metric="update")

    def write(self, record: Record, line: int) -> None:
        self._run.log({**_scalars(record), "update": record["update"]}, step=line)

    def close(self) -> None:
        self._run.finish()


def wandb_module() -> Any:
    """The wandb package. Raises UserError where it is not installed."""
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise _no_wandb() from error
    if not hasattr(wandb, "init"):  # a folder ./wandb left by earlier runs imports as a namespace
        raise _no_wandb()
    return wandb


def _no_wandb() -> UserError:
    return UserError('tracking.wandb: not installed; pip install "freshpairs[wandb]"')
