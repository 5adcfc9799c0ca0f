"""Every recipe on stories15M for two rounds, its losses computed again from what it wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from judges.build import build_judge
from judges.interface import Score
from pipeline import load_config, run
from pipeline.config import Config
from pipeline.lesson import positions_of
from pipeline.resampling import Dial, whole_run
from tests import recomputation, tiny
from tests.judge_helpers import served_model

RECIPES = sorted((Path(__file__).parents[1] / "configs/recipes").glob("*.yaml"))
GSM8K = Path(__file__).parents[2] / "shared/data/gsm8k/test.jsonl"
SMALL = [
    "sampling.prompts_per_update=6",
    "evaluation.prompts=null",
    "tracking.tensorboard=false",
    "cluster.address=inline",
    "generator.backend=transformers",
    "resampling.passes=1",
    "checkpoint={every: 1, keep: 99}",
]


def test_every_recipe_says_what_it_is() -> None:
    assert len(RECIPES) >= 21
    for path in RECIPES:
        header = [line for line in path.read_text().splitlines() if line.startswith("#")]
        text = " ".join(line.removeprefix("# ") for line in header)
        assert "At full size:" in text, path.name
        assert "Published:" in text, path.name
        assert load_config(path).run.name == path.stem


def exact(completions: list[str], answers: list[str], args: dict[str, Any]) -> list[float | None]:
    judge = build_judge("exact_answer", args)
    prompts = ["p"] * len(completions)
    scores = judge.ask({"answer": answers}, prompts=prompts, completions=completions)
    return [Score.read(score).value for score in scores]


def test_exact_answers() -> None:
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
        assert exact([completion], [answer], {}) == [expected]
    cfg = load_config(RECIPES[0].parent / "iterative-rpo.yaml")
    assert cfg.judge.name == "exact_answer"
    found = exact([" Lily.", "the Lily"], ["#### lily"] * 2, cfg.judge.args)
    assert found == [1.0, 0.0]


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"no {GSM8K}: it is not part of the repository")
def test_every_gsm8k_answer_is_right_and_another_is_wrong() -> None:
    answers = [json.loads(line)["answer"] for line in GSM8K.read_text().splitlines()]
    assert len(answers) == 1319
    assert exact(answers, answers, {}) == [1.0] * 1319
    others = [answer + "9" for answer in answers]
    assert exact(others, answers, {}) == [0.0] * 1319


def imitation(part: recomputation.Update) -> list[float]:
    """sft: -log π of the chosen, a token."""
    chosen = [part.scored[pair["position"], pair["chosen"]] for pair in part.pairs]
    return [-side.logp / side.tokens for side in chosen]


def losses(cfg: Config, updates: Sequence[int]) -> list[float | None]:
    if cfg.resampling.replays:
        return [replayed_loss(cfg, update) for update in updates]
    return recomputation.losses(cfg, updates)


def replayed_loss(cfg: Config, update: int) -> float:
    """Of the prompts that the plan drew from all rounds so far, by the reference of this one."""
    found = recomputation.Run(cfg)
    size = cfg.sampling.prompts_per_update
    dial = Dial(cfg.resampling, cfg.run.updates, size, cfg.run.seed)
    plans = [plan for plan in whole_run(dial) for _ in range(plan.updates)]
    plan = plans[update]
    first = (update - plans.index(plan)) * size
    batch = positions_of(plan, cfg.run.seed)[first : first + size]
    rounds = range(plan.index + 1)
    rows = {k: row for i in rounds for k, row in found.completions(i).items() if k[0] in batch}
    pairs = [p for i in rounds for p in found.pairs(i) if p["position"] in batch]
    own = {k for k in rows if k[0] >= plan.start}
    assert bool(rows.keys() - own) == (plan.index > 0)  # earlier rounds' are among them
    found.use(update)
    policy = {k: sum(found.logprobs(row["prompt_ids"], row["ids"])) for k, row in rows.items()}
    found.use(update + 1, "reference")  # as it stood in this round
    reference = {k: sum(found.logprobs(row["prompt_ids"], row["ids"])) for k, row in rows.items()}
    scored = {
        k: recomputation.Scored(policy[k], reference[k], len(row["ids"]), policy[k])
        for k, row in rows.items()
    }
    learned = [pair for pair in pairs if pair["fate"] == "learn"]
    part = recomputation.Update(found, update, batch, learned, rows, scored, [])
    values = recomputation.EXAMPLES[cfg.objective.name](part)
    return sum(values) / len(values)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_and_its_losses_are_those_of_other_code(
    stories15m: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    monkeypatch.setitem(recomputation.EXAMPLES, "sft", imitation)
    full = load_config(path)
    per_round = full.resampling.updates_per_round
    rounds, updates = (1, 3) if math.isinf(per_round) else (2, 2 * int(per_round))
    tokens = min(24, full.sampling.max_new_tokens)
    overrides = [*SMALL, f"run={{updates: {updates}, dir: '{tmp_path / 'run'}'}}"]
    if full.policy.model != "stories15M":  # a larger one
        overrides.append("sampling.prompts_per_update=2")
    with served_model() as url:
        if full.judge.client is not None:
            overrides.append(f"judge.client={{kind: openai, model: judge, base_url: '{url}'}}")
        cfg = load_config(path, [*overrides, f"sampling.max_new_tokens={tokens}"])
        run(cfg, quiet=True)
    records = tiny.records(cfg.run_dir)
    assert len([r for r in records if r["kind"] == "round"]) == rounds
    found = [r for r in records if r["kind"] == "update"]
    looked_at = sorted({0, 1, updates // 2})  # the last is the first of the second round
    assert all(found[update]["pairs"] > 0 for update in looked_at)
    for update, loss in zip(looked_at, losses(cfg, looked_at), strict=True):
        record = found[update]
        assert loss is not None
        assert math.isfinite(loss)
        assert record["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-4)
