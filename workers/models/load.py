"""The policy's weights and tokenizer, from wherever its name resolves to."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from workers.models.lora import with_adapters
from workers.models.resolve import resolve_model
from workers.options import PolicyOptions


def load_policy(options: PolicyOptions) -> Any:
    """The causal language model in evaluation mode (no dropout), float32, with its adapters.

    Raises UserError for a target module of ``policy.lora`` that the model does not have.
    """
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        resolve_model(options.model), dtype=getattr(torch, options.dtype)
    )
    return model.eval() if options.lora is None else with_adapters(model, options.lora)
