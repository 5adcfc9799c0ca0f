"""Buckets over torch process groups: gloo between CPUs, NCCL between GPUs, across nodes.

Each receiver has a group of two with the learner, made when it first asks: a slow or dead receiver
holds no other up, and one that was restarted simply asks again. Questions go through the
rendezvous store, bytes through the group; a thread of the learner's answers each receiver, so the
learner itself waits for nobody.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from workers.weight_sync.buckets import SyncError

FOREVER = timedelta(days=365)
ANSWER_WITHIN = timedelta(minutes=10)
"""A learner that does not answer for so long is gone."""

LEARNER, RECEIVER = 0, 1
HERE, GONE = "here", "gone"

GroupBackend = Literal["gloo", "nccl"]


class GroupTransport:
    """The learner's end: keeps what was published, and serves whoever asks."""

    def __init__(self, backend: GroupBackend) -> None:
        self.device = "cpu" if backend == "gloo" else "cuda"
        self._backend: GroupBackend = backend
        self._published: dict[int, Sequence[torch.Tensor]] = {}
        self._host = own_address()
        self._store = TCPStore(self._host, 0, is_master=True, wait_for_workers=False)
        threading.Thread(target=self._admit, daemon=True, name="weight-sync-door").start()

    def publish(self, version: int, data: Sequence[torch.Tensor]) -> GroupSource:
        """Keep the bytes for whoever asks."""
        self._published[version] = data
        return GroupSource(self._backend, self._host, self._store.port)

    def release(self, below: int) -> None:
        """Forget the versions below."""
        for version in [v for v in self._published if v < below]:
            del self._published[version]

    def _admit(self) -> None:
        """Wait for receivers, one after another, and give each a thread."""
        store = TCPStore(self._host, self._store.port, is_master=False, timeout=FOREVER)
        receiver = 0
        while True:
            store.get(f"receiver/{receiver}")
            threading.Thread(
                target=self._serve, args=(receiver,), daemon=True, name=f"weight-sync-{receiver}"
            ).start()
            receiver += 1

    def _serve(self, receiver: int) -> None:
        """Answer a receiver's questions until it is gone: it then asks anew, by another number."""
        store = TCPStore(self._host, self._store.port, is_master=False, timeout=FOREVER)
        channel = PrefixStore(f"channel/{receiver}", store)
        try:
            group = _group(self._backend, channel, LEARNER, self._host)
            question = 0
            while True:
                version = int(channel.get(f"wanted/{question}"))
                here = version in self._published
                channel.set(f"answer/{question}", HERE if here else GONE)
                for bucket in range(len(self._published[version]) if here else 0):
                    # Not held in a variable while this thread waits: it is to be had no longer.
                    group.send([self._published[version][bucket]], RECEIVER, 0).wait()
                question += 1
        except RuntimeError:  # torch's word for a peer that went away; its own side says so
            return


@dataclass(frozen=True, slots=True)
class GroupSource:
    """Where the learner's rendezvous store listens."""

    backend: GroupBackend
    host: str
    port: int

    def fetch(self, version: int, sizes: Sequence[int]) -> Iterator[torch.Tensor]:
        """Ask for a version and receive its buckets, each into the same memory.

        Raises SyncError where the learner no longer has it, or went away.
        """
        channel = None
        try:
            channel = _Channel.to(self)
            yield from channel.receive(version, sizes)
        except (RuntimeError, TimeoutError) as error:
            if isinstance(error, SyncError):
                raise
            reason = str(error).strip().splitlines()[0]
            raise SyncError(
                f"weight push of version {version}: did not come over {self.backend} from "
                f"{self.host}:{self.port} ({reason})"
            ) from error
        finally:
            if channel is None or not channel.idle:  # also when who reads it turned away
                _Channel.open_channels.pop(self, None)


class _Channel:
    """A receiver's end of its group of two."""

    open_channels: dict[GroupSource, _Channel] = {}  # noqa: RUF012 (one a process and learner)

    def __init__(self, source: GroupSource) -> None:
        self._device = "cpu" if source.backend == "gloo" else "cuda"
        store = TCPStore(source.host, source.port, is_master=False, timeout=ANSWER_WITHIN)
        number = store.add("receivers", 1) - 1
        self._store = PrefixStore(f"channel/{number}", store)
        self._questions = 0
        self.idle = True
        """Whether all that was asked for was received: else what lies in it is not an answer."""
        store.set(f"receiver/{number}", "")
        self._group = _group(source.backend, self._store, RECEIVER, own_address(source.host))

    @classmethod
    def to(cls, source: GroupSource) -> _Channel:
        """The open channel to a learner, or a new one."""
        if source not in cls.open_channels:
            cls.open_channels[source] = cls(source)
        return cls.open_channels[source]

    def receive(self, version: int, sizes: Sequence[int]) -> Iterator[torch.Tensor]:
        question, self._questions, self.idle = self._questions, self._questions + 1, False
        self._store.set(f"wanted/{question}", str(version))
        if self._store.get(f"answer/{question}") == GONE.encode():
            raise SyncError(f"weight push of version {version}: the learner no longer has it")
        memory = torch.empty(max(sizes, default=0), dtype=torch.uint8, device=self._device)
        for size in sizes:
            self._group.recv([memory[:size]], LEARNER, 0).wait()
            yield memory[:size]
        self.idle = True


def _group(backend: GroupBackend, store: Any, rank: int, host: str) -> Any:
    """A process group of learner and receiver, beside whatever groups the process has."""
    if backend == "gloo":
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = FOREVER if rank == LEARNER else ANSWER_WITHIN
        return ProcessGroupGloo(store, rank, 2, options)
    from torch.distributed import ProcessGroupNCCL

    nccl_options = ProcessGroupNCCL.Options()
    nccl_options._timeout = FOREVER if rank == LEARNER else ANSWER_WITHIN
    return ProcessGroupNCCL(store, rank, 2, nccl_options)


def own_address(peer: str = "192.0.2.1") -> str:
    """This machine's address on the way to a peer; 127.0.0.1 where there is no network.

    Nothing is sent: connecting a datagram socket only chooses a route.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
