"""The card of a published pair set: where it comes from, how much it holds, its columns."""

from __future__ import annotations

from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import Config

TAG = "freshpairs"
"""What marks a repository as one that was pushed by us."""

COLUMNS = {
    "prompt": "what was asked: text, or chat messages",
    "chosen": "the completion that the judge preferred",
    "rejected": "the other completion",
    "completion": "one completion",
    "label_prob": "the judge's P(chosen is better)",
    "label": "whether the completion is desirable",
    "prompt_ids": "the prompt's tokens, as the policy saw them",
    "round": "the sampling round it is of",
    "version": "updates that the policy had taken when it was asked for the completions",
    "position": "the prompt's place in the run's stream of prompts",
    "positions": "how many prompts the run drew",
}
OF_A_SIDE = {
    "ids": "its tokens, as sampled",
    "logprobs": "its tokens' log-probabilities under the policy that wrote it, plain softmax, nats",
    "sampling_logprobs": "the same under the distribution it was drawn from; null where that is "
    "the plain softmax",
    "sample": "its index among the prompt's completions",
    "seed": "the seed it was drawn with",
    "finished": "whether it ended in an end-of-sequence token",
    "reference_share": "the share of the reference in the mixture it was drawn from; 0 is the "
    "policy alone",
}


def pair_card(cfg: Config, pairs: Path, model: str | None) -> str:
    """Markdown with Hugging Face's front matter, for the Parquet file that ``export`` wrote.

    ``model`` is the hub repository of the policy that was trained on it. No licence is made up:
    the card says that none is stated, and whose they would be.
    """
    table = pq.read_table(pairs, columns=["round", "position"])
    rounds, prompts = (pc.count_distinct(table[name]).as_py() for name in table.column_names)
    names = pq.read_schema(pairs).names
    kind = "labelled completions" if "label" in names else "pairs"
    trained = "the policy of this run" if model is None else f"[{model}](/{model})"
    lines = [
        "---",
        f"tags: [{TAG}, preference]",
        "---",
        "",
        f"# {cfg.run.name}: {kind}",
        "",
        f"{table.num_rows} {kind} on {prompts} prompts, from {rounds} rounds: what {trained} "
        "learned from, exported by Freshpairs.",
        "",
        *_origin(cfg),
        "",
        "Licence: none is stated here. The prompts' and the writing model's own terms apply; "
        "whoever passes the set on has to settle and name them.",
        "",
        "| column | is |",
        "| --- | --- |",
        *(f"| {name} | {_meaning(name)} |" for name in names),
        "",
    ]
    return "\n".join(lines)


def _origin(cfg: Config) -> list[str]:
    """Who asked, who wrote, who judged."""
    if cfg.prompts.pairs is not None:
        given = public_name(cfg.prompts.pairs)
        return [f"- a given set, `{given}`: this run sampled and judged none of it"]
    sources = cfg.prompts.mixture or [cfg.prompts]
    prompts = ", ".join(f"`{public_name(source.path)}`" for source in sources if source.path)
    sampling = cfg.sampling
    return [
        f"- prompts: {prompts}",
        f"- completions: sampled by `{public_name(cfg.policy.model)}` while it was trained on them "
        f"({cfg.objective.name}, {cfg.run.updates} updates), {sampling.completions_per_prompt} a "
        f"prompt, temperature {sampling.temperature:g}, at most {sampling.max_new_tokens} tokens",
        f"- judge: {public_name(cfg.judge.title)}",
    ]


def _meaning(column: str) -> str:
    if column in COLUMNS:
        return COLUMNS[column]
    side, _, rest = column.partition("_")
    return f"{side}: {OF_A_SIDE[rest]}"


def public_name(name: str) -> str:
    """A file of this machine by its name alone; a hub's or a built-in's name as it is."""
    return name.rsplit("/", 1)[-1] if name.startswith("/") else name
