"""What a model card says was done, as a config has it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import parse_config
from pipeline.model_card import model_card

EVALUATION = {
    "kind": "evaluation",
    "judge": "curt",
    "quality": 0.75,
    "quality_baseline": 0.25,
    "win": 3,
    "tie": 1,
    "loss": 0,
    "win_rate": 0.875,
    "kl_to_reference": 2.5,
}


def card(folder: Path, evaluations: list[dict[str, Any]] | None = None, **sections: Any) -> str:
    """The card of a run of 8 updates that learned from 3 and 4 examples in two of them."""
    raw = {
        "run": {"dir": str(folder), "name": "mine", "updates": 8},
        "prompts": {"path": "p"},
        "judge": {"name": "sentiment"},
        **sections,
    }
    records: list[dict[str, Any]] = [{"kind": "update", "pairs": pairs} for pairs in (3, 4)]
    records += evaluations or []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return model_card(parse_config(raw, folder))


def test_an_online_run(tmp_path: Path) -> None:
    said = card(tmp_path, sampling={"prompts_per_update": 4, "max_new_tokens": 9})
    assert "tags: [freshpairs, preference-optimization, online-dpo]\n" in said
    assert "` aligned on fresh samples of its own with Freshpairs.\n" in said
    assert "- judge: sentiment\n" in said
    assert (
        "- 8 updates of 4 prompts × 2 completions of at most 9 tokens (temperature 1), sampled "
        "anew every update; 7 pairs learned from\n"
    ) in said


HOW_OFTEN: list[tuple[dict[str, Any], str]] = [
    ({"updates_per_round": 4}, "anew every 4 updates;"),
    ({"updates_per_round": 2, "passes": 2}, "anew every 4 updates;"),
    ({"updates_per_round": math.inf}, "once, before the first update;"),
    (
        {"updates_per_round": 4, "early": {"ess_below": 0.5}},
        "anew when pairs went stale, at the latest every 4 updates;",
    ),
    (
        {"updates_per_round": math.inf, "early": {"kl_above": 0.5}},
        "anew when pairs went stale;",
    ),
    (
        {"updates_per_round": 4, "adaptive": True},
        "anew every K updates, K chosen by the run;",
    ),
    (
        {"updates_per_round": 4, "adaptive": True, "early": {"ess_below": 0.5}},
        "anew when pairs went stale, at the latest every K updates, K chosen by the run;",
    ),
    (
        {"updates_per_round": 2, "replay": [0.55, 0.3, 0.15]},
        "anew every 2 updates, each round mixed with earlier ones: 0.55/0.3/0.15;",
    ),
    ({"replay": "all"}, "anew every update, each round mixed with all rounds so far;"),
]


@pytest.mark.parametrize(("resampling", "said"), HOW_OFTEN, ids=[said for _, said in HOW_OFTEN])
def test_how_often_it_was_sampled(tmp_path: Path, resampling: dict[str, Any], said: str) -> None:
    assert f", sampled {said} 7 pairs learned from\n" in card(tmp_path, resampling=resampling)


def test_a_threshold_of_drift_may_resample(tmp_path: Path) -> None:
    said = card(
        tmp_path,
        resampling={"updates_per_round": 4, "early": {"ess_below": 0.5}},
        drift={"resample": {"entropy": 0.1}},
    )
    latest = "at the latest every 4 updates"
    assert f"anew when pairs went stale or drift passed a threshold, {latest};" in said


@pytest.mark.parametrize(
    ("evaluations", "judged"), [([], False), ([EVALUATION], True)], ids=["alone", "evaluated"]
)
def test_an_offline_run(tmp_path: Path, evaluations: list[Any], judged: bool) -> None:
    said = card(tmp_path, evaluations, prompts={"pairs": str(tmp_path / "theirs.jsonl")})
    assert "tags: [freshpairs, preference-optimization, offline]\n" in said
    assert "` trained on a given pair set, `theirs.jsonl`, with Freshpairs.\n" in said
    assert "- 8 updates of 32 prompts; 7 pairs learned from\n" in said
    for word in ("online", "fresh samples", "sampled", "temperature", "- judge", "sentiment"):
        assert word not in said
    assert ("| curt | 0.250 | 0.750 | 3 / 1 / 0 | 0.875 |" in said) is judged


def test_an_offline_run_that_replays(tmp_path: Path) -> None:
    said = card(
        tmp_path,
        prompts={"pairs": "theirs.jsonl"},
        resampling={"updates_per_round": 2, "replay": [0.5, 0.5]},
    )
    mixed = "each round mixed with earlier ones: 0.5/0.5"
    assert f"- 8 updates of 32 prompts, {mixed}; 7 pairs learned from\n" in said


def test_fine_tuning_on_the_chosen_side(tmp_path: Path) -> None:
    objective = {"name": "sft"}
    said = card(tmp_path, objective=objective, prompts={"pairs": "theirs.jsonl"})
    assert "tags: [freshpairs, sft, offline]\n" in said
    assert "` fine-tuned on the chosen side of a given pair set, `theirs.jsonl`, with" in said
    said = card(tmp_path, objective=objective)
    assert "tags: [freshpairs, sft, online]\n" in said
    assert "` fine-tuned on the chosen side of fresh samples of its own with Freshpairs" in said
