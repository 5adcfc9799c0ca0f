"""The final policy in Hugging Face format, with a card that says what was done to it."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.learner import RemoteLearner
from pipeline.tracking import metrics
from workers.learner.options import ReferenceSchedule


def write_policy(cfg: Config, learner: RemoteLearner, tokenizer: Any) -> Path:
    """Write RUN/policy: weights, tokenizer, chat template and model card, whole or not at all."""
    final = cfg.run_dir / "policy"
    partial = cfg.run_dir / ".partial-policy"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    learner.export(partial)
    tokenizer.save_pretrained(partial)
    for path in partial.rglob("*"):  # safetensors writes for its owner alone
        if path.is_file():
            path.chmod(0o644)
    (partial / "README.md").write_text(model_card(cfg))
    os.replace(partial, final)
    return final


def model_card(cfg: Config) -> str:
    """Markdown with Hugging Face's front matter: base model, recipe, last evaluation."""
    records = list(metrics(cfg.run_dir))
    evaluations = {r["judge"]: r for r in records if r["kind"] == "evaluation"}
    pairs = sum(r["pairs"] for r in records if r["kind"] == "update")
    lines = [
        "---",
        f"base_model: {cfg.policy.model}",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [freshpairs, preference-optimization, online-dpo]",
        "---",
        "",
        f"# {cfg.run.name}",
        "",
        f"`{cfg.policy.model}` aligned on fresh samples of its own with Freshpairs.",
        "",
        f"- objective: {cfg.objective.name} ({cfg.objective.settings})",
        f"- reference: {_reference(cfg)}",
        f"- judge: {cfg.judge.title}",
        f"- {cfg.run.updates} updates of {cfg.sampling.prompts_per_update} prompts × "
        f"{cfg.sampling.completions_per_prompt} completions of at most "
        f"{cfg.sampling.max_new_tokens} tokens (temperature {cfg.sampling.temperature:g}), "
        f"sampled {_how_often(cfg.resampling.updates_per_round)}; {pairs} {_examples(cfg)} "
        "learned from",
        f"- learning rate {cfg.learner.learning_rate:g} ({cfg.learner.schedule}), AdamW, "
        f"{cfg.policy.dtype}, seed {cfg.run.seed}",
        *_adapters(cfg),
        "",
    ]
    if evaluations:
        lines += [
            "Against the starting model, on held-out prompts:",
            "",
            "| judge | start | now | win / tie / loss | win rate |",
            "| --- | --- | --- | --- | --- |",
        ]
        for judge, record in evaluations.items():
            lines.append(
                f"| {judge} | {_figure(record['quality_baseline'])} | {_figure(record['quality'])} "
                f"| {record['win']} / {record['tie']} / {record['loss']} "
                f"| {_figure(record['win_rate'])} |"
            )
        kl = next(iter(evaluations.values()))["kl_to_reference"]
        whom = "starting model" if cfg.reference.update == "frozen" else "last reference"
        lines += ["", f"KL to the {whom}: {_figure(kl)} nats a sequence." if kl is not None else ""]
    return "\n".join(lines)


def _adapters(cfg: Config) -> list[str]:
    lora = cfg.policy.lora
    if lora is None:
        return []
    targets = lora.target_modules
    return [
        f"- LoRA of rank {lora.rank}, alpha {lora.alpha:g}, on "
        f"{targets if isinstance(targets, str) else ', '.join(targets)}: merged into these "
        "weights, and alone in `adapter/` (PEFT)"
    ]


def _examples(cfg: Config) -> str:
    names = {"pairs": "pairs", "unpaired": "labels", "ranked": "rankings", "sampled": "samples"}
    return names[cfg.objective.needs.records]


def _reference(cfg: Config) -> str:
    if not (cfg.objective.needs.reference or cfg.drift.reference):
        return "none"
    match cfg.reference.update:
        case ReferenceSchedule(every_rounds=int(rounds)):
            return f"reset to the policy every {rounds} rounds"
        case ReferenceSchedule(ema=decay):
            return f"moving average of the policy, decay {decay}"
        case _:
            return "frozen"


def _how_often(updates_per_round: float) -> str:
    if math.isinf(updates_per_round):
        return "once, before the first update"
    return (
        f"anew every {updates_per_round} updates" if updates_per_round > 1 else "anew every update"
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
