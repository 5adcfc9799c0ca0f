"""Whole records of each kind, for tests to vary."""

from typing import Any

from pipeline.tracking import ROUND_KEYS, UPDATE_KEYS, TrackingOptions

FILE_ONLY = TrackingOptions(tensorboard=False)
STAGES = ("generate", "judge", "learn", "sync", "idle")
REASONS = ("tie", "invalid", "identical", "margin", "truncated")


def an_update(**values: Any) -> dict[str, Any]:
    return dict.fromkeys(UPDATE_KEYS, 0.5) | values


def a_round(**values: Any) -> dict[str, Any]:
    nested = {"dropped": dict.fromkeys(REASONS, 1), "seconds": dict.fromkeys(STAGES, 0.25)}
    return dict.fromkeys(ROUND_KEYS, 2) | nested | values


def an_evaluation(**values: Any) -> dict[str, Any]:
    return {
        "judge": "sentiment",
        "win": 3,
        "tie": 1,
        "loss": 2,
        "win_rate": 3.5 / 6,
        "win_rate_ci": (0.25, 0.75),
        "quality": 0.5,
        "quality_baseline": 0.25,
        "kl_to_reference": None,
    } | values
