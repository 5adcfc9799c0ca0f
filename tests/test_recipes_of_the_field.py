"""Every recipe on stories15M for two rounds, its losses computed again from what it wrote."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from judges.plugins import load_plugin
from pipeline import load_config, run
from tests import recomputation, tiny

RECIPES = sorted((Path(__file__).parents[1] / "configs/recipes").glob("*.yaml"))
GSM8K = Path(__file__).parents[2] / "shared/data/gsm8k/test.jsonl"
SMALL = [
    "sampling.prompts_per_update=6",
    "evaluation.prompts=null",
    "tracking.tensorboard=false",
    "cluster.address=inline",
    "checkpoint={every: 1, keep: 99}",
]


def test_every_recipe_says_what_it_is() -> None:
    assert len(RECIPES) >= 12
    for path in RECIPES:
        header = [line for line in path.read_text().splitlines() if line.startswith("#")]
        text = " ".join(line.removeprefix("# ") for line in header)
        assert "At full size:" in text, path.name
        assert "Published:" in text, path.name
        assert load_config(path).run.name == path.stem


def test_exact_answers() -> None:
    judge = load_plugin(f"{RECIPES[0].parent}/exact_answer.py:score", key="judge.name")
    worked = "He has 3 + 4 = 7.\n#### "
    cases = [
        ("so #### 1,200", worked + "1200", 1.0),
        ("#### 7.", worked + "7", 1.0),
        ("#### 7 or rather #### 8", worked + "7", 0.0),
        ("the answer is 7", worked + "7", 0.0),
        ("#### -7", worked + "-7", 1.0),
        ("", worked + "7", 0.0),
    ]
    for completion, answer, expected in cases:
        assert judge(prompts=["p"], completions=[completion], answer=[answer]) == [expected]
    first = {"pattern": r"^\W*(\w+)"}
    found = judge(
        prompts=["p"] * 2, completions=[" Lily.", "the Lily"], answer=["#### lily"] * 2, **first
    )
    assert found == [1.0, 0.0]


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"no {GSM8K}: it is not part of the repository")
def test_every_gsm8k_answer_is_right_and_another_is_wrong() -> None:
    judge = load_plugin(f"{RECIPES[0].parent}/exact_answer.py:score", key="judge.name")
    answers = [json.loads(line)["answer"] for line in GSM8K.read_text().splitlines()]
    assert len(answers) == 1319
    assert judge(prompts=answers, completions=answers, answer=answers) == [1.0] * 1319
    others = [answer + "9" for answer in answers]
    assert judge(prompts=answers, completions=others, answer=answers) == [0.0] * 1319


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_and_its_losses_are_those_of_other_code(
    stories15m: Path, tmp_path: Path, path: Path
) -> None:
    full = load_config(path)
    per_round = full.resampling.updates_per_round
    rounds, updates = (1, 3) if math.isinf(per_round) else (2, 2 * int(per_round))
    tokens = min(24, full.sampling.max_new_tokens)
    overrides = [*SMALL, f"run={{updates: {updates}, dir: '{tmp_path / 'run'}'}}"]
    cfg = load_config(path, [*overrides, f"sampling.max_new_tokens={tokens}"])
    run(cfg, quiet=True)
    records = tiny.records(cfg.run_dir)
    assert len([r for r in records if r["kind"] == "round"]) == rounds
    found = [r for r in records if r["kind"] == "update"]
    looked_at = sorted({0, 1, updates // 2})  # the last is the first of the second round
    assert all(found[update]["pairs"] > 0 for update in looked_at)
    for update, loss in zip(looked_at, recomputation.losses(cfg, looked_at), strict=True):
        record = found[update]
        assert loss is not None
        assert math.isfinite(loss)
        assert record["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-4)
