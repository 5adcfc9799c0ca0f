"""Online and iterative preference optimisation: the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import Config, load_config
    from pipeline.job import RunResult, resume, run

__all__ = ["Config", "RunResult", "load_config", "resume", "run"]


def __getattr__(name: str) -> Any:
    """Import on first use: a config is read without loading what a run needs."""
    if name in ("Config", "load_config"):
        from pipeline import config

        return getattr(config, name)
    if name in ("RunResult", "resume", "run"):
        from pipeline import job

        return getattr(job, name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
