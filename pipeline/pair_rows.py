"""What a row of a preference set says: a prompt with two completions, or one that is labelled."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from judges.errors import UserError
from judges.interface import Message, Text
from judges.plugins import nearest
from pipeline.pair_records import RECORD, Sampled, count_of, numbers_of, sampled_side
from pipeline.prompt_content import completion_of, content_of
from pipeline.prompt_files import Row
from workers.messages import IntArray

Answer: TypeAlias = str | Message
"""What a completion says: text, or the assistant's message."""

SIDES = ("chosen", "rejected")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

FORMS = (
    "a row has prompt, chosen and rejected; or chosen and rejected as conversations; or "
    "conversations, chosen and rejected; or prompt, completion and label"
)


class LeftOutError(Exception):
    """A row that the set is known to hold and that nothing can be learned from; says why."""


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One completion of a row: what it says, and its tokens where a run recorded them."""

    answer: Answer
    sampled: Sampled | None = None

    @property
    def text(self) -> str:
        """For people and judges."""
        return self.answer if isinstance(self.answer, str) else str(self.answer["content"])


@dataclass(frozen=True, slots=True)
class StreamPlace:
    """Where a prompt stood in the stream of the run that exported it, and how long that was."""

    position: int
    positions: int


@dataclass(frozen=True, slots=True, eq=False)
class PairRow:
    """A row's prompt with its ``sides``: chosen and rejected, or the one completion of a label.

    ``prompt_ids`` [P] are there if the sides are sampled. ``place`` is there if that and the sides'
    sample indices were recorded. ``columns`` are the other fields.
    """

    prompt: Text
    sides: tuple[Side, ...]
    label_prob: float
    desirable: bool | None
    prompt_ids: IntArray | None
    place: StreamPlace | None
    columns: Mapping[str, Any]


def read_pair_row(row: Row, chat: bool | None, has_template: bool) -> PairRow:
    """What a row says, in whichever of the forms it has; a null is as good as no column.

    ``chat`` true: text becomes messages; false: there may be text only; None: each as it stands,
    but for dialogues of "Human:" and "Assistant:", which are messages where the policy's tokenizer
    ``has_template``. Raises UserError, without the row's place, and LeftOutError.
    """
    row = {name: value for name, value in row.items() if value is not None and name != "split"}
    names = _side_names(row)
    if "conversations" in row and names == SIDES:
        prompt, answers = _sharegpt(row, chat)
    elif "prompt" not in row and all(isinstance(row[name], str) for name in names):
        prompt, answers = _dialogues(row, names, has_template if chat is None else chat)
    elif names == SIDES and all(_is_conversation(row[name]) for name in names):
        prompt, answers = _shared_conversation(row, chat)
    else:
        prompt, answers = _prompted(row, names, chat)
    return _with_records(row, names, prompt, answers)


def _side_names(row: Row) -> tuple[str, ...]:
    """``SIDES``, or the completion of a labelled row. Raises UserError where one is missing."""
    wanted = ("completion", "label") if "completion" in row else SIDES
    for name in wanted:
        if name not in row:
            raise UserError(f"no {name}, or null{nearest(name, row)}: {FORMS}")
    return wanted if wanted == SIDES else ("completion",)


def _prompted(row: Row, names: Sequence[str], chat: bool | None) -> tuple[Text, list[Answer]]:
    """Prompt and completions in columns of their own (TRL's explicit prompt)."""
    if "prompt" not in row:
        raise UserError(f"no prompt, or null{nearest('prompt', row)}: {FORMS}")
    messages = any(not isinstance(row[name], str) for name in names)
    prompt = content_of(row["prompt"], True if messages and chat is None else chat)
    return prompt, [_answer(row[name], name, not isinstance(prompt, str)) for name in names]


def _answer(value: Any, noun: str, chat: bool) -> Answer:
    content = completion_of(value, noun)
    if isinstance(content, str):
        return {"role": "assistant", "content": content} if chat else content
    if not chat:
        raise UserError(f"the {noun} is a list of messages: drop chat: false or give text")
    if len(content) != 1:
        raise UserError(
            f"the {noun} has {len(content)} messages: after a prompt give the assistant's one"
        )
    return _of_assistant(content[0], noun)


def _of_assistant(message: Message, noun: str) -> Message:
    if message["role"] != "assistant":
        raise UserError(
            f"the {noun} ends with a message of role {message['role']!r}: "
            "give one of the assistant, which is what the policy learns to write"
        )
    return message


def _is_conversation(value: Any) -> bool:
    """Whether it is several messages: a completion with the prompt before it."""
    return isinstance(value, list) and len(value) > 1


def _shared_conversation(row: Row, chat: bool | None) -> tuple[Text, list[Answer]]:
    """Conversations that hold the prompt themselves (TRL's implicit prompt).

    A text prompt beside them is only the first message once more, as in UltraFeedback.
    """
    if not isinstance(row.get("prompt", ""), str):
        raise UserError(
            "a prompt of messages, and chosen and rejected of several: after a prompt give the "
            "assistant's one, or leave the prompt out"
        )
    prompts: list[Text] = []
    answers: list[Answer] = []
    for name in SIDES:
        content = content_of(row[name], chat)
        assert not isinstance(content, str)
        prompts.append(list(content[:-1]))
        answers.append(_of_assistant(content[-1], name))
    if prompts[0] != prompts[1]:
        raise UserError(
            "chosen and rejected part before their last message: give conversations that share "
            "all but that"
        )
    return prompts[0], answers


def _sharegpt(row: Row, chat: bool | None) -> tuple[Text, list[Answer]]:
    """``conversations`` of {from, value}, and a message for each side."""
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise UserError(f"conversations: of type {type(turns).__name__}: give a list of messages")
    messages = [_sharegpt_message(turn, "conversations") for turn in turns]
    if isinstance(row.get("system"), str) and row["system"].strip():
        messages.insert(0, {"role": "system", "content": row["system"]})
    prompt = content_of(messages, chat)
    return prompt, [_of_assistant(_sharegpt_message(row[name], name), name) for name in SIDES]


def _sharegpt_message(turn: Any, noun: str) -> Message:
    if isinstance(turn, list) and len(turn) == 1:
        turn = turn[0]
    known = isinstance(turn, dict) and isinstance(turn.get("value"), str)
    if not known or turn.get("from") not in SHAREGPT_ROLES:
        raise UserError(
            f'{noun}: not of the form {{"from": …, "value": text}} with from one of '
            f"{', '.join(SHAREGPT_ROLES)}: mend or remove the row"
        )
    content = completion_of(turn["value"], noun)
    return {"role": SHAREGPT_ROLES[turn["from"]], "content": content}


def _dialogues(row: Row, names: Sequence[str], chat: bool) -> tuple[Text, list[Answer]]:
    """Texts of "Human:" and "Assistant:" turns that share all but the assistant's last (hh-rlhf).

    The prompt of text ends with the last "Assistant:", so a completion begins with its space.
    Raises LeftOutError where dialogues part before that, or the assistant says nothing.
    """
    texts = [str(completion_of(row[name], name)) for name in names]
    for name, text in zip(names, texts, strict=True):
        if not text.startswith(HUMAN) or ASSISTANT not in text:
            raise UserError(
                f"no prompt, and {name} is no dialogue that begins with {HUMAN!r} and has "
                f"{ASSISTANT!r}: {FORMS}"
            )
    parts = [text.rpartition(ASSISTANT) for text in texts]
    shared = {before for before, _, _ in parts}
    if len(shared) > 1 or any(HUMAN in last for _, _, last in parts):
        raise LeftOutError("parted")
    if not all(last.strip() for _, _, last in parts):
        raise LeftOutError("empty")
    dialogue = shared.pop()
    if not chat:
        return dialogue + ASSISTANT, [last for _, _, last in parts]
    messages = _turns(dialogue)
    if messages[-1]["role"] != "user":
        raise LeftOutError("turns")
    answers: list[Answer] = [{"role": "assistant", "content": last.strip()} for *_, last in parts]
    return messages, answers


def _turns(dialogue: str) -> list[Message]:
    """The dialogue's messages; turns of one speaker in a row are one: templates want turns."""
    pieces = re.split(f"({HUMAN}|{ASSISTANT})", dialogue)[1:]
    said = zip(pieces[::2], pieces[1::2], strict=True)
    return [
        {
            "role": "user" if speaker == HUMAN else "assistant",
            "content": "\n\n".join(content.strip() for _, content in turns),
        }
        for speaker, turns in itertools.groupby(said, key=lambda turn: turn[0])
    ]


def _with_records(
    row: Row, names: Sequence[str], prompt: Text, answers: Sequence[Answer]
) -> PairRow:
    """The row with what our export recorded: tokens, positions, how sure the label is."""
    paired = len(names) == 2
    sampled = [sampled_side(row, name) for name in names]
    prompt_ids = numbers_of(row, "prompt_ids", np.int64)
    if len({ids is None for ids in (prompt_ids, *sampled)}) > 1:
        wanted = ", ".join(f"{name}_ids" for name in ("prompt", *names))
        raise UserError(f"has some of {wanted}, not all: give all, or none to tokenise the text")
    known = {"prompt", "conversations", *names} | ({"label_prob"} if paired else {"label"})
    if prompt_ids is not None:
        known |= {"prompt_ids", "position", "positions", "round", "version"}
        known |= {f"{name}_{field}" for name in names for field in RECORD}
    return PairRow(
        prompt,
        tuple(Side(answer, record) for answer, record in zip(answers, sampled, strict=True)),
        _label_prob(row.get("label_prob", 1.0)) if paired else 1.0,
        None if paired else _label(row["label"]),
        prompt_ids,
        _stream_place(row, sampled),
        {name: value for name, value in row.items() if name not in known},
    )


def _stream_place(row: Row, sampled: Sequence[Sampled | None]) -> StreamPlace | None:
    if any(record is None or record.sample is None for record in sampled):
        return None
    position, positions = count_of(row, "position"), count_of(row, "positions")
    if position is None or positions is None:
        return None
    if position >= positions:
        raise UserError(
            f"position={position}: not below positions={positions}: export the set again"
        )
    return StreamPlace(position, positions)


def _label_prob(value: Any) -> float:
    try:
        prob = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        prob = math.nan
    if not 0.0 < prob <= 1.0:
        raise UserError(
            f"label_prob={value}: not in (0, 1]: it is P(chosen is better); mend or remove the row"
        )
    return prob


def _label(value: Any) -> bool:
    said = value.strip().lower() if isinstance(value, str) else value
    for label, forms in ((True, (1, "true", "1")), (False, (0, "false", "0"))):
        if said in forms:
            return label
    raise UserError(f"label={value}: not true or false (or 1, 0): mend or remove the row")
