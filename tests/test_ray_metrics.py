"""What a run shows as Ray metrics: by hand, and as Prometheus reads it from a node."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from pipeline import job
from pipeline.launch.ray_metrics import GAUGES, samples
from pipeline.replica import Replica
from tests import tiny
from workers.generator import SampledUnit, SampleRequest
from workers.messages import Prompt

ROUND = {
    "kind": "round",
    "round": 4,
    "update": 9,
    "completions": 8,
    "score_mean": 0.25,
    "kl_to_reference": None,
    "tokens_per_second": 640.0,
    "seconds": {"generate": 2.0, "judge": 3.0, "learn": 4.0, "sync": 5.0, "idle": 6.0},
}
UPDATE = {
    "kind": "update",
    "update": 9,
    "round": 4,
    "loss": 0.5,
    "lag_mean": 1.5,
    "lag_max": 2,
    "seconds": 7.0,
}


def shown(record: dict[str, Any], *owed: tuple[int, set[int]], judges: int = 1) -> dict[str, Any]:
    replicas: Any = [SimpleNamespace(backlog=prompts, rounds=rounds) for prompts, rounds in owed]
    found = dict(samples(record, replicas, judges))
    assert set(found) <= set(GAUGES)
    return found


def test_an_update() -> None:
    assert shown(UPDATE, (4, {5, 6}), (3, {6})) == {
        "rounds_in_flight": 2,
        "prompts_owed": 7,
        "updates": 9,
        "loss": 0.5,
        "lag_mean_updates": 1.5,
        "lag_max_updates": 2,
        "update_seconds": 7.0,
    }


def test_a_round() -> None:
    assert shown(ROUND, (0, set()), judges=4) == {
        "rounds_in_flight": 0,
        "prompts_owed": 0,
        "rounds": 5,
        "generated_tokens_per_second": 640.0,
        "score_mean": 0.25,
        "kl_to_reference_nats": None,
        # 3 s of each of 4 workers for 8 completions
        "judge_seconds_per_completion": 1.5,
        "generate_seconds": 2.0,
        "judge_seconds": 3.0,
        "learn_seconds": 4.0,
        "push_seconds": 5.0,
        "idle_seconds": 6.0,
    }


def test_a_round_without_completions_and_an_evaluation() -> None:
    assert shown(ROUND | {"completions": 0})["judge_seconds_per_completion"] is None
    assert shown({"kind": "evaluation", "win_rate": 0.75})["win_rate"] == 0.75


class Silent:
    """Takes calls; what it answers is there when it is asked for."""

    def submit(self, method: str, *args: Any) -> Any:
        return SimpleNamespace(result=lambda: SampledUnit((), 0.0))


def test_a_generator_owes_the_rounds_that_nobody_collected() -> None:
    replica = Replica(0, Silent(), np.arange(3), 0.0)  # type: ignore[arg-type]
    prompts = (Prompt(0, np.array([1]), "p"), Prompt(1, np.array([1]), "q"))
    requests = [SampleRequest(prompts, 2, 0, "sampling", round=index) for index in (3, 3, 4)]
    first, second, _ = [replica.sample(request) for request in requests]
    replica.sample(SampleRequest(prompts[:1], 1, 0, "evaluation"))
    assert (replica.rounds, replica.backlog) == ({3, 4}, 7)
    first.result()
    assert (replica.rounds, replica.backlog) == ({3, 4}, 5)
    second.result()
    assert (replica.rounds, replica.backlog) == ({4}, 3)


def scraped() -> dict[str, float]:
    """Our gauges as this Ray's one node exports them, by name and judge."""
    import ray

    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    try:
        text = httpx.get(url, timeout=10.0).text
    except httpx.TransportError:  # its agent is still starting
        return {}
    found = {}
    for name, tags, value in re.findall(r"^ray_freshpairs_(\w+)\{(.*)\} (\S+)$", text, re.M):
        assert 'run="tiny"' in tags
        found[name] = float(value)
    return found


@pytest.mark.slow
def test_prometheus_reads_a_runs_gauges(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read when the loop is over, before Ray is left: they are exported every few seconds."""
    prompts = {"path": str(tmp_path / "prompts.jsonl")}
    cfg = tiny.config(
        tiny_model,
        tmp_path,
        run={"updates": 4},
        resampling={"updates_per_round": 2, "rounds_in_flight": 1},
        evaluation={"prompts": prompts, "count": 5},
        generator={"threads": 1},
        cluster={"address": "local"},
    )
    last: dict[str, float] = {}
    write = job.write_policy

    def reading(*args: Any) -> Any:
        until = time.monotonic() + 60.0
        while last.get("rounds") != 2.0 and time.monotonic() < until:
            time.sleep(0.5)
            last.update(scraped())
        return write(*args)

    monkeypatch.setattr(job, "write_policy", reading)
    run = job.run(cfg, quiet=True).run_dir
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    newest = {record["kind"]: record for record in records}
    update, round_ = newest["update"], newest["round"]
    assert last == pytest.approx(
        {
            "updates": 4,
            "rounds": 2,
            "rounds_in_flight": 0,
            "prompts_owed": 0,
            "loss": update["loss"],
            "lag_mean_updates": update["lag_mean"],
            "lag_max_updates": update["lag_max"],
            "update_seconds": update["seconds"],
            "generated_tokens_per_second": round_["tokens_per_second"],
            "score_mean": round_["score_mean"],
            "kl_to_reference_nats": round_["kl_to_reference"],
            "judge_seconds_per_completion": round_["seconds"]["judge"] / round_["completions"],
            "generate_seconds": round_["seconds"]["generate"],
            "judge_seconds": round_["seconds"]["judge"],
            "learn_seconds": round_["seconds"]["learn"],
            "push_seconds": round_["seconds"]["sync"],
            "idle_seconds": round_["seconds"]["idle"],
            "win_rate": newest["evaluation"]["win_rate"],
        }
    )
    assert set(last) == set(GAUGES)
