"""What the conversions share: the Hugging Face form of a Llama model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


def half_split(rows: FloatArray, heads: int) -> FloatArray:
    """Reorder query or key rows [heads · head size, hidden] for Hugging Face's rotary embedding.

    llama2.c and GGUF rotate rows (2i, 2i + 1) of a head together, Hugging Face rows
    (i, i + head size / 2).
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def write_weights(directory: Path, safetensors: bytes) -> None:
    """Write the serialized weights, readable by whom the umask lets.

    ``safetensors.save_file`` makes a file that its owner alone can read, useless in a cache that
    several users share.
    """
    (directory / "model.safetensors").write_bytes(safetensors)


def write_configs(
    directory: Path,
    *,
    hidden: int,
    mlp_hidden: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    vocabulary: int,
    context: int,
    rope_theta: float,
    rms_norm_eps: float,
    dtype: str,
    bos: int,
    eos: int | list[int],
    pad: int,
) -> None:
    """Write ``config.json`` and ``generation_config.json`` of a Llama with tied embeddings.

    The generation config samples from the plain softmax: left unset, ``top_k`` would be 50.
    """
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp_hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "rms_norm_eps": rms_norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "dtype": dtype,
        **ids,
    }
    _write_json(directory / "config.json", config)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    _write_json(directory / "generation_config.json", ids | sampling)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
