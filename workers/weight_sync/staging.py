"""Memory for the buckets of a push, used again once no generator needs the version it held."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from workers.weight_sync.buckets import Bucket, pack


class Staging:
    """New memory costs several times what copying into it does: every page is cleared first."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._held: dict[int, list[torch.Tensor]] = {}
        self._spare: list[torch.Tensor] = []

    def pack(
        self, version: int, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None
    ) -> list[tuple[Bucket, torch.Tensor]]:
        """The tensors of a version in buckets, as ``buckets.pack`` makes them."""
        return pack(tensors, dtype, allocate=lambda size: self.take(version, size))

    def take(self, version: int, size: int) -> torch.Tensor:
        """Memory of [size] uint8 for a bucket of a version, until that version is released."""
        same = [i for i, spare in enumerate(self._spare) if spare.numel() == size]
        data = self._spare.pop(same[0]) if same else self._new(size)
        self._held.setdefault(version, []).append(data)
        return data

    def _new(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def release(self, below: int) -> None:
        """The versions below will not be read again: their memory may be written to."""
        released = [version for version in self._held if version < below]
        for version in released:
            self._spare = self._held.pop(version)
