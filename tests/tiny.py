"""A model, prompts and a config small enough that a whole run takes a second."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pipeline.config import Config, parse_config

WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    *[
        "a",
        "b",
        "c",
        "d",
        "e",
        "f",
        "g",
        "h",
        "i",
        "j",
        "k",
        "l",
        "m",
        "n",
        "o",
        "p",
        "q",
        "r",
        "s",
        "t",
        "u",
    ],
]

JUDGE = '''
def score(prompts, completions, **columns):
    """How often the completion says "a", minus its share of "b": fractions, so ties are rare."""
    words = [c.split() for c in completions]
    return [w.count("a") - w.count("b") / (1 + len(w)) for w in words]
'''


def save_model(
    directory: Path, *, words: list[str] = WORDS, tied: bool = True, spread: float = 0.5
) -> Path:
    """Write a random Llama and its word-level tokenizer (BOS 1 in front, EOS 2) to a directory.

    ``spread`` is the standard deviation of its weights: large enough that tokens differ in
    probability.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=spread,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer(words).save_pretrained(directory)
    return directory


def tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    """A word is a token; text begins with <s>."""
    model = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    model.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def save_encoder(directory: Path, words: list[str] = WORDS, max_tokens: int = 12) -> Path:
    """Write a random two-layer BERT whose tokenizer pads on the left and knows no maximum length.

    Ids: [PAD] 0, [CLS] 1, [SEP] 2, [UNK] 3, then the words.
    """
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *words]
    model = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    model.pre_tokenizer = WhitespaceSplit()
    model.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=model,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        padding_side="left",
    ).save_pretrained(directory)
    config = BertConfig(
        vocab_size=len(names),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=max_tokens,
        initializer_range=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(directory)
    return directory


def write_prompts(path: Path, count: int = 24) -> Path:
    """Prompts of one to four words; every fourth is held out."""
    rows = [
        {
            "prompt": " ".join(WORDS[3 + (i * 7 + k * 5) % 21] for k in range(1 + i % 4)),
            "split": "heldout" if i % 4 == 3 else "train",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(model: Path, folder: Path, **sections: Mapping[str, Any]) -> Config:
    """A run of 6 updates of 4 prompts × 2 completions in ``folder``/run, inline, one thread.

    ``sections`` override or extend the config's sections key by key.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prompts = write_prompts(folder / "prompts.jsonl")
    (folder / "judge.py").write_text(JUDGE)
    raw: dict[str, dict[str, Any]] = {
        "run": {"name": "tiny", "dir": str(folder / "run"), "updates": 6},
        "policy": {"model": str(model)},
        "prompts": {"path": str(prompts)},
        "sampling": {"prompts_per_update": 4, "max_new_tokens": 8},
        "generator": {"backend": "transformers", "threads": 1},
        "judge": {"name": f"{folder / 'judge.py'}:score"},
        "learner": {"learning_rate": 1e-2, "threads": 1},
        "checkpoint": {"every": 2},
        "tracking": {"tensorboard": False},
        "cluster": {"address": "inline"},
    }
    for name, section in sections.items():
        raw[name] = raw.get(name, {}) | dict(section)
    return parse_config(raw, base=folder)


def records(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what is measured in seconds."""
    found = []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        record.pop("seconds", None)
        record.pop("tokens_per_second", None)
        found.append(record)
    return found
