"""How much memory each worker takes, by what it is for: arithmetic from configs, nothing is loaded.

Exact: numbers of parameters, what autograd keeps of a forward pass, keys and values a token.
Assumed, and named so: what a process or an engine takes besides (``PROCESS``, ``ENGINE``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from judges.client_options import OpenAIOptions
from judges.errors import UserError
from judges.model_clients import LocalClientOptions, PolicyClientOptions
from judges.options import AskOptions
from pipeline.config import Config
from pipeline.launch.crew import judges_of
from pipeline.parts import reference_shares, unit_size
from pipeline.plan.rates import Lengths, keeps_reference

if TYPE_CHECKING:
    from workers.models.footprint import Footprint

GIB = 1 << 30
NUMBER = {"float32": 4, "bfloat16": 2, "float16": 2}
MOMENTS = 2
"""AdamW's, of every number that is learned, in its precision."""

PROCESS = {"gpu": 600 << 20, "cpu": 450 << 20, "vllm": 1300 << 20}
"""Assumed, of every process: a CUDA context; Python, torch and transformers; the same and vLLM."""

ENGINE = 2 << 30
"""Assumed, of an engine on a GPU beside its weights and cache: activations, CUDA graphs."""

UTILIZATION, SEQUENCES = 0.92, 256
"""vLLM 0.32's own gpu_memory_utilization and, where it cannot tell the GPU, max_num_seqs."""

CPU_CACHE = 1 << 30
"""Of the vLLM generator on a CPU (workers/vllm_engine.py)."""

SCORED = ("reward_model",)
"""Judges that hold a sequence classifier."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the models of a run weigh.

    ``judge``: parameters of the training judge's own model and bytes of each, ``judge_is_served``
    where it asks one that is served elsewhere; ``judges``: bytes of every judge by title.
    """

    policy: Footprint
    generator_bytes: int
    judge: tuple[int, int] = (0, 4)
    judge_is_served: bool = False
    judges: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one worker by what they are for, on a GPU of its own or in a process's RAM.

    ``gpus`` share them evenly; ``note`` says what a cache holds.
    """

    parts: Mapping[str, int]
    gpus: int
    note: str = ""

    @property
    def total(self) -> int:
        """Of each of its GPUs, or of the process."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Room:
    """What an engine has for keys and values on each GPU: bytes; tokens and whole sequences over
    all its ``gpus``, at most as many as it decodes at one time."""

    cache: int
    tokens: int
    sequences: int
    gpus: int


def sizes_of(cfg: Config) -> Sizes:
    """The sizes of policy and judges, from their configs. Raises UserError where one is missing."""
    from workers.models.footprint import policy_footprint

    bytes_each = NUMBER[cfg.generator.dtype_for(cfg.policy)]
    judges = {title: _judge_bytes(judge) for title, judge in judges_of(cfg).items()}
    served = any(isinstance(client, OpenAIOptions) for client in _clients(cfg.judge))
    return Sizes(
        policy_footprint(cfg.policy),
        bytes_each,
        judge=_judge_model(cfg.judge),
        judge_is_served=served or cfg.judge.name in ("http", "served_reward_model"),
        judges=judges,
    )


def learner_memory(cfg: Config, sizes: Sizes) -> Memory:
    """Of each learner process, at the end of a micro-batch's forward pass, when it holds most.

    With several processes, weights and optimizer are sharded evenly, and one block is gathered.
    """
    policy, options = sizes.policy, cfg.learner
    number, shards = NUMBER[cfg.policy.dtype], options.workers
    learned = policy.trainable * number
    tokens = max(options.tokens_per_micro_batch, 1)
    head = policy.hidden * 3 * tokens + (0 if policy.plain else policy.head)
    parts = {
        "weights": policy.parameters * number // shards,
        "gradients": learned // shards,
        "optimizer": MOMENTS * learned // shards,
        "reference": learned // shards if keeps_reference(cfg) else 0,
        "activations": policy.activation_bytes_a_token * tokens,
        "backward of the head": head * number,
        "gathered block": policy.largest_block * number if shards > 1 else 0,
        "process": PROCESS["gpu" if options.gpus else "cpu"],
    }
    in_ram = cfg.generator.moves_by in ("object_store", "gloo")
    if not (options.gpus and in_ram):
        versions = 1 + cfg.resampling.rounds_in_flight
        parts["pushes"] = policy.trainable * sizes.generator_bytes * versions
    return Memory(_some(parts), _whole(options.gpus), f"{tokens} tokens a micro-batch")


def generator_memory(cfg: Config, sizes: Sizes, lengths: Lengths, capacity: float | None) -> Memory:
    """Of each generator; ``capacity`` are the bytes of a GPU, None where nobody knows."""
    gpus = _whole(cfg.generator.gpus)
    if cfg.generator.backend_for(cfg.needs) == "vllm":
        return _of_engine(cfg, sizes, lengths, capacity)
    policy, number = sizes.policy, NUMBER[cfg.policy.dtype]
    shares = reference_shares(cfg)
    per_round = min(cfg.resampling.updates_per_round, cfg.run.updates)
    prompts = cfg.sampling.prompts_per_update
    unit = unit_size(cfg, prompts).of(int(per_round) * prompts, len(shares))
    rows = unit * len(shares)
    tokens = rows * int(lengths.prompt + cfg.sampling.max_new_tokens)
    parts = {
        "weights": policy.parameters * number,
        "reference": policy.trainable * number if any(shares) else 0,
        "KV cache": tokens * policy.kv_a_token * number,
        "logits": 3 * rows * policy.vocabulary * number,
        "process": PROCESS["cpu"],
    }
    return Memory(_some(parts), gpus, f"{rows} completions at one time")


def _of_engine(cfg: Config, sizes: Sizes, lengths: Lengths, capacity: float | None) -> Memory:
    room = engine_room(cfg, sizes, lengths, capacity)
    on_gpu = bool(cfg.generator.gpus)
    parts = {
        "weights": sizes.policy.parameters * sizes.generator_bytes // max(1, room.gpus),
        "KV cache": room.cache,
        "engine": ENGINE if on_gpu else 0,
        "process": PROCESS["gpu" if on_gpu else "vllm"],
    }
    each = lengths.prompt + cfg.sampling.max_new_tokens
    held = f"cache of {room.tokens} tokens: {int(room.tokens // each)} × {each:.0f}"
    return Memory(_some(parts), room.gpus if on_gpu else 0, held)


def engine_room(cfg: Config, sizes: Sizes, lengths: Lengths, capacity: float | None) -> Room:
    """The cache of a vLLM generator: as said, or what its share of a GPU leaves (0 without one)."""
    engine = cfg.generator.engine
    gpus = int(engine.get("tensor_parallel_size", 1))
    said = engine.get("kv_cache_memory_bytes")
    if said is None and not cfg.generator.gpus:
        said = CPU_CACHE
    if said is None:
        share = float(engine.get("gpu_memory_utilization", UTILIZATION))
        weights = sizes.policy.parameters * sizes.generator_bytes / gpus
        said = (capacity or 0.0) * share - weights - ENGINE - PROCESS["gpu"]
    cache = max(0, int(said))
    tokens = cache * gpus // (sizes.policy.kv_a_token * sizes.generator_bytes)
    sequences = int(tokens / (lengths.prompt + lengths.completion))
    return Room(cache, tokens, min(sequences, int(engine.get("max_num_seqs", SEQUENCES))), gpus)


def judge_memory(cfg: Config, sizes: Sizes, capacity: float | None) -> Memory:
    """Of each judge worker, which holds every judge that the run asks."""
    on_gpu = bool(cfg.judge.gpus)
    parts = {title: held for title, held in sizes.judges.items() if held}
    note = ""
    for client in _clients(cfg.judge):
        if isinstance(client, PolicyClientOptions):
            parts["policy"] = sizes.policy.parameters * sizes.generator_bytes
        if isinstance(client, LocalClientOptions) and client.kind == "vllm":
            share = float(client.engine.get("gpu_memory_utilization", UTILIZATION))
            held = sum(parts.values())
            cache = (capacity or 0.0) * share - held if on_gpu else CPU_CACHE
            parts["engine and KV cache"] = max(0, int(cache))
    parts["process"] = PROCESS["gpu" if on_gpu else "cpu"]
    return Memory(parts, _whole(cfg.judge.gpus), note)


def _clients(judge: AskOptions) -> Iterator[Any]:
    if judge.client is not None:
        yield judge.client


def _judge_model(judge: AskOptions) -> tuple[int, int]:
    """Parameters of a judge's own model, and bytes of each; none of a rule's or a served one's."""
    from workers.models.footprint import causal_parameters, classifier_parameters

    for client in _clients(judge):
        if isinstance(client, LocalClientOptions):
            return causal_parameters(client.model, "judge.client.model"), NUMBER[client.dtype]
    if judge.name in SCORED and isinstance(model := judge.args.get("model"), str):
        dtype = str(judge.args.get("dtype", "float32"))
        if dtype not in NUMBER:
            raise UserError(f"judge.args.dtype={dtype}: choose from {', '.join(NUMBER)}")
        return classifier_parameters(model), NUMBER[dtype]
    return 0, 4


def _judge_bytes(judge: AskOptions) -> int:
    parameters, bytes_each = _judge_model(judge)
    members = judge.args.get("members")
    held = parameters * bytes_each
    for member in members if isinstance(members, list) else []:
        if isinstance(member, Mapping) and member.get("name") in SCORED:
            inner = AskOptions.model_validate(
                {k: member[k] for k in ("name", "args") if k in member}
            )
            held += _judge_bytes(inner)
    return held


def _whole(gpus: float) -> int:
    return 0 if not gpus else max(1, int(gpus))


def _some(parts: Mapping[str, int]) -> dict[str, int]:
    return {name: held for name, held in parts.items() if held}
