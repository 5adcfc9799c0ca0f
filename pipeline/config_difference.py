"""How the configs of several runs differ: by dotted key, and how a key and a value are told."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

OWN_KEYS = ("run.name", "run.dir")
"""What every run has to itself: never a difference."""


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config by dotted keys; lists and empty mappings are values."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def differences(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The dotted keys that not all of these have, or not with one value; names are no matter."""
    keys = dict.fromkeys(key for config in configs for key in config)
    first = configs[0]
    return [
        key
        for key in keys
        if key not in OWN_KEYS
        and any((key in c, c.get(key)) != (key in first, first.get(key)) for c in configs)
    ]


def short_keys(keys: Sequence[str], among: Iterable[str] = ()) -> dict[str, str]:
    """Each dotted key's last part; more of it where another key, or one of ``among``, has that."""
    every = {*keys, *among}
    return {key: _shortest(key, every - {key}) for key in keys}


def _shortest(key: str, others: Iterable[str]) -> str:
    parts = key.split(".")
    for count in range(1, len(parts)):
        short = ".".join(parts[-count:])
        if not any(f".{other}".endswith(f".{short}") for other in others):
            return short
    return key


def value_text(value: Any) -> str:
    """A config's value as YAML has it, on one line."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float() if math.isinf(value):
            return ".inf" if value > 0 else "-.inf"
        case str():
            return value
        case Mapping():
            return "{" + ", ".join(f"{k}: {value_text(v)}" for k, v in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(value_text, value)) + "]"
    return str(value)
