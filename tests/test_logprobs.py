"""Chunked log-probabilities equal log_softmax, in value, in gradient and in no larger memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
)

from workers.learner import logprobs
from workers.learner.logprobs import (
    CompletionScorer,
    chunked_logprobs,
    chunked_logprobs_and_collisions,
)

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.5,
}
LINEAR = [
    LlamaConfig(**SHAPE, tie_word_embeddings=True),
    LlamaConfig(**SHAPE, tie_word_embeddings=False),
    PhiConfig(**SHAPE),  # its head has a bias
]
RESHAPED = [
    GraniteConfig(**SHAPE, logits_scaling=2.0),
    CohereConfig(**SHAPE, logit_scale=0.25),
    Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=2.0),
]

TOKENS, WORDS = 64, 30


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "TOKENS", TOKENS)
    monkeypatch.setattr(logprobs, "WORDS", WORDS)


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return made


def inputs(
    positions: int, *, width: int = 6, vocabulary: int = 71, bias: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    random = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()

    targets = torch.randint(vocabulary, (positions,), generator=random)
    return (
        leaf(positions, width),
        leaf(vocabulary, width),
        leaf(vocabulary) if bias else None,
        targets,
    )


def plain_logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def values_and_gradients(
    function: Callable[..., Tensor], hidden: Tensor, weight: Tensor, bias: Tensor | None, targets
) -> list[Tensor]:
    """Log-probabilities [N], and the gradients of their sum weighted by position."""
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    found = function(hidden, weight, bias, targets)
    weighted = (found * torch.linspace(-1, 2, len(found), dtype=found.dtype)).sum()
    return [found.detach(), *torch.autograd.grad(weighted, leaves)]


def random_model(config: PreTrainedConfig):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    bias = model.get_output_embeddings().bias
    if bias is not None:
        torch.nn.init.normal_(bias)
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("positions", [1, TOKENS - 1, TOKENS, TOKENS + 1, 2 * TOKENS + 3])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["f32", "f64"]
)
def test_equals_log_softmax(positions: int, bias: bool, dtype: torch.dtype, tolerance: float):
    given = inputs(positions, bias=bias, dtype=dtype)
    found = values_and_gradients(chunked_logprobs, *given)
    exact = values_and_gradients(
        plain_logprobs,
        *(t.double() if t is not None and t.is_floating_point() else t for t in given),
    )
    assert found[0].dtype == dtype
    for values, expected in zip(found, exact, strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            values.double(), expected.double(), atol=tolerance * scale, rtol=0
        )


@pytest.mark.parametrize("bias", [False, True])
def test_gradient_check(bias: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logprobs, "TOKENS", 4)
    monkeypatch.setattr(logprobs, "WORDS", 2)
    hidden, weight, offset, targets = inputs(
        6, width=3, vocabulary=5, bias=bias, dtype=torch.float64
    )
    leaves = [hidden, weight] if offset is None else [hidden, weight, offset]

    def scored(hidden: Tensor, weight: Tensor, offset: Tensor | None = None) -> Tensor:
        return chunked_logprobs(hidden, weight, offset, targets)

    assert torch.autograd.gradcheck(scored, leaves)


def test_never_holds_positions_by_vocabulary():
    positions, vocabulary = 4 * TOKENS, 400
    given = inputs(positions, vocabulary=vocabulary, bias=True, dtype=torch.float32)
    largest = {}
    for function in (plain_logprobs, chunked_logprobs):
        with LargestTensor() as watch:
            values_and_gradients(function, *given)
        largest[function] = watch.elements
    assert largest == {
        plain_logprobs: positions * vocabulary,
        chunked_logprobs: max(t.numel() for t in given if t is not None),
    }


@pytest.mark.parametrize("config", LINEAR + RESHAPED, ids=lambda c: c.model_type)
def test_completions_are_scored_as_by_the_models_logits(config: PreTrainedConfig):
    model = random_model(config)
    rows = [([1, 7, 9, 30], [4, 11, 2]), ([1], [3, 3, 49, 8, 21, 5]), ([1, 2, 3], [2])]
    width = max(len(prompt) + len(ids) for prompt, ids in rows)
    padded = torch.tensor([p + ids + [0] * (width - len(p + ids)) for p, ids in rows])
    starts, lengths = zip(*((len(p), len(ids)) for p, ids in rows), strict=True)
    scorer = CompletionScorer(model)
    found = scorer(padded, torch.tensor(starts), torch.tensor(lengths))
    assert scorer.plain == (config in RESHAPED)
    for (prompt, ids), values in zip(rows, found, strict=True):
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(ids)), ids]
        torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("positions", [1, TOKENS, 2 * TOKENS + 3])
def test_collisions_are_the_sum_of_squared_probabilities(positions: int, bias: bool):
    hidden, weight, bias_V, targets = inputs(positions, bias=bias, dtype=torch.float64)
    values, collisions = chunked_logprobs_and_collisions(hidden, weight, bias_V, targets)
    assert values.requires_grad
    assert not collisions.requires_grad
    logits = hidden @ weight.T + (0.0 if bias_V is None else bias_V)
    torch.testing.assert_close(collisions, (logits.softmax(-1) ** 2).sum(-1).log())
    alone = values_and_gradients(chunked_logprobs, hidden, weight, bias_V, targets)
    beside = values_and_gradients(
        lambda *given: chunked_logprobs_and_collisions(*given)[0], hidden, weight, bias_V, targets
    )
    assert all(torch.equal(one, other) for one, other in zip(alone, beside, strict=True))


@pytest.mark.parametrize("config", [*LINEAR, RESHAPED[0]], ids=lambda c: c.model_type)
def test_a_models_collisions_are_those_of_its_logits(config: PreTrainedConfig):
    model = random_model(config)
    row = torch.tensor([[1, 7, 9, 30, 4, 11, 2]])
    scorer = CompletionScorer(model)
    (values,), (collisions,) = scorer.with_collisions(row, torch.tensor([4]), torch.tensor([3]))
    (alone,) = scorer(row, torch.tensor([4]), torch.tensor([3]))
    assert torch.equal(values, alone)
    expected = (model(row).logits[0, 3:-1].softmax(-1) ** 2).sum(-1).log()
    torch.testing.assert_close(collisions, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [*LINEAR, RESHAPED[0]], ids=lambda c: c.model_type)
def test_gradients_are_those_of_the_models_logits(config: PreTrainedConfig):
    model = random_model(config)
    row = torch.tensor([[1, 7, 9, 30, 4, 11, 2]])
    (found,) = CompletionScorer(model)(row, torch.tensor([4]), torch.tensor([3]))
    logits = model(row).logits[0, 3:-1]
    expected = logits.log_softmax(-1)[range(3), row[0, 4:]]
    weights = torch.tensor([1.0, -2.0, 0.5])
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), parameters),
        torch.autograd.grad((expected * weights).sum(), parameters),
        strict=True,
    ):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, atol=1e-5 * scale + 1e-9, rtol=0)


@pytest.mark.parametrize("config", [LINEAR[0]], ids=["llama"])
def test_prompts_never_pass_the_head(config: PreTrainedConfig, monkeypatch: pytest.MonkeyPatch):
    scorer = CompletionScorer(random_model(config))
    scored = []
    monkeypatch.setattr(
        logprobs,
        "chunked_logprobs",
        lambda *given: scored.append(len(given[0])) or chunked_logprobs(*given),
    )
    scorer(torch.ones(2, 30, dtype=torch.long), torch.tensor([20, 10]), torch.tensor([3, 5]))
    assert scored == [8]
