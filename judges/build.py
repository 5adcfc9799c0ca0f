"""From a name in a config to a judge that can be asked."""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from judges.errors import UserError
from judges.interface import Text
from judges.plugins import (
    FORM,
    args_key,
    is_plugin,
    load_plugin,
    nearest,
    open_parameters,
    required,
)

BUILT_IN: Mapping[str, str] = {
    "sentiment": "judges.lexicon:sentiment",
    "polarity": "judges.lexicon:polarity",
    "language": "judges.lexicon:Language",
    "readability": "judges.lexicon:Readability",
    "profanity": "judges.lexicon:Profanity",
    "exact_answer": "judges.answers:ExactAnswer",
    "regex": "judges.rules:Regex",
    "json_schema": "judges.rules:JsonSchema",
    "length_window": "judges.rules:LengthWindow",
    "repetition": "judges.rules:Repetition",
    "human": "judges.human.judge:Human",
    "reward_model": "judges.reward_model:RewardModel",
    "implicit_reward": "judges.implicit_reward:ImplicitReward",
    "served_reward_model": "judges.served:VllmReward",
    "http": "judges.served:HttpReward",
    "llm_pairwise": "judges.llm:Pairwise",
    "llm_pointwise": "judges.llm:Pointwise",
    "self_rewarding": "judges.llm:SelfRewarding",
    "ensemble": "judges.ensemble:WeightedSum",
    "vote": "judges.ensemble:Vote",
    "length_control": "judges.length_control:LengthControl",
}
"""Where each is defined: loaded when it is asked for, as it may need torch."""

NOTHING: Mapping[str, Callable[[], Any]] = MappingProxyType({})

TEXTS = ("prompts", "completions", "first", "second")
"""The parameters that are handed over by us; all others are columns of the prompts, or args."""

OF_TRAINERS = ("trainer_state", "log_extra", "log_metric", "environments")
"""What TRL's trainers hand to reward functions beside texts, ids and columns: of their own."""


@dataclass(frozen=True, slots=True)
class Judge:
    """A judge built from its config.

    ``compares`` tells its shape: it is asked for P(first better), else for scores. ``accepts`` are
    the parameters that its signature leaves open (None: any), ``needs`` the columns among them
    without a default. ``took`` are the things offered to its constructor that it asked for.
    ``identity`` (JSON) is what its answers depend on beside the question: name, args, and the
    content of the files these name. ``members`` are the judges that it asks itself.
    """

    name: str
    compares: bool
    function: Callable[..., Any]
    accepts: frozenset[str] | None
    needs: tuple[str, ...]
    bound: frozenset[str]
    key: str
    took: frozenset[str]
    identity: tuple[Any, ...]
    members: tuple[Judge, ...] = ()

    def reads(self, column: str) -> bool:
        """Whether it is given that column of the prompts."""
        return column not in self.bound and (self.accepts is None or column in self.accepts)

    def needed(self) -> set[str]:
        """The columns that its signature or a member's needs."""
        return set(self.needs).union(*(member.needed() for member in self.members))

    def require(self, columns: Collection[str], given: Collection[str] = ()) -> None:
        """Raise UserError for a column that its or a member's signature needs and prompts lack.

        ``given`` are there besides the prompts' own.
        """
        for member in self.members:
            member.require(columns, given)
        for name in self.needs:
            if name not in columns and name in OF_TRAINERS:
                raise UserError(
                    f"{self.key}={self.name}: it needs {name}, which only TRL's trainers have: "
                    f"give that parameter a default, {name}=None"
                )
            if name not in (*columns, *given):
                raise UserError(
                    f"{self.key}={self.name}: it needs the column {name}, and the prompts have "
                    f"{', '.join(columns) or 'no columns'}{nearest(name, columns)}: "
                    f"add the column, or give {args_key(self.key)}.{name}"
                )

    def ask(self, columns: Mapping[str, Sequence[Any]], **texts: Sequence[Text]) -> Any:
        """What the judge returns, unread: an awaitable if it is asynchronous.

        ``texts`` are ``prompts`` and ``completions``, or ``prompts``, ``first`` and ``second``;
        they and the columns are lists of one length. An arg goes before a column of its name.
        Raises UserError where ``require`` does.
        """
        self.require(columns)
        offered = {n: v for n, v in columns.items() if n not in self.bound} | texts
        if self.accepts is not None:
            offered = {n: v for n, v in offered.items() if n in self.accepts}
        return self.function(**offered)


def build_judge(
    name: str,
    args: Mapping[str, Any],
    *,
    key: str = "judge.name",
    offered: Mapping[str, Callable[[], Any]] = NOTHING,
) -> Judge:
    """The built-in judge of that name, or the plug-in that it points to.

    A class is constructed here, once, with ``args`` and with what it asks for by name of what is
    ``offered`` (each made when it is asked for); of its instance the method ``score``, else
    ``compare``, else the call is the judge. A function gets ``args`` by keyword at every call.
    It compares if its signature takes ``first`` and ``second``; else it scores. Raises UserError
    for an unknown name, an unfit signature, or args that do not fit it; what a plug-in's
    constructor raises passes through.
    """
    if not is_plugin(name) and name not in BUILT_IN:
        raise UserError(
            f"{key}={name}: no such judge{nearest(name, BUILT_IN)}: "
            f"write {', '.join(BUILT_IN)}, {FORM}"
        )
    plugin = load_plugin(BUILT_IN.get(name, name), key=key)
    identity = (name, contents(dict(args)), contents(name.rpartition(":")[0]))
    took: frozenset[str] = frozenset()
    if inspect.isclass(plugin):
        instance, took = _construct(plugin, args, name, key, offered)
        function, args = _method(instance, name, key), {}
    else:
        function = plugin
    for arg in args:
        if arg in TEXTS:
            raise UserError(
                f"{args_key(key)}.{arg}: the judge is given {arg} by the run: rename it"
            )
    open_, takes_any = open_parameters(function, args, key=key, spec=name)
    compares = "first" in open_ and "second" in open_
    if not (compares or takes_any or "completions" in open_):
        raise UserError(
            f"{key}={name}: it takes ({', '.join(open_)}): a judge takes prompts and completions "
            "to score, or prompts, first and second to compare"
        )
    for parameter in open_.values():
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise UserError(
                f"{key}={name}: its parameter {parameter.name} is positional-only, and a judge is "
                "called by keyword: take the / out of its signature"
            )
    handed_over = ("prompts", "first", "second") if compares else ("prompts", "completions")
    return Judge(
        name=name,
        compares=compares,
        function=functools.partial(function, **args) if args else function,
        accepts=None if takes_any else frozenset(open_),
        needs=tuple(n for n in required(open_) if n not in handed_over),
        bound=frozenset(args),
        key=key,
        took=took,
        identity=identity,
    )


def _construct(
    plugin: type,
    args: Mapping[str, Any],
    name: str,
    key: str,
    offered: Mapping[str, Callable[[], Any]],
) -> tuple[object, frozenset[str]]:
    """The instance, and the names of what was offered that it took."""
    open_, _ = open_parameters(plugin, args, key=key, spec=name)
    taken = {n: offered[n]() for n in open_ if n in offered}
    if missing := [n for n in required(open_) if n not in taken]:
        raise UserError(f"{args_key(key)}: {name} needs {', '.join(missing)}: give it there")
    try:
        return plugin(**args, **taken), frozenset(taken)
    except (TypeError, AttributeError, ValueError) as error:
        if name not in BUILT_IN or isinstance(error, UserError):
            raise
        raise UserError(f"{args_key(key)}: {name}: {' '.join(str(error).split())}") from error


def contents(value: Any) -> Any:
    """The same, with a digest of the content beside each string that names a file or directory.

    A directory's is of its files' names, sizes and times: models are large.
    """
    match value:
        case str() if os.path.isdir(value):
            stats = [(entry.name, entry.stat()) for entry in os.scandir(value) if entry.is_file()]
            found = sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
            return [value, hashlib.sha256(repr(found).encode()).hexdigest()]
        case str() if os.path.isfile(value):
            return [value, hashlib.sha256(Path(value).read_bytes()).hexdigest()]
        case Mapping():
            return {str(key): contents(item) for key, item in value.items()}
        case list() | tuple():
            return [contents(item) for item in value]
    return value


def _method(instance: object, name: str, key: str) -> Callable[..., Any]:
    for method in ("score", "compare"):
        if callable(function := getattr(instance, method, None)):
            return function  # type: ignore[no-any-return]
    if callable(instance):
        return instance
    raise UserError(f"{key}={name}: the class has no method score, compare or __call__: add one")
