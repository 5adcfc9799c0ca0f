"""What ``vllm serve`` says of a reward model through our client is what our own judge says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from judges.calls import CallLimits, Calls
from judges.errors import UserError
from judges.interface import Score
from judges.reward_model import RewardModel
from judges.served import VllmReward
from tests.classifier_helpers import save_classifier
from tests.vllm_helpers import serving

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(500)]

POSITIONS = 128
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": POSITIONS}
"""Of the smallest head dimension that vLLM has on the CPU, 32."""

PROMPTS = ["a b c ", "d ", "e f g h i j "]
COMPLETIONS = ["k", "l m n o p", "q r"]


SMALL = ("--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20))


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """A decoder with a chat template and three labels."""
    model = save_classifier(
        tmp_path_factory.mktemp("chat-model"),
        "llama",
        labels=["bad", "fair", "good"],
        template=True,
        head_dim=32,
        **SHAPE,
    )
    with serving(model, model / "serve.log", *SMALL) as url:
        yield model, url


@pytest.fixture(scope="module")
def pair_model(tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """An encoder of pairs with one output."""
    model = save_classifier(tmp_path_factory.mktemp("pair-model"), "bert", **SHAPE)
    with serving(model, model / "serve.log", *SMALL) as url:
        yield model, url


def served(model: Path, url: str, prompts=PROMPTS, completions=COMPLETIONS, **args) -> list[Score]:
    judge = VllmReward(Calls(CallLimits(timeout=60.0)), url, str(model), **args)
    return asyncio.run(judge.score(prompts, completions))


def own(model: Path, prompts=PROMPTS, completions=COMPLETIONS, **args) -> list:
    scores = RewardModel(str(model), **args).score(prompts, completions)
    return [pytest.approx(score.value, abs=1e-3) for score in scores]


def values(scores: list[Score]) -> list[float]:
    assert [score.reason for score in scores] == [None] * len(scores)
    return [score.value for score in scores]


def test_chats_and_texts_of_a_labelled_decoder(chat_model):
    model, url = chat_model
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    replies = [[{"role": "assistant", "content": completion}] for completion in COMPLETIONS]
    for label in (0, 2):
        expected = own(model, label=label)
        assert values(served(model, url, chats, replies, label=label)) == expected
        assert values(served(model, url, label=label, format="chat")) == expected
        plain = own(model, label=label, format="text")
        assert values(served(model, url, label=label)) == plain


def test_pairs_and_texts_of_an_encoder(pair_model):
    model, url = pair_model
    assert values(served(model, url + "/v1", format="pair")) == own(model, format="pair")
    assert values(served(model, url)) == own(model)


def test_what_the_server_refuses_is_invalid_with_its_words(chat_model):
    model, url = chat_model
    completions = ["a", " ".join("a" * POSITIONS), "b"]
    scores = served(model, url, completions=completions, label=1)
    expected = own(model, completions=completions[:1], prompts=PROMPTS[:1], label=1, format="text")
    assert [scores[0].value] == expected
    assert scores[1].value is None
    assert f"HTTP 400 from {url}/pooling" in scores[1].reason
    assert f"maximum context length is {POSITIONS} tokens" in scores[1].reason
    assert scores[2].reason is None
    [unknown] = served(Path("nobody"), url, ["a"], ["b"], label=1)
    assert unknown.value is None
    assert unknown.reason.startswith(f"HTTP 404 from {url}/pooling: ")


def test_a_label_must_be_chosen(chat_model):
    with pytest.raises(UserError, match="has 3 outputs: write the index"):
        served(*chat_model)
