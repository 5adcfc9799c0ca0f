"""The client and the AI judges against vLLM's own OpenAI server, and against transformers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from judges.calls import CallLimits, Calls
from judges.client_options import OpenAIOptions
from judges.clients import OpenAIClient
from judges.completing import Ask, Reply
from judges.llm import Pairwise, Pointwise, SelfRewarding
from tests.vllm_helpers import serving
from workers.models.fetch import fetch_model

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(500)]

QUESTIONS = [
    "Answer with one digit and nothing else: 1 or 2?",
    "Is 7 a prime? Answer Yes or No.",
    "Write one word.",
]


@pytest.fixture(scope="module")
def model() -> Path:
    return fetch_model("smollm2-135m-instruct", say=lambda _: None)


@pytest.fixture(scope="module")
def url(model, tmp_path_factory) -> Iterator[str]:
    """Where `vllm serve` serves the model, in float32."""
    log = tmp_path_factory.mktemp("served") / "serve.log"
    arguments = ["--dtype", "float32", "--max-model-len", "2048", "--served-model-name", "judge"]
    memory = ["--kv-cache-memory-bytes", str(512 << 20)]
    with serving(model, log, *arguments, *memory) as served:
        yield f"{served}/v1"


@pytest.fixture
def client(url, monkeypatch) -> OpenAIClient:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    options = OpenAIOptions(kind="openai", model="judge", base_url=url)
    return OpenAIClient(options, Calls(CallLimits(concurrency=4, timeout=300)))


def question(text: str, **fields: Any) -> Ask:
    return Ask(({"role": "user", "content": text},), **({"max_tokens": 4} | fields))


def test_logprobs_are_those_of_a_forward_pass(client, model):
    """Every listed token's, under the chat template, to 1e-3; and they are the likeliest."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    replies = asyncio.run(client([question(text, top_logprobs=20) for text in QUESTIONS]))
    for text, reply in zip(QUESTIONS, replies, strict=True):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        with torch.no_grad():
            logprobs = network(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        likeliest = logprobs.topk(20)
        expected = {
            tokenizer.decode([token]): logprob
            for token, logprob in zip(
                likeliest.indices.tolist(), likeliest.values.tolist(), strict=True
            )
        }
        assert len(expected) == 20
        assert reply.failure is None
        assert reply.first_token == pytest.approx(expected, abs=1e-3)
        assert reply.text is not None
        assert reply.text.startswith(max(expected, key=expected.__getitem__).strip())


def test_usage_and_endings_are_the_servers(client):
    cut, ended = asyncio.run(
        client(
            [
                question("Count from one to a hundred.", max_tokens=3),
                question("Say hi.", max_tokens=200),
            ]
        )
    )
    assert (cut.finished, ended.finished) == (False, True)
    assert cut.text
    assert ended.text
    assert client.usage.output_tokens >= 3 + 2
    assert client.usage.input_tokens > 20


def test_what_the_server_refuses_is_a_failure(client):
    """More tokens than the model has room for, and more log-probabilities than it lists."""
    long, many = asyncio.run(
        client([question("word " * 5000), question("Say hi.", top_logprobs=10_000)])
    )
    assert long.text is None
    assert long.failure is not None
    assert long.failure.startswith("HTTP 400: ")
    assert many == Reply(many.text, None, many.finished)
    assert many.text
    assert client.logprobs is False


def test_the_judges_ask_it(client):
    """This model is too small to judge; what it says is read, or refused, and swaps exactly."""

    async def judged() -> list[Any]:
        pairwise = Pairwise(client)
        forth = await pairwise.compare(["Name a prime."], ["7"], ["Eight is one, I think."])
        back = await pairwise.compare(["Name a prime."], ["Eight is one, I think."], ["7"])
        scores = await Pointwise(client).score(["Name a prime."], ["7"])
        points = await SelfRewarding(client, max_tokens=64).score(["Name a prime."], ["7"])
        return [*forth, *back, *scores, *points]

    forth, back, score, points = asyncio.run(judged())
    if forth.value is None:
        assert back.value is None
    else:
        assert back.value == pytest.approx(1 - forth.value, abs=1e-3)
    assert score.value is None or 1 <= score.value <= 9
    assert points.value is None or 0 <= points.value <= 5
    assert all(each.value is not None or each.reason for each in (forth, back, score, points))
    assert all("HTTP" not in (each.reason or "") for each in (forth, back, score, points))
