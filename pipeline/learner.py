"""The learner as the loop sees it: its calls by name, its version at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.handles import Future, Handle
from workers.messages import Completion, FloatArray, IntArray, UpdateBatch
from workers.options import PolicyOptions
from workers.weight_sync.buckets import Receipt, WeightPush


class RemoteLearner:
    """Typed calls to a ``workers.learner.Learner``, wherever it runs."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self.version = 0

    def notes(self) -> list[str]:
        """What a user should know of how this model is computed."""
        notes: list[str] = self._call("notes")
        return notes

    def begin_round(self, index: int) -> int | None:
        """Let the reference move as its schedule says; its version, None where there is none."""
        version: int | None = self._call("begin_round", index)
        return version

    def score_reference(self, batches: Sequence[UpdateBatch]) -> list[list[FloatArray | None]]:
        """Reference log-probabilities of every completion of every batch; None without one."""
        scores: list[list[FloatArray | None]] = self._call("score_reference", batches)
        return scores

    def score_policy(self, batches: Sequence[UpdateBatch]) -> list[list[FloatArray]]:
        """This version's log-probabilities of every completion of every batch."""
        scores = [self._handle.submit("score_policy", batch) for batch in batches]
        return [score.result() for score in scores]

    def update(self, batch: UpdateBatch) -> dict[str, Any]:
        """One optimizer step; returns the update record."""
        record: dict[str, Any] = self._call("update", batch)
        self.version += 1
        return record

    def reset(self) -> dict[str, Any]:
        """An update that puts the policy back to its reference; returns its record."""
        record: dict[str, Any] = self._call("reset")
        self.version += 1
        return record

    def weights(self, keep_from: int) -> Future[WeightPush]:
        """This version's weights, not yet here: generators take the future.

        Versions below ``keep_from`` will not be asked for again.
        """
        return self._handle.submit("weights", keep_from)

    def sent(self) -> Future[Receipt]:
        """What a generator must answer to the last weights."""
        return self._handle.submit("sent")

    def probe(self, prompt_ids: IntArray, new_tokens: int) -> Future[Completion]:
        """This version's own greedy continuation of the probe."""
        return self._handle.submit("probe", prompt_ids, new_tokens)

    def look(self, place: str) -> tuple[str, str]:
        """The name of the learner's machine, and what it reads at a place, or why it cannot."""
        seen: tuple[str, str] = self._call("look", place)
        return seen

    def save(self, place: str) -> None:
        """Write a checkpoint of learner, reference and optimizer to a directory or under a URL."""
        self._call("save", place)

    def load(self, place: str) -> None:
        """Take up a checkpoint."""
        self.version = self._call("load", place)

    def adopt(self, policy: PolicyOptions, version: int) -> None:
        """Take the weights of another model of the same shape as the policy's."""
        self._call("adopt", policy, version)
        self.version = version

    def export(self, place: str) -> None:
        """Write the policy in Hugging Face format to a directory or under a URL."""
        self._call("export", place)

    def _call(self, method: str, *args: object) -> Any:
        return self._handle.submit(method, *args).result()
