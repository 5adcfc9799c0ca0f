"""The implicit reward is β times the log-ratio of two models, token for token, EOS included."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from judges.build import build_judge
from judges.errors import UserError
from judges.implicit_reward import ImplicitReward
from judges.interface import Score
from tests import tiny
from tests.classifier_helpers import TEMPLATE

EXACT = {"abs": 1e-5, "rel": 0.0}
EOS = 2
BETA = 0.3

words = st.lists(st.sampled_from(tiny.WORDS), max_size=12).map(" ".join)
ids = st.lists(st.integers(0, len(tiny.WORDS) - 1), min_size=1, max_size=20)


def save(directory: Path, model, template: str | None = None, vocabulary=tiny.WORDS) -> Path:
    model.save_pretrained(directory)
    tokenizer = tiny.tokenizer(vocabulary)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return directory


def gpt2(seed: int) -> GPT2LMHeadModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tiny.WORDS),
                n_embd=16,
                n_layer=1,
                n_head=2,
                n_positions=64,
                initializer_range=0.3,
                bos_token_id=1,
                eos_token_id=EOS,
            )
        )


def gemma2(seed: int) -> Gemma2ForCausalLM:
    """Its logits are capped: they are not its head's."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=len(tiny.WORDS),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                max_position_embeddings=64,
                initializer_range=0.5,
                final_logit_softcapping=2.0,
                bos_token_id=1,
                eos_token_id=EOS,
                pad_token_id=0,
            )
        )


@pytest.fixture(scope="module", params=["gpt2", "gemma2"])
def pair(request, tmp_path_factory) -> tuple[Path, Path]:
    """A policy and its reference."""
    folder = tmp_path_factory.mktemp(request.param)
    build = {"gpt2": gpt2, "gemma2": gemma2}[request.param]
    return (
        save(folder / "policy", build(1), TEMPLATE),
        save(folder / "reference", build(2), TEMPLATE),
    )


@pytest.fixture(scope="module")
def judge(pair) -> ImplicitReward:
    return ImplicitReward(*map(str, pair), beta=BETA)


@pytest.fixture(scope="module")
def expected(pair):
    """The reward of one sequence: one call of each model, a full softmax, a sum."""
    models = [AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32).eval() for d in pair]

    @torch.no_grad()
    def reward(prompt: list[int], completion: list[int]):
        ratio = 0.0
        for model, sign in zip(models, (1.0, -1.0), strict=True):
            logprobs = model(torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
            for i, token in enumerate(completion):
                ratio += sign * float(logprobs[len(prompt) + i - 1, token])
        return pytest.approx(BETA * ratio, **EXACT)

    return reward


def of(text: str) -> list[int]:
    return [tiny.WORDS.index(word) for word in text.split()]


def values(scores: list[Score]) -> list[float | None]:
    assert all(score.reason is None for score in scores)
    return [score.value for score in scores]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=8), st.integers(1, 200))
def test_texts_in_any_batch(judge, expected, items, size):
    judge._tokens_per_batch = size
    prompts, completions = zip(*items, strict=True)
    assert values(judge.score(prompts, completions)) == [
        expected([1, *of(prompt)], [*of(completion), EOS]) for prompt, completion in items
    ]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=8), st.integers(1, 200))
def test_token_ids_are_taken_as_they_are(judge, expected, items, size):
    judge._tokens_per_batch = size
    prompts, completions = zip(*items, strict=True)
    said = judge.score(
        ["unread"] * len(items),
        ["unread"] * len(items),
        prompt_ids=prompts,
        completion_ids=completions,
    )
    assert values(said) == [expected(*item) for item in items]


def test_ids_of_some_and_texts_of_others(judge, expected):
    said = judge.score(
        ["a b", "c", "d"],
        ["e", "f", "g"],
        prompt_ids=[None, [5], None],
        completion_ids=[None, [7, 8], [9]],
    )
    assert values(said) == [
        expected([1, *of("a b")], [*of("e"), EOS]),
        expected([5], [7, 8]),
        expected([1, *of("d")], [9]),
    ]


def test_chats_are_read_up_to_where_the_assistant_speaks(judge, expected):
    prompt = [{"role": "user", "content": "a b"}]
    said = judge.score([prompt] * 2, [[{"role": "assistant", "content": "c d"}], "e"])
    before = of("<s> u a b </s> a")
    assert values(said) == [
        expected(before, [*of("c d"), EOS]),
        expected(before, [*of("e"), EOS]),
    ]


def test_ratios_over_every_completion_of_a_tiny_vocabulary(tmp_path):
    """Rewards of all completions of up to two words recover each model's distribution."""
    vocabulary = tiny.WORDS[:5]
    for seed, name in enumerate(("policy", "reference")):
        model = tiny.save_model(tmp_path / name, words=vocabulary)
        loaded = AutoModelForCausalLM.from_pretrained(model)
        torch.manual_seed(seed)
        for weights in loaded.parameters():
            weights.data += 0.2 * torch.randn_like(weights)
        loaded.save_pretrained(model)
    judge = ImplicitReward(str(tmp_path / "policy"), str(tmp_path / "reference"), beta=BETA)
    others = [t for t in range(len(vocabulary)) if t != EOS]
    ended = [[EOS], *([t, EOS] for t in others)]
    open_ = [list(pair) for pair in itertools.product(others, others)]
    completions = ended + open_  # every outcome of drawing two tokens, or one that is the EOS
    texts = [""] * len(completions)
    rewards = values(
        judge.score(texts, texts, prompt_ids=[[1, 3]] * len(texts), completion_ids=completions)
    )

    @torch.no_grad()
    def probabilities(name: str) -> list[float]:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64)
        found = []
        for completion in completions:
            logits = model(torch.tensor([[1, 3, *completion]])).logits[0, 1:-1].softmax(-1)
            found.append(math.prod(float(logits[i, t]) for i, t in enumerate(completion)))
        return found

    policy, reference = probabilities("policy"), probabilities("reference")
    assert sum(policy) == pytest.approx(1.0)
    assert sum(reference) == pytest.approx(1.0)
    for i, j in itertools.combinations(range(len(completions)), 2):
        log_odds = math.log(policy[i] / policy[j]) - math.log(reference[i] / reference[j])
        assert rewards[i] - rewards[j] == pytest.approx(BETA * log_odds, abs=1e-5)
    # So the policy is the reference tilted by the rewards: π = π_ref exp(r / β), and Z is 1.
    tilted = [p * math.exp(r / BETA) for p, r in zip(reference, rewards, strict=True)]
    assert tilted == pytest.approx(policy, rel=1e-4)


def test_a_policy_that_is_its_reference_rewards_nothing(pair):
    judge = ImplicitReward(str(pair[0]), str(pair[0]))
    assert values(judge.score(["a", "b c"], ["d e", ""])) == [0.0, 0.0]


def test_logits_are_held_for_a_part_at_a_time(tmp_path, monkeypatch):
    directories = [save(tmp_path / str(seed), gpt2(seed)) for seed in (1, 2)]
    judge = ImplicitReward(*map(str, directories))
    texts = ["a b c d e f g", "h i", "j"]
    whole = values(judge.score(texts, texts))
    seen = []
    for model in judge._models:
        model.lm_head.register_forward_hook(lambda *args: seen.append(args[2].shape[:-1].numel()))
    monkeypatch.setattr("judges.implicit_reward._POSITIONS", 4)
    assert values(judge.score(texts, texts)) == pytest.approx(whole, abs=1e-6)
    # 8 + 3 + 2 positions predict a token of a completion, in parts of 4, for two models.
    assert seen == [4, 4, 4, 1] * 2


def test_what_has_no_reward_is_invalid_alone(judge, expected):
    two = [{"role": "assistant", "content": "a"}] * 2
    asked = [
        ("", "a", [], [3], "the prompt has no tokens: nothing tells how likely the first one is"),
        ("", "a", [3], [], "the completion has no tokens"),
        ("", "a", [3] * 60, [3] * 5, "65 tokens: the model takes 64"),
        ("", "a", [3], [24], "token 24: the model knows 24"),
        ("", "a", [-1], [3], "token -1: the model knows 24"),
        ("a", two, None, None, "a completion of 2 messages: an implicit reward takes one"),
        (
            [{"role": "system", "content": "a"}],
            "a",
            None,
            None,
            "the chat template refuses it: no system prompts",
        ),
        ("a", "b", None, None, None),
    ]
    prompts, completions, prompt_ids, completion_ids, reasons = zip(*asked, strict=True)
    scores = judge.score(prompts, completions, prompt_ids, completion_ids)
    assert [score.reason for score in scores] == list(reasons)
    assert [score.value is None for score in scores] == [True] * 7 + [False]
    assert scores[-1].value == expected([1, *of("a")], [*of("b"), EOS])


def test_by_name_with_and_without_the_columns(pair, expected):
    policy, reference = map(str, pair)
    judge = build_judge("implicit_reward", {"policy": policy, "reference": reference, "beta": BETA})
    assert judge.needs == ()
    texts = {"prompts": ["a"], "completions": ["b"]}
    assert values(judge.ask({}, **texts)) == [expected([1, *of("a")], [*of("b"), EOS])]
    columns = {"prompt_ids": [[4, 5]], "completion_ids": [[6]], "answer": [7]}
    assert values(judge.ask(columns, **texts)) == [expected([4, 5], [6])]


def test_half_precision(pair, expected):
    judge = ImplicitReward(*map(str, pair), beta=1.0, dtype="bfloat16")
    full = ImplicitReward(*map(str, pair), beta=1.0)
    texts = ["a b c", "d"]
    assert values(judge.score(texts, texts)) == pytest.approx(
        values(full.score(texts, texts)), abs=0.3
    )


def refused(**args) -> str:
    with pytest.raises(UserError) as caught:
        ImplicitReward(**args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_models_that_do_not_fit_are_refused_in_a_line(pair, tmp_path):
    policy, reference = map(str, pair)
    none = str(tmp_path / "none")
    assert refused(policy=none, reference=reference).startswith(f"policy={none}: cannot be loaded")
    assert refused(policy=policy, reference=none).startswith(f"reference={none}: cannot be loaded")
    swapped = [*tiny.WORDS[:3], "b", "a", *tiny.WORDS[5:]]
    other = save(tmp_path / "other", gpt2(3), vocabulary=swapped)
    message = refused(policy=policy, reference=str(other))
    assert "they differ in token 3" in message
    assert "share a tokenizer" in message
    for beta in (0.0, -1.0, math.nan):
        assert refused(policy=policy, reference=reference, beta=beta).startswith(f"beta={beta}: ")


def test_a_completion_ends_with_an_eos_so_there_must_be_one(pair, tmp_path):
    directory = save(tmp_path / "model", gpt2(1))
    path = directory / "tokenizer_config.json"
    settings_ = json.loads(path.read_text())
    settings_["eos_token"] = None
    path.write_text(json.dumps(settings_))
    assert AutoTokenizer.from_pretrained(directory).eos_token_id is None
    assert "no end-of-sequence token" in refused(policy=str(directory), reference=str(directory))


def test_a_chat_needs_a_template(tmp_path):
    directories = [save(tmp_path / str(seed), gpt2(seed)) for seed in (1, 2)]
    judge = ImplicitReward(*map(str, directories))
    with pytest.raises(UserError, match="its tokenizer has no chat template"):
        judge.score([[{"role": "user", "content": "a"}]], ["b"])
