"""Writes configuration.md from the config's own fields: `python docs/configuration.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline.config import Config

PAGE = Path(__file__).with_name("configuration.md")

HEAD = """# Configuration

Every key of a config, its default and what it means; written by `python docs/configuration.py` from
the code, so it cannot fall behind. Unknown keys are errors. On the command line any key is
`section.key=value`, the value in YAML. Files are looked up in the working directory, then beside
the config.

"""


def page() -> str:
    """The whole page, in Markdown."""
    return HEAD + "\n".join(_section(name, field) for name, field in Config.model_fields.items())


def _section(name: str, field: FieldInfo) -> str:
    model = _model_of(field.annotation)
    assert model is not None, name
    about = " ".join((model.__doc__ or "").split())
    rows = "\n".join(_row(key, inner) for key, inner in model.model_fields.items())
    return f"## {name}\n\n{about}\n\n| key | default | meaning |\n| --- | --- | --- |\n{rows}\n"


def _row(key: str, field: FieldInfo) -> str:
    inner = _model_of(field.annotation)
    about = (field.description or "").replace("|", "\\|")
    if inner is not None:
        keys = ", ".join(f"`{k}`" for k in inner.model_fields)
        about = f"{about} (keys: {keys})"
    return f"| `{key}` | {_default(field)} | {about} |"


def _default(field: FieldInfo) -> str:
    value: Any = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return ""
    shown = {None: "null", True: "true", False: "false"}.get(value) if _simple(value) else None
    return f"`{shown if shown is not None else re.sub(chr(39), '', str(value))}`"


def _simple(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


if __name__ == "__main__":
    PAGE.write_text(page())
