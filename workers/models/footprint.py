"""What a model weighs and what its activations take, from its config alone: nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from judges.errors import UserError
from workers.learner.logprobs import chunked_logprobs
from workers.models.lora import trainable, with_adapters
from workers.models.resolve import resolve_model
from workers.options import LoraOptions, PolicyOptions

ROWS, WIDTH = (1, 2), 128
"""Activations are counted at so many rows of that width; they are linear in the tokens."""

SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Of a config: the model's logits are then not its head applied to its last hidden state."""

CAUSAL = "causal_without_mask"


@dataclass(frozen=True, slots=True)
class Footprint:
    """A policy's size: counts of numbers, not of bytes, unless the name says so.

    Tied tensors count once. ``trainable``: the adapters with LoRA, else all. ``largest_block``: of
    the layers and the embeddings, which sharding gathers one at a time. ``head``: the output head's
    weight. ``kv_a_token``: keys and values of all layers. ``activation_bytes_a_token``: what
    autograd keeps of a forward pass through body and head in the learner's precision, every token
    counted as a completion's; the learner's head is computed in chunks, or as ``plain`` logits.
    """

    parameters: int
    trainable: int
    largest_block: int
    head: int
    hidden: int
    vocabulary: int
    layers: int
    kv_a_token: int
    context: int
    activation_bytes_a_token: int
    plain: bool


def policy_footprint(policy: PolicyOptions) -> Footprint:
    """The size of ``policy.model`` with its adapters; a directory needs no more than a config.json.

    Raises UserError where there is no config to be had.
    """
    config = config_of(policy.model, "policy.model")
    text = config.get_text_config()
    plain = any(getattr(text, key, None) not in (None, 1.0) for key in SCALED_LOGITS)
    with FakeTensorMode():
        model = _built(config, getattr(torch, policy.dtype), policy.lora)
        few, more = (_kept_bytes(model, rows, plain) for rows in ROWS)
        learned = sum(tensor.numel() for tensor in trainable(model).values())
        parameters = sum(tensor.numel() for tensor in model.parameters())
        head = model.get_output_embeddings().weight.numel()
        blocks = [head, *(_numbers(layer) for layer in _layers(model))]
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Footprint(
        parameters=parameters,
        trainable=learned,
        largest_block=max(blocks),
        head=head,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        layers=text.num_hidden_layers,
        kv_a_token=2 * text.num_hidden_layers * heads * width,
        context=text.max_position_embeddings,
        activation_bytes_a_token=(more - few) // ((ROWS[1] - ROWS[0]) * WIDTH),
        plain=plain,
    )


def gpus_here() -> list[int]:
    """Bytes of memory of each GPU that torch finds on this machine."""
    count = torch.cuda.device_count()
    return [torch.cuda.get_device_properties(at).total_memory for at in range(count)]


def classifier_parameters(model: str) -> int:
    """Parameters of a sequence classifier. Raises UserError where its config cannot be had."""
    config = config_of(model, "judge.args.model")
    with FakeTensorMode():
        return _numbers(AutoModelForSequenceClassification.from_config(config))


def causal_parameters(model: str, key: str) -> int:
    """Parameters of a causal language model that the config's ``key`` names. Raises UserError."""
    with FakeTensorMode():
        return _numbers(AutoModelForCausalLM.from_config(config_of(model, key)))


def config_of(model: str, key: str) -> Any:
    """The config of a directory, a fetched model or a hub id that the run's ``key`` names.

    Raises UserError where there is none.
    """
    directory = Path(model).expanduser()
    location = directory if (directory / "config.json").is_file() else resolve_model(model)
    try:
        return AutoConfig.from_pretrained(location)
    except OSError as error:
        raise UserError(
            f"{key}={model}: its config.json is not on this machine and the hub cannot be "
            "reached: give a directory that holds one (its weights are not needed)"
        ) from error


def _built(config: Any, dtype: torch.dtype, lora: LoraOptions | None) -> Any:
    """The model as the learner has it, of tensors that hold nothing."""
    AttentionInterface.register(CAUSAL, _causal_attention)
    AttentionMaskInterface.register(CAUSAL, _no_mask)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=CAUSAL)
        model = model.eval() if lora is None else with_adapters(model, lora)
    return _of_this_machine(model)


def _of_this_machine(model: Any) -> Any:
    """The meta tensors replaced by fake ones of the CPU, so that its kernels are chosen."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:
                    made[id(tensor)] = torch.empty_like(tensor, device="cpu")
                    if isinstance(tensor, torch.nn.Parameter):
                        learned = tensor.requires_grad
                        made[id(tensor)] = torch.nn.Parameter(made[id(tensor)], learned)
                tensors[name] = tensor if tensor is None else made[id(tensor)]
    return model


def _causal_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs: Any
) -> Any:
    """Attention as torch's fused kernels compute it, which keep no weights [T, T]."""
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs | {"is_causal": True})


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Without padding there is none in the learner either; its data cannot be looked at here."""


def _kept_bytes(model: Any, rows: int, plain: bool) -> int:
    """Bytes that autograd keeps of a micro-batch of ``rows`` completions of ``WIDTH`` tokens."""
    ids_BT = torch.zeros((rows, WIDTH), dtype=torch.int64)
    head = model.get_output_embeddings()
    with saved_bytes(model) as kept:
        if plain:
            logits_NV = model(ids_BT, use_cache=False).logits.flatten(0, 1).float()
            torch.log_softmax(logits_NV, -1).gather(-1, ids_BT.flatten()[:, None])
        else:
            hidden_NH = model.base_model(ids_BT, use_cache=False).last_hidden_state.flatten(0, 1)
            chunked_logprobs(hidden_NH, head.weight, head.bias, ids_BT.flatten())
    return sum(kept.values())


@contextmanager
def saved_bytes(model: Any) -> Iterator[Mapping[object, int]]:
    """Bytes of each storage that autograd saves inside, those of the model's own tensors left out.

    Storages that are shared by several saved tensors count once.
    """
    own = {tensor.untyped_storage() for tensor in model.state_dict(keep_vars=True).values()}
    kept: dict[object, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in own:
            kept[storage] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def _layers(model: Any) -> list[torch.nn.Module]:
    """The modules of the longest list of them: a transformer's blocks."""
    lists = [list(m) for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return max(lists, key=len, default=[])


def _numbers(module: torch.nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.parameters())
