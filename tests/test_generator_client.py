"""The project's own generators as the model that an AI judge asks."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from judges.calls import CallLimits, Calls
from judges.completing import Ask, Reply
from judges.errors import UserError
from judges.model_clients import LocalClientOptions, PolicyClientOptions
from judges.options import AskOptions
from pipeline import job
from pipeline.ledger import Ledger
from tests import tiny
from workers.judge_clients import build_desk, build_panel
from workers.models.load import load_policy
from workers.options import PolicyOptions

TEMPLATE = (
    "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}u{% endif %}"
)


@pytest.fixture(scope="module")
def chat_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with a chat template: the messages' words, then u."""
    directory = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_model, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


def ask(*words: str, max_tokens: int = 5, **rest: float) -> Ask:
    messages = tuple({"role": "user", "content": word} for word in words)
    return Ask(messages, max_tokens=max_tokens, **rest)  # type: ignore[arg-type]


def replies_of(
    model: Path, asks: list[Ask], kind: str = "transformers", **options: Any
) -> list[Reply]:
    build = build_desk(Path("/nowhere")).build_client
    client = LocalClientOptions(kind=kind, model=str(model), **options)  # type: ignore[arg-type]
    complete = build(client, Calls(CallLimits()), None)
    return asyncio.run(complete(asks))  # type: ignore[arg-type]


def prompt_ids(model: Path, question: Ask) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(model)
    words = [*(str(message["content"]) for message in question.messages), "u"]
    return torch.tensor(tokenizer.convert_tokens_to_ids(" ".join(words).split()))


def test_greedy_answers_and_first_tokens_are_those_of_plain_forward_passes(chat_model: Path):
    asks = [ask("a b c", top_logprobs=4), ask("d"), ask("e f", "g h i j", top_logprobs=4)]
    replies = replies_of(chat_model, asks)
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    for question, reply in zip(asks, replies, strict=True):
        ids = prompt_ids(chat_model, question)
        logprobs = torch.log_softmax(model(ids[None]).logits[0, -1].detach(), -1)
        for _ in range(5):
            token = model(ids[None]).logits[0, -1].argmax()
            ids = torch.cat([ids, token[None]])
            if int(token) in (1, 2):
                break
        words = tokenizer.decode(ids[-5:], skip_special_tokens=True)
        assert reply.text is not None
        assert reply.text.split() == words.split()[-len(reply.text.split()) :]
        assert reply.failure is None
        if question.top_logprobs == 0:
            assert reply.first_token is None
            continue
        best = logprobs.topk(4)
        texts = [tokenizer.decode([token]) for token in best.indices.tolist()]
        expected = dict(zip(texts, best.values.tolist(), strict=True))
        assert reply.first_token == pytest.approx(expected, abs=1e-5)


def test_an_answer_depends_on_its_question_alone(chat_model: Path):
    asks = [ask(word, temperature=1.0, max_tokens=12) for word in "abcdefgh"]
    together = replies_of(chat_model, asks)
    assert len({reply.text for reply in together}) > 4
    for question, reply in zip(asks[:3], together[:3], strict=True):
        assert replies_of(chat_model, [question]) == [reply]
    again = Ask(asks[0].messages, max_tokens=12, temperature=1.0, sample=1)
    assert replies_of(chat_model, [again])[0].text != together[0].text


def test_a_question_that_does_not_fit_fails_alone(chat_model: Path):
    long, short = replies_of(chat_model, [ask(" ".join("abc" * 30)), ask("a")])
    assert long.text is None
    assert long.failure == "96 tokens with the answer: the model takes 64"
    assert short.text is not None


def test_a_model_without_a_chat_template_cannot_be_asked(tiny_model: Path):
    with pytest.raises(UserError, match="has no chat template"):
        replies_of(tiny_model, [ask("a")])


JUDGE = """
from judges.completing import Ask

class Judge:
    def __init__(self, complete):
        self.complete = complete

    async def score(self, prompts, completions):
        asks = [Ask(({"role": "user", "content": "a b c d"},), max_tokens=1, top_logprobs=24)
                for _ in completions]
        replies = await self.complete(asks)
        return [reply.first_token["e"] + i / 1e6 for i, reply in enumerate(replies)]
"""


@pytest.mark.parametrize("rounds_in_flight", [0, 1])
def test_the_policy_is_asked_as_it_is_when_its_round_is_sampled(
    chat_model: Path, tmp_path: Path, rounds_in_flight: int
):
    (tmp_path / "mine.py").write_text(JUDGE)
    cfg = tiny.config(
        chat_model,
        tmp_path,
        judge={"name": f"{tmp_path}/mine.py:Judge", "client": {"kind": "policy"}},
        resampling={"rounds_in_flight": rounds_in_flight},
        checkpoint={"every": 1, "keep": 99},
        learner={"learning_rate": 3e-2, "threads": 1},
    )
    job.run(cfg, quiet=True)
    said = []
    for round_ in Ledger(cfg.run_dir / "ledger"):
        model = load_policy(PolicyOptions(model=str(chat_model)))
        if round_.version:
            at = cfg.run_dir / "checkpoints" / f"update-{round_.version:06d}" / "learner.pt"
            model.load_state_dict(torch.load(at, weights_only=True)["policy"], strict=False)
            model.tie_weights()
        ids = prompt_ids(chat_model, ask("a b c d"))
        logprobs = torch.log_softmax(model(ids[None]).logits[0, -1].detach(), -1)
        expected = float(logprobs[AutoTokenizer.from_pretrained(chat_model).vocab["e"]])
        scores = np.concatenate([group.judgement.scores for group in round_.groups])
        np.testing.assert_allclose(scores, expected, atol=1e-4)
        said.append(expected)
    assert max(said) - min(said) > 0.05


def test_a_judge_that_asks_the_policy_needs_a_run():
    options = {"mine": AskOptions(name="self_rewarding", client=PolicyClientOptions(kind="policy"))}
    with pytest.raises(UserError, match="without a run there is no policy"):
        build_panel(options, folder=None)
