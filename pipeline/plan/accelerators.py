"""GPUs by their data sheets, and what a round takes on them by arithmetic: nothing is measured.

A roofline: learning is bound by operations, of which a share (``MFU``) is reached; decoding reads
all weights and the batch's keys and values once a token from memory, of whose speed a share
(``MBU``) is reached.
"""

from __future__ import annotations

from dataclasses import dataclass

from judges.errors import UserError
from pipeline.config import Config
from pipeline.plan.memory import Sizes, engine_room
from pipeline.plan.rates import STAGES, Law, Lengths, Rates, keeps_reference, learned_completions

GIB = 1 << 30
MFU = 0.4
MBU = 0.6
QUESTION = 300
"""Assumed tokens of a judge's instructions."""

HOST_BYTES_A_SECOND = 5e9
"""Of a push through the object store: memory copies and checksums (docs/performance.md)."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU: dense operations a second in bfloat16 (tensor cores) and float32 (without TF32),
    bytes a second of its memory, and how many GiB of it a driver leaves."""

    bfloat16: float
    float32: float
    bandwidth: float
    gib: float
    source: str


GPUS = {
    "a100": Gpu(312e12, 19.5e12, 2.039e12, 79.2, "NVIDIA A100 80GB SXM data sheet, 2022"),
    "h100": Gpu(989e12, 67e12, 3.35e12, 79.2, "NVIDIA H100 SXM data sheet, 2023"),
    "h200": Gpu(989e12, 67e12, 4.8e12, 139.8, "NVIDIA H200 SXM data sheet, 2024"),
    "l40s": Gpu(362e12, 91.6e12, 0.864e12, 44.4, "NVIDIA L40S data sheet, 2023"),
}


def gpu_named(name: str) -> Gpu:
    """A GPU whose data sheet is known. Raises UserError for another."""
    found = GPUS.get(name.lower())
    if found is None:
        raise UserError(
            f"--gpu {name}: no such data sheet here; choose from {', '.join(GPUS)}, or say what "
            "yours does with --rates"
        )
    return found


def roofline(
    cfg: Config, sizes: Sizes, gpu: Gpu, lengths: Lengths, judge: Law | None = None
) -> Rates:
    """A config's rates by arithmetic, as if every worker had GPUs of this kind.

    ``judge`` stands for what arithmetic says of it. Raises UserError where it cannot: of a judge
    that asks a model served elsewhere.
    """
    policy = sizes.policy
    a_completion = lengths.prompt + lengths.completion
    learned, scored = (4 if cfg.policy.lora else 6), 2
    peak = gpu.float32 if cfg.policy.dtype == "float32" else gpu.bfloat16
    flops = peak * MFU * cfg.learner.workers
    update = learned * policy.parameters * learned_completions(cfg) * a_completion / flops
    samples = cfg.sampling.completions_per_prompt if keeps_reference(cfg) else 0
    score = scored * policy.parameters * samples * a_completion / flops
    pushed = policy.trainable * sizes.generator_bytes
    return Rates(
        sample=_decoding(cfg, sizes, gpu, lengths),
        judge=judge or _judging(cfg, sizes, gpu, lengths),
        score=Law(score),
        update=Law(update),
        pack=pushed / HOST_BYTES_A_SECOND,
        load=pushed / HOST_BYTES_A_SECOND,
        lengths=lengths,
        origin=dict.fromkeys(STAGES, "arithmetic"),
    )


def _decoding(cfg: Config, sizes: Sizes, gpu: Gpu, lengths: Lengths) -> Law:
    """A step reads the weights and every sequence's cache, or computes, whichever takes longer;
    the prompts are computed first, each once."""
    policy, samples = sizes.policy, cfg.sampling.completions_per_prompt
    room = engine_room(cfg, sizes, lengths, gpu.gib * GIB)
    peak = gpu.float32 if sizes.generator_bytes == 4 else gpu.bfloat16
    bandwidth, flops = gpu.bandwidth * MBU * room.gpus, peak * MFU * room.gpus
    weights = policy.parameters * sizes.generator_bytes
    cached = policy.kv_a_token * sizes.generator_bytes
    context = lengths.prompt + lengths.completion / 2
    a_token = max(cached * context / bandwidth, 2 * policy.parameters / flops)
    prefill = 2 * policy.parameters * lengths.prompt / flops
    return Law(
        each=prefill + samples * lengths.completion * a_token,
        fixed=lengths.completion * weights / bandwidth,
        at_once=max(1, room.sequences // samples),
    )


def _judging(cfg: Config, sizes: Sizes, gpu: Gpu, lengths: Lengths) -> Law:
    """A reward model reads each prompt and completion; a model that is asked reads, for each pair
    in both orders, prompt, both completions and ``QUESTION``, and writes a word; a rule takes
    nothing."""
    if sizes.judge_is_served:
        raise UserError(
            f"--gpu: judge.name={cfg.judge.name} asks a model that is served elsewhere, whose "
            "speed no data sheet tells: add --rates judge=COMPLETIONS_PER_SECOND"
        )
    parameters, bytes_each = sizes.judge
    samples = cfg.sampling.completions_per_prompt
    read = samples * (lengths.prompt + lengths.completion)
    if cfg.judge.client is not None:
        read = samples * (samples - 1) * (QUESTION + lengths.prompt + 2 * lengths.completion)
    peak = gpu.float32 if bytes_each == 4 else gpu.bfloat16
    return Law(2 * parameters * read / (peak * MFU) if cfg.judge.gpus else 0.0)
