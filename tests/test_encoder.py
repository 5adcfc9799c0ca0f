"""Sentence embeddings: each text's is the mean of its own token states, whoever is in its batch."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import BertModel

from judges.errors import UserError
from tests import tiny
from workers.models.encoder import SentenceEncoder
from workers.models.fetch import fetch_model

PAD, CLS, SEP, FIRST_WORD = 0, 1, 2, 4
WORDS = list("abcdefghijklmnop")
MAX_TOKENS = 12


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_encoder(tmp_path_factory.mktemp("bert"), WORDS, MAX_TOKENS)


def pooled(directory: Path, text: str) -> npt.NDArray[np.float32]:
    """The embedding of ``text`` alone: no padding, no mask, ids and mean by hand."""
    words = [FIRST_WORD + WORDS.index(word) for word in text.split()]
    ids = [CLS, *words[: MAX_TOKENS - 2], SEP]
    model = BertModel.from_pretrained(directory).eval()
    with torch.no_grad():
        states = model(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
    mean = np.stack(list(states)).sum(axis=0) / len(ids)
    return np.asarray(mean / np.sqrt((mean * mean).sum()))


def random_texts(count: int) -> list[str]:
    """Distinct, of 0 to 20 words: some exceed the model's 12 tokens."""
    rng = np.random.default_rng(0)
    texts = {" ".join(rng.choice(WORDS, size=rng.integers(0, 21))): None for _ in range(2 * count)}
    return list(texts)[:count]


def test_each_text_gets_the_mean_of_its_own_states_in_order(bert: Path) -> None:
    texts = random_texts(40)
    embeddings = SentenceEncoder(str(bert))(texts)
    assert embeddings.dtype == np.float32
    expected = np.stack([pooled(bert, text) for text in texts])
    np.testing.assert_allclose(embeddings, expected, atol=2e-6)
    similarities = expected @ expected.T - 2 * np.eye(len(texts))
    assert similarities.max() < 0.999  # an exchange of two texts would show


def test_order_and_company_change_nothing(bert: Path) -> None:
    encoder = SentenceEncoder(str(bert))
    texts = random_texts(40)
    embeddings = encoder(texts)
    np.testing.assert_allclose(encoder(texts[::-1])[::-1], embeddings, atol=2e-6)
    alone = np.concatenate([encoder([text]) for text in texts])
    np.testing.assert_allclose(alone, embeddings, atol=2e-6)


def test_a_text_is_encoded_once_in_batches_of_32_by_length(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[torch.Tensor] = []
    forward = BertModel.forward

    def spy(self: BertModel, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        batches.append(input_ids)
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(BertModel, "forward", spy)
    texts = random_texts(40)
    embeddings = SentenceEncoder(str(bert))([*texts, *texts[::-1]])
    assert [len(ids) for ids in batches] == [32, 8]
    assert not (batches[1] == PAD).any()  # the eight longest are all cut to 12 tokens
    assert batches[1].shape[1] == MAX_TOKENS
    np.testing.assert_array_equal(embeddings[:40], embeddings[:39:-1])


def test_no_texts_have_no_embeddings_of_the_model_s_size(bert: Path) -> None:
    assert SentenceEncoder(str(bert))([]).shape == (0, 16)


def test_an_encoder_that_was_not_fetched_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRESHPAIRS_CACHE", str(tmp_path))
    with pytest.raises(UserError) as raised:
        SentenceEncoder("MiniLM-L6-v2")
    assert str(raised.value) == (
        "objective.embedding_model=MiniLM-L6-v2 is not on this machine: "
        "run `freshpairs fetch minilm-l6-v2`"
    )
    with pytest.raises(UserError, match=r"embedding_model=minilm: .*known are minilm-l6-v2$"):
        SentenceEncoder("minilm")


@pytest.mark.slow
def test_minilm_puts_sentences_of_one_meaning_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRESHPAIRS_CACHE", str(tmp_path))
    fetch_model("minilm-l6-v2", say=lambda _: None)
    sentences = [
        "The weather is lovely today.",
        "It's so sunny outside!",
        "He drove to the stadium.",
    ]
    embeddings = SentenceEncoder("minilm-l6-v2")(sentences)
    assert embeddings.shape == (3, 384)
    # What sentence-transformers gives: https://sbert.net/docs/quickstart.html.
    expected = [[1.0000, 0.6660, 0.1046], [0.6660, 1.0000, 0.1411], [0.1046, 0.1411, 1.0000]]
    np.testing.assert_allclose(embeddings @ embeddings.T, expected, atol=6e-5)
