"""A preference set that was given, as judged prompts by position: what offline training reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from judges.errors import UserError
from pipeline.completion_encoder import CompletionEncoder
from pipeline.given_groups import EncodedRow, group_of, sample_of
from pipeline.pair_files import read_pairs
from pipeline.pair_records import require_known
from pipeline.pair_rows import SIDES, PairRow, Side
from pipeline.prompt_source import HOME_SPLIT
from workers.detokenizer import completion_text
from workers.messages import IntArray, PromptGroup
from workers.seeds import derive_seed

READ_BACK = 8
"""Recorded rows whose tokens are decoded, to see that they are of the policy's tokenizer."""

SHOWN = 40
"""Characters of what they read then."""


class GivenPairs:
    """Prompts with completions that are judged already, by position, epoch after epoch.

    Of a plain set every row is a position, and an epoch has each row once, in an order of its own
    (``shuffled``) or in that of the file. A set that we exported keeps the positions of the run it
    comes from, never shuffled: rows of one position are one group over the completions they share,
    an epoch lasts as long as that run's stream, and positions that nothing was learned from are
    missing. ``left_out`` counts, by reason, the rows that no position has: ``parted`` (dialogues
    that differ before the assistant's last turn), ``turns`` (dialogues whose last speaker before it
    is the assistant, as chat), ``empty``, ``too_long``; complete after ``check``. ``unpaired``:
    rows are single completions with a label; ``recorded``: all have their log-probabilities.
    """

    def __init__(
        self,
        path: str,
        tokenizer: Any,
        template_args: Mapping[str, Any] | None = None,
        *,
        chat: bool | None,
        order: Literal["shuffled", "file"],
        too_long: Literal["error", "drop"],
        max_tokens: int,
        run_seed: int,
        ends: Iterable[int] = (),
        split: str = HOME_SPLIT,
        key: str = "prompts.pairs",
        vocabulary: int | None = None,
    ) -> None:
        """Reads the file whole; tokenises nothing yet.

        ``template_args`` and ``ends`` as in ``CompletionEncoder``; ``max_tokens`` is the most that
        a prompt and completion may have together. With ``too_long="drop"`` rows that have more, or
        an empty completion, are left out. Recorded ids must be below ``vocabulary``, the policy's
        size of it. Raises UserError, which names the option under ``key``, for a file or a row that
        is none of the forms.
        """
        self._where = f"{key}={path}"
        self._order = order
        self._drop = too_long == "drop"
        self._max_tokens = max_tokens
        self._run_seed = run_seed
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._encoder = CompletionEncoder(tokenizer, template_args, ends)
        self._encoded: dict[int, EncodedRow | None] = {}
        self._kept: Sequence[int] | None = None
        self._permutation: tuple[int, Sequence[int]] | None = None
        self.left_out: Counter[str] = Counter()
        self._rows: list[tuple[int, PairRow]] = []
        has_template = getattr(tokenizer, "chat_template", None) is not None
        for number, row in read_pairs(self._file(path), self._where, chat, has_template, split):
            if isinstance(row, str):
                self.left_out[row] += 1
            else:
                self._rows.append((number, row))
        if not self._rows:
            raise self._nothing(f"of split {split}")
        self._require_one_form()
        first = self._rows[0][1]
        self.unpaired = first.desirable is not None
        self.recorded = all(_is_recorded(side) for _, row in self._rows for side in row.sides)
        self._positions = None if first.place is None else first.place.positions
        self._by_position = self._groups()

    def __len__(self) -> int:
        """Positions of an epoch; where rows may be dropped for their length, tokenises all."""
        return self._positions or len(self._kept_rows())

    @property
    def rows(self) -> int:
        """Rows that there are to learn from, like ``len`` where those are positions."""
        return len(self._kept_rows())

    def check(self) -> None:
        """Tokenise every row (kept for ``take``). Raises UserError, with the row, for a mistake.

        The first recorded rows are decoded too: their tokens must be those of their text.
        """
        kept = [index for index in range(len(self._rows)) if self._row(index) is not None]
        if not kept:
            raise self._nothing("to learn from")
        self._kept = kept
        recorded = (index for index in kept if self._rows[index][1].prompt_ids is not None)
        for index in islice(recorded, READ_BACK):
            self._require_own_tokens(index)

    def take(self, start: int, count: int, version: int) -> list[PromptGroup]:
        """The groups at positions start … start + count - 1, the same however they are asked for.

        ``version`` is said to have written them. Fewer than ``count`` where positions are missing.
        """
        groups = []
        for position in range(start, start + count):
            epoch, at = divmod(position, len(self))
            found = [self._row(index) for index in self._rows_at(epoch, at)]
            rows = [row for row in found if row is not None]
            if rows:
                groups.append(group_of(position, rows, version, self._encoder.ends))
        return groups

    def first(self, count: int, version: int = 0) -> list[PromptGroup]:
        """The first ``count`` groups that there are in an epoch; fewer where it has no more."""
        groups = (g for at in range(len(self)) for g in self.take(at, 1, version))
        return list(islice(groups, count))

    def _file(self, path: str) -> Path:
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(
                f"{self._where}: no such file; mend the path (relative ones start at {Path.cwd()})"
            )
        return file

    def _nothing(self, what: str) -> UserError:
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.left_out.items())
        left_out = f"; left out: {reasons}" if reasons else ""
        return UserError(f"{self._where}: no rows {what}{left_out}; fill it or choose another")

    def _place(self, index: int) -> str:
        return f"{self._where} row {self._rows[index][0]}"

    def _require_one_form(self) -> None:
        """Raises UserError where labels stand beside pairs, or positions beside none."""
        first = self._rows[0][1]
        for index, (_, row) in enumerate(self._rows):
            if (row.desirable is None) != (first.desirable is None):
                raise UserError(
                    f"{self._place(index)}: pairs and single completions with a label in one set: "
                    "split it into two files"
                )
            lengths = [None if r.place is None else r.place.positions for r in (row, first)]
            if lengths[0] != lengths[1]:
                raise UserError(
                    f"{self._place(index)}: positions={lengths[0]}, before it {lengths[1]}: one "
                    "set is the export of one run: do not join them, or drop the column positions"
                )

    def _groups(self) -> dict[int, list[int]]:
        """Of a set with positions, the rows of each. Raises UserError where they do not agree."""
        found: dict[int, list[int]] = {}
        said: dict[tuple[int, int], IntArray] = {}
        for index, (_, row) in enumerate(self._rows):
            if row.place is None:
                return {}
            position = row.place.position
            found.setdefault(position, []).append(index)
            assert row.prompt_ids is not None
            tokens = {-1: row.prompt_ids}
            tokens |= {sample_of(side): side.sampled.ids for side in row.sides if side.sampled}
            for sample, ids in tokens.items():
                if not np.array_equal(said.setdefault((position, sample), ids), ids):
                    what = "the prompt" if sample < 0 else f"sample {sample}"
                    raise UserError(
                        f"{self._place(index)}: {what} of position {position} has other tokens "
                        "than in a row before: export the set again"
                    )
        return found

    def _kept_rows(self) -> Sequence[int]:
        """The rows that are positions of a plain set."""
        if not self._drop:
            return range(len(self._rows))
        if self._kept is None:
            self.check()
        assert self._kept is not None
        return self._kept

    def _rows_at(self, epoch: int, at: int) -> Sequence[int]:
        if self._positions is not None:
            return self._by_position.get(at, ())
        kept = self._kept_rows()
        if self._order == "file":
            return (kept[at],)
        if self._permutation is None or self._permutation[0] != epoch:
            seed = derive_seed(self._run_seed, "pairs", epoch)
            order = np.random.default_rng(seed).permutation(len(kept))
            self._permutation = epoch, order.tolist()
        return (kept[self._permutation[1][at]],)

    def _row(self, index: int) -> EncodedRow | None:
        """The row with its ids; None where it is left out. Raises UserError with the row."""
        if index not in self._encoded:
            try:
                encoded = self._encode(self._rows[index][1])
                fault = self._fault(encoded)
                if fault is not None and not self._drop:
                    raise UserError(fault[1])
            except UserError as error:
                raise UserError(f"{self._place(index)}: {error}") from error
            if fault is not None:
                self.left_out[fault[0]] += 1
            self._encoded[index] = encoded if fault is None else None
        return self._encoded[index]

    def _encode(self, row: PairRow) -> EncodedRow:
        """Recorded ids as they are; of what was only written, those of the policy's tokenizer."""
        if row.prompt_ids is not None:
            require_known(row.prompt_ids, "prompt_ids", self._vocabulary)
            for name, side in zip(_names_of(row), row.sides, strict=True):
                if side.sampled is not None:
                    require_known(side.sampled.ids, f"{name}_ids", self._vocabulary)
            recorded = tuple(side.sampled.ids for side in row.sides if side.sampled)
            return EncodedRow(row, row.prompt_ids, recorded)
        prompt = self._encoder.encode_prompt(row.prompt)
        encode = self._encoder.encode_completion
        return EncodedRow(
            row, prompt, tuple(encode(row.prompt, prompt, s.answer) for s in row.sides)
        )

    def _require_own_tokens(self, index: int) -> None:
        """Raises UserError unless a recorded row's tokens decode to its text, spaces aside."""
        encoded = self._row(index)
        assert encoded is not None
        names = _names_of(encoded.row)
        for name, side, ids in zip(names, encoded.row.sides, encoded.ids, strict=True):
            text = completion_text(self._tokenizer, encoded.prompt_ids, ids.tolist())
            if "".join(text.split()) != "".join(side.text.split()):
                shown = text.strip()[:SHOWN]
                raise UserError(
                    f"{self._place(index)}: {name}_ids: the tokens are of another tokenizer, here "
                    f"they read {shown!r}: train the same model, or drop the columns …_ids to "
                    "tokenise the text"
                )

    def _fault(self, encoded: EncodedRow) -> tuple[str, str] | None:
        """Why nothing can be learned from a row: a word to count by, and a sentence."""
        if not len(encoded.prompt_ids):
            raise UserError("the prompt has no tokens; the model needs one to start from")
        if any(not len(ids) for ids in encoded.ids) or any(map(_says_nothing, encoded.row.sides)):
            return "empty", "a completion is empty: fill it in, or set too_long: drop"
        longest = len(encoded.prompt_ids) + max(len(ids) for ids in encoded.ids)
        if longest > self._max_tokens:
            return "too_long", (
                f"prompt and completion have {longest} tokens, there is room for "
                f"{self._max_tokens}: shorten the row, or set too_long: drop"
            )
        return None


def _names_of(row: PairRow) -> tuple[str, ...]:
    """What the columns of the row's sides begin with."""
    return SIDES if row.desirable is None else ("completion",)


def _is_recorded(side: Side) -> bool:
    return side.sampled is not None and side.sampled.logprobs is not None


def _says_nothing(side: Side) -> bool:
    """Whether it was written down without a word; a run may have sampled an end at once."""
    return side.sampled is None and not side.text.strip()
