"""Whole runs with vLLM generators as Ray actors: pushed to, killed, and served at the end."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline import job, load_config
from tests.vllm_helpers import learner_of, serving
from workers.seeds import derive_seed

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(500)]

ROOT = Path(__file__).parents[1]
UPDATES, PROMPTS = 4, 8


def generator_processes() -> list[int]:
    """Processes of this machine that hold a vLLM engine in a Ray actor of this run."""
    found = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            mapped, command = maps.read_text(), (maps.parent / "cmdline").read_text()
        except OSError:  # ended meanwhile, or another user's
            continue
        if "vllm/_C" in mapped and command.startswith("ray::"):
            found.append(int(maps.parent.name))
    return sorted(found)


class Killer(threading.Thread):
    """Ends one generator as soon as the first round is recorded: round 1 is being sampled."""

    def __init__(self, metrics: Path) -> None:
        super().__init__(daemon=True)
        self._metrics = metrics
        self.killed: int | None = None

    def run(self) -> None:
        give_up = time.monotonic() + 300
        while time.monotonic() < give_up:
            if self._metrics.exists() and '"round"' in self._metrics.read_text():
                before = generator_processes()
                if before:
                    self.killed = before[-1]
                    os.kill(self.killed, signal.SIGKILL)
                return
            time.sleep(0.02)


@pytest.fixture(scope="module")
def run(stories15m, tmp_path_factory):
    """The shipped config, shortened; a generator is killed in the middle of it."""
    folder = tmp_path_factory.mktemp("vllm-run")
    cfg = load_config(
        ROOT / "configs/quickstart-vllm.yaml",
        [
            f"run.dir={folder / 'run'}",
            f"run.updates={UPDATES}",
            f"sampling.prompts_per_update={PROMPTS}",
            "sampling.max_new_tokens=200",
            "generator.transport=gloo",
            "evaluation.count=8",
            "evaluation.every=null",
        ],
    )
    killer = Killer(cfg.run_dir / "metrics.jsonl")
    killer.start()
    job.run(cfg, quiet=True)
    killer.join()
    return cfg, killer


def test_a_killed_replica_loses_and_doubles_nothing(run):
    cfg, killer = run
    assert killer.killed is not None
    assert not Path(f"/proc/{killer.killed}").exists()
    seen = Counter()
    for index in range(UPDATES):
        rows = pq.read_table(cfg.run_dir / f"ledger/round-{index:06d}.parquet").to_pylist()
        assert {row["version"] for row in rows} == {index}
        for row in rows:
            assert row["seed"] == derive_seed(0, "sampling", row["position"], row["sample"])
            seen[row["position"], row["sample"]] += 1
    assert seen == Counter(itertools.product(range(UPDATES * PROMPTS), range(2)))


def test_updates_in_flight_on_ray(stories15m, tmp_path):
    """Pushes overtake the rounds on a thread of their own; what came of it is in the ledger."""
    updates = 4
    cfg = load_config(
        ROOT / "configs/quickstart-vllm.yaml",
        [
            f"run.dir={tmp_path / 'run'}",
            f"run.updates={updates}",
            f"sampling.prompts_per_update={PROMPTS}",
            "sampling.max_new_tokens=200",
            "generator.replicas=1",
            "generator.in_flight_updates=true",
            "resampling.rounds_in_flight=1",
            "evaluation.prompts=null",
        ],
    )
    job.run(cfg, quiet=True)
    seen = Counter()
    for index in range(updates):
        rows = pq.read_table(cfg.run_dir / f"ledger/round-{index:06d}.parquet").to_pylist()
        asked_of = max(0, index - 1)
        for row in rows:
            last = row["version"] if row["last_version"] is None else row["last_version"]
            assert asked_of <= row["version"] <= last <= index
            seen[row["position"], row["sample"]] += 1
    assert seen == Counter(itertools.product(range(updates * PROMPTS), range(2)))
    records = [json.loads(line) for line in (cfg.run_dir / "metrics.jsonl").open()]
    assert all(r["logprob_gap"] < 1e-4 for r in records if r["kind"] == "round")
    assert [r["lag_max"] <= 1 for r in records if r["kind"] == "update"] == [True] * updates


def test_every_round_says_its_gap(run):
    cfg, _ = run
    records = [json.loads(line) for line in (cfg.run_dir / "metrics.jsonl").open()]
    gaps = [record["logprob_gap"] for record in records if record["kind"] == "round"]
    assert len(gaps) == UPDATES
    assert all(0.0 < gap < 1e-4 for gap in gaps)


def test_what_was_trained_is_served_as_it_is(run):
    """`vllm serve RUN/policy`, asked for a greedy completion, gives the exported model's."""
    cfg, _ = run
    policy = cfg.run_dir / "policy"
    memory = ("--kv-cache-memory-bytes", str(128 << 20))
    with serving(policy, cfg.run_dir / "serve.log", *memory) as url:
        prompt = [1, 9038, 2501, 263, 931]  # "Once upon a time"
        question = {"model": str(policy), "prompt": prompt, "max_tokens": 16, "temperature": 0}
        request = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps(question | {"return_token_ids": True}).encode(),
            {"Content-Type": "application/json"},
        )
        answer = json.load(urllib.request.urlopen(request, timeout=60))
    expected = learner_of(policy).probe(np.array(prompt, np.int64), 16).ids.tolist()
    assert answer["choices"][0]["token_ids"] == expected
    assert answer["choices"][0]["text"].strip()
