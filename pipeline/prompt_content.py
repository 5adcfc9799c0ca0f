"""What a prompt may be: text, messages, or turns; and a completion: text, or messages."""

from __future__ import annotations

from typing import Any

from judges.errors import UserError
from judges.interface import Text


def content_of(value: Any, chat: bool | None) -> Text:
    """A prompt's text or messages from a row's value: text, messages or turns.

    ``chat`` as in ``PromptSource.chat``. Raises UserError for anything else, and for nothing.
    """
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        what = "null" if value is None else "empty"
        raise UserError(f"the prompt is {what}; fill it in or remove the row")
    if isinstance(value, list) and isinstance(value[0], str):
        return content_of(value[0], chat is not False)
    if isinstance(value, str):
        _require_unicode(value)
        return [{"role": "user", "content": value}] if chat else value
    if not isinstance(value, list):
        raise UserError(
            f"the prompt is of type {type(value).__name__}; "
            "give text, a list of {role, content} messages or a list of turns"
        )
    if chat is False:
        raise UserError("the prompt is a list of messages; drop chat: false or give text")
    return [_message(message, number) for number, message in enumerate(value, start=1)]


def completion_of(value: Any, noun: str) -> Text:
    """A completion's text, which may be empty, or its messages, from a row's value.

    ``noun`` is what the errors call it. Raises UserError for anything else.
    """
    if isinstance(value, str):
        _require_unicode(value, noun)
        return value
    if value is None or value == []:
        what = "null" if value is None else "an empty list"
        raise UserError(f"the {noun} is {what}; fill it in or remove the row")
    if not isinstance(value, list) or isinstance(value[0], str):
        what = "a list of strings" if isinstance(value, list) else f"of type {type(value).__name__}"
        raise UserError(f"the {noun} is {what}; give text or a list of {{role, content}} messages")
    return [_message(message, number, noun) for number, message in enumerate(value, start=1)]


def _message(message: Any, number: int, noun: str = "prompt") -> dict[str, Any]:
    for field in ("role", "content"):
        if not isinstance(message, dict) or not isinstance(message.get(field), str):
            raise UserError(
                f"message {number} of the {noun} has no text {field!r}; "
                'write {"role": "user", "content": "…"}'
            )
    _require_unicode(message["content"], noun)
    return {name: value for name, value in message.items() if value is not None}


def _require_unicode(text: str, noun: str = "prompt") -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the {noun} has half a surrogate pair at character {error.start}; remove it"
        ) from error
