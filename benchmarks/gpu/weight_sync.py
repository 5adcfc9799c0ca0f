"""What a weight push costs on a GPU: packing, checksums, CUDA IPC, NCCL, the way over the host.

The tensors of a Llama of a billion parameters in bfloat16. Each side goes from the learner's
tensors to those of a receiver, which are complete when its clock stops; the copy is device to
device, of as many bytes, counted once:

- checksum: device_checksum over every bucket, which is also part of pack.
- pack: the tensors into buckets, checksummed.
- host: to the CPU, packed there, copied once more as an object store does, loaded onto the GPU.
- ipc: pack, handles to another process on the same GPU, loaded there.
- nccl: pack, transferred to another process on the second GPU, loaded there.

The first repeat is not counted, medians are quoted, GB are 10^9 bytes. Needs torch and xxhash,
and prints one JSON line: where there is no GPU, that. ``--tiny`` is a thousandth of it on whatever
there is, with gloo as well where that is the CPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from workers.weight_sync.buckets import device_checksum, pack, unpack_into
from workers.weight_sync.staging import Staging
from workers.weight_sync.transport import ObjectStore, build_transport, push_of

Tensors = dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16, help="of 61 M parameters each")
    parser.add_argument("--repeats", type=int, default=5, help="counted runs of each side")
    parser.add_argument("--tiny", action="store_true", help="a few tensors, on the CPU too")
    options = parser.parse_args()
    facts = {"benchmark": "gpu/weight_sync", **_machine()}
    if facts["gpu"] is None and not options.tiny:
        print(json.dumps(facts | {"skipped": "torch sees no GPU; --tiny runs on the CPU"}))
        return
    device = "cpu" if facts["gpu"] is None else "cuda"

    tensors = _tensors(options.layers, options.tiny, device)
    size = sum(tensor.nbytes for tensor in tensors.values())
    results = _in_this_process(tensors, size, device, options.repeats)
    for name, reason in _refused(device).items():
        results[name] = {"skipped": reason} if reason else _sent(name, tensors, size, options)
    copied = results["copy"]["seconds"]
    for result in results.values():
        if "seconds" in result:
            result["times_copy"] = result["seconds"] / copied
    facts |= {"device": device, "gigabytes": size / 1e9, "tensors": len(tensors)}
    print(json.dumps(facts | {"repeats": options.repeats, "sides": results}))


def _machine() -> dict[str, Any]:
    """The GPU's name and count, driver and torch."""
    found = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if found else None,
        "gpus": torch.cuda.device_count(),
        "driver": _driver() if found else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.split("\n")[0].strip()


def _tensors(layers: int, tiny: bool, device: str) -> Tensors:
    """Random tensors of the shapes of a Llama's parameters, its head tied to its embeddings."""
    words, hidden, inner, grouped = (1024, 128, 512, 64) if tiny else (32000, 2048, 8192, 512)
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (grouped, hidden),
        "self_attn.v_proj": (grouped, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (words, hidden), "norm": (hidden,)}
    for index in range(4 if tiny else layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    torch.manual_seed(0)
    return {
        f"model.{name}.weight": torch.randn(shape, dtype=torch.bfloat16, device=device)
        for name, shape in shapes.items()
    }


def _in_this_process(
    tensors: Tensors, size: int, device: str, repeats: int
) -> dict[str, dict[str, Any]]:
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    staging = Staging(device)
    buckets = [data for _, data in Staging(device).pack(0, tensors)]
    received = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    sides: dict[str, Callable[[int], Any]] = {
        "copy": lambda _: target.copy_(source),
        "checksum": lambda _: [device_checksum(data) for data in buckets],
        "pack": lambda version: _packed(staging, version, tensors),
        "host": lambda version: _over_the_host(version, tensors, received),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            _finish(device)
            began = time.perf_counter()
            side(repeat)
            _finish(device)
            seconds[name].append(time.perf_counter() - began)
    return {name: _summary(values[1:], size) for name, values in seconds.items()}


def _packed(staging: Staging, version: int, tensors: Tensors) -> None:
    staging.release(version)
    staging.pack(version, tensors)


def _over_the_host(version: int, tensors: Tensors, received: Tensors) -> None:
    packed = pack({name: tensor.cpu() for name, tensor in tensors.items()})
    stored = [(bucket, data.clone()) for bucket, data in packed]
    unpack_into(push_of(version, stored, ObjectStore()), received)


def _refused(device: str) -> dict[str, str | None]:
    """Which transports there are on this device, and why one is left out."""
    if device == "cpu":
        return {"gloo": None, "ipc": "no GPU", "nccl": "no GPU"}
    gpus = torch.cuda.device_count()
    return {"ipc": None, "nccl": None if gpus > 1 else "needs two GPUs, there is one"}


def _summary(seconds: list[float], size: int) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {"seconds": median, "gb_per_second": size / 1e9 / median, "runs": seconds}


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _sent(name: str, tensors: Tensors, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """A push to another process over a transport; ``load_seconds`` is the receiver's part."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    place = {"gloo": "cpu", "ipc": "cuda:0", "nccl": "cuda:1"}[name]
    process = context.Process(target=_receive, args=(theirs, place), daemon=True)
    process.start()
    theirs.close()
    whole, loads = [], []
    try:
        transport = build_transport(name)
        staging = Staging(transport.device)
        for version in range(options.repeats + 1):
            transport.release(version)
            staging.release(version)
            began = time.perf_counter()
            ours.send(push_of(version, staging.pack(version, tensors), transport))
            answer = ours.recv()
            if isinstance(answer, str):
                return {"skipped": answer}
            whole.append(time.perf_counter() - began)
            loads.append(answer)
        ours.send(None)
        process.join()
    except (EOFError, OSError, RuntimeError) as error:  # a machine that cannot share or connect
        return {"skipped": f"{type(error).__name__}: {error}"}
    return _summary(whole[1:], size) | {"load_seconds": statistics.median(loads[1:])}


def _receive(pipe: Any, place: str) -> None:
    """The receiver's process: loads what it is sent, answers with its seconds, or why it cannot."""
    device = torch.device(place)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    tensors: Tensors = {}
    while (push := pipe.recv()) is not None:
        try:
            for slot in () if tensors else (s for bucket in push.buckets for s in bucket.slots):
                kind = getattr(torch, slot.dtype)
                tensors[slot.name] = torch.empty(slot.shape, dtype=kind, device=device)
            began = time.perf_counter()
            unpack_into(push, tensors)
            _finish(device.type)
            pipe.send(time.perf_counter() - began)
        except RuntimeError as error:
            pipe.send(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
