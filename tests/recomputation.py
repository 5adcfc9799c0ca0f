"""Every update's loss of a finished run, computed again from what the run wrote, by other code.

Reads the Parquet files and checkpoints themselves, scores with transformers' own logits one
completion at a time, and has the formulas of ALGORITHMS in plain arithmetic. Needs a checkpoint
after every update and one pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM

from pipeline.config import Config

Row = dict[str, Any]
Key = tuple[int, int]


@dataclass
class Scored:
    """A completion: log π and log π_ref, summed, and what it was sampled with."""

    logp: float
    ref: float | None
    tokens: int
    behaviour: float

    @property
    def ratio(self) -> float:
        assert self.ref is not None
        return self.logp - self.ref


@dataclass
class Update:
    """What one update learned from: its prompts' rows, and every log-ratio so far."""

    run: Run
    version: int
    batch: Sequence[int]
    pairs: Sequence[Row]
    completions: Mapping[Key, Row]
    scored: Mapping[Key, Scored]
    seen: list[float]


def sp(z: float) -> float:
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


def sigmoid(z: float) -> float:
    return math.exp(-sp(-z))


class Run:
    """The files of a run, and its models by version."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.directory = cfg.run_dir
        self.model = AutoModelForCausalLM.from_pretrained(start_of(cfg), dtype=torch.float32)
        self.model.eval()

    def completions(self, index: int) -> dict[Key, Row]:
        rows = pq.read_table(self.file(index)).to_pylist()
        return {(row["position"], row["sample"]): row for row in rows}

    def pairs(self, index: int) -> list[Row]:
        return pq.read_table(self.file(index, ".pairs")).to_pylist()

    def reference(self, index: int) -> dict[Key, Row]:
        path = self.file(index, ".reference")
        rows = pq.read_table(path).to_pylist() if path.exists() else []
        return {(row["position"], row["sample"]): row for row in rows}

    def file(self, index: int, kind: str = "") -> Path:
        return self.directory / "ledger" / f"round-{index:06d}{kind}.parquet"

    def use(self, version: int, whose: str = "policy") -> None:
        """Put the weights of a version into the model: the policy's, or its reference's then."""
        if version == 0:
            start = AutoModelForCausalLM.from_pretrained(start_of(self.cfg), dtype=torch.float32)
            self.model.load_state_dict(start.state_dict())
            return
        path = self.directory / "checkpoints" / f"update-{version:06d}" / "learner.pt"
        state = torch.load(path, weights_only=True)
        weights = state["policy"] if whose == "policy" else state["reference"]["model"]
        self.model.load_state_dict(weights)

    @torch.no_grad()
    def logprobs(self, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
        row = torch.tensor([[*prompt, *ids]])
        logits = self.model(row, use_cache=False).logits[0, len(prompt) - 1 : -1]
        picked = logits.double().log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]
        found: list[float] = picked.tolist()
        return found


def start_of(cfg: Config) -> str:
    from workers.models.resolve import resolve_model

    return str(resolve_model(cfg.policy.model))


def losses(cfg: Config, updates: Sequence[int] | None = None) -> list[float | None]:
    """The mean loss of each of these updates, None where nothing was left to learn from.

    BCO's δ remembers: of it, the first updates.
    """
    run = Run(cfg)
    found: list[float | None] = []
    seen: list[float] = []  # every β-scaled log-ratio so far, for BCO
    per_round = min(cfg.resampling.updates_per_round, cfg.run.updates)
    for update in range(cfg.run.updates) if updates is None else updates:
        index, within = divmod(update, int(per_round))
        completions, reference = run.completions(index), run.reference(index)
        positions = sorted({position for position, _ in completions})
        size = cfg.sampling.prompts_per_update
        batch = positions[within * size : (within + 1) * size]
        run.use(update)
        pairs = [p for p in run.pairs(index) if p["position"] in batch and p["fate"] == "learn"]
        scored = {
            key: score(run, row, reference.get(key), update)
            for key, row in completions.items()
            if key[0] in batch
        }
        part = Update(run, update, batch, pairs, completions, scored, seen)
        values = EXAMPLES[cfg.objective.name](part)
        found.append(sum(values) / len(values) if values else None)
    return found


def score(run: Run, row: Row, reference: Row | None, version: int) -> Scored:
    logp = sum(run.logprobs(row["prompt_ids"], row["ids"]))
    sampled = row["sampling_logprobs"]
    behaviour = sum(row["logprobs"] if sampled is None else sampled)
    if row["version"] == version and sampled is None:
        behaviour = logp
    ref = None if reference is None else sum(reference["reference_logprobs"])
    return Scored(logp, ref, len(row["ids"]), behaviour)


def pair_loss(o: Any, w: Scored, r: Scored, chosen_from_reference: bool) -> float:
    """The preference part of a pair's loss, its label certain."""
    match o.name:
        case "dpo":
            return sp(-o.beta * (w.ratio - r.ratio))
        case "robust_dpo":
            u, e = o.beta * (w.ratio - r.ratio), o.flip_probability
            return ((1 - e) * sp(-u) - e * sp(u)) / (1 - 2 * e)
        case "ipo":
            d = w.ratio - r.ratio
            if o.length_normalized:
                d = w.ratio / w.tokens - r.ratio / r.tokens
            return (d - 1 / (2 * o.tau)) ** 2
        case "simpo":
            return sp(-(o.beta * (w.logp / w.tokens - r.logp / r.tokens) - o.gamma))
        case "cpo":
            return sp(-o.beta * (w.logp - r.logp))
        case "orpo":
            odds = [
                math.log(math.exp(s.logp / s.tokens) / (1 - math.exp(s.logp / s.tokens)))
                for s in (w, r)
            ]
            return o.lam * sp(-(odds[0] - odds[1])) - w.logp / w.tokens
        case "sppo":
            return (w.ratio - 0.5 / o.beta) ** 2 + (r.ratio + 0.5 / o.beta) ** 2
        case "xpo":
            optimism = o.alpha * (w if chosen_from_reference else r).logp
            return sp(-o.beta * (w.ratio - r.ratio)) + optimism
    raise ValueError(f"{o.name}: its formula is not written here a second time")


def pairwise(u: Update) -> list[float]:
    o: Any = u.run.cfg.objective
    values = []
    for pair in u.pairs:
        keys = [(pair["position"], pair[side]) for side in ("chosen", "rejected")]
        w, r = u.scored[keys[0]], u.scored[keys[1]]
        from_reference = u.completions[keys[0]]["reference_share"] > 0
        p = pair["label_prob"]
        p = p * (1 - o.label_smoothing) + (1 - p) * o.label_smoothing
        value = p * pair_loss(o, w, r, from_reference)
        if p < 1:
            value += (1 - p) * pair_loss(o, r, w, not from_reference)
        value -= o.nll_weight * w.logp / w.tokens
        if o.wpo:
            value *= wpo(u.run, u.completions[keys[0]]) * wpo(u.run, u.completions[keys[1]])
        values.append(value * gap_weight(u, keys))
    return values


def gap_weight(u: Update, keys: Sequence[Key]) -> float:
    """min(clip, learner / generator) of the policy's own samples among these."""
    gap = u.run.cfg.generator.gap
    rows = [u.completions[key] for key in keys]
    logs = [row["gap_log_weight"] for row in rows if row["reference_share"] == 0]
    if gap.correction == "recompute" or None in logs:
        return 1.0
    return min(gap.clip, math.exp(sum(logs)))


@torch.no_grad()
def wpo(run: Run, row: Row) -> float:
    prompt, ids = row["prompt_ids"], row["ids"]
    logits = run.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double()
    p = logits.softmax(-1)
    aligned = [math.log(p[t, i]) - math.log(float((p[t] ** 2).sum())) for t, i in enumerate(ids)]
    return math.exp(sum(aligned) / len(aligned))


def pdpo(u: Update) -> list[float]:
    o: Any = u.run.cfg.objective
    sides = [
        (u.scored[p["position"], p["chosen"]], u.scored[p["position"], p["rejected"]])
        for p in u.pairs
    ]
    margins = [o.beta * (w.ratio - r.ratio) for w, r in sides]
    right = [pair["label_prob"] for pair in u.pairs]
    part = [p * sp(-m) + (1 - p) * sp(m) for p, m in zip(right, margins, strict=True)]
    weights = [math.exp(w.logp + r.logp - w.behaviour - r.behaviour) for w, r in sides]
    weights = {
        "none": [1.0] * len(sides),
        "raw": weights,
        "clipped": [min(weight, o.clip) for weight in weights],
        "self_normalized": [weight * len(weights) / sum(weights) for weight in weights],
    }[o.weights]
    found = []
    for i, (w, r) in enumerate(sides):
        others = [
            p
            for p, pair in zip(part, u.pairs, strict=True)
            if pair["position"] != u.pairs[i]["position"]
        ]
        leave_one_out = sum(others) / len(others) if others else 0.0
        baseline = {"ln2": math.log(2), "none": 0.0, "leave_one_out": leave_one_out}[o.baseline]
        surrogate = o.score_weight * (part[i] - baseline) * (w.logp + r.logp) + part[i]
        found.append(weights[i] * surrogate)
    return found


def labels(u: Update) -> list[tuple[Key, bool]]:
    found = [
        (key, row["desirable"])
        for key, row in u.completions.items()
        if key[0] in u.batch and row["fate"] == "learn"
    ]
    for pair in u.pairs:
        found.append(((pair["position"], pair["chosen"]), True))
        found.append(((pair["position"], pair["rejected"]), False))
    return found


def kto(u: Update) -> list[float]:
    o: Any = u.run.cfg.objective
    labelled = labels(u)
    prompts = {key[0]: row["prompt_ids"] for key, row in u.completions.items() if key[0] in u.batch}
    order = sorted(prompts)
    mismatched = []
    for place, position in enumerate(order):
        others = [prompts[order[place - back]] for back in range(1, len(order))]
        other = next((ids for ids in others if ids != prompts[position]), None)
        if other is not None:
            keys = {key for key, _ in labelled if key[0] == position}
            mismatched += [(other, u.completions[key]["ids"]) for key in keys]
    policy = [sum(u.run.logprobs(prompt, ids)) for prompt, ids in mismatched]
    u.run.use(u.version + 1, "reference")  # as it stood in this round
    reference = [sum(u.run.logprobs(prompt, ids)) for prompt, ids in mismatched]
    ratios = [p - r for p, r in zip(policy, reference, strict=True)]
    z = max(0.0, sum(ratios) / len(ratios)) if ratios else 0.0
    return [
        o.desirable_weight * (1 - sigmoid(o.beta * (u.scored[key].ratio - z)))
        if desirable
        else o.undesirable_weight * (1 - sigmoid(o.beta * (z - u.scored[key].ratio)))
        for key, desirable in labelled
    ]


def bco(u: Update) -> list[float]:
    beta = u.run.cfg.objective.reward_scale
    labelled = labels(u)
    u.seen += [beta * u.scored[key].ratio for key, _ in labelled]
    delta = sum(u.seen) / len(u.seen) if u.seen else 0.0
    return [
        sp(-(beta * u.scored[key].ratio - delta))
        if good
        else sp(beta * u.scored[key].ratio - delta)
        for key, good in labelled
    ]


def plackett_luce(u: Update) -> list[float]:
    beta = u.run.cfg.objective.reward_scale
    found = []
    for position in u.batch:
        chain = [p for p in u.pairs if p["position"] == position]
        if not chain:
            continue
        order = [chain[0]["chosen"], *(p["rejected"] for p in chain)]
        rewards = [math.exp(beta * u.scored[position, sample].ratio) for sample in order]
        stages = [rewards[k] / sum(rewards[k:]) for k in range(len(rewards))]
        found.append(-sum(math.log(stage) for stage in stages))
    return found


def nash_md(u: Update) -> list[float]:
    beta = u.run.cfg.objective.reward_scale
    found = []
    for pair in u.pairs:
        own = u.scored[pair["position"], 0]
        wins = pair["label_prob"] if pair["chosen"] == 0 else 1 - pair["label_prob"]
        found.append(beta * own.ratio * own.logp - (wins - 0.5) * own.logp)
    return found


PAIRWISE = ("dpo", "robust_dpo", "ipo", "simpo", "cpo", "orpo", "sppo", "xpo")
EXAMPLES: Mapping[str, Any] = dict.fromkeys(PAIRWISE, pairwise) | {
    "pdpo": pdpo,
    "kto": kto,
    "bco": bco,
    "plackett_luce": plackett_luce,
    "nash_md": nash_md,
}
