"""LoRA on vLLM: a push is the adapter alone, loaded in place under one name."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from workers.models.lora import peft_adapter
from workers.options import PolicyOptions
from workers.weight_sync.buckets import Receipt, WeightPush, arriving

ADAPTER = "policy"


def load_adapter(engine: Any, push: WeightPush, policy: PolicyOptions) -> tuple[Any, Receipt]:
    """Give an engine the pushed adapter; the request object to sample with it, and the receipt.

    Raises SyncError if a bucket is missing or corrupted.
    """
    from vllm.lora.request import LoRARequest

    assert policy.lora is not None
    began = time.perf_counter()
    tensors, config = peft_adapter(
        {name: tensor.clone() for name, tensor in arriving(push)}, policy.lora, policy.model
    )
    with tempfile.TemporaryDirectory(prefix="freshpairs-adapter-") as directory:
        save_file(tensors, Path(directory) / "adapter_model.safetensors")
        (Path(directory) / "adapter_config.json").write_text(json.dumps(config))
        request = LoRARequest(ADAPTER, 1, directory, load_inplace=True)
        engine.add_lora(request)
    # Later requests name the adapter that is loaded; its directory is gone.
    loaded = LoRARequest(ADAPTER, 1, directory)
    return loaded, Receipt(push.version, push.checksum, time.perf_counter() - began)
