"""Files of preference sets, also compressed ones: their rows, each with its number."""

from __future__ import annotations

import gzip
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from judges.errors import UserError
from pipeline.pair_rows import LeftOutError, PairRow, read_pair_row
from pipeline.prompt_files import Numbered, read_file
from pipeline.prompt_source import HOME_SPLIT


def read_pairs(
    path: Path, where: str, chat: bool | None, has_template: bool, split: str
) -> Iterator[tuple[int, PairRow | str]]:
    """The rows of the split, each with its number: what it says, or why it is left out.

    Rows that name no ``split`` are of ``HOME_SPLIT``. Raises UserError with the row.
    """
    for number, row in read_pair_file(path, where):
        if str(row.get("split") or HOME_SPLIT) != split:
            continue
        try:
            yield number, read_pair_row(row, chat, has_template)
        except LeftOutError as left_out:
            yield number, str(left_out)
        except UserError as error:
            raise UserError(f"{where} row {number}: {error}") from error


def read_pair_file(path: Path, where: str) -> Numbered:
    """The rows of a .jsonl, .json, .csv or .parquet file, or of one compressed as .gz.

    Each comes with its number, as in ``read_file``. ``where`` opens every error. Raises UserError.
    """
    if path.suffix.lower() != ".gz":
        yield from read_file(path, where)
        return
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / path.stem
        try:
            with gzip.open(path) as packed, plain.open("wb") as file:
                shutil.copyfileobj(packed, file)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{where}: cannot be unpacked ({error}): pack it again") from error
        yield from read_file(plain, where)
