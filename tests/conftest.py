"""Threads before torch is imported, and the tiny model most tests run on."""

import os

os.environ.update(
    OMP_NUM_THREADS="1",
    OMP_WAIT_POLICY="passive",
    KMP_BLOCKTIME="0",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
)

from pathlib import Path

import pytest

from tests import tiny
from workers.models.fetch import fetch_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random two-layer Llama of 24 words and its tokenizer."""
    return tiny.save_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def stories15m() -> Path:
    """The real model of the quickstart, fetched once for this machine."""
    return fetch_model("stories15m", say=lambda _: None)
