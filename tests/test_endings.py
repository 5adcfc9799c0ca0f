"""What ends a completion: tokens of three configs and the user's, strings in its text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from judges.errors import UserError
from pipeline.inputs import check_inputs
from tests import tiny
from tests.learner_helpers import EOS, make_generator, prompts_of, sample_request
from workers.endings import Endings, endings_of
from workers.generator import SamplingOptions
from workers.messages import Completion, Prompt
from workers.options import PolicyOptions
from workers.transformers_generator import TransformersGenerator

FIVE_WORDS = ["<unk>", "<s>", "</s>", "a", "b"]
A, B = 3, 4


@pytest.fixture(scope="module")
def five_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes all words about equally often."""
    directory = tmp_path_factory.mktemp("five-words")
    return tiny.save_model(directory, words=FIVE_WORDS, spread=0.1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of 24 words whose files a test may change."""
    return tiny.save_model(tmp_path / "model")


def set_key(path: Path, key: str, value: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


def found(model: Path, **sampling) -> Endings:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return endings_of(model, tokenizer, SamplingOptions(**sampling))


def completions(
    model: Path, prompts: Sequence[Prompt], samples: int = 40, **sampling
) -> list[Completion]:
    unit = make_generator(model, **sampling).sample(sample_request(prompts, samples))
    return [completion for group in unit.completions for completion in group]


def assert_cut(
    ended: Sequence[Completion], whole: Sequence[Completion], ends: Callable[[list[int]], bool]
) -> None:
    """Each completion is the one without further endings, up to the first token that ``ends``."""
    assert len(ended) == len(whole)
    for one, other in zip(ended, whole, strict=True):
        ids = other.ids.tolist()
        cuts = [k for k in range(1, len(ids) + 1) if ends(ids[:k])]
        length = cuts[0] if cuts else len(ids)
        assert one.ids.tolist() == ids[:length]
        assert len(one.logprobs) == length
        assert one.finished == (bool(cuts) or other.finished)


# Which they are


def test_three_sources_of_eos(model: Path) -> None:
    assert found(model) == Endings((EOS,), ())
    set_key(model / "generation_config.json", "eos_token_id", [7, 5])
    set_key(model / "config.json", "eos_token_id", 9)
    assert found(model).token_ids == (2, 5, 7, 9)
    (model / "generation_config.json").unlink()
    assert found(model).token_ids == (2, 9)
    set_key(model / "config.json", "eos_token_id", None)
    assert found(model).token_ids == (2,)


def test_only_a_missing_generation_config_is_passed_over(model: Path) -> None:
    (model / "generation_config.json").write_text("{")
    with pytest.raises(OSError, match="not a valid JSON"):
        found(model)


def test_stop_tokens_by_id_and_by_string(model: Path) -> None:
    endings = found(model, stop_tokens=["b", 23, "<unk>", 4, 0], stop=["x y", "z"])
    assert endings == Endings((0, 2, 4, 23), ("x y", "z"))


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        # The tokenizer would call it <unk>.
        ({"stop_tokens": ["<|x|>"]}, "sampling.stop_tokens: '<|x|>' is not a token of {}: give "),
        ({"stop_tokens": ["a b"]}, "sampling.stop_tokens: 'a b' is not a token of {}: give "),
        ({"stop_tokens": ["5"]}, "sampling.stop_tokens: '5' is not a token of {}: give "),
        ({"stop_tokens": [24]}, "sampling.stop_tokens: 24 is outside the vocabulary of {}: ids go"),
        ({"stop_tokens": [-1]}, "sampling.stop_tokens: -1 is outside the vocabulary of {}: ids go"),
        ({"stop": ["a", "</s>"]}, "sampling.stop: '</s>' is a special token, which no completion"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(
    model: Path, tmp_path: Path, sampling, said: str
) -> None:
    cfg = tiny.config(model, tmp_path / "here", sampling=sampling)
    with pytest.raises(UserError) as mistake:
        check_inputs(cfg)
    assert str(mistake.value).startswith(said.format(model))
    assert "\n" not in str(mistake.value)


def test_a_token_that_the_model_has_no_embedding_for(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<|late|>"])
    with pytest.raises(UserError, match=r"'<\|late\|>' is outside the vocabulary .* 0 to 23"):
        endings_of(model, tokenizer, SamplingOptions(stop_tokens=["<|late|>"]))


# What they do


@pytest.mark.parametrize("stop_token", [B, "b"])
def test_a_stop_token_ends_a_completion_like_an_eos(five_words: Path, stop_token) -> None:
    prompts = prompts_of([1], [1, A, B], [1, B])
    whole = completions(five_words, prompts, max_new_tokens=8)
    ended = completions(five_words, prompts, max_new_tokens=8, stop_tokens=[stop_token])
    assert_cut(ended, whole, lambda ids: ids[-1] == B)
    assert {int(c.ids[-1]) for c in ended if c.finished} == {EOS, B}
    assert not any(B in c.ids[:-1] for c in ended)


@pytest.mark.parametrize("strings", [["a b"], ["b a b", "a a a"], ["b"], ["q"]])
@pytest.mark.parametrize("limit", [2, 8])
def test_a_completion_ends_once_a_string_stands_in_its_text(
    five_words: Path, strings: list[str], limit: int
) -> None:
    """Text is the words' with a space before each; special tokens write nothing."""
    prompts = prompts_of([1], [1, A], [1, B, A], [1, A, A, B])

    def text(ids: Sequence[int]) -> str:
        return " ".join(FIVE_WORDS[i] for i in ids if i > EOS)

    whole = completions(five_words, prompts, max_new_tokens=limit)
    ended = completions(five_words, prompts, max_new_tokens=limit, stop=strings)
    assert_cut(ended, whole, lambda ids: any(string in text(ids) for string in strings))
    for c in ended:
        assert c.text.strip() == text(c.ids.tolist())
        stopped = any(string in c.text for string in strings)
        assert c.finished == (stopped or int(c.ids[-1]) == EOS)
    if strings == ["a b"]:  # across the prompt's end it does not count
        assert any(c.ids[0] == B and len(c.ids) > 1 for c in ended if c.position in (1, 2))
        # Special tokens between the words are no text, and the last token may be the limit's.
        assert any(len(c.ids) == limit and c.text.endswith("a b") for c in ended)
        assert limit == 2 or any(c.ids[-3:].tolist() == [A, 0, B] for c in ended)


def test_all_completions_may_end_by_strings_at_once(five_words: Path) -> None:
    greedy = {"max_new_tokens": 8, "top_k": 1}
    (whole,) = completions(five_words, prompts_of([1, A, A]), 1, **greedy)
    words = whole.text.split()
    assert int(whole.ids[0]) in (A, B)
    assert len(whole.ids) == 8
    ended = completions(five_words, prompts_of([1, A, A]), 5, stop=[words[0]], **greedy)
    assert [(c.ids.tolist(), c.finished) for c in ended] == 5 * [(whole.ids[:1].tolist(), True)]


def test_a_string_within_a_tokens_text(tmp_path: Path) -> None:
    words = [*FIVE_WORDS[:3], "x:y", "b"]
    model = tiny.save_model(tmp_path, words=words, spread=0.1)
    ended = completions(model, prompts_of([1]), max_new_tokens=8, stop=[":"])
    assert {int(c.ids[-1]) for c in ended if c.finished} == {EOS, 3}
    assert all(c.text.endswith("x:y") for c in ended if c.ids[-1] == 3)
    assert not any(3 in c.ids[:-1] for c in ended)


def test_strings_end_samples_of_a_mixture(five_words: Path) -> None:
    def mixed(**sampling) -> list[Completion]:
        options = SamplingOptions(max_new_tokens=8, temperature=0.9, min_p=0.1, **sampling)
        policy = PolicyOptions(model=str(five_words))
        generator = TransformersGenerator(policy, options, reference=True)
        request = sample_request(prompts_of([1], [1, A, B]), 40)
        shares = (0.0, 0.5, 1.0, 0.5) * 10
        groups = generator.sample(replace(request, reference_shares=shares)).completions
        return [completion for group in groups for completion in group]

    whole, ended = mixed(), mixed(stop=["a a"])
    assert_cut(ended, whole, lambda ids: "a a" in " ".join(FIVE_WORDS[i] for i in ids if i > EOS))
    assert sum(len(c.ids) for c in ended) < sum(len(c.ids) for c in whole)
    for one, other in zip(ended, whole, strict=True):
        drawn = other.behaviour_logprobs[: len(one.ids)]
        np.testing.assert_allclose(one.behaviour_logprobs, drawn, rtol=0, atol=1e-5)


# Characters of several tokens


BYTES = ["a", "Ã", "©", "Ċ"]
"""a, the two bytes of é, and a line feed, as byte-level tokenizers spell them."""
SPELLED = dict(enumerate((b"a", b"\xc3", b"\xa9", b"\n"), start=3))


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose é is two tokens."""
    words = ["<unk>", "<s>", "</s>", *BYTES]
    directory = tiny.save_model(tmp_path_factory.mktemp("bytes"), words=words, spread=0.02)
    backend = Tokenizer(BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("strings", [["é"], ["aé"], ["éa\n"], ["\n"]])
def test_a_string_with_characters_of_several_tokens(bytes_model: Path, strings) -> None:
    """The prompts end with whole characters."""
    prompts = prompts_of([1, 3], [1, 4, 5])

    def ends(ids: list[int]) -> bool:
        text = b"".join(SPELLED.get(i, b"") for i in ids).decode(errors="replace")
        return any(string in text for string in strings)

    whole = completions(bytes_model, prompts, 300, max_new_tokens=8)
    ended = completions(bytes_model, prompts, 300, max_new_tokens=8, stop=strings)
    assert_cut(ended, whole, ends)
    stopped = [c for c in ended if c.finished and c.ids[-1] != EOS]
    assert stopped
    assert all(any(c.text.endswith(string) for string in strings) for c in stopped)


def test_a_character_begun_in_the_prompt_ends_nothing(bytes_model: Path) -> None:
    ended = completions(bytes_model, prompts_of([1, 3, 4]), 300, max_new_tokens=8, stop=["é"])
    assert any(c.ids[0] == 5 and len(c.ids) > 1 for c in ended)
    for c in ended:
        assert c.finished == ("é" in c.text or int(c.ids[-1]) == EOS)
