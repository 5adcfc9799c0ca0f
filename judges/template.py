"""The question that an AI judge asks: a file of plain text into which data is put, fenced in."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from judges.errors import UserError
from judges.interface import Message, Text
from judges.plugins import nearest

SHIPPED = Path(__file__).parent / "templates"
FENCE = "fence"

_PART = re.compile(r"^--- (system|user) ---[ \t]*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Template:
    """What the system and the user say, with placeholders such as ``{prompt}``.

    A line ``--- system ---`` or ``--- user ---`` begins a part; what stands above the first is a
    note to whoever edits the file. A file without such lines is all the user's part.
    """

    system: str | None
    user: str
    placeholders: frozenset[str]

    @classmethod
    def load(
        cls,
        template: str | None,
        default: str,
        *,
        data: Sequence[str],
        words: Sequence[str] = (),
    ) -> Template:
        """The shipped template of that name, the file at that path, or that text (several lines).

        ``data`` names the placeholders that prompts and completions take, ``words`` those of plain
        words; all of them and ``{fence}`` must occur. Raises UserError.
        """
        text, where = _read(template or default)
        marks = list(_PART.finditer(text))
        ends = [*(mark.start() for mark in marks), len(text)][1:]
        parts = [
            (m[1], text[m.end() : end].strip("\n")) for m, end in zip(marks, ends, strict=True)
        ] or [("user", text.strip("\n"))]
        roles = [role for role, _ in parts]
        if "user" not in roles or len(set(roles)) < len(roles):
            raise UserError(
                f"{where}: its parts are {', '.join(roles)}: one --- user --- is needed, one "
                "--- system --- may be"
            )
        by_role = dict(parts)
        found = frozenset(name for part in by_role.values() for name in _names(part))
        for name in (*data, *words, FENCE):
            if name not in found:
                has = ", ".join(f"{{{other}}}" for other in sorted(found)) or "none"
                raise UserError(f"{where}: it lacks the placeholder {{{name}}} (it has {has})")
        for name in data:
            if name in _names(by_role.get("system", "")):
                raise UserError(f"{where}: {{{name}}} is data: put it into the user's part")
        return cls(by_role.get("system"), by_role["user"], found)

    def filled(
        self, data: Mapping[str, Text], words: Mapping[str, str] | None = None
    ) -> tuple[Message, ...]:
        """The messages, with each piece of data between fences that occur in none of them.

        All is put in at once: a placeholder or a fence in the data is data.
        """
        fence = fence_for(piece for text in data.values() for piece in _pieces(text))
        values = {name: fenced(text, fence) for name, text in data.items()}
        values |= {FENCE: fence, **(words or {})}
        known = re.compile("|".join(re.escape(f"{{{name}}}") for name in values))

        def put(part: str) -> str:
            return known.sub(lambda match: values[match[0][1:-1]], part)

        parts = {"system": self.system, "user": self.user}
        return tuple(
            {"role": role, "content": put(part)} for role, part in parts.items() if part is not None
        )


def fenced(text: Text, fence: str) -> str:
    """The text between two lines with the fence; of a conversation, each message with its role."""
    if isinstance(text, str):
        return f"<<<{fence}\n{text}\n{fence}>>>"
    return "\n".join(
        f"<<<{fence} {_role(message)}\n{_content(message)}\n{fence}>>>" for message in text
    )


def fence_for(texts: Iterable[str]) -> str:
    """16 hexadecimal digits that are in none of the texts, the same for the same texts.

    In any order: a pair's two orders differ in nothing but the order, and a question that is asked
    again is the same question to a cache.
    """
    known = sorted(texts)
    for attempt in itertools.count():
        content = json.dumps([known, attempt]).encode()
        fence = hashlib.sha256(content).hexdigest()[:16]
        if not any(fence in text.lower() for text in known):
            return fence
    raise AssertionError("unreachable")


def canonical(text: Text) -> str:
    """Equal for equal texts, and in an order of its own."""
    plain = text if isinstance(text, str) else [dict(message) for message in text]
    return json.dumps(plain, sort_keys=True, default=str)


def _read(template: str) -> tuple[str, str]:
    """The text, and what a message calls it."""
    if "\n" in template:
        return template, "args.template"
    shipped = SHIPPED / f"{template}.txt"
    path = shipped if shipped.parent == SHIPPED and shipped.is_file() else Path(template)
    where = f"args.template={template}"
    try:
        return path.expanduser().read_text(encoding="utf-8"), where
    except (OSError, ValueError) as error:
        names = sorted(file.stem for file in SHIPPED.glob("*.txt"))
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(
            f"{where}: {reason}{nearest(template, names)}: name a file, or {', '.join(names)}"
        ) from error


def _names(part: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", part)


def _pieces(text: Text) -> list[str]:
    if isinstance(text, str):
        return [text]
    return [piece for message in text for piece in (_role(message), _content(message))]


def _role(message: Message) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", str(message.get("role", "")))[:30]


def _content(message: Message) -> str:
    content = message.get("content")
    return "" if content is None else str(content)
