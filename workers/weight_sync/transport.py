"""Transports: how a version's buckets get from the learner to whoever loads them.

All move the same buckets, pulled by the receiver: the push that a generator is given says where
they are to be had. A version stays to be had until the learner releases it, so a generator that
was restarted loads again what it held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from workers.weight_sync.buckets import Bucket, Carried, Source, WeightPush, checksum_of_all

if TYPE_CHECKING:
    import torch

TransportName: TypeAlias = Literal["object_store", "gloo", "nccl", "ipc"]


class Transport(Protocol):
    """The learner's end."""

    device: str
    """Where the buckets must lie to be published: cpu or cuda."""

    def publish(self, version: int, data: Sequence[torch.Tensor]) -> Source:
        """Make the bytes of a version's buckets available, until they are released."""
        ...

    def release(self, below: int) -> None:
        """Forget the versions below: no generator will load them again."""
        ...


class ObjectStore:
    """The bytes are in the push: Ray's object store carries them, shared memory on one node."""

    device = "cpu"

    def publish(self, version: int, data: Sequence[torch.Tensor]) -> Source:
        """Wrap the bytes; whoever holds the push keeps them."""
        return Carried(tuple(tensor.numpy() for tensor in data))

    def release(self, below: int) -> None:
        """Nothing is kept here."""


def build_transport(name: TransportName) -> Transport:
    """The learner's end of a transport."""
    match name:
        case "object_store":
            return ObjectStore()
        case "gloo" | "nccl":
            from workers.weight_sync.process_group import GroupTransport

            return GroupTransport(name)
        case "ipc":
            from workers.weight_sync.cuda_ipc import CudaIpc

            return CudaIpc()


def push_of(
    version: int, packed: Sequence[tuple[Bucket, torch.Tensor]], transport: Transport
) -> WeightPush:
    """What a generator is given to load a version, packed on the transport's device."""
    buckets = tuple(bucket for bucket, _ in packed)
    source = transport.publish(version, [data for _, data in packed])
    return WeightPush(version, buckets, checksum_of_all(buckets), source)
