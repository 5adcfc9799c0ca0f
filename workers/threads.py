"""Thread counts: fixed for each worker, because they are part of a result's last bits."""

from __future__ import annotations


def thread_environment(threads: int) -> dict[str, str]:
    """Variables that must stand in the environment before torch is imported.

    Passive waiting: with OpenMP's busy waiting, several torch processes on few cores run several
    times slower. A short spin before a thread sleeps (some microseconds) keeps most of what busy
    waiting gains: a decode step is hundreds of small parallel regions.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "3000",
        "KMP_BLOCKTIME": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }


def apply_threads(threads: int) -> None:
    """Let torch compute with this many threads from here on, in this process."""
    import torch

    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
