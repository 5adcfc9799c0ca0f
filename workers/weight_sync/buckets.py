"""Weights on the move: a few large buckets, a version and a checksum of every byte."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

if TYPE_CHECKING:
    import torch

BUCKET_BYTES = 256 << 20


class SyncError(RuntimeError):
    """Weights that did not arrive as they were sent, or a generator that does not sample them."""


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """Where one tensor lies in a bucket."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Consecutive tensors as one array of ``size`` bytes: their places and their checksum."""

    slots: tuple[TensorSlot, ...]
    size: int
    checksum: str


class Source(Protocol):
    """Where the bytes of a push are to be had, by whoever loads it."""

    def fetch(self, version: int, sizes: Sequence[int]) -> Iterator[torch.Tensor]:
        """Each bucket's bytes [size] uint8, in order; the next one may reuse the last's memory.

        Raises SyncError where they can no longer be had.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class WeightPush:
    """A version's weights. ``checksum`` is over the buckets' checksums, in order."""

    version: int
    buckets: tuple[Bucket, ...]
    checksum: str
    source: Source


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one side holds: a version, and the checksum of the tensors that it sent or received.

    ``seconds`` is what packing or loading them took.
    """

    version: int
    checksum: str
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True, eq=False)
class Carried:
    """Bytes that travel with the push itself, as through Ray's object store."""

    data: tuple[npt.NDArray[np.uint8], ...]

    def fetch(self, version: int, sizes: Sequence[int]) -> Iterator[torch.Tensor]:
        """The arrays, not copied: they may be shared with other processes and are only read."""
        import torch

        for array in self.data:
            with warnings.catch_warnings():  # of arrays that cannot be written to: nobody does
                warnings.simplefilter("ignore", UserWarning)
                yield torch.from_numpy(array)


def checksum_of(data: torch.Tensor) -> str:
    """A hash of the bytes [size] uint8, as hex: 128-bit XXH3 on the CPU, a 64-bit one on a GPU."""
    if data.device.type == "cpu":
        return xxhash.xxh3_128_hexdigest(data.numpy().data)
    return device_checksum(data)


def device_checksum(data: torch.Tensor) -> str:
    """A 64-bit hash computed where the bytes lie, with torch alone: sum of mixed words · places.

    The bytes as 64-bit words w_i, zeros behind: Σ_i m(w_i)·(2i+1) mod 2^64, where m multiplies by
    an odd constant and folds the high half into the low one, so that a change of one word, and an
    exchange of two, shows.
    """
    import torch

    padding = -data.numel() % 8
    words = torch.nn.functional.pad(data, (0, padding)).view(torch.int64)
    total = 0
    for first in range(0, words.numel(), 1 << 24):  # a bounded workspace
        part = words[first : first + (1 << 24)]
        mixed = part * -7046029254386353131  # 2^64 / the golden ratio, odd
        mixed = mixed ^ (mixed >> 32)
        places = torch.arange(first, first + part.numel(), device=data.device) * 2 + 1
        total += int((mixed * places).sum())
    return f"{(total + data.numel()) % 2**64:016x}"


def pack(
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None = None,
    bucket_bytes: int = BUCKET_BYTES,
    allocate: Callable[[int], torch.Tensor] | None = None,
) -> list[tuple[Bucket, torch.Tensor]]:
    """Copy the tensors, in their order, into buckets of ``bucket_bytes`` at most (or a tensor).

    ``allocate`` gives memory for so many bytes, [size] uint8, on the device where they will be
    received, as a checksum depends on it; without it, new memory of the CPU's. ``dtype`` is what
    floating-point tensors travel as; None leaves them as they are.
    """
    packed = []
    for group in _groups(tensors, dtype, bucket_bytes):
        slots = tuple(slot for slot, _ in group)
        size = slots[-1].offset + slots[-1].size
        data = (allocate or _new_memory)(size)
        end = 0
        for slot, tensor in group:
            data[end : slot.offset].zero_()  # what aligns the next tensor
            _place(data, slot).copy_(tensor.detach())
            end = slot.offset + slot.size
        packed.append((Bucket(slots, size, checksum_of(data)), data))
    return packed


def _new_memory(size: int) -> torch.Tensor:
    import torch

    return torch.empty(size, dtype=torch.uint8)


def _place(data: torch.Tensor, slot: TensorSlot) -> torch.Tensor:
    """The tensor of a slot, in the bucket's memory."""
    import torch

    dtype = getattr(torch, slot.dtype)
    if not slot.size:
        return torch.empty(slot.shape, dtype=dtype, device=data.device)
    return data[slot.offset : slot.offset + slot.size].view(dtype).view(slot.shape)


def _groups(
    tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None, bucket_bytes: int
) -> Iterator[list[tuple[TensorSlot, torch.Tensor]]]:
    group: list[tuple[TensorSlot, torch.Tensor]] = []
    offset = 0
    for name, tensor in tensors.items():
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        size = tensor.numel() * kind.itemsize
        offset += -offset % kind.itemsize  # aligned: a view of its own type can be taken
        if group and offset + size > bucket_bytes:
            yield group
            group, offset = [], 0
        name_of_kind = str(kind).removeprefix("torch.")
        group.append((TensorSlot(name, tuple(tensor.shape), name_of_kind, offset, size), tensor))
        offset += size
    if group:
        yield group


def checksum_of_all(buckets: Sequence[Bucket]) -> str:
    """The checksum of a push: over those of its buckets, in order."""
    joined = "".join(bucket.checksum for bucket in buckets).encode()
    return xxhash.xxh3_128_hexdigest(joined)


def arriving(push: WeightPush) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of everything in a push, each bucket checked before its tensors are given.

    A tensor is only good until the next one is asked for. Raises SyncError if a bucket's bytes do
    not match its checksum, if one is missing, or if the push says to hold others than it has.
    """
    if checksum_of_all(push.buckets) != push.checksum:
        raise SyncError(
            f"weight push of version {push.version}: lists {len(push.buckets)} buckets, which are "
            f"not those that were sent (checksum {checksum_of_all(push.buckets)}, sent "
            f"{push.checksum})"
        )
    sizes = [bucket.size for bucket in push.buckets]
    came = 0
    for index, data in enumerate(push.source.fetch(push.version, sizes)):
        bucket = push.buckets[index]
        if checksum_of(data) != bucket.checksum:
            raise SyncError(
                f"weight push of version {push.version}: bucket {index} arrived corrupted "
                f"(checksum {checksum_of(data)}, sent {bucket.checksum})"
            )
        for slot in bucket.slots:
            yield slot.name, _place(data, slot)
        came = index + 1
    if came != len(push.buckets):
        raise SyncError(
            f"weight push of version {push.version}: {came} of {len(push.buckets)} buckets came"
        )


def unpack_into(push: WeightPush, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy a push into tensors of the same names and shapes, in place.

    Raises SyncError, before anything is copied, if names or shapes differ, and if a bucket's bytes
    do not match its checksum, before anything of that bucket is copied.
    """
    import torch

    slots = [slot for bucket in push.buckets for slot in bucket.slots]
    sent = {slot.name for slot in slots}
    missing, unknown = sorted(set(tensors) - sent), sorted(sent - set(tensors))
    if missing or unknown:
        raise SyncError(
            f"weight push of version {push.version}: tensors missing {missing}, unknown {unknown}"
        )
    for slot in slots:
        shape = tuple(tensors[slot.name].shape)
        if shape != slot.shape:
            raise SyncError(
                f"weight push of version {push.version}: {slot.name} has shape {slot.shape}, "
                f"the generator's has {shape}"
            )
    with torch.no_grad():
        for name, tensor in arriving(push):
            tensors[name].copy_(tensor)


def receipt_of(tensors: Mapping[str, torch.Tensor], push: WeightPush) -> Receipt:
    """Checksum the tensors as they stand after loading, bucketed as the push was."""
    held = []
    for bucket in push.buckets:
        whole = {slot.name: tensors[slot.name] for slot in bucket.slots}
        held += [one for one, _ in pack(whole, bucket_bytes=sys.maxsize)]
    return Receipt(push.version, checksum_of_all(held))
