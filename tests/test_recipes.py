"""Shipped configs on their real models, end to end on Ray."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import load_config, run
from pipeline.ledger import Ledger
from tests import tiny
from workers.messages import Fate
from workers.models.fetch import fetch_model

ROOT = Path(__file__).parents[1]


def of_kind(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in tiny.records(run_dir) if record["kind"] == kind]


def independent_logprobs(model: Any, prompt: np.ndarray, ids: np.ndarray) -> torch.Tensor:
    """Log-probabilities of a completion by one plain forward pass over it alone."""
    tokens = torch.tensor([*prompt.tolist(), *ids.tolist()])
    with torch.no_grad():
        logits = model(tokens[None]).logits[0]
    table = torch.log_softmax(logits, -1)
    return table[len(prompt) - 1 : -1].gather(-1, tokens[len(prompt) :, None]).squeeze(-1)


def assert_ledger_is_of_the_model(run_dir: Path, model: str) -> None:
    """Round 0's log-probabilities, and the first loss, recomputed from the ids in the ledger."""
    start = AutoModelForCausalLM.from_pretrained(fetch_model(model), dtype=torch.float32)
    first = Ledger(run_dir / "ledger").read(0)
    assert sum(pair.fate is Fate.LEARN for pair in first.pairs) > 0
    for group in first.groups[:4]:
        for completion in group.completions:
            expected = independent_logprobs(start, group.prompt.ids, completion.ids)
            np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
            np.testing.assert_allclose(completion.reference_logprobs, expected, atol=1e-4)
    assert of_kind(run_dir, "update")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
def test_quickstart_aligns_stories15m(stories15m: Path, tmp_path: Path) -> None:
    cfg = load_config(ROOT / "configs/quickstart.yaml", [f"run.dir={tmp_path / 'run'}"])
    result = run(cfg, quiet=True)
    by_judge = {record["judge"]: record for record in result.evaluations}
    sentiment, polarity = by_judge["sentiment"], by_judge["polarity"]
    assert sentiment["quality_baseline"] == pytest.approx(0.3, abs=0.1)
    assert sentiment["quality"] >= 0.6
    assert polarity["quality"] > polarity["quality_baseline"]
    assert sentiment["kl_to_reference"] <= 15
    assert sentiment["repetition_rate"] - sentiment["repetition_rate_baseline"] <= 0.05
    assert sentiment["length_mean"] <= 1.2 * sentiment["length_mean_baseline"]
    assert_ledger_is_of_the_model(result.run_dir, "stories15m")
    tokenizer = AutoTokenizer.from_pretrained(result.run_dir / "policy")
    policy = AutoModelForCausalLM.from_pretrained(result.run_dir / "policy")
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    text = tokenizer.decode(policy.generate(**prompt, do_sample=False, max_new_tokens=20)[0])
    assert "Once upon a time" in text


@pytest.mark.slow
def test_smollm2_learns_from_chat_prompts(tmp_path: Path) -> None:
    fetch_model("smollm2-135m-instruct")
    cfg = load_config(
        ROOT / "configs/smollm2-chat.yaml",
        [f"run.dir={tmp_path / 'run'}", "run.updates=2", "evaluation.prompts=null"],
    )
    result = run(cfg, quiet=True)
    assert len(of_kind(result.run_dir, "round")) == 2
    assert_ledger_is_of_the_model(result.run_dir, "smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(result.run_dir / "policy")
    group = Ledger(result.run_dir / "ledger").read(0).groups[0]
    assert [message["role"] for message in group.prompt.content] == ["user"]
    expected = tokenizer.apply_chat_template(
        group.prompt.content, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert group.prompt.ids.tolist() == expected
    assert "<|im_start|>" not in group.completions[0].text
    card = json.loads((result.run_dir / "policy" / "config.json").read_text())
    assert card["model_type"] == "llama"
    assert tokenizer.chat_template is not None
