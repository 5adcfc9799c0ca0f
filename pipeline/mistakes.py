"""A user's mistakes in a config, told as a user would look for them: key, value, remedy."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from judges.client_options import without_secrets
from judges.tagged_union import TaggedUnion


def explain(model: type[BaseModel], errors: Iterable[ErrorDetails]) -> list[str]:
    """A line for each mistake in a config of this model: dotted key, value, what it must be.

    The errors of a union's branches are one mistake.
    """
    return [
        _line(model, list(details))
        for _, details in itertools.groupby(errors, lambda error: _place(model, error["loc"]).key)
    ]


def _line(model: type[BaseModel], details: Sequence[ErrorDetails]) -> str:
    """The dotted key, its value, what is wrong and the remedy."""
    first = details[0]
    place = _place(model, first["loc"])
    about = place.field.description if place.field else None
    match first["type"]:
        case "extra_forbidden":
            name = str(first["loc"][-1])
            near = difflib.get_close_matches(name, place.siblings, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(place.siblings)}"
            return f"{place.key}: unknown key; {hint}"
        case "missing":
            return f"{place.key}: missing{f' — {about}' if about else '; every config needs it'}"
        case "value_error":
            message = str(first["ctx"]["error"])
            if not place.key or message.startswith(place.key):
                return message
            if isinstance(first["input"], Mapping):
                return f"{place.key}: {message}"
            return f"{place.key}={_shown(first['input'])}: {message}"
        case _:
            needed = " or ".join(_needed(detail) for detail in details)
            meaning = f" — {about}" if about else ""
            return f"{place.key}={_shown(first['input'])}: must be {needed}{meaning}"


_NEEDED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping of keys to values",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "a mapping of keys to values",
    "none_required": "null",
    "string_too_short": "non-empty",
    "string_type": "text (in quotes where it looks like a number)",
}


def _needed(detail: ErrorDetails) -> str:
    """What would have been right, to follow "must be"."""
    return _NEEDED.get(detail["type"], detail["msg"].lower().removeprefix("input should be "))


def _shown(value: object) -> str:
    word = value is None or isinstance(value, bool)
    text = json.dumps(value) if word else without_secrets(" ".join(str(value).split()))
    return text if len(text) <= 60 else f"{text[:57]}…"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in a config something is: its dotted key, its field, the keys that may stand there."""

    key: str
    field: FieldInfo | None
    siblings: tuple[str, ...]


def _place(model: type[BaseModel], location: Iterable[str | int]) -> _Place:
    """The place of pydantic's location, without the union branches that pydantic adds to it."""
    key: str = ""
    field: FieldInfo | None = None
    section: type[BaseModel] | None = model
    siblings: tuple[str, ...] = ()
    for step in location:
        if field is not None and isinstance(step, str) and (branch := _branch(field, step)):
            section, field = branch, None
        elif section is not None and isinstance(step, str):
            siblings = tuple(section.model_fields)
            key = f"{key}.{step}".removeprefix(".")
            field = section.model_fields.get(step)
            section = _section_of(field.annotation) if field else None
        elif isinstance(step, int):
            key = f"{key}[{step}]"
        elif field is not None and get_origin(field.annotation) is dict:
            key = f"{key}.{step}"
    return _Place(key, field, siblings)


def _branch(field: FieldInfo, tag: str) -> type[BaseModel] | None:
    """The model that a tagged union's tag stands for, where the field is one."""
    for part in (*field.metadata, *_parts(field.annotation)):
        if isinstance(part, TaggedUnion):
            return _section_of(part.branches.get(tag))
    return None


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in _parts(annotation):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _parts(annotation: Any) -> Iterator[Any]:
    """The annotation, then what it is made of at any depth, with the metadata of Annotated."""
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)
