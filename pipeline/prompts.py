"""The stream of prompts a run samples from: shuffled, tokenised, addressed by position."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from pydantic import Field, field_validator, model_validator

from judges.errors import UserError
from judges.interface import Text
from pipeline.prompt_content import content_of
from pipeline.prompt_files import Row
from pipeline.prompt_source import PromptSource, RowSource, record_features
from workers.messages import IntArray, Prompt
from workers.seeds import derive_seed

Record: TypeAlias = tuple[int, int, Row | None]
"""Source, index (or, in a stream, number) of the row, and the row itself where it is streamed."""

NOT_THE_TEMPLATES = (
    *("self", "conversation", "messages", "chat_template", "tokenizer_kwargs", "tokenize"),
    *("add_generation_prompt", "continue_final_message", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
)
"""Parameters of ``apply_chat_template`` that are ours to set: how, and to what, it is applied."""


class PromptOptions(PromptSource):
    """The run's prompts: one source, or a weighted mixture of several."""

    mixture: list[PromptSource] = Field(
        default_factory=list,
        description="Several sources instead of one `path`, drawn at random by their weights. An "
        "epoch lasts until each has been used up; smaller ones start over until then.",
    )
    shuffle_buffer: int = Field(
        default=10_000,
        ge=1,
        description="Rows a stream keeps in memory to shuffle; other sources shuffle all rows.",
    )

    chat_template_args: dict[str, Any] = Field(
        default_factory=dict,
        description="More arguments of the chat template, e.g. {enable_thinking: false}",
    )

    @field_validator("chat_template_args")
    @classmethod
    def _read_by_templates(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if name in NOT_THE_TEMPLATES:
                raise ValueError(f"{name} is no argument of the template's own: leave it out")
        return value

    @model_validator(mode="after")
    def _one_place(self) -> PromptOptions:
        self.check_place()
        return self

    def check_place(self) -> None:
        """Raises ValueError unless there is one place that prompts come from."""
        if not self.mixture:
            if self.path is None:
                raise ValueError("give either path or mixture")
            return
        for name in PromptSource.model_fields:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"either path or mixture: with mixture, set {name} in its sources")
        for index, source in enumerate(self.mixture):
            if source.path is None:
                raise ValueError(f"mixture[{index}] needs a path")


class PromptEncoder:
    """Turns a prompt into the ids the policy sees, with room left for the completion.

    ``tokenizer`` is a transformers tokenizer, ``context`` the longest prompt and completion
    together in tokens (``cut``: generator.max_model_len, below the model's own), ``template_args``
    go to the chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        context: int,
        max_new_tokens: int,
        template_args: Mapping[str, Any] | None = None,
        cut: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._context = context
        self._max_new_tokens = max_new_tokens
        self._template_args = dict(template_args or {})
        self._cut = cut

    def encode(self, content: Text) -> IntArray:
        """[P] ids: text with the tokenizer's special tokens, chat through its template up to where
        the assistant speaks.

        Raises UserError where there is no template, it refuses the messages or does not read its
        arguments, or prompt and completion do not fit into the context.
        """
        if isinstance(content, str):
            if self._template_args:
                raise UserError(
                    f"a text prompt passes no chat template, so chat_template_args="
                    f"{self._template_args} would do nothing: set chat: true, or leave them out"
                )
            tokens = self._tokenizer(content)["input_ids"]
        else:
            tokens = self._encode_chat(content)
        ids = np.asarray(tokens, dtype=np.int64)
        if not len(ids):
            raise UserError("the prompt has no tokens; the model needs one to start from")
        if len(ids) + self._max_new_tokens > self._context:
            window = "generator.max_model_len" if self._cut else "the model's context"
            raise UserError(
                f"the prompt has {len(ids)} tokens, with sampling.max_new_tokens="
                f"{self._max_new_tokens} {window} is {self._context}: {self._remedy(len(ids))}"
            )
        return ids

    def _encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> Any:
        from jinja2 import TemplateError

        if getattr(self._tokenizer, "chat_template", None) is None:
            raise UserError(
                "a chat prompt, but the policy's tokenizer has no chat template; "
                "use a chat model, or plain text prompts with chat: false"
            )
        self._check_template_args()
        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **self._template_args,
            )
        except TemplateError as error:
            raise UserError(
                f"the policy's chat template refuses the messages ({error}); change their roles"
            ) from error
        except (TypeError, ValueError) as error:
            if not self._template_args:
                raise
            raise UserError(
                f"the policy's chat template refuses chat_template_args={self._template_args} "
                f"({error}); change them"
            ) from error

    def _check_template_args(self) -> None:
        """Jinja ignores what a template does not read: a name that it lacks is a mistake."""
        if not self._template_args:
            return
        template = self._tokenizer.get_chat_template(tools=self._template_args.get("tools"))
        for name in self._template_args:
            if not re.search(rf"\b{re.escape(name)}\b", template):
                raise UserError(
                    f"chat_template_args.{name}: the policy's chat template reads nothing of that "
                    "name; correct it, or leave it out"
                )

    def _remedy(self, prompt_tokens: int) -> str:
        remedies = []
        if self._context > self._max_new_tokens:
            remedies.append(f"shorten it to {self._context - self._max_new_tokens}")
        if self._context > prompt_tokens:
            remedies.append(f"set max_new_tokens to at most {self._context - prompt_tokens}")
        longer = "raise that" if self._cut else "choose a policy with a longer context"
        return ", or ".join([*remedies, longer])


class PromptStream:
    """Prompts by position, without end: epoch after epoch, each shuffled afresh.

    With one source, an epoch has every prompt exactly once (of a stream: shuffled within a buffer).
    A mixture draws each prompt's source by weight and ends an epoch once every source has been
    used up (``all_exhausted``): no row repeats before its source's last, all rows are seen however
    the weights are set, and the shares hold from the first prompt to the last.
    """

    def __init__(
        self,
        options: PromptOptions,
        encode: PromptEncoder,
        run_seed: int,
        purpose: str = "prompts",
        key: str = "prompts",
    ) -> None:
        """Reads map-style sources whole. Raises UserError, which names the option under ``key``."""
        self._options = options
        self._encoder = encode
        self._run_seed = run_seed
        self._purpose = purpose
        self._key = key
        self._sources = (
            [RowSource(s, f"{key}.mixture[{i}]") for i, s in enumerate(options.mixture)]
            if options.mixture
            else [RowSource(options, key)]
        )
        self._tables = [None if s.options.streaming else s.load() for s in self._sources]
        self._ids: dict[tuple[int, int], IntArray] = {}
        self._length: int | None = None
        self._next = 0
        self._records = self._walk()

    def __len__(self) -> int:
        """Prompts of an epoch: of a mixture, whose epochs differ a little, the first.

        Raises UserError for a stream, whose end is not known.
        """
        if self._length is None:
            if any(table is None for table in self._tables):
                raise UserError(
                    f"{self._key}.streaming=true: a stream's length is not known; turn it off"
                )
            self._length = sum(1 for _ in self._epoch(0))
        return self._length

    def check(self) -> None:
        """Tokenise every row of map-style sources (kept for ``take``) and the first of streams.

        Raises UserError, with the row, for one that is no prompt or does not fit.
        """
        for index, (source, table) in enumerate(zip(self._sources, self._tables, strict=True)):
            if table is None:
                first = next(iter(source.stream(index)))
                self._prompt(0, (index, first["row"], json.loads(first["value"])))
                continue
            for row in range(len(table[1])):
                self._prompt(0, (index, row, None))

    def take(self, start: int, count: int) -> list[Prompt]:
        """The prompts at positions start … start + count - 1, the same however they are asked for.

        Cheap when called on where the last call ended; going back starts over from position 0.
        """
        if start < self._next:
            self._next = 0
            self._records = self._walk()
        prompts = []
        while self._next < start + count:
            record = next(self._records)
            position = self._next
            self._next += 1
            if position >= start:
                prompts.append(self._prompt(position, record))
        return prompts

    def _walk(self) -> Iterator[Record]:
        for epoch in itertools.count():
            yield from self._epoch(epoch)

    def _epoch(self, epoch: int) -> Iterator[Record]:
        seeds = [
            derive_seed(self._run_seed, self._purpose, epoch, index)
            for index in range(len(self._sources))
        ]
        if len(self._tables) == 1 and self._tables[0] is not None:
            order = np.random.default_rng(seeds[0]).permutation(len(self._tables[0][1]))
            yield from ((0, int(row), None) for row in order)
            return
        parts = [self._shuffled(index, seed) for index, seed in enumerate(seeds)]
        mixed = parts[0] if len(parts) == 1 else self._interleave(parts, epoch)
        for record in mixed:
            value = record["value"]
            row = None if value is None else json.loads(value)
            yield record["source"], record["row"], row

    def _shuffled(self, index: int, seed: int) -> Any:
        """One source's records, as a ``Dataset`` or, where any source streams, an iterable one."""
        import datasets

        table = self._tables[index]
        if table is None:
            stream = self._sources[index].stream(index)
            return stream.shuffle(seed=seed, buffer_size=self._options.shuffle_buffer)
        rows = len(table[1])
        records = datasets.Dataset.from_dict(
            {
                "source": [index] * rows,
                "row": np.random.default_rng(seed).permutation(rows),
                "value": [None] * rows,
            },
            features=record_features(),
        )
        any_stream = any(table is None for table in self._tables)
        return records.to_iterable_dataset() if any_stream else records

    def _interleave(self, parts: list[Any], epoch: int) -> Any:
        import datasets

        weights = [source.options.weight for source in self._sources]
        return datasets.interleave_datasets(
            parts,
            probabilities=[weight / sum(weights) for weight in weights],
            seed=derive_seed(self._run_seed, f"{self._purpose}/mixture", epoch),
            stopping_strategy="all_exhausted",
        )

    def _prompt(self, position: int, record: Record) -> Prompt:
        index, at, row = record
        source, table = self._sources[index], self._tables[index]
        number = at
        if table is not None:
            row, number = table[0][at], table[1][at]
        assert row is not None
        column = source.options.column
        if table is None:
            source.require_column(row)
        try:
            content = content_of(row.get(column), source.options.chat)
            ids = self._ids.get((index, at)) if table is not None else None
            if ids is None:
                ids = self._encoder.encode(content)
        except UserError as error:
            raise UserError(f"{source.place(number)}: {error}") from error
        if table is not None:
            self._ids[index, at] = ids
        rest = {name: value for name, value in row.items() if name not in (column, "split")}
        return Prompt(position, ids, content, json.loads(json.dumps(rest, default=str)))
