"""Models, engines and learners for the vLLM tests; an engine is built once for all of them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests import tiny
from workers.generator import SampleRequest
from workers.learner.learner import Learner
from workers.learner.options import LearnerOptions
from workers.learner.pairwise_options import DpoOptions
from workers.messages import BatchCompletion, Completion, FloatArray, IntArray, Prompt, UpdateBatch
from workers.options import PolicyOptions

WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(61))]


def save_untied(directory: Path) -> Path:
    """A random Llama with a head of its own, of the smallest head dimension vLLM has on the CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tiny.tokenizer(WORDS).save_pretrained(directory)
    return directory


def learner_of(model: Path, transport: str = "object_store", **policy: Any) -> Learner:
    options = PolicyOptions(model=str(model), **policy)
    return Learner(options, LearnerOptions(), DpoOptions(), updates=9, transport=transport)


def perturb(learner: Learner, version: int, by: float = 0.05) -> None:
    """Make the next version: every weight moves by a share of its tensor's spread."""
    noise = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for weights in learner._policy.parameters():
            if weights.requires_grad:
                step = torch.randn(weights.shape, generator=noise)
                weights += by * (weights.std() if weights.any() else 1.0) * step
    learner.version = version


def probe_of(model: Path) -> IntArray:
    """144 ids: more than one prefix-cache block of vLLM on the CPU."""
    vocabulary = LlamaConfig.from_pretrained(model).vocab_size
    return np.array([1, *(3 + np.arange(143) * 7 % (vocabulary - 3))], np.int64)


def prompts_of(model: Path, count: int) -> tuple[Prompt, ...]:
    vocabulary = LlamaConfig.from_pretrained(model).vocab_size
    ids = [np.array([1, *(3 + (i * 31 + np.arange(9)) % (vocabulary - 3))]) for i in range(count)]
    return tuple(Prompt(10 + i, row.astype(np.int64), "x") for i, row in enumerate(ids))


def push(generator: Any, learner: Learner, probe_ids: IntArray, limit: float = 1e-3) -> Any:
    """Load and prove the learner's version; the proof."""
    generator.load(learner.weights())
    return generator.prove(probe_ids, learner.sent(), learner.probe(probe_ids, 4), limit)


def sampled(
    generator: Any, prompts: Sequence[Prompt], samples: int = 2, **request: Any
) -> list[Completion]:
    unit = generator.sample(SampleRequest(tuple(prompts), samples, 0, "sampling", **request))
    return [completion for group in unit.completions for completion in group]


def scored(
    learner: Learner, prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> list[FloatArray]:
    """The learner's own log-probabilities of the completions."""
    ids = {prompt.position: prompt.ids for prompt in prompts}
    items = tuple(BatchCompletion(ids[c.position], c) for c in completions)
    return learner.score_policy(UpdateBatch(items, ()))


@contextlib.contextmanager
def serving(model: Path, log: Path, *arguments: str) -> Iterator[str]:
    """The address of `vllm serve MODEL`, once it is well; what it says goes to ``log``."""
    program = Path(sys.executable).parent / "vllm"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [program, "serve", model, "--host", "127.0.0.1", "--port", port, "--enforce-eager"]
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with log.open("w") as said:
        server = subprocess.Popen(
            [*command, *arguments],
            stdout=said,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        give_up = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60)
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < give_up, log.read_text()[-3000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
