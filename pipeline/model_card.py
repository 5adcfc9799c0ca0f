"""The final policy in Hugging Face format, with a card that says what was done to it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.learner import RemoteLearner
from pipeline.resampling_options import ALL, EarlyOptions
from pipeline.storage import storage_of
from pipeline.tracking import metrics
from workers.learner.options import ReferenceSchedule
from workers.places import files_of

CARD_FILE = "README.md"
"""Is written last: with it, a policy is whole."""


def write_policy(cfg: Config, learner: RemoteLearner, tokenizer: Any) -> None:
    """Write RUN/policy: weights, tokenizer, chat template and model card, whole or not at all."""
    storage = storage_of(cfg)
    with storage.appearing(cfg.run_dir / "policy", CARD_FILE) as (here, at_the_learner):
        learner.export(at_the_learner)
        tokenizer.save_pretrained(here)
        for path in files_of(here):  # safetensors writes for its owner alone
            path.chmod(0o644)
        (here / CARD_FILE).write_text(model_card(cfg))


def has_policy(cfg: Config) -> bool:
    """Whether the run is finished: its policy is there, whole."""
    return cfg.run_dir / "policy" in storage_of(cfg).whole(cfg.run_dir, CARD_FILE)


def model_card(cfg: Config) -> str:
    """Markdown with Hugging Face's front matter: base model, recipe, last evaluation.

    Of a run on given pairs it names their file, and no judge but those that evaluated.
    """
    records = list(metrics(cfg.run_dir))
    evaluations = {r["judge"]: r for r in records if r["kind"] == "evaluation"}
    pairs = sum(r["pairs"] for r in records if r["kind"] == "update")
    lines = [
        "---",
        f"base_model: {cfg.policy.model}",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [freshpairs, {_kind(cfg)}]",
        "---",
        "",
        f"# {cfg.run.name}",
        "",
        f"`{cfg.policy.model}` {_what_was_done(cfg)} with Freshpairs.",
        "",
        f"- objective: {cfg.objective.name} ({cfg.objective.settings})",
        f"- reference: {_reference(cfg)}",
        *([] if _offline(cfg) else [f"- judge: {cfg.judge.title}"]),
        f"- {', '.join(_rounds(cfg))}; {pairs} {_examples(cfg)} learned from",
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


def _offline(cfg: Config) -> bool:
    return cfg.prompts.pairs is not None


def _kind(cfg: Config) -> str:
    """What people look for on a hub, as tags."""
    if cfg.objective.name == "sft":
        return "sft, offline" if _offline(cfg) else "sft, online"
    return f"preference-optimization, {'offline' if _offline(cfg) else 'online-dpo'}"


def _what_was_done(cfg: Config) -> str:
    chosen = cfg.objective.name == "sft"
    if cfg.prompts.pairs is None:
        samples = "fresh samples of its own"
        return f"fine-tuned on the chosen side of {samples}" if chosen else f"aligned on {samples}"
    given = f"a given pair set, `{Path(cfg.prompts.pairs).name}`,"
    return f"fine-tuned on the chosen side of {given}" if chosen else f"trained on {given}"


def _rounds(cfg: Config) -> Iterator[str]:
    """How many updates of what, how often that was sampled, and what else rounds learned from."""
    sampling, replay = cfg.sampling, cfg.resampling.replay
    updates = f"{cfg.run.updates} updates of {sampling.prompts_per_update} prompts"
    if _offline(cfg):
        yield updates
    else:
        yield (
            f"{updates} × {sampling.completions_per_prompt} completions of at most "
            f"{sampling.max_new_tokens} tokens (temperature {sampling.temperature:g})"
        )
        yield f"sampled {_how_often(cfg)}"
    if replay == ALL:
        yield "each round mixed with all rounds so far"
    elif len(replay) > 1:
        yield f"each round mixed with earlier ones: {'/'.join(f'{share:g}' for share in replay)}"


def _how_often(cfg: Config) -> str:
    resampling = cfg.resampling
    every = resampling.updates_per_round * resampling.passes
    span = "update" if every == 1 else f"{every} updates"
    if resampling.adaptive is not None:
        span = "K updates, K chosen by the run"
    early = ["pairs went stale"] if resampling.early != EarlyOptions() else []
    early += ["drift passed a threshold"] if cfg.drift.resample else []
    if early:
        latest = "" if math.isinf(every) else f", at the latest every {span}"
        return f"anew when {' or '.join(early)}{latest}"
    return "once, before the first update" if math.isinf(every) else f"anew every {span}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
