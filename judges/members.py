"""The judges that another judge is made of: their section of its args, and asking them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, get_args

from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from judges.asking import Asker, Question
from judges.cache import content_key
from judges.client_options import without_secrets
from judges.errors import UserError
from judges.interface import Score, Text
from judges.model_clients import ClientOptions, PolicyClientOptions
from judges.options import AskOptions
from judges.plugins import nearest


class MemberOptions(AskOptions):
    """A judge that is part of another: its own limits, client and cache."""

    name: str = Field(description="A built-in judge, path/to/file.py:name or installed.module:name")

    @model_validator(mode="after")
    def _does_not_ask_the_policy(self) -> MemberOptions:
        if isinstance(self.client, PolicyClientOptions):
            raise ValueError(
                "client.kind=policy: a member is not given the policy's weights: name its model"
            )
        return self


class AskMember(Protocol):
    """Builds a member with everything around it; ``key`` is the config key of its name."""

    def __call__(self, options: AskOptions, key: str) -> Asker:
        """Raises UserError where ``build_judge`` does."""
        ...


Options = TypeVar("Options", bound=MemberOptions)


def read_member(kind: type[Options], raw: Any, key: str) -> Options:
    """The options written at ``key``, a name alone or a mapping.

    Raises UserError: one line for each mistake, with its key.
    """
    try:
        return kind.model_validate({"name": raw} if isinstance(raw, str) else raw)
    except ValidationError as error:
        lines = (_line(kind, key, mistake) for mistake in error.errors())
        raise UserError("\n".join(dict.fromkeys(lines))) from None


def read_members(kind: type[Options], raw: Any, key: str) -> list[Options]:
    """The options of each member of the list at ``key``. Raises UserError as ``read_member`` does.

    Also for an empty list, and for two members of one title.
    """
    if not isinstance(raw, list | tuple) or not raw:
        raise UserError(f"{key}: must be a list of judges: [sentiment, {{name: …, args: …}}]")
    members = [read_member(kind, one, f"{key}[{at}]") for at, one in enumerate(raw)]
    titles: set[str] = set()
    for at, member in enumerate(members):
        if member.title in titles:
            raise UserError(
                f"{key}[{at}]: {member.title} stands for two members: give one an alias"
            )
        titles.add(member.title)
    return members


def scoring(ask_member: AskMember, options: MemberOptions, key: str) -> Asker:
    """The member written at ``key``. Raises UserError if it compares."""
    asker = ask_member(options, key=f"{key}.name")
    if asker.judge.compares:
        raise UserError(
            f"{key}.name={options.name}: it compares two completions, and here scores are needed: "
            "use a judge that scores, or let it take part in a vote"
        )
    return asker


def questions_of(
    prompts: Sequence[Text], texts: Iterable[tuple[Text, ...]], columns: Mapping[str, Sequence[Any]]
) -> list[Question]:
    """What a judge was given, as questions to its members."""
    return [
        Question(prompt, shown, {name: values[at] for name, values in columns.items()})
        for at, (prompt, shown) in enumerate(zip(prompts, texts, strict=True))
    ]


async def asked_once(asker: Asker, questions: Sequence[Question]) -> list[Score]:
    """One score for each question, where the same question is asked only once."""
    keys = [
        content_key(q.prompt, q.texts, {n: v for n, v in q.columns.items() if asker.judge.reads(n)})
        for q in questions
    ]
    distinct: dict[str, Question] = {}
    for key, question in zip(keys, questions, strict=True):
        distinct.setdefault(key, question)
    scores = await asker.ask(list(distinct.values()))
    by_key = dict(zip(distinct, scores, strict=True))
    return [by_key[key] for key in keys]


def missing_of(titles: Sequence[str], scores: Sequence[Score]) -> Score | None:
    """What the whole says where a member has no verdict, with that member's title and reason.

    INVALID if a member failed, declined if members only declined; None where all have a verdict.
    """
    missing = [pair for pair in zip(titles, scores, strict=True) if pair[1].value is None]
    if not missing:
        return None
    title, score = min(missing, key=lambda pair: pair[1].declined)
    return Score(None, f"{title}: {score.reason}", declined=score.declined)


def _line(kind: type[Options], key: str, mistake: ErrorDetails) -> str:
    """The mistake's own key, and what is wrong there."""
    place, last = key, ""
    for step in mistake["loc"]:
        # After "client" pydantic names the kind of client that it took the section for.
        if last != "client":
            place += f"[{step}]" if isinstance(step, int) else f".{step}"
        last = str(step)
    match mistake["type"]:
        case "extra_forbidden":
            known = _known(kind, mistake["loc"])
            return f"{place}: unknown key{nearest(last, known)}: leave it out, or correct it"
        case "missing":
            return f"{place}: missing: give it there"
        case "model_type":
            return f"{place}={_shown(mistake['input'])}: must be a judge's name, or {{name: …}}"
        case "value_error":
            return f"{place}: {mistake['ctx']['error']}"
    needed = mistake["msg"].removeprefix("Input should be ")
    return f"{place}={_shown(mistake['input'])}: must be {needed}"


def _known(kind: type[Options], location: tuple[int | str, ...]) -> Iterable[str]:
    """The keys that may stand where an unknown one was found, as far as is known."""
    match location:
        case (_,):
            return kind.model_fields
        case ("client", tag, _):
            _, union = get_args(ClientOptions)
            return list(union.branches[tag].model_fields)
    return ()


def _shown(value: object) -> str:
    text = without_secrets(" ".join(str(value).split()))
    return text if len(text) <= 60 else f"{text[:57]}…"
