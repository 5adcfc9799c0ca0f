"""LoRA: adapters beside frozen linear modules, W + (alpha/rank)·B·A, by PEFT."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter
from transformers.pytorch_utils import Conv1D

from judges.errors import UserError
from workers.options import LoraOptions

ADAPTER = "default"
PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SEED = 0


def with_adapters(model: Any, options: LoraOptions) -> Any:
    """The model itself, its weights frozen and adapters injected in place: of the same class still.

    They start as the identity (B = 0); A is drawn from a fixed seed, module by module, and the
    global random state is left as it was. Raises UserError for a target that is no linear module.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = _linear_modules(model)
    if options.target_modules != "all-linear":
        _refuse_unknown(model, options.target_modules, linear)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules=options.target_modules,
        fan_in_fan_out=not all(isinstance(module, torch.nn.Linear) for module in linear.values()),
    )
    with torch.random.fork_rng(devices=[]):  # PEFT draws too, from the global state
        model = inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    draws = torch.Generator().manual_seed(SEED)
    for name, tensor in trainable(model).items():
        start = torch.zeros(tensor.shape)
        if ".lora_A." in name:
            torch.nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=draws)
        tensor.data.copy_(start)
    return model.eval()


def _linear_modules(model: Any) -> dict[str, torch.nn.Module]:
    """Every linear module but the output head, by its full name."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }


def _refuse_unknown(model: Any, targets: list[str], linear: Mapping[str, Any]) -> None:
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        hit = [name for name in names if name == target or name.endswith(f".{target}")]
        if not hit or not linear.keys() >= set(hit):
            known = ", ".join(sorted({name.rpartition(".")[-1] for name in linear}))
            raise UserError(
                f"policy.lora.target_modules={target}: no linear module of this model takes an "
                f"adapter by that name; choose from {known}, or all-linear"
            )


def trainable(model: Any) -> dict[str, Parameter]:
    """What is learned and pushed, by name: the adapters, or all parameters where there are none."""
    parameters: dict[str, Parameter] = dict(model.named_parameters())
    return {name: p for name, p in parameters.items() if ".lora_" in name} or parameters


def frozen_copy(model: Any) -> Any:
    """A copy that takes no gradients. Adapters are its own, the weights below them are shared."""
    own = {id(tensor) for tensor in trainable(model).values()}
    shared = {id(p): p for p in model.parameters() if id(p) not in own}
    return copy.deepcopy(model, shared).requires_grad_(False)


def merged(model: Any) -> Any:
    """A copy in plain Hugging Face format, the adapters folded into the weights.

    Tensors that no adapter changes are shared.
    """
    from peft.tuners.lora import LoraLayer

    plain = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, LoraLayer):
            base: Any = layer.get_base_layer()
            with torch.no_grad():
                weight = base.weight + layer.get_delta_weight(ADAPTER)
            base.weight = Parameter(weight, requires_grad=False)
            plain.set_submodule(name, base)
    vars(plain).pop("peft_config", None)
    return plain


def model_state(model: Any) -> dict[str, Tensor]:
    """What a checkpoint must hold of a model whose base is loaded anew: the adapters, or all."""
    state: dict[str, Tensor] = model.state_dict()
    adapters = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    return adapters or state


@torch.no_grad()
def load_model_state(model: Any, state: Mapping[str, Tensor]) -> None:
    """Take up what ``model_state`` gave. Raises KeyError or RuntimeError if it does not fit."""
    found = trainable(model)
    if not any(".lora_" in name for name in found):
        model.load_state_dict(state)
        return
    for name, tensor in found.items():
        tensor.copy_(state[name])


def peft_adapter(
    tensors: Mapping[str, Tensor], options: LoraOptions, base_model: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The adapters, by the names that ``trainable`` gives them, as PEFT's files hold them.

    Returns the tensors as ``base_model.model.<module>.lora_A.weight`` and the adapter's config.
    """
    state = {_peft_name(name): tensor.detach().contiguous() for name, tensor in tensors.items()}
    targets = options.target_modules
    if targets == "all-linear":  # as they are here, whatever the reader takes for linear
        targets = sorted({name.split(".")[-3] for name in state})
    alpha = int(options.alpha) if options.alpha.is_integer() else options.alpha
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": options.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "inference_mode": True,
    }
    return state, config


def _peft_name(name: str) -> str:
    return f"{PREFIX}{name.removesuffix(f'.{ADAPTER}.weight')}.weight"


def write_adapter(model: Any, options: LoraOptions, base_model: str, directory: Path) -> None:
    """Write the model's adapters as ``peft.PeftModel.from_pretrained`` reads them."""
    state, config = peft_adapter(trainable(model), options, base_model)
    directory.mkdir()
    save_file(state, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(config, indent=2))


@torch.no_grad()
def read_adapter(model: Any, directory: Path) -> None:
    """Take up what ``write_adapter`` wrote. Raises UserError if it is not for these adapters."""
    mine = {_peft_name(name): tensor for name, tensor in trainable(model).items()}
    state = load_file(directory / WEIGHTS) if (directory / WEIGHTS).is_file() else {}
    shapes = {name: tensor.shape for name, tensor in state.items()}
    if shapes != {name: tensor.shape for name, tensor in mine.items()}:
        raise UserError(
            f"policy.lora: {directory} does not hold adapters of this rank and these modules; "
            "leave policy.lora as it was in the run"
        )
    for name, tensor in mine.items():
        tensor.copy_(state[name])
