"""A vLLM engine of ours as the model that an AI judge asks."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.test_generator_client import TEMPLATE, ask, replies_of
from tests.vllm_helpers import save_untied

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


def test_its_answers_are_those_of_transformers(tmp_path: Path):
    model = save_untied(tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    drawn = ask("w3 w4 w5", temperature=1.0, max_tokens=8)
    asks = [
        ask("w3 w4 w5", top_logprobs=4),
        ask("w9"),
        ask("w6 w7", "w8 w9 w10 w11", top_logprobs=4),
    ]
    engine = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 4}
    found = replies_of(model, [*asks, drawn, drawn], "vllm", engine=engine)
    for one, other in zip(found[:3], replies_of(model, asks), strict=True):
        assert one.text == other.text
        assert one.first_token == (
            None if other.first_token is None else pytest.approx(other.first_token, abs=1e-4)
        )
    assert found[3] == found[4]
