"""Any judge over a file of completions or pairs, without training: ``freshpairs label``."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table
from rich.text import Text as Shown

from judges.asking import Asker, Question
from judges.errors import UserError
from judges.interface import Outcome, Score, Text, Verdict
from judges.links import bradley_terry, hard
from judges.options import JudgeOptions, is_implicit
from judges.plugins import nearest
from pipeline.prompt_content import completion_of, content_of
from pipeline.prompt_files import Row, first_line, read_file
from pipeline.report import visible

SIDES = (("chosen", "rejected"), ("first", "second"))
"""Columns of a pair: those of a preference data set, or without saying which is better."""

ASKED_TOGETHER = 256
"""Rows that a judge is given at once: progress is shown, and kept, between them."""

LONGEST_REASON = 100
"""Characters of the reason that the summary shows."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A file's rows: ``sides`` name the columns of a pair, none where a row is one completion.

    In ``chat`` form the judge reads messages only: one row with messages brings it about for all.
    """

    rows: list[Row]
    sides: tuple[str, str] | None
    chat: bool


@dataclass(frozen=True, slots=True)
class Labelled:
    """What a judge said of a file: the table as it was written, and what asking came to."""

    table: pa.Table
    counts: Counter[str]
    sides: tuple[str, str] | None
    seconds: float


def label(
    path: Path,
    options: JudgeOptions,
    out: Path,
    *,
    say: Callable[[str], object] = lambda line: None,
) -> Labelled:
    """Judge the rows of ``path`` (JSON lines, JSON, CSV, Parquet) and write them to ``out``.

    A row has ``prompt`` and ``completion``, or ``prompt`` and two completions, ``chosen`` and
    ``rejected`` or ``first`` and ``second``; its other columns are the judge's. A judge that scores
    is asked about both completions of a pair; if a row has messages, it reads all texts as messages
    (of the user, of the assistant). What a judge that is paid for has answered is kept in
    ``OUT.judge/``: labelling that was stopped goes on from there. Raises UserError for a file or a
    judge that will not do, BudgetSpent where its budget ends.
    """
    if out.suffix != ".parquet":
        raise UserError(f"--out {out}: labels are written as Parquet: name a file .parquet")
    if is_implicit(options):
        raise UserError(
            "judge.name=implicit_reward: without a run there is no policy in training: give "
            "judge.args.policy and judge.args.reference"
        )
    from workers.judge_clients import build_desk

    found = read_rows(path)
    given = _given(found.rows, path)
    asker = build_desk(out.with_suffix(".judge")).asker(options, budget=options.budget)
    if asker.judge.compares and found.sides is None:
        raise UserError(
            f"{path}: {options.name} compares, and these rows have one completion each: give it "
            "pairs (prompt, first, second), or a judge that scores"
        )
    _prepare(out)
    began = time.perf_counter()
    columns = asyncio.run(_labels(asker, found, options, say))
    table = _with_columns(given, columns)
    partial = _partial(out)
    try:
        pq.write_table(table, partial)
        os.replace(partial, out)
    except OSError as error:
        raise _unwritable(out, error) from error
    return Labelled(table, asker.counts, found.sides, time.perf_counter() - began)


def read_rows(path: Path) -> Rows:
    """The rows of a file of completions or pairs. Raises UserError where a row lacks its part."""
    rows = [row for _, row in read_file(path, str(path))]
    if not rows:
        raise UserError(f"{path}: holds no rows; nothing to label")
    names = list(rows[0])
    sides = next((pair for pair in SIDES if set(pair) <= set(names)), None)
    chat = False
    for number, row in enumerate(rows, start=1):
        for name in ("prompt", *(sides or ("completion",))):
            value = row.get(name)
            try:
                text = content_of(value, None) if name == "prompt" else completion_of(value, name)
            except UserError as error:
                hint = "" if name in row else nearest(name, row)
                raise UserError(
                    f"{path} row {number}: {name}{hint}: {error}; a row has prompt "
                    "and completion, or prompt and chosen, rejected (or first, second)"
                ) from error
            chat |= not isinstance(text, str)
    return Rows(rows, sides, chat)


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".tmp")


def _prepare(out: Path) -> None:
    """Make the folder of ``out``. Raises UserError where no file could be written there."""
    try:
        if out.is_dir():
            raise UserError(f"--out {out}: is a directory: name a file .parquet in it")
        out.parent.mkdir(parents=True, exist_ok=True)
        _partial(out).touch()
        _partial(out).unlink()
    except OSError as error:
        raise _unwritable(out, error) from error


def _unwritable(out: Path, error: OSError) -> UserError:
    return UserError(f"--out {out}: cannot be written ({error.strerror}): name another place")


def _given(rows: Sequence[Row], path: Path) -> dict[str, pa.Array]:
    """The rows' columns. Raises UserError for one that cannot be written as Parquet."""
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
            pq.write_table(pa.table({name: columns[name]}), pa.BufferOutputStream())
        except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
            raise UserError(
                f"{path}: the column {name!r} cannot be written as Parquet "
                f"({first_line(error)}): give it values of one type, or remove it"
            ) from error
    return columns


async def _labels(
    asker: Asker, found: Rows, options: JudgeOptions, say: Callable[[str], object]
) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    for start in range(0, len(found.rows), ASKED_TOGETHER):
        part = replace(found, rows=found.rows[start : start + ASKED_TOGETHER])
        for name, values in (await _part(asker, part, options)).items():
            columns.setdefault(name, []).extend(values)
        say(f"{min(start + ASKED_TOGETHER, len(found.rows))} of {len(found.rows)} rows judged")
    return columns


async def _part(asker: Asker, part: Rows, options: JudgeOptions) -> dict[str, list[Any]]:
    if part.sides is None:
        scores = await asker.ask(_questions(part, "completion"))
        return {
            "score": [score.value for score in scores],
            "outcome": [_kind(score) or "valid" for score in scores],
            "reason": [score.reason for score in scores],
        }
    if asker.judge.compares:
        scores = await asker.ask(_questions(part, *part.sides))
        return _verdicts([_compared(score) for score in scores], scores)
    # In one call: a judge may standardise its scores over it.
    questions = [question for side in part.sides for question in _questions(part, side)]
    scores = await asker.ask(questions)
    first, second = scores[: len(part.rows)], scores[len(part.rows) :]
    pairs = list(zip(first, second, strict=True))
    return {
        f"score_{part.sides[0]}": [score.value for score in first],
        f"score_{part.sides[1]}": [score.value for score in second],
        **_verdicts([_linked(*pair, options) for pair in pairs], [_worse(*p) for p in pairs]),
    }


def _questions(part: Rows, *sides: str) -> list[Question]:
    held = {"prompt", "completion", *SIDES[0], *SIDES[1]}
    return [
        Question(
            content_of(row["prompt"], part.chat or None),
            tuple(_completion(row[side], side, part.chat) for side in sides),
            {name: value for name, value in row.items() if name not in held},
        )
        for row in part.rows
    ]


def _completion(value: Any, side: str, chat: bool) -> Text:
    text = completion_of(value, side)
    return [{"role": "assistant", "content": text}] if chat and isinstance(text, str) else text


def _compared(score: Score) -> Verdict:
    if score.value is None:
        return Verdict(Outcome.INVALID)
    return Verdict.from_probability(score.value)


def _linked(first: Score, second: Score, options: JudgeOptions) -> Verdict:
    """A draw would differ from run to run: the sampled link's probability is told instead."""
    one, other = (np.nan if score.value is None else score.value for score in (first, second))
    if options.link == "hard":
        return hard(one, other)
    return bradley_terry(one, other, options.link_temperature)


def _worse(first: Score, second: Score) -> Score:
    """The one of two that tells why there is no verdict."""
    return first if first.value is None else second


def _verdicts(verdicts: Sequence[Verdict], scores: Sequence[Score]) -> dict[str, list[Any]]:
    return {
        "first_better": [
            None if verdict.outcome is Outcome.INVALID else verdict.first_better
            for verdict in verdicts
        ],
        "outcome": [
            (_kind(score) if verdict.outcome is Outcome.INVALID else None) or verdict.outcome.value
            for verdict, score in zip(verdicts, scores, strict=True)
        ],
        "reason": [score.reason for score in scores],
    }


def _kind(score: Score) -> str | None:
    if score.value is not None:
        return None
    return "declined" if score.declined else Outcome.INVALID.value


def _with_columns(given: dict[str, pa.Array], columns: dict[str, list[Any]]) -> pa.Table:
    """The rows with what the judge said; a column of theirs of the same name makes way."""
    texts = ("outcome", "reason")
    kept = {name: values for name, values in given.items() if name not in columns}
    said = {n: pa.array(v, pa.string() if n in texts else None) for n, v in columns.items()}
    return pa.table(kept | said)


def _invalid_reason(table: pa.Table) -> str:
    """Why the first INVALID row is that, in one line."""
    said = zip(*(table.column(name).to_pylist() for name in ("outcome", "reason")), strict=True)
    reason = next(reason for outcome, reason in said if outcome == Outcome.INVALID.value)
    line = visible(" ".join((reason or "no reason given").split()))
    return line if len(line) <= LONGEST_REASON else f"{line[: LONGEST_REASON - 1]}…"


def summary(labelled: Labelled) -> Table:
    """What a judge said of a file, for people."""
    table = Table(show_header=False, box=None)
    counts = Counter(labelled.table.column("outcome").to_pylist())
    rows = labelled.table.num_rows
    table.add_row("rows", str(rows))
    for outcome, count in counts.most_common():
        table.add_row(outcome, f"{count} ({count / rows:.1%})")
    if counts[Outcome.INVALID.value]:
        table.add_row("for example", Shown(_invalid_reason(labelled.table)))
    if labelled.sides is None:
        scores = np.array(
            [s for s in labelled.table.column("score").to_pylist() if s is not None], np.float64
        )
        if scores.size:
            table.add_row("score", f"{scores.mean():.4g} ± {scores.std():.4g}")
    else:
        first = [p for p in labelled.table.column("first_better").to_pylist() if p is not None]
        if first:
            better = float(np.mean([0.5 if p == 0.5 else float(p > 0.5) for p in first]))
            table.add_row(f"{labelled.sides[0]} better", f"{better:.1%} (a tie counts half)")
    if labelled.counts["both_orders"]:
        flips = labelled.counts["flipped"] / labelled.counts["both_orders"]
        table.add_row("order flips", f"{flips:.1%}")
    for name in ("asked", "cached", "calls", "retries", "timeouts", "tokens"):
        if labelled.counts[name]:
            table.add_row(name, str(labelled.counts[name]))
    if labelled.counts["usd"]:
        table.add_row("usd", f"{labelled.counts['usd']:.4f}")
    table.add_row("seconds", f"{labelled.seconds:.1f}")
    return table
