"""What is sampled is the policy: its distribution, its tokens, its seeds and its weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests import tiny
from tests.learner_helpers import (
    EOS,
    batch_of,
    item,
    make_generator,
    make_learner,
    plain_logits,
    plain_logprobs,
    plain_model,
    prompts_of,
    sample_request,
    sampled_batch,
    with_reference,
)
from workers.messages import Completion, Prompt
from workers.sampler import request_uniforms
from workers.seeds import derive_seed
from workers.weight_sync.buckets import Carried, Receipt, SyncError

FIVE_WORDS = ["<unk>", "<s>", "</s>", "a", "b"]
PROMPTS = {
    "five_words": prompts_of([1], [1, 3], [1, 4, 4, 3], [1, 3, 3, 3, 3, 4, 3], [1, 4]),
    "tiny_model": prompts_of([1, 5, 8], [1, 9, 3, 20, 5, 6, 11], [1], [1, 8, 8], [1, 23, 4, 5, 17]),
    "absolute_positions": prompts_of([1, 4], [1, 9, 3, 20, 5, 6, 11], [1], [1, 8, 8]),
    "stories15m": prompts_of(
        [1, 9038, 2501, 263, 931], [1, 319, 4123], [1, 450, 2586, 411, 278, 282, 682, 10714, 471]
    ),
}
"""Prompts of different lengths for each model."""


@pytest.fixture(scope="session")
def five_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose completions end at many different lengths."""
    directory = tmp_path_factory.mktemp("five-words")
    return tiny.save_model(directory, words=FIVE_WORDS, spread=0.25)


@pytest.fixture(scope="session")
def absolute_positions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that, unlike a Llama, hears of every shift; its config has dropout."""
    directory = tmp_path_factory.mktemp("absolute-positions")
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=len(tiny.WORDS),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    GPT2LMHeadModel(shape).save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(params=PROMPTS)
def case(request: pytest.FixtureRequest) -> tuple[Path, tuple[Prompt, ...]]:
    """Each model with its prompts."""
    return request.getfixturevalue(request.param), PROMPTS[request.param]


def completions_of(generator, *given, **keywords) -> list[Completion]:
    sampled = generator.sample(sample_request(*given, **keywords)).completions
    return [completion for group in sampled for completion in group]


def assert_same(found: Sequence[Completion], expected: Sequence[Completion], gap: float = 0.0):
    """Equal token for token, log-probabilities within ``gap``."""
    assert [c.ids.tolist() for c in found] == [c.ids.tolist() for c in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=gap)


def every_completion(vocabulary: int, limit: int, before: tuple[int, ...] = ()) -> Iterator[tuple]:
    """All that can be sampled: ending in EOS, or ``limit`` tokens without one."""
    for token in range(vocabulary):
        ids = (*before, token)
        if token == EOS or len(ids) == limit:
            yield ids
        else:
            yield from every_completion(vocabulary, limit, ids)


def probabilities(model: Path, prompt: Sequence[int], limit: int) -> dict[tuple[int, ...], float]:
    """π(y|x) of every completion, as the learner scores it."""
    completions = list(every_completion(len(FIVE_WORDS), limit))
    scores = make_learner(model).score_policy(batch_of([item(prompt, y) for y in completions]))
    return {
        y: float(np.exp(np.sum(logprobs, dtype=np.float64)))
        for y, logprobs in zip(completions, scores, strict=True)
    }


@pytest.mark.parametrize("prompt", [[1], [1, 3, 4, 4]])
@pytest.mark.parametrize("limit", [1, 3])
def test_probabilities_of_all_completions_sum_to_one(five_words: Path, prompt, limit: int):
    found = probabilities(five_words, prompt, limit)
    assert len(found) == {1: 5, 3: 1 + 4 + 16 * 5}[limit]
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-5)


def test_frequencies_follow_the_policy(five_words: Path):
    generator = make_generator(five_words, max_new_tokens=3)
    short, long = [1], [1, 3, 4, 4]
    counts = {len(short): Counter(), len(long): Counter()}
    for chunk in range(4):
        prompts = prompts_of(*[short, long] * 500, first=1000 * chunk)
        sampled = generator.sample(sample_request(prompts, samples=4)).completions
        for prompt, group in zip(prompts, sampled, strict=True):
            counts[len(prompt.ids)].update(tuple(c.ids.tolist()) for c in group)
    for prompt in (short, long):
        expected = probabilities(five_words, prompt, 3)
        assert set(counts[len(prompt)]) <= set(expected)
        cells = Counter()
        for completion, probability in expected.items():
            cells[completion if 8000 * probability >= 5 else "rare"] += 8000 * probability
        observed = Counter()
        for completion, count in counts[len(prompt)].items():
            observed[completion if completion in cells else "rare"] += count
        assert len(cells) > 30
        pvalue = stats.chisquare(
            [observed[c] for c in cells], list(cells.values()), sum_check=False
        ).pvalue
        assert pvalue > 0.01


@pytest.mark.parametrize("ends", [[EOS], [EOS, 4]])
def test_an_eos_stands_only_where_it_was_sampled(tmp_path: Path, ends: list[int]):
    model = tiny.save_model(tmp_path, words=FIVE_WORDS, spread=0.25)
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": ends}))
    generator = make_generator(model, max_new_tokens=8)
    completions = completions_of(generator, PROMPTS["five_words"], 40)
    assert len({len(c.ids) for c in completions if c.finished}) >= 5
    assert any(not c.finished for c in completions)
    for c in completions:
        assert not set(c.ids[:-1].tolist()) & set(ends)
        assert c.finished == (c.ids[-1] in ends)
        assert c.finished or len(c.ids) == 8
        assert len(c.logprobs) == len(c.ids)
    assert {int(c.ids[-1]) for c in completions if c.finished} == set(ends)


@pytest.mark.parametrize(
    ("sampling", "plain"),
    [
        ({}, True),
        ({"temperature": 1.0, "top_p": 1.0, "top_k": None, "min_p": 0.0}, True),
        ({"temperature": 0.8}, False),
        ({"top_p": 0.9}, False),
        ({"top_k": 24}, False),
        ({"min_p": 0.1}, False),
    ],
)
def test_sampling_logprobs_are_kept_where_they_differ(tiny_model: Path, sampling, plain: bool):
    generator = make_generator(tiny_model, max_new_tokens=2, **sampling)
    for c in completions_of(generator, PROMPTS["tiny_model"]):
        assert (c.sampling_logprobs is None) == plain
        assert c.behaviour_logprobs is (c.logprobs if plain else c.sampling_logprobs)


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.8, "top_p": 0.9}], ids=["plain", "reshaped"]
)
def test_logprobs_are_the_learners(case, sampling):
    model, prompts = case
    batch = sampled_batch(make_generator(model, max_new_tokens=16, **sampling), prompts)
    scores = make_learner(model).score_policy(batch)
    for c, expected in zip(batch.completions, scores, strict=True):
        np.testing.assert_allclose(c.completion.logprobs, expected, rtol=0, atol=1e-4)


def test_every_token_is_drawn_by_its_own_uniform(case):
    """Replays each completion by transformers' own logits and warpers, one row at a time."""
    model, prompts = case
    generator = make_generator(model, max_new_tokens=12, temperature=0.8, top_k=20, top_p=0.9)
    replay = plain_model(model)
    for c in sampled_batch(generator, prompts).completions:
        with torch.no_grad():
            scores = plain_logits(replay, c.prompt_ids, c.completion.ids)
        for warper in (TemperatureLogitsWarper(0.8), TopKLogitsWarper(20), TopPLogitsWarper(0.9)):
            scores = warper(None, scores)
        logprobs = scores.log_softmax(-1)
        ids = torch.from_numpy(c.completion.ids)[:, None]
        expected = logprobs.gather(-1, ids)[:, 0]
        np.testing.assert_allclose(c.completion.sampling_logprobs, expected, rtol=0, atol=1e-4)
        above = logprobs.double().exp().cumsum(-1).gather(-1, ids)[:, 0].numpy()
        below = above - expected.double().exp().numpy()
        uniforms = request_uniforms(c.completion.seed, 12)[: len(ids)]
        assert ((below - 1e-4 <= uniforms) & (uniforms < above + 1e-4)).all()


def test_the_same_request_gives_the_same_completions(tiny_model: Path):
    generator = make_generator(tiny_model, max_new_tokens=8)
    first = completions_of(generator, PROMPTS["tiny_model"])
    assert_same(completions_of(generator, PROMPTS["tiny_model"]), first)
    assert_same(
        completions_of(make_generator(tiny_model, max_new_tokens=8), PROMPTS["tiny_model"]), first
    )


def test_seeds_are_derived_from_run_purpose_position_and_sample(tiny_model: Path):
    generator = make_generator(tiny_model, max_new_tokens=8)
    prompts = prompts_of([1, 4, 5], [1, 4, 5], first=70)
    found = generator.sample(sample_request(prompts, 3, run_seed=11, purpose="p")).completions
    for prompt, group in zip(prompts, found, strict=True):
        for sample, c in enumerate(group):
            assert (c.position, c.sample) == (prompt.position, sample)
            assert c.seed == derive_seed(11, "p", prompt.position, sample)
    unit = [c for group in found for c in group]
    others = [
        unit[:3],
        unit[3:],
        completions_of(generator, prompts[:1], 3, run_seed=12, purpose="p"),
        completions_of(generator, prompts[:1], 3, run_seed=11, purpose="q"),
    ]
    assert len({tuple(c.ids.tolist()) for group in others for c in group}) == 12


def test_a_prompt_alone_gets_the_completions_it_gets_in_a_batch(case):
    model, prompts = case
    generator = make_generator(model, max_new_tokens=12)
    together = completions_of(generator, prompts, 3)
    alone = [c for prompt in prompts for c in completions_of(generator, [prompt], 3)]
    assert_same(together, alone, gap=1e-4)
    backwards = completions_of(generator, prompts[::-1], 3)
    assert_same(backwards[-3:] + backwards[:3], together[:3] + together[-3:], gap=1e-4)


def test_text_goes_on_from_the_prompts_text_without_special_tokens(five_words: Path):
    for c in completions_of(make_generator(five_words, max_new_tokens=3), prompts_of([1, 3]), 30):
        assert FIVE_WORDS[3] + c.text == " ".join(FIVE_WORDS[i] for i in [3, *c.ids] if i > EOS)


def test_probe_is_greedy_past_any_eos(case):
    model, prompts = case
    prompt = prompts[0].ids
    reference = plain_model(model)
    reference.generation_config.eos_token_id = None
    ids = torch.from_numpy(prompt)[None]
    expected = reference.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20
    )[0, len(prompt) :]
    assert EOS in expected[:-1] or "tiny" not in model.name
    with torch.no_grad():
        logprobs = plain_logprobs(reference, prompt, expected)
    for worker in (make_generator(model), make_learner(model)):
        probe = worker.probe(prompt, 20)
        assert probe.ids.tolist() == expected.tolist()
        np.testing.assert_allclose(probe.logprobs, logprobs, rtol=0, atol=1e-4)


def test_a_push_changes_what_is_sampled(tiny_model: Path):
    generator = make_generator(tiny_model, max_new_tokens=8)
    learner = make_learner(tiny_model, learning_rate=0.05)
    before = sampled_batch(generator, PROMPTS["tiny_model"])
    assert {c.completion.version for c in before.completions} == {-1}
    learner.update(with_reference(learner, before))
    assert (
        generator.load(learner.weights())
        == learner.sent()
        == Receipt(1, learner.weights().checksum)
    )
    after = sampled_batch(generator, PROMPTS["tiny_model"])
    assert {c.completion.version for c in after.completions} == {1}
    for old, new, expected in zip(
        before.completions, after.completions, learner.score_policy(after), strict=True
    ):
        np.testing.assert_allclose(new.completion.logprobs, expected, rtol=0, atol=1e-4)
        assert new.completion.seed == old.completion.seed
    assert [c.completion.ids.tolist() for c in after.completions] != [
        c.completion.ids.tolist() for c in before.completions
    ]
    assert generator.probe(np.array([1, 4]), 3).version == 1


def test_a_corrupted_bucket_is_refused(tiny_model: Path):
    generator = make_generator(tiny_model, max_new_tokens=8)
    learner = make_learner(tiny_model, learning_rate=0.05)
    generator.load(learner.weights())
    before = sampled_batch(generator, PROMPTS["tiny_model"])
    learner.update(with_reference(learner, before))
    push = learner.weights()
    data = push.source.data[0].copy()
    data[len(data) // 2] ^= 1
    with pytest.raises(SyncError, match=r"version 1: bucket 0 arrived corrupted"):
        generator.load(replace(push, source=Carried((data,))))
    assert generator.version == 0
    with pytest.raises(SyncError, match="does not sample: it weight push of version 1: bucket 0"):
        sampled_batch(generator, PROMPTS["tiny_model"])
