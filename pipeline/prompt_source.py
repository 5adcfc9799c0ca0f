"""Where prompts come from: the rows of a file, a directory or a hub dataset, each with its place.

Files are read by ours, row by row, so that a mistake in one is named by its line and a changed
file is always read again; directories and hub datasets by the ``datasets`` library.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from judges.errors import UserError
from pipeline.prompt_files import DATA_SUFFIXES, Numbered, Row, first_line, read_file

HOME_SPLIT = "train"
"""The split of a file's rows that do not name one."""

OTHER_DATA_SUFFIXES = (".arrow", ".gz", ".tsv", ".txt", ".yaml", ".zip", ".zst")
"""Not readable, but a path that ends so is meant as a file, never as a hub dataset."""


class PromptSource(BaseModel):
    """One set of prompts and how to read it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str | None = Field(
        default=None,
        description="A .jsonl, .json, .csv or .parquet file, a directory of them, or a dataset's "
        "name on the Hugging Face hub (anything that is no path here and has no data suffix).",
    )
    subset: str | None = Field(
        default=None,
        description="The configuration of a hub dataset that has several (openai/gsm8k: main).",
    )
    split: str = Field(
        default=HOME_SPLIT,
        description="Which split to use. In a file: the rows whose `split` column says so; rows "
        "without one are `train`.",
    )
    column: str = Field(
        default="prompt",
        description="The column that holds the prompt: text, a list of {role, content} messages, "
        "or a list of turns, of which the first becomes the user's message.",
    )
    chat: bool | None = Field(
        default=None,
        description="null: messages and turns are chat, text is plain text. true: text becomes "
        "one user message. false: plain text only; of turns the first is taken.",
    )
    streaming: bool = Field(
        default=False,
        description="Read rows as they are needed instead of all at the start: for what does not "
        "fit into memory. Rows are then checked as they come, not before the run.",
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="This source's share in a mixture, relative to the other sources' weights.",
    )


class RowSource:
    """The rows of one ``PromptSource``: loaded whole (map-style) or streamed.

    ``key`` is the source's place in the config, ``where`` what its errors open with.
    """

    def __init__(self, options: PromptSource, key: str) -> None:
        if options.path is None:
            raise UserError(f"{key}.path: missing; give a file, a directory or a hub dataset")
        self.options = options
        self.key = key
        self.where = f"{key}.path={options.path}"
        self.path = Path(options.path).expanduser()
        self.is_file = self.path.is_file()
        meant_as_file = (
            self.path.suffix.lower() in DATA_SUFFIXES + OTHER_DATA_SUFFIXES
            or options.path.startswith(("/", ".", "~"))
            or options.path.count("/") > 1
        )
        if not self.path.exists() and meant_as_file:
            raise UserError(
                f"{self.where}: no such file; mend the path (relative ones start at {Path.cwd()})"
            )

    def place(self, number: int) -> str:
        """What an error about one row opens with."""
        return f"{self.where} row {number}"

    def load(self) -> tuple[Sequence[Row], Sequence[int]]:
        """All rows of the split, and the number [rows] of each in its file.

        Raises UserError where there are none, they cannot be read or the column is missing.
        """
        if self.is_file:
            numbered = list(self.numbered_file_rows())
            rows = [row for _, row in numbered]
            self.require_column({name for row in rows for name in row})
            return rows, [number for number, _ in numbered]
        splits = self._open_dataset()
        home = self._home_split(splits)
        table = splits[home]
        numbers = list(range(1, len(table) + 1))
        if self.path.is_dir():
            own = table["split"] if "split" in table.column_names else [None] * len(table)
            named = [str(split or home) for split in own]
            kept = [row for row, split in enumerate(named) if split == self.options.split]
            if named and not kept:
                raise self._no_such_split({*splits, *named})
            table, numbers = table.select(kept), [row + 1 for row in kept]
        if not numbers:
            raise self.empty()
        self.require_column(table.column_names)
        return table, numbers

    def stream(self, index: int) -> Any:
        """An ``IterableDataset`` of {"source": index, "row": number, "value": the row as JSON}.

        Rows come in the order of the source. The numbers of a dataset in several shards count in
        the order of reading.
        """
        import datasets

        features = record_features()
        if self.is_file:
            return datasets.IterableDataset.from_generator(
                _records, features=features, gen_kwargs={"source": self, "index": index}
            )
        splits = self._open_dataset()
        home = self._home_split(splits)
        rows = splits[home]
        if self.path.is_dir():
            rows = rows.filter(lambda row: str(row.get("split") or home) == self.options.split)
        first = next(iter(rows), None)
        if first is None:
            raise self.empty() if home == self.options.split else self._no_such_split(splits)
        return rows.map(
            lambda row, number: _record(index, number + 1, row),
            with_indices=True,
            remove_columns=rows.column_names or list(first),
            features=features,
        )

    def numbered_file_rows(self) -> Numbered:
        """The file's rows of the split, lazily; UserError at the end where there were none."""
        splits = set()
        for number, row in read_file(self.path, self.where):
            split = str(row.get("split") or HOME_SPLIT)
            splits.add(split)
            if split == self.options.split:
                yield number, row
        if not splits:
            raise self.empty()
        if self.options.split not in splits:
            raise self._no_such_split(splits)

    def require_column(self, names: Iterable[str]) -> None:
        """Raises UserError, with the nearest name, where the prompt's column is not among them."""
        columns = sorted(set(names) - {"split"})
        if self.options.column in columns:
            return
        near = difflib.get_close_matches(self.options.column, columns, n=1, cutoff=0.5)
        nearest = f"the nearest is {near[0]!r}, " if near else ""
        raise UserError(
            f"{self.where}: no column {self.options.column!r}; set {self.key}.column: "
            f"{nearest}there are {', '.join(columns) or 'none'}"
        )

    def empty(self) -> UserError:
        """The error for a source without rows."""
        return UserError(
            f"{self.where}: no rows (split {self.options.split}); fill it or choose another"
        )

    def _open_dataset(self) -> Any:
        """The source's splits by name, as ``datasets`` loads them. Raises UserError."""
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()
        try:
            return datasets.load_dataset(
                str(self.path) if self.path.is_dir() else self.options.path,
                self.options.subset,
                streaming=self.options.streaming,
            )
        except Exception as error:
            reason = first_line(error.__cause__ or error)
            if self.path.is_dir():
                raise UserError(
                    f"{self.where}: the directory cannot be read as a dataset ({reason}); "
                    "give one of its files"
                ) from error
            raise UserError(
                f"{self.where}: no such path here, and not loadable from the Hugging Face hub "
                f"({reason}); check the name, {self.key}.subset and the network"
            ) from error

    def _home_split(self, splits: Any) -> str:
        """The split to read, in a directory the unnamed one where rows may name theirs."""
        if self.options.split in splits:
            return self.options.split
        if self.path.is_dir() and HOME_SPLIT in splits:
            return HOME_SPLIT
        raise self._no_such_split(splits)

    def _no_such_split(self, splits: Iterable[str]) -> UserError:
        there = ", ".join(sorted({str(split) for split in splits}))
        return UserError(
            f"{self.where}: no rows of split {self.options.split!r}; "
            f"set {self.key}.split: there are {there}"
        )


def record_features() -> Any:
    """The columns, as ``datasets`` wants them, of what is shuffled and mixed in place of rows."""
    import datasets

    int64 = datasets.Value("int64")
    return datasets.Features({"source": int64, "row": int64, "value": datasets.Value("string")})


def _record(index: int, number: int, row: Row) -> Row:
    return {"source": index, "row": number, "value": json.dumps(row, default=str)}


def _records(source: RowSource, index: int) -> Iterator[Row]:
    for number, row in source.numbered_file_rows():
        yield _record(index, number, row)
