"""A generator of ours as the model that an AI judge asks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from judges.cache import content_key
from judges.completing import Ask, Reply
from judges.errors import UserError
from workers.generator import SampledUnit, SampleRequest, SamplingOptions
from workers.messages import IntArray, Prompt

ASKED_TOGETHER = 32
"""Questions of a batch: their prompts are padded to one length where the backend pads."""


class AskedGenerator(Protocol):
    """What is needed of a generator."""

    def sample(self, request: SampleRequest) -> SampledUnit: ...

    def next_tokens(self, prompts: Sequence[IntArray], top: int) -> list[dict[int, float]]:
        """The most likely next tokens of each prompt and their log-probabilities, in nats."""
        ...


class GeneratorClient:
    """Answers in the chat form of its model; the same question draws the same answer.

    ``context`` is the longest question and answer, in tokens. Raises UserError for a model without
    a chat template: it cannot be asked anything.
    """

    def __init__(
        self, generator: AskedGenerator, tokenizer: Any, context: int, *, model: str
    ) -> None:
        if tokenizer.chat_template is None:
            raise UserError(
                f"judge.client: {model} has no chat template, so it cannot be asked: name a chat "
                "model"
            )
        self._generator = generator
        self._tokenizer = tokenizer
        self._context = context

    async def __call__(self, asks: Sequence[Ask]) -> list[Reply]:
        """A reply for each question; one that does not fit the context fails."""
        replies: dict[int, Reply] = {}
        groups: defaultdict[tuple[int, float, int], list[int]] = defaultdict(list)
        prompts = [self._prompt(ask) for ask in asks]
        for index, (ask, prompt) in enumerate(zip(asks, prompts, strict=True)):
            length = len(prompt.ids) + ask.max_tokens
            if length > self._context:
                failure = f"{length} tokens with the answer: the model takes {self._context}"
                replies[index] = Reply(None, failure=failure)
            else:
                groups[ask.max_tokens, ask.temperature, ask.top_logprobs].append(index)
        for (max_tokens, temperature, top), members in groups.items():
            for start in range(0, len(members), ASKED_TOGETHER):
                batch = members[start : start + ASKED_TOGETHER]
                found = self._answer([prompts[i] for i in batch], max_tokens, temperature, top)
                replies.update(zip(batch, found, strict=True))
        return [replies[index] for index in range(len(asks))]

    def _answer(
        self, prompts: Sequence[Prompt], max_tokens: int, temperature: float, top: int
    ) -> list[Reply]:
        first: list[Mapping[str, float] | None] = [None] * len(prompts)
        if top:
            tokens = self._generator.next_tokens([prompt.ids for prompt in prompts], top)
            first = [self._by_text(found) for found in tokens]
        sampling = SamplingOptions(
            max_new_tokens=max_tokens,
            temperature=temperature or 1.0,
            top_k=None if temperature else 1,
        )
        request = SampleRequest(tuple(prompts), 1, 0, "judge", sampling=sampling)
        sampled = [group[0] for group in self._generator.sample(request).completions]
        return [
            Reply(completion.text, logprobs, completion.finished)
            for completion, logprobs in zip(sampled, first, strict=True)
        ]

    def _prompt(self, ask: Ask) -> Prompt:
        messages = [dict(message) for message in ask.messages]
        ids = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        place = int(content_key(messages, ask.sample)[:15], 16)  # seeds its draws
        return Prompt(place, np.array(ids, np.int64), "")

    def _by_text(self, tokens: Mapping[int, float]) -> dict[str, float]:
        """Log-probabilities by the token's text; of two tokens with one text, their sum."""
        found: dict[str, float] = {}
        for token, logprob in tokens.items():
            text = self._tokenizer.decode([token])
            found[text] = float(np.logaddexp(found.get(text, -np.inf), logprob))
        return found
