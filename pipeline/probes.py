"""Probes: texts of which the learner gives log-probabilities as each round begins.

The first round's pairs show whether what was learned stays learned, completions that nobody wants
whether they become likely, held-out text what is forgotten.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from judges.errors import UserError
from judges.interface import Message, Text
from judges.plugins import nearest
from pipeline.completion_encoder import CompletionEncoder
from pipeline.drift_options import HeldOutOptions
from pipeline.prompt_content import completion_of, content_of
from pipeline.prompt_files import Row, read_file
from pipeline.prompt_source import PromptSource, RowSource
from workers.messages import (
    BatchCompletion,
    Fate,
    FloatArray,
    IntArray,
    PromptGroup,
    Round,
    UpdateBatch,
    probe_completion,
)

ScorePolicy: TypeAlias = Callable[[Sequence[UpdateBatch]], list[list[FloatArray]]]
"""The policy's log-probabilities [tokens] of every completion of every batch."""

Side: TypeAlias = Literal["chosen", "rejected"]
SIDES: tuple[Side, ...] = ("chosen", "rejected")

FIRST_PAIRS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """A completion of a pair that the first round taught, and its log-probability before that.

    ``logps`` in nats.
    """

    side: Side
    item: BatchCompletion
    logps: float


class Probes:
    """Scores its texts in one call a round.

    ``bad`` are completions to stay unlikely, each once; ``held_out`` are texts, each with its first
    token as the prompt. The pairs are the first 8 learned from in the first round that has any, of
    labels the first 8 desirable and the first 8 undesirable completions.
    """

    def __init__(
        self, bad: Sequence[BatchCompletion] = (), held_out: Sequence[BatchCompletion] = ()
    ) -> None:
        self._bad = tuple(bad)
        self._held_out = tuple(held_out)
        self._learned: tuple[Learned, ...] = ()

    def measures(
        self, round_: Round, score_policy: ScorePolicy | None = None
    ) -> dict[str, float | None]:
        """What the policy says of the probes as this round begins.

        ``chosen_logps_change``, ``rejected_logps_change``: mean over the pairs of Σ_t logprobs now
        minus then, nats a sequence; then is when the round began that taught them, where they are
        0. ``bad_mass``: mean over prompts of Σ π(y|x) over the prompt's bad completions y;
        ``bad_logps``: mean over all of these of log π(y|x). ``held_out_nll``: −Σ logprobs over all
        texts / number of tokens, nats a token. None where there is nothing to score.
        """
        taught = [] if self._learned else list(first_learned(round_))
        pairs = [item for _, item in taught] or [learned.item for learned in self._learned]
        logprobs = iter(_scored([*pairs, *self._bad, *self._held_out], score_policy))
        pair_logps = [_sum(found) for found in itertools.islice(logprobs, len(pairs))]
        bad_logps = [_sum(found) for found in itertools.islice(logprobs, len(self._bad))]
        if taught and pair_logps:
            self._learned = tuple(
                Learned(side, item, logps)
                for (side, item), logps in zip(taught, pair_logps, strict=True)
            )
        return {
            **{f"{side}_logps_change": self._change(side, pair_logps) for side in SIDES},
            "bad_mass": self._bad_mass(bad_logps),
            "bad_logps": _mean(bad_logps),
            "held_out_nll": _nll(list(logprobs)),
        }

    def state(self) -> list[dict[str, Any]]:
        """The pairs' completions and their first log-probabilities, as JSON."""
        return [
            {
                "side": learned.side,
                "prompt_ids": learned.item.prompt_ids.tolist(),
                "ids": learned.item.completion.ids.tolist(),
                "logps": learned.logps,
            }
            for learned in self._learned
        ]

    def load(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Take up what ``state`` gave."""
        self._learned = tuple(
            Learned(
                one["side"],
                probe(np.array(one["prompt_ids"], np.int64), one["ids"]),
                float(one["logps"]),
            )
            for one in state
        )

    def _change(self, side: Side, logps: Sequence[float]) -> float | None:
        if not logps:
            return None
        both = zip(self._learned, logps, strict=True)
        return _mean([now - learned.logps for learned, now in both if learned.side == side])

    def _bad_mass(self, logps: Sequence[float]) -> float | None:
        if not logps:
            return None
        prompts = {item.prompt_ids.tobytes() for item in self._bad}
        return float(np.exp(np.array(logps, np.float64)).sum()) / len(prompts)


def first_learned(round_: Round) -> Iterator[tuple[Side, BatchCompletion]]:
    """Both sides of the first pairs a round teaches, or the first labels of each kind."""
    pairs = (
        (group, pair) for group in round_.groups for pair in group.pairs if pair.fate is Fate.LEARN
    )
    for group, pair in itertools.islice(pairs, FIRST_PAIRS):
        yield "chosen", _of_group(group, pair.chosen)
        yield "rejected", _of_group(group, pair.rejected)
    for side in SIDES:
        labels = (
            (group, label.sample)
            for group in round_.groups
            for label in group.labels
            if label.fate is Fate.LEARN and label.desirable == (side == "chosen")
        )
        for group, sample in itertools.islice(labels, FIRST_PAIRS):
            yield side, _of_group(group, sample)


def probe(prompt_ids: IntArray, ids: Sequence[int]) -> BatchCompletion:
    """A completion to be scored and never learned from."""
    completion = probe_completion(0, list(ids), [0.0] * len(ids))
    return BatchCompletion(prompt_ids, completion, learn=False)


def read_bad(
    path: str, encoder: CompletionEncoder, context: int, chat: bool | None = None
) -> list[BatchCompletion]:
    """The completions of ``drift.bad``, each with its end; one that stands there twice, once.

    A row has a prompt and a completion, of text or messages; ``chat`` as in the run's prompts.
    Raises UserError, with the row, for one that is none or exceeds the ``context`` in tokens.
    """
    where = f"drift.bad={path}"
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{where}: no such file: mend the path, or leave it out")
    found: dict[tuple[bytes, bytes], BatchCompletion] = {}
    for number, row in read_file(file, where):
        try:
            item = _bad_item(row, encoder, chat)
            _check_fits(len(item.prompt_ids) + len(item.completion.ids), context)
        except UserError as error:
            raise UserError(f"{where} row {number}: {error}") from error
        found.setdefault((item.prompt_ids.tobytes(), item.completion.ids.tobytes()), item)
    if not found:
        raise UserError(f"{where}: no rows: fill it, or leave it out")
    return list(found.values())


def read_held_out(options: HeldOutOptions, tokenizer: Any, context: int) -> list[BatchCompletion]:
    """The texts of ``drift.held_out``, each cut to the ``context`` in tokens.

    Its first token is the prompt: the BOS where the tokenizer puts one in front, so that all tokens
    of the text are scored; without one, all but the first. Texts that leave nothing to score are
    passed over. Raises UserError, with the row, for what is no text, and where nothing is left.
    """
    source = RowSource(
        PromptSource(
            path=options.path, subset=options.subset, split=options.split, column=options.column
        ),
        "drift.held_out",
    )
    rows, numbers = source.load()
    found: list[BatchCompletion] = []
    for index, number in enumerate(numbers):
        text = rows[index].get(options.column)
        if not isinstance(text, str):
            what = f"{source.place(number)}: {options.column}"
            raise UserError(f"{what} is no text: fill it in or remove the row")
        ids = tokenizer(text)["input_ids"][:context]
        if len(ids) > 1:
            found.append(probe(np.array(ids[:1], np.int64), ids[1:]))
        if len(found) == options.count:
            break
    if not found:
        raise UserError(f"{source.where}: no text of more than one token: give another")
    return found


def _bad_item(row: Row, encoder: CompletionEncoder, chat: bool | None) -> BatchCompletion:
    for column in ("prompt", "completion"):
        if column not in row:
            raise UserError(f"no {column}{nearest(column, row)}: a row has prompt and completion")
    completion = completion_of(row["completion"], "completion")
    messages = not isinstance(completion, str)
    prompt = content_of(row["prompt"], True if messages and chat is None else chat)
    prompt_ids = encoder.encode_prompt(prompt)
    answer = _answer(completion, isinstance(prompt, str))
    return probe(prompt_ids, encoder.encode_completion(prompt, prompt_ids, answer).tolist())


def _answer(completion: Text, to_text: bool) -> str | Message:
    """What follows the prompt: text after text, else the assistant's one message."""
    if isinstance(completion, str):
        return completion if to_text else {"role": "assistant", "content": completion}
    if to_text:
        raise UserError("the completion is a list of messages: drop chat: false or give text")
    if len(completion) != 1 or completion[0]["role"] != "assistant":
        raise UserError("the completion is not one message of the assistant: give that")
    return completion[0]


def _check_fits(tokens: int, context: int) -> None:
    if tokens > context:
        raise UserError(
            f"prompt and completion have {tokens} tokens, the context is {context}: shorten them"
        )


def _of_group(group: PromptGroup, sample: int) -> BatchCompletion:
    return probe(group.prompt.ids, group.completions[sample].ids.tolist())


def _scored(items: Sequence[BatchCompletion], score_policy: ScorePolicy | None) -> list[FloatArray]:
    if not items or score_policy is None:
        return []
    (logprobs,) = score_policy([UpdateBatch(tuple(items), ())])
    return logprobs


def _sum(logprobs: FloatArray) -> float:
    return float(logprobs.sum(dtype=np.float64))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _nll(logprobs: Sequence[FloatArray]) -> float | None:
    tokens = sum(len(found) for found in logprobs)
    return -sum(_sum(found) for found in logprobs) / tokens if tokens else None
