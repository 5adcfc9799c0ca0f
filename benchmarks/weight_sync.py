"""Milliseconds per MB of a weight push, transport by transport, against a plain memory copy.

A push goes from the learner's tensors into those of two receivers, each in a process of its own
(two replicas are the usual case), both at once:

- pack: the learner's tensors into buckets, checksummed, and published.
- transport: everything until the receiver has the bytes that is not its own work on them. Through
  Ray's object store: put, and the receiving actors' view of the shared memory. Over gloo: question
  and transfer, bucket by bucket.
- load: a bucket checksummed, its tensors copied to where they are used. "vllm" is the whole of
  VllmGenerator.load in place of that: vLLM's reload with its repacking, caches reset.

A call ends when the slower receiver is done; pack + transport + load is its time. The copy is
np.copyto of as many bytes into memory that is there already, by one thread, without a receiver.
Sets: the parameters of stories15M, and float32 tensors of 1 MB each. MB are 10^6 bytes, not counted
twice for two receivers. Sides alternate, the first repeat is not counted, medians are quoted. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from rich.console import Console
from rich.table import Table

from workers.generator import GeneratorOptions, SamplingOptions
from workers.models.fetch import fetch_model
from workers.options import PolicyOptions
from workers.threads import apply_threads, thread_environment
from workers.vllm_engine import ENVIRONMENT
from workers.weight_sync.buckets import Source, WeightPush, unpack_into
from workers.weight_sync.staging import Staging
from workers.weight_sync.transport import ObjectStore, Transport, build_transport, push_of

CHECKOUT = Path(__file__).resolve().parents[1]
RECEIVERS = 2
TRANSPORTS = ("object_store", "gloo")
PARTS = ("pack", "transport", "load")
SMALL_ENGINE = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 4}


class Loaded(NamedTuple):
    """When a receiver was done, on the clock all processes share, and what its own work took."""

    ended: float
    load: float


class Received(NamedTuple):
    """One push in seconds, by its parts."""

    pack: float
    transport: float
    load: float


@dataclasses.dataclass(slots=True)
class Watched:
    """A source that counts the seconds in which the receiver waits for its bytes."""

    source: Source
    seconds: float = 0.0

    def fetch(self, version: int, sizes: Sequence[int]) -> Iterator[Any]:
        fetched = self.source.fetch(version, sizes)
        for _ in sizes:
            began = time.perf_counter()
            data = next(fetched)
            self.seconds += time.perf_counter() - began
            yield data
        next(fetched, None)  # what a transport does after its last bucket


class Receiver:
    """The generator's end: tensors like those that come, and a vLLM engine where one is asked for.

    Both are made by the first push that needs them, which is not counted.
    """

    def __init__(self, threads: int) -> None:
        apply_threads(threads)
        self._tensors: dict[str, Any] = {}
        self._vllm: Any = None

    def load(self, push: WeightPush, into_vllm: bool) -> Loaded:
        began = time.perf_counter()
        watched = Watched(push.source)
        push = dataclasses.replace(push, source=watched)
        if into_vllm:
            self._engine().load(push)
        else:
            unpack_into(push, self._like(push))
        ended = time.perf_counter()
        return Loaded(ended, ended - began - watched.seconds)

    def _like(self, push: WeightPush) -> dict[str, Any]:
        import torch

        slots = [slot for bucket in push.buckets for slot in bucket.slots]
        if self._tensors.keys() != {slot.name for slot in slots}:
            kinds = {slot.dtype: getattr(torch, slot.dtype) for slot in slots}
            self._tensors = {s.name: torch.ones(s.shape, dtype=kinds[s.dtype]) for s in slots}
        return self._tensors

    def _engine(self) -> Any:
        if self._vllm is None:
            from workers.vllm_generator import VllmGenerator

            options = GeneratorOptions(backend="vllm", engine=SMALL_ENGINE)
            self._vllm = VllmGenerator(PolicyOptions(), SamplingOptions(), options)
        return self._vllm


class Link(Protocol):
    """The learner's end of a transport and its receivers."""

    transport: Transport

    def load(self, push: WeightPush, into_vllm: bool) -> list[Loaded]:
        """Give every receiver the push, wait for all."""
        ...

    def close(self) -> None: ...


class RayLink:
    """Receivers that are Ray actors; the push goes through the object store."""

    def __init__(self, threads: int) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        ray.init(
            address="local",
            num_cpus=RECEIVERS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        self.transport = ObjectStore()
        variables = thread_environment(threads) | ENVIRONMENT | {"PYTHONPATH": str(CHECKOUT)}
        actor = ray.remote(Receiver).options(num_cpus=1, runtime_env={"env_vars": variables})
        self._receivers = [actor.remote(threads) for _ in range(RECEIVERS)]

    def load(self, push: WeightPush, into_vllm: bool) -> list[Loaded]:
        import ray

        stored = ray.put(push)
        loaded: list[Loaded] = ray.get([r.load.remote(stored, into_vllm) for r in self._receivers])
        return loaded

    def close(self) -> None:
        import ray

        ray.shutdown()


class GlooLink:
    """Receivers that are processes; the push says where to ask, the bytes come over gloo."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for _ in range(RECEIVERS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_receive, args=(theirs, threads), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self.transport = build_transport("gloo")

    def load(self, push: WeightPush, into_vllm: bool) -> list[Loaded]:
        for pipe in self._pipes:
            pipe.send((push, into_vllm))
        return [pipe.recv() for pipe in self._pipes]

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(None)
            process.join()


def _receive(pipe: Any, threads: int) -> None:
    receiver = Receiver(threads)
    while (asked := pipe.recv()) is not None:
        pipe.send(receiver.load(*asked))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="counted pushes of each side")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--megabytes", type=int, default=512, help="size of the synthetic set")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=list(TRANSPORTS))
    parser.add_argument("--without-vllm", action="store_true", help="do not load vLLM engines")
    options = parser.parse_args()
    os.environ.update(thread_environment(options.threads) | ENVIRONMENT)
    with_vllm = not options.without_vllm and importlib.util.find_spec("vllm") is not None

    kinds = {"object_store": RayLink, "gloo": GlooLink}
    links: dict[str, Link] = {name: kinds[name](options.threads) for name in options.transports}
    apply_threads(options.threads)
    results = {}
    for name in options.sets:
        vllm = options.transports[0] if with_vllm and name == "stories15m" else None
        results[name] = _measure(SETS[name](options.megabytes), links, vllm, options.repeats)
        _show(name, results[name])
    for link in links.values():
        link.close()
    facts = {"benchmark": "weight_sync", "cores": len(os.sched_getaffinity(0))}
    facts |= {"threads": options.threads, "receivers": RECEIVERS, "repeats": options.repeats}
    print(json.dumps(facts | {"sets": results}))


def _stories15m(_: int) -> dict[str, Any]:
    from workers.models.load import load_policy
    from workers.models.lora import trainable

    fetch_model("stories15m")
    return dict(trainable(load_policy(PolicyOptions())))


def _synthetic(megabytes: int) -> dict[str, Any]:
    import torch

    return {f"layers.{i}.weight": torch.randn(500, 500) for i in range(megabytes)}


SETS: dict[str, Callable[[int], dict[str, Any]]] = {
    "stories15m": _stories15m,
    "synthetic": _synthetic,
}


def _measure(
    tensors: dict[str, Any], links: dict[str, Link], vllm: str | None, repeats: int
) -> dict[str, Any]:
    """Every side in turns; ``vllm`` is the transport by which vLLM engines are loaded as well."""
    size = sum(tensor.nbytes for tensor in tensors.values())
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    copies: list[float] = []
    sides = {name: (link, False) for name, link in links.items()}
    if vllm is not None:
        sides[f"vllm, {vllm}"] = (links[vllm], True)
    pushes: dict[str, list[Received]] = {name: [] for name in sides}
    stagings = {name: Staging("cpu") for name in sides}
    for version in range(repeats + 1):
        began = time.perf_counter()
        np.copyto(target, source)
        copies.append(time.perf_counter() - began)
        for name, (link, into_vllm) in sides.items():
            pushes[name].append(_push(version, tensors, stagings[name], link, into_vllm))
    per_mb = 1e3 / (size / 1e6)
    copy = statistics.median(copies[1:]) * per_mb
    summary: dict[str, Any] = {"megabytes": size / 1e6, "copy_ms_per_mb": copy, "sides": {}}
    for name, received in pushes.items():
        totals = [sum(push) * per_mb for push in received[1:]]
        total = statistics.median(totals)
        parts = {
            part: statistics.median(getattr(push, part) for push in received[1:]) * per_mb
            for part in PARTS
        }
        side = {"ms_per_mb": total, "times_copy": total / copy, "parts": parts, "runs": totals}
        summary["sides"][name] = side
    return summary


def _push(
    version: int, tensors: dict[str, Any], staging: Staging, link: Link, into_vllm: bool
) -> Received:
    """One version from the learner's tensors into all receivers, no older one kept."""
    link.transport.release(version)
    staging.release(version)
    began = time.perf_counter()
    push = push_of(version, staging.pack(version, tensors), link.transport)
    packed = time.perf_counter()
    last = max(link.load(push, into_vllm))
    return Received(packed - began, last.ended - packed - last.load, last.load)


def _show(name: str, result: dict[str, Any]) -> None:
    copy = result["copy_ms_per_mb"]
    title = f"{name}, {result['megabytes']:.0f} MB to {RECEIVERS} receivers, ms per MB"
    table = Table("", "whole", *PARTS, "times a copy", title=title)
    table.add_row("memory copy", f"{copy:.3f}", "", "", "", "1.0")
    for side, found in result["sides"].items():
        parts = (f"{found['parts'][part]:.3f}" for part in PARTS)
        table.add_row(side, f"{found['ms_per_mb']:.3f}", *parts, f"{found['times_copy']:.1f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
