"""Weights on the move: a few large buckets, a version and a checksum of every byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

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


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """Consecutive tensors as one array of bytes, with their places and their checksum."""

    slots: tuple[TensorSlot, ...]
    data: npt.NDArray[np.uint8]
    checksum: str


@dataclass(frozen=True, slots=True, eq=False)
class WeightPush:
    """A version's weights. ``checksum`` is over the buckets' checksums, in order."""

    version: int
    buckets: tuple[Bucket, ...]
    checksum: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one side holds: a version, and the checksum of its tensors as they stand there.

    ``seconds`` is what packing or loading them took.
    """

    version: int
    checksum: str
    seconds: float = field(default=0.0, compare=False)


def checksum_of(data: npt.NDArray[np.uint8]) -> str:
    """128-bit XXH3 of the bytes, as hex."""
    return xxhash.xxh3_128_hexdigest(data.data)


def _as_bytes(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    import torch

    flat = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
    array: npt.NDArray[np.uint8] = flat.numpy()
    return array


def _groups(
    tensors: Mapping[str, torch.Tensor], bucket_bytes: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    group: list[tuple[str, torch.Tensor]] = []
    held = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if group and held + size > bucket_bytes:
            yield group
            group, held = [], 0
        group.append((name, tensor))
        held += size
    if group:
        yield group


def pack(
    tensors: Mapping[str, torch.Tensor], version: int, bucket_bytes: int = BUCKET_BYTES
) -> WeightPush:
    """Copy the tensors, in their order, into buckets of ``bucket_bytes`` at most (or a tensor)."""
    buckets = []
    for group in _groups(tensors, bucket_bytes):
        data = np.empty(sum(t.numel() * t.element_size() for _, t in group), dtype=np.uint8)
        slots, offset = [], 0
        for name, tensor in group:
            raw = _as_bytes(tensor)
            data[offset : offset + raw.size] = raw
            dtype = str(tensor.dtype).removeprefix("torch.")
            slots.append(TensorSlot(name, tuple(tensor.shape), dtype, offset, raw.size))
            offset += raw.size
        buckets.append(Bucket(tuple(slots), data, checksum_of(data)))
    return WeightPush(version, tuple(buckets), _checksum_of_all(buckets))


def _checksum_of_all(buckets: list[Bucket]) -> str:
    joined = "".join(bucket.checksum for bucket in buckets).encode()
    return xxhash.xxh3_128_hexdigest(joined)


def unpack_into(push: WeightPush, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy a push into tensors of the same names and shapes, in place.

    Raises SyncError, before anything is copied, if a bucket's bytes do not match its checksum or
    if the names or shapes differ.
    """
    import torch

    for index, bucket in enumerate(push.buckets):
        if checksum_of(bucket.data) != bucket.checksum:
            raise SyncError(
                f"weight push of version {push.version}: bucket {index} arrived corrupted "
                f"(checksum {checksum_of(bucket.data)}, sent {bucket.checksum})"
            )
    sent = {slot.name for bucket in push.buckets for slot in bucket.slots}
    missing, unknown = sorted(set(tensors) - sent), sorted(sent - set(tensors))
    if missing or unknown:
        raise SyncError(
            f"weight push of version {push.version}: tensors missing {missing}, unknown {unknown}"
        )
    places = [(bucket.data, slot) for bucket in push.buckets for slot in bucket.slots]
    for _, slot in places:
        shape = tuple(tensors[slot.name].shape)
        if shape != slot.shape:
            raise SyncError(
                f"weight push of version {push.version}: {slot.name} has shape {slot.shape}, "
                f"the generator's has {shape}"
            )
    for data, slot in places:
        if not slot.size:
            continue  # torch makes no tensor of an empty buffer
        raw = data[slot.offset : slot.offset + slot.size]
        typed = torch.frombuffer(bytearray(raw), dtype=getattr(torch, slot.dtype))
        with torch.no_grad():
            tensors[slot.name].copy_(typed.view(slot.shape))


def receipt_of(tensors: Mapping[str, torch.Tensor], push: WeightPush) -> Receipt:
    """Checksum the tensors as they stand after loading, bucketed as the push was."""
    checksums = []
    for bucket in push.buckets:
        held = np.concatenate([_as_bytes(tensors[slot.name]) for slot in bucket.slots])
        checksums.append(checksum_of(held))
    return Receipt(push.version, xxhash.xxh3_128_hexdigest("".join(checksums).encode()))
