"""A judge of final answers: right where a completion ends in the answer of its row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from judges.interface import Score, Text, text_of
from judges.rules import TIMEOUT_S, compiled, timed_out

MAX_DIGITS = 1000
"""Longer answers are compared as text: no completion may make us compute with its digits."""

_MARK = re.compile(r"#{4,}|\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_DOLLAR = re.compile(r"\\?\$")
_LEADING = re.compile(r"[-+−]?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?(?![./:]?[0-9]|\^)")

_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(rf"([-+]?{_DECIMAL})(?:/({_DECIMAL}))?")
_FRACTION = re.compile(r"([-+]?)\\frac(?:\{([^{}]*)\}\{([^{}]*)\}|([0-9])([0-9]))")

_REWRITES = [
    (re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\(?:left|right)(?![a-z])"), ""),
    (re.compile(r"\\[dt]frac(?![a-z])"), r"\\frac"),
    (_DOLLAR, ""),
    (re.compile(r"\\[!,;: ]"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile("−"), "-"),
    (re.compile(r"\s+"), " "),
    (re.compile(r"(?<=[^\w,]) | (?=\W)"), ""),
]
"""What says nothing, in case-folded text. A space after a comma stays: 1, 200 is no 1,200."""


class ExactAnswer:
    r"""1 where a completion's final answer is its row's, 0 where it is another or none.

    The final answer is the last ``#### …`` (Cobbe et al., GSM8K, arXiv:2110.14168) or
    ``\boxed{…}`` (Hendrycks et al., MATH, arXiv:2103.03874) of a completion, whichever comes last;
    with a ``pattern`` it is the first group of the pattern's last match. The row's ``answer`` may
    be bare, or a worked one that ends in either form. Numbers are equal by value, so 1,200 = 1200.0
    and \frac{1}{2} = 1/2 = 0.5; all else is equal as text. Case, spaces, dollar signs, a final full
    stop or per cent sign, and the LaTeX of layout do not count. After #### a number may be followed
    by words (``#### 18 dollars``).
    """

    def __init__(self, pattern: str | None = None) -> None:
        """Raises UserError for a pattern that is not a regular expression with a group."""
        self._pattern = None if pattern is None else compiled(pattern, groups=1)

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        answer: Sequence[str | float | None],
    ) -> list[float | Score | None]:
        """INVALID is a row without an answer, and a completion that the pattern takes too long on.

        ``answer`` is that of each completion's row.
        """
        pairs = zip(completions, answer, strict=True)
        return [self._judged(text_of(completion), row) for completion, row in pairs]

    def _judged(self, completion: str, row: object) -> float | Score:
        if not isinstance(row, str | int | float | None):
            return Score(None, f"the row's answer is a {type(row).__name__}, not text or a number")
        expected = "" if row is None else _plain(_last_stated(str(row)) or str(row))
        if not expected:
            return Score(None, "the row has no answer")
        number = _number(expected)
        try:
            found = self._found(completion, numeric=number is not None)
        except TimeoutError:
            return timed_out()
        if found is None:
            return Score(0.0, "no final answer")
        found = _plain(found)
        value = _number(found)
        if number is None or value is None:
            return float(found.replace(", ", ",") == expected.replace(", ", ","))
        return float(value == number)

    def _found(self, completion: str, *, numeric: bool) -> str | None:
        if self._pattern is None:
            return _last_stated(completion, numeric=numeric)
        matches = self._pattern.finditer(completion, timeout=TIMEOUT_S)
        groups = [match[1] for match in matches if match[1] is not None]
        return groups[-1] if groups else None


def _last_stated(text: str, *, numeric: bool = False) -> str | None:
    """The last answer that is marked as such; ``numeric``: a #### before no number is a heading."""
    marks = list(_MARK.finditer(text))
    closing = _closing_braces(text) if marks else {}
    end = len(text)
    for mark in reversed(marks):
        after, end = text[mark.end() : end], mark.start()
        if not mark[0].startswith("#"):
            close = closing.get(mark.end() - 1)
            if close is not None:
                return text[mark.end() : close]
        elif stated := _line_stated(after, numeric):
            return stated
    return None


def _line_stated(after: str, numeric: bool) -> str | None:
    line = after.strip().partition("\n")[0]
    if not numeric or _number(_plain(line)) is not None:
        return line
    leading = _LEADING.match(_DOLLAR.sub("", line).lstrip())
    return leading[0].replace(",", "") if leading else None


def _closing_braces(text: str) -> dict[int, int]:
    r"""From where a brace opens to where it closes; ``\{`` and ``\}`` are no braces."""
    opened: list[int] = []
    closing: dict[int, int] = {}
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            closing[opened.pop()] = brace.start()
    return closing


def _plain(answer: str) -> str:
    plain = answer.casefold()
    for pattern, replacement in _REWRITES:
        plain = pattern.sub(replacement, plain)
    return plain.strip().rstrip(" .%\\")


def _number(plain: str) -> Fraction | None:
    if len(plain) > MAX_DIGITS:
        return None
    if latex := _FRACTION.fullmatch(plain):
        sign, *parts = (part for part in latex.groups() if part is not None)
        plain = sign + "/".join(parts)
    found = _NUMBER.fullmatch(plain)
    if found is None:
        return None
    numerator, denominator = (Fraction(part.replace(",", "")) for part in found.groups("1"))
    return numerator / denominator if denominator else None
