"""A model's replies, kept: a request that was paid for is not made again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from judges.asking import gathered
from judges.cache import Cache, Keep, content_key
from judges.completing import Ask, Complete, Reply

TOGETHER = 32
"""Questions that are asked at once, as a batch, and whose replies are kept at once."""


class KeptReplies:
    """Asks ``complete`` only what the cache does not know: a ``Complete``.

    ``identity`` (JSON) names the model that answers. A pair is asked in both orders; where one of
    the two requests fails, the other's reply is there when the pair is judged again. What ends the
    asking (a budget that is spent) loses no replies but those of ``together`` questions at most.
    """

    def __init__(
        self, complete: Complete, cache: Cache, identity: Any, together: int = TOGETHER
    ) -> None:
        self._complete = complete
        self._cache = cache
        self._identity = identity
        self._together = together

    async def __call__(self, asks: Sequence[Ask]) -> list[Reply]:
        """One reply for each question, in order; failures are not kept."""
        starts = range(0, len(asks), self._together)
        batches = [asks[start : start + self._together] for start in starts]
        replies = await gathered([self._replies(batch) for batch in batches])
        return [reply for of_batch in replies for reply in of_batch]

    async def _replies(self, asks: Sequence[Ask]) -> list[Reply]:
        fresh: dict[int, Reply] = {}

        async def ask(indices: list[int], keep: Keep) -> None:
            replies = await self._complete([asks[index] for index in indices])
            fresh.update(zip(indices, replies, strict=True))
            keep({i: asdict(reply) for i, reply in fresh.items() if reply.failure is None})

        keys = [content_key("reply", self._identity, asdict(ask)) for ask in asks]
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        answers = await self._cache.answers(keys, ask)
        return [
            fresh[first[key]] if answer is None else Reply(**answer)
            for key, (answer, _) in zip(keys, answers, strict=True)
        ]
