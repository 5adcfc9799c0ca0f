"""Tokens of completions that somebody wrote down: as the policy would have sampled them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from judges.errors import UserError
from judges.interface import Message, Text
from pipeline.prompts import PromptEncoder
from workers.messages import IntArray

ANY_LENGTH = 2**62
"""Room for every prompt: what is too long is for the caller to say, of prompt and completion."""


class CompletionEncoder:
    """Prompts and completions as ids, the completions ending with a token that ends sampling.

    ``tokenizer`` is a transformers tokenizer; ``template_args`` go to its chat template. ``ends``
    are the ids that end a completion beside the tokenizer's EOS: the model's generation config
    may name others (``endings_of``), and its chat template use them.
    """

    def __init__(
        self,
        tokenizer: Any,
        template_args: Mapping[str, Any] | None = None,
        ends: Iterable[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._template_args = dict(template_args or {})
        self._prompts = PromptEncoder(tokenizer, ANY_LENGTH, 0, self._template_args)
        self._eos: int | None = tokenizer.eos_token_id
        self._ends = set(ends) | ({self._eos} if self._eos is not None else set())

    @property
    def ends(self) -> frozenset[int]:
        """The ids that end a completion."""
        return frozenset(self._ends)

    def encode_prompt(self, prompt: Text) -> IntArray:
        """[P] ids, as ``PromptEncoder`` gives them, however many. Raises UserError."""
        return self._prompts.encode(prompt)

    def encode_completion(
        self, prompt: Text, prompt_ids: IntArray, answer: str | Message
    ) -> IntArray:
        """[T] ids of a completion after its prompt, the last of them an end.

        Of text: what it adds to the ids of the prompt when both are tokenised as one text, for so
        the tokenizer sees that no word begins in between (a SentencePiece tokenizer would put a
        space before it). Where the tokenizer joins the two across their border, the ids of the
        prompt are no prefix of that, and the completion is tokenised alone, without special tokens:
        the policy is sampled from the ids of the prompt, so no others may stand before it. (After a
        prompt that ends with a space SentencePiece writes a second one then.) The tokenizer's EOS
        is appended unless the text ends in an end.

        Of a message: what the chat template adds to the prompt with its generation prompt, up to
        the token that ends the turn. Templates write more, a line break say, that is never sampled.

        Raises UserError where the template begins another way than the prompt, where a turn has no
        end, and where a completion would end within its text.
        """
        if isinstance(prompt, str) and isinstance(answer, str):
            return self._of_text(prompt, prompt_ids, answer)
        assert not isinstance(prompt, str)
        assert not isinstance(answer, str)
        return self._of_message(prompt, prompt_ids, answer)

    def _of_text(self, prompt: str, prompt_ids: IntArray, text: str) -> IntArray:
        if self._eos is None:
            raise UserError(
                "the policy's tokenizer has no EOS token, so no completion would end: set its "
                "eos_token, or use a chat model"
            )
        together = np.asarray(self._tokenizer(prompt + text, verbose=False)["input_ids"], np.int64)
        if len(together) > len(prompt_ids) and _begins_with(together, prompt_ids):
            ids = together[len(prompt_ids) :]
        else:
            alone = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids = np.asarray(alone, np.int64)
        if not len(ids) or int(ids[-1]) not in self._ends:
            ids = np.append(ids, self._eos)
        self._require_one_end(ids)
        return ids

    def _of_message(
        self, prompt: Sequence[Message], prompt_ids: IntArray, answer: Message
    ) -> IntArray:
        whole = np.asarray(self._apply_template([*prompt, answer]), np.int64)
        if not _begins_with(whole, prompt_ids):
            raise UserError(
                "the policy's chat template does not write the conversation as the prompt and what "
                "follows it, so the completion's tokens cannot be told: set chat_template_args, or "
                "use a template whose generation prompt opens every turn of the assistant"
            )
        ids = whole[len(prompt_ids) :]
        for end in sorted(self._ends):
            token = self._tokenizer.decode([end])
            if token and token in str(answer["content"]):
                raise _ends_within(token)
        found = np.flatnonzero(np.isin(ids, sorted(self._ends)))
        if not len(found):
            raise UserError(
                f"the policy's chat template ends no turn of the assistant with {self._shown()}: "
                "use one that does, or the policy would never learn to stop"
            )
        return ids[: found[0] + 1]

    def _apply_template(self, messages: Sequence[Message]) -> Any:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=True,
                return_dict=False,
                **self._template_args,
            )
        except TemplateError as error:
            raise UserError(
                f"the policy's chat template refuses the messages ({error}); change their roles"
            ) from error

    def _require_one_end(self, ids: IntArray) -> None:
        within = [int(token) for token in ids[:-1] if int(token) in self._ends]
        if within:
            raise _ends_within(self._tokenizer.decode([within[0]]))

    def _shown(self) -> str:
        return ", ".join(repr(self._tokenizer.decode([end])) for end in sorted(self._ends)) or "EOS"


def _begins_with(ids: IntArray, prefix: IntArray) -> bool:
    return np.array_equal(ids[: len(prefix)], prefix)


def _ends_within(token: str) -> UserError:
    return UserError(
        f"the completion has {token!r} in its text, which ends a completion: remove it there"
    )
