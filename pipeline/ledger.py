"""The durable record of every round: two Parquet files each, exact, written before learning."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.durable import sync_to_disk
from pipeline.ledger_tables import completions_table, groups_of, pairs_table
from workers.messages import Round

HEADER_KEY = b"freshpairs.round"


@dataclass(frozen=True, slots=True)
class RoundHeader:
    """What a round's files say of it as a whole, in their Parquet schema metadata.

    ``reference_version`` is that of the reference which scored it, None where none did.
    """

    index: int
    version: int
    judge: str
    seconds: dict[str, float]
    reference_version: int | None
    logprob_gap: float | None


class Ledger:
    """The rounds under ``directory``: appended whole or not at all, never changed.

    A round exists if and only if its completions file does. That is written last, after its pairs
    are on disk: leftovers of a killed process (a temporary file, pairs alone) do not count and are
    overwritten.
    """

    def __init__(self, directory: Path) -> None:
        """Touches nothing: the directory is made by the first ``append``."""
        self.directory = directory

    def append(self, round_: Round, reference_version: int | None = None) -> None:
        """Write the round durably: once this returns, it survives a crash of the machine.

        Raises RuntimeError where the ledger has a round of that index, ValueError for a round
        whose groups do not fit the format (an empty or repeated one, unequal lengths).
        """
        if round_.index in self:
            raise RuntimeError(f"{self._path(round_.index)}: a round is never written twice")
        _require_consistent(round_)
        header = RoundHeader(
            index=round_.index,
            version=round_.version,
            judge=round_.judge,
            seconds=dict(round_.seconds),
            reference_version=reference_version,
            logprob_gap=round_.logprob_gap,
        )
        if not self.directory.is_dir():
            self.directory.mkdir(parents=True)
            sync_to_disk(self.directory.parent)
        self._write(self._pairs_path(round_.index), pairs_table(round_), header)
        self._write(self._path(round_.index), completions_table(round_, reference_version), header)

    def read(self, index: int) -> Round:
        """The round exactly as it was appended. Raises KeyError where there is none."""
        header = self.header(index)
        groups = groups_of(
            pq.ParquetFile(self._path(index)).read(),
            pq.ParquetFile(self._pairs_path(index)).read(),
        )
        return Round(
            index=header.index,
            version=header.version,
            groups=groups,
            judge=header.judge,
            seconds=header.seconds,
            logprob_gap=header.logprob_gap,
        )

    def header(self, index: int) -> RoundHeader:
        """The round's header, without reading its rows. Raises KeyError where there is none."""
        if index not in self:
            raise KeyError(f"round {index} is not in {self.directory}")
        metadata = pq.read_schema(self._path(index)).metadata
        return RoundHeader(**json.loads(metadata[HEADER_KEY]))

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

    def _write(self, path: Path, table: pa.Table, header: RoundHeader) -> None:
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            metadata = {HEADER_KEY: json.dumps(asdict(header))}
            pq.write_table(table.replace_schema_metadata(metadata), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_to_disk(self.directory)


def _require_consistent(round_: Round) -> None:
    positions = [group.prompt.position for group in round_.groups]
    if len(set(positions)) < len(positions):
        raise ValueError(f"round {round_.index}: a prompt's position stands there twice")
    for group in round_.groups:
        position, judgement, n = group.prompt.position, group.judgement, len(group.completions)
        members = [judgement.position, *(part.position for part in group.completions + group.pairs)]
        if n == 0 or any(member != position for member in members):
            raise ValueError(f"round {round_.index}: position {position} has none or others' parts")
        shapes_fit = len(judgement.scores) == len(judgement.reasons) == n and (
            judgement.wins is None or judgement.wins.shape == (n, n)
        )
        if not shapes_fit:
            raise ValueError(
                f"round {round_.index}: position {position} has {n} completions, not as many scores"
            )
