"""Buckets shared on one GPU: the push carries CUDA IPC handles, nothing is copied on its way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_tensor

from workers.weight_sync.buckets import SyncError


class CudaIpc:
    """The learner's end: keeps the buckets on its GPU for as long as they may be opened."""

    device = "cuda"

    def __init__(self) -> None:
        self._published: dict[int, Sequence[torch.Tensor]] = {}

    def publish(self, version: int, data: Sequence[torch.Tensor]) -> CudaIpcSource:
        """Keep the buckets and hand out their handles."""
        torch.cuda.current_stream().synchronize()  # what a handle opens must be complete
        self._published[version] = data
        gpu = str(torch.cuda.get_device_properties(data[0].device).uuid) if data else ""
        handles = tuple(reduce_tensor(tensor) for tensor in data)  # type: ignore[no-untyped-call]
        return CudaIpcSource(gpu, handles)

    def release(self, below: int) -> None:
        """Free the versions below, and what their receivers have closed."""
        for version in [v for v in self._published if v < below]:
            del self._published[version]
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True, eq=False)
class CudaIpcSource:
    """Handles of buckets in the memory of the GPU with this UUID."""

    gpu: str
    handles: tuple[tuple[Any, tuple[Any, ...]], ...]

    def fetch(self, version: int, sizes: Sequence[int]) -> Iterator[torch.Tensor]:
        """Open each bucket where it lies. Raises SyncError on another GPU than the learner's."""
        device = torch.cuda.current_device()
        here = str(torch.cuda.get_device_properties(device).uuid)
        if here != self.gpu:
            raise SyncError(
                f"weight push of version {version}: lies on GPU {self.gpu}, this generator is on "
                f"{here}: CUDA IPC shares memory of one GPU (use generator.transport=nccl)"
            )
        for rebuild, arguments in self.handles:
            place = list(arguments)
            place[6] = device  # the learner's index of that GPU may be another
            yield rebuild(*place)
