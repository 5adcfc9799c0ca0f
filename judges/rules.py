"""Judges by rule: what a completion's text is like, without a model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import regex

from judges.errors import UserError
from judges.interface import Score, Text, text_of

TIMEOUT_S = 1.0
"""What a user's pattern may take on one completion: some need exponential time."""

REASON_LENGTH = 200
"""Characters of a validator's reason: it may quote the whole completion."""

_FENCED = re.compile(r"```(?:json)?[ \t]*\r?\n(.*)```", re.DOTALL | re.IGNORECASE)


class Regex:
    """1 where the pattern is found in a completion, 0 where it is not."""

    def __init__(self, pattern: str) -> None:
        """``pattern``: a Python regular expression. Raises UserError for anything else."""
        self._pattern = compiled(pattern)

    def score(
        self, prompts: Sequence[Text], completions: Sequence[Text]
    ) -> list[float | Score | None]:
        """A completion that the pattern takes too long on is INVALID."""
        return [self._judged(text_of(completion)) for completion in completions]

    def _judged(self, text: str) -> float | Score:
        try:
            return float(self._pattern.search(text, timeout=TIMEOUT_S) is not None)
        except TimeoutError:
            return timed_out()


class JsonSchema:
    """1 where a completion is JSON that is valid under the schema, 0 with the reason where not.

    The JSON is the whole completion, or the whole of one ```` ```json ```` fence around it. The
    schema's draft is that of its ``$schema``, else 2020-12; ``format`` is an annotation there and
    is not checked. Nothing is fetched: a ``$ref`` points into the schema itself.
    """

    def __init__(self, schema: Mapping[str, Any] | str) -> None:
        """``schema``: the schema, or the path of its .json file, from the working directory.

        Raises UserError for a file that cannot be read, and for what is not a schema.
        """
        from referencing import Registry

        where, document = _read_schema(schema)
        self._validator = _checked_draft(document, where)(document, registry=Registry())

    def score(
        self, prompts: Sequence[Text], completions: Sequence[Text]
    ) -> list[float | Score | None]:
        """What the validator cannot check (numbers or nesting beyond its means) is INVALID."""
        return [self._judged(text_of(completion)) for completion in completions]

    def _judged(self, text: str) -> float | Score:
        from jsonschema.exceptions import best_match

        fenced = _FENCED.fullmatch(text.strip())
        try:
            instance = json.loads(
                fenced[1] if fenced else text, parse_float=_finite, parse_constant=_not_json
            )
        except RecursionError:
            return Score(0.0, "JSON that is nested too deep")
        except ValueError as error:
            return Score(0.0, f"not JSON: {error}")
        try:
            worst = best_match(self._validator.iter_errors(instance))
        except (ArithmeticError, RecursionError) as failure:
            return Score(None, _one_line(f"cannot be checked: {type(failure).__name__}: {failure}"))
        if worst is None:
            return 1.0
        return Score(0.0, _one_line(f"{worst.json_path}: {worst.message}"))


class LengthWindow:
    """1 for a completion whose length is from ``min`` to ``max``, less the further it is outside.

    Outside, the score is the shorter of length and broken bound over the longer: 0.5 at half of
    ``min`` and at twice ``max``. Thus of two that miss the window the nearer one wins, where 0 for
    both would teach nothing. White space around the text is not counted.
    """

    def __init__(self, min: int | None = None, max: int | None = None, unit: str = "words") -> None:
        """Bounds in ``unit``: words (parted by white space) or characters. Raises UserError."""
        for name, bound in (("min", min), ("max", max)):
            if bound is not None and (type(bound) is not int or bound < 1):
                raise UserError(
                    f"judge.args.{name}={bound}: not a length: write a whole number >= 1"
                )
        if min is None and max is None:
            raise UserError("judge.args: length_window has no bound: give it min, max or both")
        if min is not None and max is not None and min > max:
            raise UserError(f"judge.args.min={min}: it is above max={max}: exchange them")
        if unit not in ("words", "characters"):
            raise UserError(f"judge.args.unit={unit}: no such unit: write words or characters")
        self._min, self._max = min, max
        self._in_words = unit == "words"

    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float | None]:
        """Scores in [0, 1]."""
        return [self._judged(text_of(completion)) for completion in completions]

    def _judged(self, text: str) -> float:
        length = len(text.split()) if self._in_words else len(text.strip())
        if self._min is not None and length < self._min:
            return length / self._min
        if self._max is not None and length > self._max:
            return self._max / length
        return 1.0


class Repetition:
    """Minus the share of a completion's word n-grams that were there before: 0 is the best.

    That is distinct / total − 1, in (−1, 0]; 0 for fewer than n + 1 words, as one n-gram repeats
    nothing. Words are parted by white space.
    """

    def __init__(self, n: int = 4) -> None:
        """``n``: words in an n-gram. Raises UserError below 1."""
        if type(n) is not int or n < 1:
            raise UserError(f"judge.args.n={n}: not a number of words: write a whole number >= 1")
        self._n = n

    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float | None]:
        """Scores in (−1, 0]."""
        return [self._judged(text_of(completion).split()) for completion in completions]

    def _judged(self, words: list[str]) -> float:
        total = len(words) - self._n + 1
        if total < 1:
            return 0.0
        ngrams = zip(*(words[start : start + total] for start in range(self._n)), strict=True)
        return (len(set(ngrams)) - total) / total


def compiled(pattern: object, *, groups: int = 0) -> regex.Pattern[str]:
    """The pattern of ``judge.args.pattern``; its searches take a ``timeout``.

    Raises UserError for what is not a regular expression or has fewer ``groups``.
    """
    if not isinstance(pattern, str):
        raise UserError(f"judge.args.pattern={pattern}: not text: write it in quotes")
    shown = _one_line(pattern)
    try:
        found = regex.compile(pattern)
    except regex.error as error:
        raise UserError(
            f"judge.args.pattern={shown}: not a regular expression ({error}): mend it"
        ) from error
    if found.groups < groups:
        raise UserError(
            f"judge.args.pattern={shown}: it has no group: put what is sought in parentheses"
        )
    return found


def timed_out() -> Score:
    """A pattern took too long."""
    return Score(None, f"the pattern takes more than {TIMEOUT_S:g} s on this completion")


def _read_schema(schema: object) -> tuple[str, Any]:
    """Its place, for messages, and its contents as JSON has them: keys that are text."""
    if isinstance(schema, Mapping):
        where = "judge.args.schema"
        try:
            document = json.loads(json.dumps(schema))
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: it cannot be written as JSON: {error}: mend it") from error
        return where, document
    where = f"judge.args.schema={schema}"
    if not isinstance(schema, str):
        raise UserError(f"{where}: not a schema: write a mapping, or the path of a .json file")
    try:
        document = json.loads(Path(schema).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}: write a mapping, or a file's path") from error
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}: mend that file") from error
    return where, document


def _checked_draft(document: Any, where: str) -> Any:
    """The validator's class, once the schema is one and all that it refers to is in it."""
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012, specification_with

    if not isinstance(document, dict) or not isinstance(document.get("$schema", ""), str):
        raise UserError(f"{where}: not an object whose $schema is text: mend it")
    try:
        draft = validator_for(document, default=Draft202012Validator)
        draft.check_schema(document)
    except SchemaError as error:
        reason = _one_line(f"{error.json_path}: {error.message}")
        raise UserError(f"{where}: not a JSON Schema ({reason}): mend it") from error
    dialect = specification_with(document.get("$schema", ""), default=DRAFT202012)
    root = dialect.create_resource(document)
    pending = [(root, REGISTRY.resolver_with_root(root))]
    seen = set()
    while pending:
        resource, resolver = pending.pop()
        if id(resource.contents) in seen:
            continue
        seen.add(id(resource.contents))
        pending += [(sub, resolver.in_subresource(sub)) for sub in resource.subresources()]
        for keyword in ("$ref", "$dynamicRef", "$recursiveRef"):
            contents = resource.contents
            reference = contents.get(keyword) if isinstance(contents, dict) else None
            if isinstance(reference, str):
                try:
                    target = resolver.lookup(reference)
                except Unresolvable as error:
                    raise UserError(
                        f"{where}: nothing in it is at {keyword} {reference}, and nothing is "
                        "fetched: put what is meant under $defs"
                    ) from error
                pending.append((dialect.create_resource(target.contents), target.resolver))
    return draft


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"the number {number[:20]} is too large")
    return value


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= REASON_LENGTH else f"{line[:REASON_LENGTH]}…"
