"""Seconds of each call that a run is made of, and where they are known from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from judges.errors import UserError
from pipeline.config import Config
from pipeline.plan.virtual import Pace
from pipeline.run_directory import read_run_config
from pipeline.storage import run_here
from pipeline.tracking import METRICS_FILE, metrics

ASSUMED_PROMPT = 256
"""Tokens of a prompt where nobody says, cut to what generator.max_model_len leaves."""

SCORE_OF_UPDATE = 1 / 3
"""What a forward pass takes of a forward and a backward one (2 of 6 operations a parameter)."""

SCORE_OF_LORA_UPDATE = 1 / 2
"""With frozen weights: 2 of 4, for they get no gradient of their own."""

STAGES = ("generate", "judge", "learn", "push")
KEYS = (*STAGES, "prompt", "completion")


@dataclass(frozen=True, slots=True)
class Law:
    """Seconds of a call about so many prompts: ``fixed`` for each wave of ``at_once`` prompts
    (None: all at once), and ``each`` a prompt."""

    each: float = 0.0
    fixed: float = 0.0
    at_once: int | None = None

    def __call__(self, prompts: int) -> float:
        waves = 1 if self.at_once is None else math.ceil(prompts / self.at_once)
        return self.fixed * waves + self.each * prompts


@dataclass(frozen=True, slots=True)
class Lengths:
    """Mean tokens of a prompt and of a completion."""

    prompt: float
    completion: float


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds of every call in the loop.

    Of a call about so many prompts: ``sample`` a generator's, ``judge`` a judge worker's, ``score``
    the reference's, ``update`` the learner's. Of a push: ``pack`` and ``probe`` in the learner,
    ``load`` and ``prove`` in each generator. ``around``: what the loop itself takes for a round.
    ``origin`` says of each stage where its figures are from.
    """

    sample: Law
    judge: Law
    score: Law
    update: Law
    lengths: Lengths
    pack: float = 0.0
    probe: float = 0.0
    load: float = 0.0
    prove: float = 0.0
    around: float = 0.0
    origin: Mapping[str, str] = field(default_factory=dict)

    @property
    def push(self) -> float:
        """Seconds of a push whose steps nobody overlaps."""
        return self.pack + self.probe + self.load + self.prove

    def pace(self) -> Pace:
        """The speed of any of the workers, by its methods."""
        laws: Mapping[str, Callable[[int], float]] = {
            "sample": self.sample,
            "judge": self.judge,
            "implicit_reward": self.judge,
            "score_reference": self.score,
            "update": self.update,
        }
        once = {
            "weights": self.pack,
            "probe": self.probe,
            "load": self.load,
            "prove": self.prove,
            "begin_round": self.around,
        }

        def seconds(method: str, positions: Sequence[int]) -> float:
            law = laws.get(method)
            return once.get(method, 0.0) if law is None else law(len(positions))

        return seconds


def parse_rates(text: str) -> dict[str, float]:
    """``generate=2000,judge=50,…`` by key. Raises UserError for other keys and values."""
    found: dict[str, float] = {}
    for part in text.split(","):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in KEYS:
            raise UserError(f"--rates {part}: no such key; choose from {', '.join(KEYS)}")
        try:
            found[key] = float(value)
        except ValueError:
            raise UserError(f"--rates {part}: must be KEY=NUMBER, e.g. generate=2000") from None
        if not (found[key] > 0 and math.isfinite(found[key])):
            raise UserError(f"--rates {part}: must be a number above 0")
    return found


def given_rates(said: Mapping[str, float], cfg: Config, base: Rates | None = None) -> Rates:
    """What ``--rates`` says, in place of what ``base`` does.

    Tokens a second that a generator writes, completions a second that a judge worker scores, tokens
    (of prompts and completions) a second in updates, seconds a push; ``prompt`` and ``completion``
    are mean tokens. Raises UserError for a stage of which nothing is known.
    """
    if base is None:
        if missing := [stage for stage in STAGES[:3] if stage not in said]:
            raise UserError(
                f"--rates: {', '.join(missing)} missing: give generate (tokens a second), judge "
                "(completions a second) and learn (tokens a second)"
            )
        base = Rates(Law(), Law(), Law(), Law(), lengths_of(said, cfg))
        base = replace(base, origin={"push": "not given: none"})
    samples, lengths = cfg.sampling.completions_per_prompt, base.lengths
    changes: dict[str, Any] = {}
    if "generate" in said:
        changes["sample"] = Law(samples * lengths.completion / said["generate"])
    if "judge" in said:
        changes["judge"] = Law(samples / said["judge"])
    if "learn" in said:
        a_completion = (lengths.prompt + lengths.completion) / said["learn"]
        changes["update"] = Law(learned_completions(cfg) * a_completion)
        changes["score"] = Law(score_share(cfg) * samples * a_completion)
    if "push" in said:
        changes |= {"pack": 0.0, "probe": 0.0, "load": said["push"], "prove": 0.0}
    origin = {stage: "given" for stage in STAGES if stage in said}
    return replace(base, **changes, origin={**base.origin, **origin})


def lengths_of(said: Mapping[str, float], cfg: Config) -> Lengths:
    """As ``--rates`` says, else assumed."""
    assumed = assumed_lengths(cfg)
    return Lengths(said.get("prompt", assumed.prompt), said.get("completion", assumed.completion))


def score_share(cfg: Config) -> float:
    """Seconds of the reference's scores to those of the update; 0 where none is kept."""
    if not keeps_reference(cfg):
        return 0.0
    return SCORE_OF_UPDATE if cfg.policy.lora is None else SCORE_OF_LORA_UPDATE


def learned_completions(cfg: Config) -> int:
    """Of a prompt's completions, how many an update learns from at most: those of its pair, or all
    of them."""
    one_pair = cfg.pairing.strategy in ("best_worst", "best_random", "random")
    samples = cfg.sampling.completions_per_prompt
    return 2 if one_pair and cfg.needs.records == "pairs" else samples


def keeps_reference(cfg: Config) -> bool:
    """Whether the learner holds a reference."""
    return cfg.needs.reference or cfg.drift.reference


def assumed_lengths(cfg: Config) -> Lengths:
    """Completions as long as they may be, prompts of ``ASSUMED_PROMPT`` tokens or what is left."""
    new = cfg.sampling.max_new_tokens
    longest = cfg.generator.max_model_len
    prompt = ASSUMED_PROMPT if longest is None else min(ASSUMED_PROMPT, longest - new)
    return Lengths(float(prompt), float(new))


SAME = (
    "policy.model",
    "policy.lora",
    "sampling.completions_per_prompt",
    "sampling.max_new_tokens",
    "objective.name",
    "judge.title",
)
"""What a run's seconds depend on besides its numbers of workers and prompts."""


def rates_of_run(run_dir: str | Path, cfg: Config) -> Rates:
    """What the rounds of a run took, its first one aside (it warms up).

    Raises UserError where that run is not like ``cfg``, or has fewer than two rounds.
    """
    was, _ = read_run_config(run_dir)
    for key in SAME:
        mine, theirs = _value(cfg, key), _value(was, key)
        if mine != theirs:
            raise UserError(
                f"--from {run_dir}: its {key} is {theirs}, the config's {mine}: its seconds say "
                "nothing of this one; calibrate instead (leave --from out), or give --rates"
            )
    with run_here(str(run_dir), [METRICS_FILE]) as here:
        records = list(metrics(here))
    rounds = [r for r in records if r["kind"] == "round" and r["round"] > 0]
    updates = [r for r in records if r["kind"] == "update" and r["round"] > 0]
    if not rounds or not updates:
        raise UserError(f"--from {run_dir}: fewer than two rounds; let it run on, or calibrate")
    sampled = sum(r["prompts"] for r in rounds)
    spent = {
        stage: sum(r["seconds"][stage] for r in rounds)
        for stage in ("generate", "judge", "learn", "sync", "idle")
    }
    learned = len(updates) * was.sampling.prompts_per_update
    in_updates = sum(r["seconds"] for r in updates)
    origin = f"{run_dir}, {len(rounds)} rounds"
    return Rates(
        sample=Law(spent["generate"] * was.generator.replicas / sampled),
        judge=Law(spent["judge"] * was.judge.replicas / sampled),
        score=Law(max(0.0, spent["learn"] - in_updates) / sampled),
        update=Law(in_updates / learned),
        load=spent["sync"] / len(rounds),
        around=spent["idle"] / len(rounds),
        lengths=Lengths(assumed_lengths(cfg).prompt, fmean(r["length_mean"] for r in rounds)),
        origin=dict.fromkeys(STAGES, origin),
    )


def _value(cfg: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(cfg, section), name)
