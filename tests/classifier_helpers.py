"""Tiny random classifiers, and what transformers says of one sequence."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    RobertaConfig,
    T5Config,
    XLNetConfig,
)

from tests import tiny

LETTERS = list("abcdefghijklmnopqrstu")
DECODERS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gpt2": GPT2Config}
ENCODERS = ("bert", "roberta")
POSITIONS = 48
"""Tokens that each of the models takes."""

TEMPLATE = (
    "{{ '<s> ' }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}"
    "{{ m['role'][0] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a ' }}{% endif %}"
)
"""Begins with a BOS of its own, names roles by a letter, ends each message with an EOS."""


def save_classifier(
    directory: Path,
    family: str,
    *,
    labels: int | Sequence[str] = 1,
    pad: int | None = None,
    template: bool = False,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a random classifier and its word-level tokenizer.

    ``pad`` is a decoder's ``config.pad_token_id``; encoders have their own. ``labels`` are names,
    or how many.
    """
    tokenizer = _tokenizer(family)
    if template:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    names = [f"LABEL_{i}" for i in range(labels)] if isinstance(labels, int) else list(labels)
    shape = _config(family, len(tokenizer), pad)
    shape.id2label = dict(enumerate(names))
    shape.label2id = {name: i for i, name in enumerate(names)}
    for name, value in config.items():
        setattr(shape, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForSequenceClassification.from_config(shape).save_pretrained(directory)
    return directory


@functools.cache
def load(directory: Path) -> tuple[Any, Any]:
    """The model and its tokenizer as transformers loads them."""
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(directory)


@torch.no_grad()
def direct(directory: Path, *texts: str, messages: Any = None) -> list[float]:
    """The logits of one sequence (a text, a pair of texts or a chat), asked of transformers."""
    model, tokenizer = load(directory)
    if messages is None:
        inputs = tokenizer(*texts, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    reads = inspect.signature(model.forward).parameters
    return model(**{n: v for n, v in inputs.items() if n in reads}).logits[0].tolist()


def _tokenizer(family: str) -> PreTrainedTokenizerFast:
    if family in DECODERS:
        return tiny.tokenizer()
    if family == "t5":
        return _words(["<pad>", "</s>", "<unk>"], "$A </s>", None, pad="<pad>", eos="</s>")
    if family == "xlnet":
        names = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>"]
        return _words(names, "$A <sep> <cls>:2", "$A <sep> $B:1 <sep>:1 <cls>:2", pad="<pad>")
    if family == "roberta":
        names = ["<s>", "<pad>", "</s>", "<unk>"]
        pair = "<s> $A </s> </s> $B </s>"
        return _words(names, "<s> $A </s>", pair, pad="<pad>", eos="</s>")
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    names = ["[PAD]", "[CLS]", "[SEP]", "<unk>"]
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return _words(names, "[CLS] $A [SEP]", pair, inputs=inputs, pad="[PAD]")


def _words(
    names: list[str],
    single: str,
    pair: str | None,
    *,
    inputs: Sequence[str] = ("input_ids", "attention_mask"),
    **tokens: str,
) -> PreTrainedTokenizerFast:
    ids = {name: i for i, name in enumerate([*names, *LETTERS])}
    model = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    special = [(name, ids[name]) for name in names]
    model.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        unk_token="<unk>",
        padding_side="left",
        model_input_names=list(inputs),
        **{f"{name}_token": token for name, token in tokens.items()},
    )


def _config(family: str, vocabulary: int, pad: int | None) -> Any:
    heads = {"num_attention_heads": 2, "initializer_range": 0.2, "vocab_size": vocabulary}
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": pad}
    if family == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=POSITIONS,
            initializer_range=0.2,
            **special,
        )
    if family in DECODERS:
        return DECODERS[family](
            max_position_embeddings=POSITIONS, num_key_value_heads=1, **size, **heads, **special
        )
    if family == "bert":
        return BertConfig(max_position_embeddings=POSITIONS, pad_token_id=0, **size, **heads)
    if family == "roberta":
        return RobertaConfig(max_position_embeddings=POSITIONS + 2, **size, **heads)
    if family == "xlnet":
        return XLNetConfig(
            vocab_size=vocabulary, d_model=16, n_layer=2, n_head=2, d_inner=32, pad_token_id=5
        )
    assert family == "t5"
    return T5Config(
        vocab_size=vocabulary,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
