"""The vLLM engine of a generator: its arguments, and requests by token ids, step by step."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

from judges.errors import UserError
from workers.generator import GeneratorOptions
from workers.models.resolve import resolve_model
from workers.options import PolicyOptions

REQUIRED_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: we take its steps
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # its sampler cannot be asked how a token was drawn
}
ENVIRONMENT = REQUIRED_ENVIRONMENT | {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # replicas on one machine would share the first cores
}

OURS = {
    "model": "policy.model",
    "dtype": "generator.dtype",
    "max_model_len": "generator.max_model_len",
    "enable_lora": "policy.lora",
    "max_lora_rank": "policy.lora.rank",
}
"""Engine arguments that other keys of the config set."""

FIXED = (
    "load_format",
    "logits_processors",
    "logprobs_mode",
    "max_logprobs",
    "seed",
    "skip_tokenizer_init",
    "worker_extension_cls",
)
"""Engine arguments on which token-exact, verified sampling rests."""

CPU_ARGUMENTS = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 30,
    # vLLM 0.32 rewinds the generator of a request whose prompt came in part: torch cannot, here.
    "enable_chunked_prefill": False,
}


def build_engine(policy: PolicyOptions, options: GeneratorOptions) -> Any:
    """A vLLM engine in this process, sampling ``policy.model`` until it is pushed other weights.

    Raises UserError where vLLM is missing or broken, or refuses the engine's arguments.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.update(REQUIRED_ENVIRONMENT)
    try:
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"generator.backend=vllm: vLLM cannot be imported ({first_line(error)}): run `make "
            "install-vllm`, or set generator.backend to transformers"
        ) from error
    if options.gpus and current_platform.is_cpu():
        raise UserError(
            f"generator.gpus={options.gpus:g}: the vLLM installed here is built for the CPU: set "
            "it to 0, or run `make install-vllm` on a machine with a GPU"
        )
    if not (options.gpus or current_platform.is_cpu()):
        raise UserError(
            "generator.gpus=0: the vLLM installed here runs on a GPU: say how much of one each "
            "generator gets, e.g. 1 or 0.5"
        )
    refuse_unknown_arguments(options.engine, [field.name for field in fields(EngineArgs)])
    arguments = {
        "model": str(resolve_model(policy.model)),
        "dtype": options.dtype_for(policy),
        "seed": 0,  # every request brings its own
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "worker_extension_cls": "workers.vllm_worker.PushReceiver",
    }
    if current_platform.is_cpu():
        arguments |= CPU_ARGUMENTS
        if options.engine.get("enable_chunked_prefill"):
            raise UserError(
                "generator.engine.enable_chunked_prefill=true: on the CPU vLLM cannot take back "
                "what a request's seed drew for half a prompt: leave it out"
            )
    if options.max_model_len is not None:
        arguments["max_model_len"] = options.max_model_len
    if options.in_flight_updates:
        arguments["async_scheduling"] = False  # a step's tokens must be known before a push
    if policy.lora is not None:
        arguments |= {"enable_lora": True, "max_lora_rank": _room_for(policy.lora.rank)}
    try:
        return LLMEngine.from_engine_args(EngineArgs(**(arguments | options.engine)))
    except (TypeError, ValueError) as error:
        raise UserError(f"generator.engine: vLLM refuses it: {first_line(error)}") from error


def _room_for(rank: int) -> int:
    """The smallest size of vLLM's that a LoRA of this rank fits into. Raises UserError."""
    from vllm.config.lora import MaxLoRARanks

    for size in sorted(get_args(MaxLoRARanks)):
        if rank <= size:
            return int(size)
    raise UserError(
        f"policy.lora.rank={rank}: vLLM has room for {max(get_args(MaxLoRARanks))} at most; lower "
        "it, or use generator.backend=transformers"
    )


def refuse_unknown_arguments(engine: Mapping[str, Any], known: list[str]) -> None:
    """Raises UserError for what is no engine argument of vLLM's, or not the user's to set here."""
    for name in engine:
        if name in OURS:
            raise UserError(f"generator.engine.{name}: is set by {OURS[name]}; set that instead")
        if name in FIXED:
            raise UserError(
                f"generator.engine.{name}: exact log-probabilities and verified pushes need it as "
                "it is; leave it out"
            )
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(
                f"generator.engine.{name}: no engine argument of the installed vLLM{hint}"
            )


def first_line(error: BaseException) -> str:
    """The line of a message that says what is wrong; pydantic's first only counts errors."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if len(lines) > 1 and "validation error" in lines[0]:
        said = ": ".join(lines[1:3]) if len(lines) > 2 and "[type=" in lines[2] else lines[1]
        return said.split(" [type=")[0].removeprefix("Value error, ")
    return lines[0] if lines else type(error).__name__
