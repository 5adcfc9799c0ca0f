"""A judge named on the command line: by name, by file, or by the config of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from judges.errors import UserError
from judges.options import JudgeOptions
from pipeline.config import apply_overrides, read_yaml
from pipeline.config_files import absolute_from, judge_files
from pipeline.mistakes import explain


class _JudgeSection(BaseModel):
    model_config = ConfigDict(extra="forbid")

    judge: JudgeOptions = Field(default_factory=JudgeOptions)


def read_judge(spec: str, overrides: Sequence[str] = ()) -> JudgeOptions:
    """The judge of that name, or of that config's ``judge`` section, its files made absolute.

    ``overrides`` are judge.key=value. Raises UserError: one line for each mistake.
    """
    path = Path(spec)
    if path.suffix in (".yaml", ".yml"):
        raw: dict[str, Any] = {"judge": read_yaml(path).get("judge", {})}
        base, where = path.parent, f"{path}: "
    else:
        raw, base, where = {"judge": {"name": spec}}, Path(), ""
    apply_overrides(raw, overrides)
    try:
        judge = _JudgeSection.model_validate(raw).judge
    except ValidationError as error:
        lines = explain(_JudgeSection, error.errors())
        raise UserError("\n".join(f"{where}{line}" for line in lines)) from None
    return judge.model_copy(update=judge_files(judge, absolute_from(base), "judge"))
