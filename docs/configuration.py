"""Writes configuration.md from the config's own fields: `python docs/configuration.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline.config import Config
from workers.interval import Interval
from workers.learner.objective_options import BUILT_IN, OwnOptions
from workers.learner.pairwise_options import Options, PairwiseOptions

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
    if model is Options:
        return _objectives(name)
    return f"## {name}\n\n{_about(model)}\n\n{_table(model)}"


def _objectives(section: str) -> str:
    rows = []
    for name, options in BUILT_IN.items():
        pairwise = issubclass(options, PairwiseOptions)
        keys = "; ".join(
            f"`{key}` ({_default(field)}): {_meaning(field)}"
            for key, field in options.model_fields.items()
            if field.description and not (pairwise and _same(field, PairwiseOptions, key))
        )
        rows.append(f"| `{name}`{' *' if pairwise else ''} | {_about(options)} | {keys} |")
    return "\n".join(
        [
            f"## {section}",
            "",
            "The loss of an example, by `name` (`dpo`), with the keys of that objective. Formulas, "
            "uses and sources: [objectives.md](objectives.md).",
            "",
            "| name | is | keys (default): meaning |",
            "| --- | --- | --- |",
            *rows,
            "",
            "Objectives of a pair, marked *, also take:",
            "",
            _table(PairwiseOptions),
            "`name: path/to/file.py:function` or `installed.module:function`, an objective of your "
            "own, takes:",
            "",
            _table(OwnOptions),
        ]
    )


def _same(field: FieldInfo, model: type[BaseModel], key: str) -> bool:
    """Whether the model has this key with the same default and meaning."""
    other = model.model_fields.get(key)
    return other is not None and (_default(field), _meaning(field)) == (
        _default(other),
        _meaning(other),
    )


def _about(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split())


def _table(model: type[BaseModel]) -> str:
    fields = [(key, field) for key, field in model.model_fields.items() if field.description]
    rows = "\n".join(_row(key, field) for key, field in fields)
    return f"| key | default | meaning |\n| --- | --- | --- |\n{rows}\n"


def _row(key: str, field: FieldInfo) -> str:
    inner = _model_of(field.annotation)
    about = _meaning(field)
    if inner is not None:
        keys = ", ".join(f"`{k}`" for k in inner.model_fields)
        about = f"{about} (keys: {keys})"
    return f"| `{key}` | {_default(field)} | {about} |"


def _meaning(field: FieldInfo) -> str:
    ranges = [f", in {part.text}" for part in field.metadata if isinstance(part, Interval)]
    return "".join([(field.description or "").replace("|", "\\|"), *ranges])


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
