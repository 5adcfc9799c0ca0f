"""The cache of fetched models, and what makes a model directory complete."""

import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import platformdirs

KNOWN_MODELS = ("stories15m", "smollm2-135m-instruct")
"""Models that a run can train."""

ENCODERS = ("minilm-l6-v2",)
"""Models that embed sentences and write none: no policies."""

_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model*",
    "vocab.*",
    "spiece.model",
    "tekken.json",
    "*.tiktoken",
)
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def models_directory() -> Path:
    """``models/`` in ``$FRESHPAIRS_CACHE``, else in the user's cache directory."""
    root = os.environ.get("FRESHPAIRS_CACHE") or platformdirs.user_cache_dir("freshpairs")
    return Path(root).expanduser().absolute() / "models"


def cached_path(name: str) -> Path:
    """Where the known model or encoder ``name`` lies once it is fetched."""
    return models_directory() / name


def cached_models() -> list[str]:
    """The known models that are complete in the cache, in the order of ``KNOWN_MODELS``."""
    return [name for name in KNOWN_MODELS if not missing_parts(cached_path(name))]


def nearest(name: str, known: Sequence[str]) -> str:
    """Which of the ``known`` names is most like ``name``."""
    return difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)[0]


def missing_parts(directory: Path) -> list[str]:
    """What a Hugging Face model directory lacks, in words; empty when it is complete.

    Needed are ``config.json``, weights (each shard that an index names) and a tokenizer.
    """
    missing = [] if (directory / "config.json").is_file() else ["config.json"]
    shards = _indexed_shards(directory)
    if shards:
        missing += sorted(shard for shard in shards if not (directory / shard).is_file())
    elif not _any(directory, _WEIGHTS):
        missing.append("weights (*.safetensors or pytorch_model*.bin)")
    if not _any(directory, _TOKENIZERS):
        missing.append("tokenizer files (tokenizer.json, tokenizer.model or vocab.*)")
    return missing


def _any(directory: Path, patterns: tuple[str, ...]) -> bool:
    return any(path.is_file() for pattern in patterns for path in directory.glob(pattern))


def _indexed_shards(directory: Path) -> set[str]:
    """The files named by the index that transformers would read: safetensors before pickles."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (directory / index).is_file():
            return set(json.loads((directory / index).read_text())["weight_map"].values())
    return set()
