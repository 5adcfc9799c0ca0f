"""What the prompt tests share: a tiny word-level tokenizer and files of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pipeline.prompts import PromptEncoder, PromptOptions, PromptStream

WORDS = ["<unk>", "<s>", "</s>", "user:", "assistant:", "once", "upon", "a", "time", "cat", "dog"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{{ m.role }}: {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A word is a token; text begins with <s> (id 1), unknown words are <unk> (id 0)."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


ENCODER = PromptEncoder(make_tokenizer(), context=256, max_new_tokens=64)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered(path: Path, count: int, prefix: str = "p") -> Path:
    return write_jsonl(path, [{"prompt": f"{prefix}{i}"} for i in range(count)])


def stream_of(path: Path | str, run_seed: int = 0, **options: Any) -> PromptStream:
    return PromptStream(PromptOptions(path=str(path), **options), ENCODER, run_seed)


def contents(stream: PromptStream, start: int, count: int) -> list[Any]:
    return [prompt.content for prompt in stream.take(start, count)]
