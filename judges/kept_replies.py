"""A model's replies, kept: a request that was paid for is not made again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from judges.cache import Cache, content_key
from judges.completing import Ask, Complete, Reply


class KeptReplies:
    """Asks ``complete`` only what the cache does not know: a ``Complete``.

    ``identity`` (JSON) names the model that answers. A pair is asked in both orders; where one of
    the two requests fails, the other's reply is there when the pair is judged again.
    """

    def __init__(self, complete: Complete, cache: Cache, identity: Any) -> None:
        self._complete = complete
        self._cache = cache
        self._identity = identity

    async def __call__(self, asks: Sequence[Ask]) -> list[Reply]:
        """One reply for each question, in order; failures are not kept."""
        failed: dict[int, Reply] = {}

        async def ask(indices: list[int]) -> list[dict[str, Any] | None]:
            replies = await self._complete([asks[index] for index in indices])
            failed.update(
                (at, reply)
                for at, reply in zip(indices, replies, strict=True)
                if reply.failure is not None
            )
            return [None if reply.failure is not None else asdict(reply) for reply in replies]

        keys = [content_key("reply", self._identity, asdict(ask)) for ask in asks]
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        answers = await self._cache.answers(keys, ask)
        return [
            failed[first[key]] if answer is None else Reply(**answer)
            for key, (answer, _) in zip(keys, answers, strict=True)
        ]
