"""The durable record of every round: Parquet files, exact, written before learning."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.durable import sync_to_disk
from pipeline.ledger_tables import (
    completions_table,
    groups_of,
    pairs_table,
    reference_logprobs_of,
    reference_table,
)
from pipeline.storage import Storage
from workers.messages import FloatArray, Round

HEADER_KEY = b"freshpairs.round"


@dataclass(frozen=True, slots=True)
class RoundHeader:
    """What a round's files say of it as a whole, in their Parquet schema metadata.

    ``reference_version`` stands in the reference's file only; it is None in the others.
    """

    index: int
    version: int
    judge: str
    seconds: dict[str, float]
    logprob_gap: float | None
    reference_version: int | None
    judging: dict[str, float | None] = field(default_factory=dict)
    given: bool = False


class Ledger:
    """The rounds under ``directory``: appended whole or not at all, never changed.

    A round exists if and only if its completions file does. That is written last, after its pairs
    are on disk: leftovers of a killed process (a temporary file, pairs alone) do not count and are
    overwritten. What the reference says of a round has a file of its own, written when the round
    begins to be learned from: between sampling and learning the reference may still move.
    """

    def __init__(self, directory: Path, storage: Storage | None = None) -> None:
        """Touches nothing: the directory is made by the first ``append``.

        ``storage`` keeps its files; None: they last where they are.
        """
        self.directory = directory
        self._storage = storage or Storage(directory.parent)

    def append(self, round_: Round) -> None:
        """Write the round durably: once this returns, it survives a crash of the machine.

        Without what a reference said of it: that is ``append_reference``.

        Raises RuntimeError where the ledger has a round of that index, ValueError for a round
        whose groups do not fit the format (an empty or repeated one, unequal lengths).
        """
        if round_.index in self:
            raise RuntimeError(f"{self._path(round_.index)}: a round is never written twice")
        _require_consistent(round_)
        header = replace(_header(round_), reference_version=None)
        if not self.directory.is_dir():
            self.directory.mkdir(parents=True)
            sync_to_disk(self.directory.parent)
        self._write(self._pairs_path(round_.index), pairs_table(round_), header)
        self._write(self._path(round_.index), completions_table(round_), header)

    def append_reference(self, round_: Round) -> None:
        """Write what the reference said of a round that is there, as durably; once a round.

        Nothing is written for a round that no reference scored. Raises KeyError for a round that
        is not there, RuntimeError where it was scored before.
        """
        if round_.index not in self:
            raise KeyError(f"round {round_.index} is not in {self.directory}")
        path = self._reference_path(round_.index)
        if path.is_file():
            raise RuntimeError(f"{path}: a round is scored by one reference")
        if round_.reference_version is not None:
            self._write(path, reference_table(round_), _header(round_))

    def read(self, index: int) -> Round:
        """The round exactly as it was appended, with its reference's scores if it has them.

        Raises KeyError where there is no such round.
        """
        header = self.header(index)
        groups = groups_of(
            pq.ParquetFile(self._path(index)).read(),
            pq.ParquetFile(self._pairs_path(index)).read(),
        )
        round_ = Round(
            index=header.index,
            version=header.version,
            groups=groups,
            judge=header.judge,
            seconds=header.seconds,
            logprob_gap=header.logprob_gap,
            reference_version=None,
            judging=header.judging,
            given=header.given,
        )
        path = self._reference_path(index)
        if not path.is_file():
            return round_
        table = pq.ParquetFile(path).read()
        scored = with_reference_logprobs(round_, reference_logprobs_of(table))
        version = _read_header(path).reference_version
        return replace(scored, reference_version=version)

    def header(self, index: int) -> RoundHeader:
        """The round's header, without reading its rows. Raises KeyError where there is none."""
        if index not in self:
            raise KeyError(f"round {index} is not in {self.directory}")
        return _read_header(self._path(index))

    def __contains__(self, index: int) -> bool:
        return self._path(index).is_file()

    def __len__(self) -> int:
        """How many rounds there are from 0 on without a gap."""
        if not self.directory.is_dir():
            return 0
        matches = (
            re.fullmatch(r"round-(\d{6,})\.parquet", p.name) for p in self.directory.iterdir()
        )
        there = {int(match[1]) for match in matches if match}
        return next(index for index in range(len(there) + 1) if index not in there)

    def __iter__(self) -> Iterator[Round]:
        for index in range(len(self)):
            yield self.read(index)

    def _path(self, index: int) -> Path:
        return self.directory / f"round-{index:06d}.parquet"

    def _pairs_path(self, index: int) -> Path:
        return self.directory / f"round-{index:06d}.pairs.parquet"

    def _reference_path(self, index: int) -> Path:
        return self.directory / f"round-{index:06d}.reference.parquet"

    def _write(self, path: Path, table: pa.Table, header: RoundHeader) -> None:
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            metadata = {HEADER_KEY: json.dumps(asdict(header))}
            pq.write_table(table.replace_schema_metadata(metadata), file)
            file.flush()
            os.fsync(file.fileno())
        self._storage.replace(temporary, path)
        sync_to_disk(self.directory)


def with_reference_logprobs(
    round_: Round, logprobs: Mapping[tuple[int, int], FloatArray | None]
) -> Round:
    """The round with each completion's reference log-probabilities, by position and sample."""
    return round_.with_completions(
        lambda c: replace(c, reference_logprobs=logprobs[c.position, c.sample])
    )


def _header(round_: Round) -> RoundHeader:
    return RoundHeader(
        index=round_.index,
        version=round_.version,
        judge=round_.judge,
        seconds=dict(round_.seconds),
        logprob_gap=round_.logprob_gap,
        reference_version=round_.reference_version,
        judging=dict(round_.judging),
        given=round_.given,
    )


def _read_header(path: Path) -> RoundHeader:
    return RoundHeader(**json.loads(pq.read_schema(path).metadata[HEADER_KEY]))


def _require_consistent(round_: Round) -> None:
    positions = [group.prompt.position for group in round_.groups]
    if len(set(positions)) < len(positions):
        raise ValueError(f"round {round_.index}: a prompt's position stands there twice")
    for group in round_.groups:
        position, judgement, n = group.prompt.position, group.judgement, len(group.completions)
        members = [judgement.position, *(part.position for part in group.completions)]
        members += [part.position for part in group.pairs + group.labels]
        if n == 0 or any(member != position for member in members):
            raise ValueError(f"round {round_.index}: position {position} has none or others' parts")
        shapes_fit = len(judgement.scores) == len(judgement.reasons) == n and (
            judgement.wins is None or judgement.wins.shape == (n, n)
        )
        if judgement.declined is not None:
            asked = judgement.scores if judgement.wins is None else judgement.wins
            shapes_fit = shapes_fit and judgement.declined.shape == asked.shape
        if not shapes_fit:
            raise ValueError(
                f"round {round_.index}: position {position} has {n} completions, not as many scores"
            )
