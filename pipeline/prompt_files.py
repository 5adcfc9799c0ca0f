"""Files of rows, read lazily, each row with its number: a mistake is named by its line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from judges.errors import UserError

Row: TypeAlias = dict[str, Any]
Numbered: TypeAlias = Iterator[tuple[int, Row]]

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read_file(path: Path, where: str) -> Numbered:
    """The file's rows, lazily, each with its 1-based number.

    The number is the line in JSON lines, the element in a JSON array and the row (without the
    header) in CSV and Parquet. CSV values stay strings. ``where`` opens every error.
    Raises UserError for anything that cannot be read, with the line or row.
    """
    reader: Callable[[Path, str], Numbered]
    match path.suffix.lower():
        case ".jsonl":
            reader = _read_json_lines
        case ".json":
            reader = _read_json
        case ".csv":
            reader = _read_csv
        case ".parquet":
            reader = _read_parquet
        case _:
            suffixes = ", ".join(DATA_SUFFIXES)
            raise UserError(f"{where}: a prompt file ends in {suffixes}; convert or rename it")
    try:
        yield from reader(path, where)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error}); check the file") from error


def _read_json_lines(path: Path, where: str) -> Numbered:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{where} line {number}"
            try:
                value = json.loads(line.rstrip(b"\r\n"))
            except UnicodeDecodeError as error:
                raise UserError(f"{place}: not UTF-8 ({error.reason}); save it as UTF-8") from error
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{place}: broken JSON ({error.msg}, column {error.colno}); "
                    "mend or remove the line"
                ) from error
            except RecursionError as error:
                raise UserError(
                    f"{place}: broken JSON (nested too deep); mend or remove the line"
                ) from error
            yield number, _object(value, place)


def _read_json(path: Path, where: str) -> Numbered:
    content = path.read_bytes()
    if not content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _read_json_lines(path, where)
        return
    try:
        values = json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} line {error.lineno}: broken JSON ({error.msg}, column {error.colno}); mend it"
        ) from error
    except RecursionError as error:
        raise UserError(f"{where}: broken JSON (nested too deep); mend it") from error
    for number, value in enumerate(values, start=1):
        yield number, _object(value, f"{where} row {number}")


def _object(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(
            f'{place}: {json.dumps(value)[:40]} is no JSON object; write {{"prompt": …}}'
        )
    return value


def _read_csv(path: Path, where: str) -> Numbered:
    number = 0
    with path.open(encoding="utf-8-sig", newline="") as lines:
        try:
            for number, row in enumerate(csv.DictReader(lines, strict=True), start=1):
                if None in row:
                    raise UserError(
                        f"{where} row {number}: more fields than the header; quote its commas"
                    )
                yield number, dict(row)
        except csv.Error as error:
            raise UserError(f"{where} row {number + 1}: broken CSV ({error}); mend it") from error


def _read_parquet(path: Path, where: str) -> Numbered:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{where}: broken Parquet ({first_line(error)}); write the file anew"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message: another library's may be long."""
    return next(iter(str(error).splitlines()), type(error).__name__)
