"""The benchmarks run and say what they promise; how fast anything is, no test can tell."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(command: str) -> dict[str, Any]:
    """The JSON object on the last line that a benchmark prints; it is not to see a GPU."""
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=BENCHMARKS,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def numbers(value: Any) -> list[float]:
    """All numbers of a JSON value."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return [number for item in items for number in numbers(item)]
    return [value] if isinstance(value, int | float) else []


def assert_measured(value: Any) -> None:
    assert numbers(value)
    assert all(math.isfinite(number) and number > 0 for number in numbers(value)), value


def test_weight_sync():
    found = run("weight_sync.py --megabytes 1 --repeats 2 --transports gloo --sets synthetic")
    assert (found["benchmark"], found["receivers"], found["repeats"]) == ("weight_sync", 2, 2)
    synthetic = found["sets"].pop("synthetic")
    assert not found["sets"]
    assert synthetic["megabytes"] == 1.0
    assert set(synthetic["sides"]) == {"gloo"}
    gloo = synthetic["sides"]["gloo"]
    assert set(gloo["parts"]) == {"pack", "transport", "load"}
    assert len(gloo["runs"]) == 2
    assert_measured(synthetic)


def test_weight_sync_of_a_gpu():
    found = run("gpu/weight_sync.py --tiny --repeats 2")
    assert (found["device"], found["gpu"]) == ("cpu", None)
    sides = found["sides"]
    assert {name for name, side in sides.items() if "skipped" in side} == {"ipc", "nccl"}
    assert set(sides) == {"copy", "checksum", "pack", "host", "gloo", "ipc", "nccl"}
    for name in ("copy", "checksum", "pack", "host", "gloo"):
        assert {"seconds", "gb_per_second", "times_copy"} <= set(sides[name])
        assert_measured(sides[name])


def test_generate_of_a_gpu():
    found = run("gpu/generate.py --tiny --repeats 2 --without-vllm")
    assert set(found["tokens_per_second"]) == {"transformers"}
    assert set(found["skipped"]) == {"vllm"}
    assert_measured(found["tokens_per_second"])


def test_without_a_gpu_a_benchmark_of_one_says_so():
    found = run("gpu/weight_sync.py")
    assert found["gpu"] is None
    assert "no GPU" in found["skipped"]


def test_judge_latency():
    found = run(
        "judge_latency.py --rounds 3 --repeats 1 --latency 0.02 --generate 0.01 --learn 0.05"
    )
    assert set(found["hidden"]) == {"0", "1"}
    assert set(found["seconds"]) == {f"{n}, {i}" for n in ("instant", "slow") for i in (0, 1)}
    assert_measured(found["seconds"])


def test_overlap_of_sleeping_workers():
    found = run("overlap.py --simulated --rounds 3 --repeats 1 --generate 0.02 --learn 0.05")
    assert set(found["seconds"]) == set(found["times_synchronous"]) == {"0", "1", "2"}
    # 3 × (20 + 50) ms; 20 + 50 ms and two further rounds at the pace of the learner, 50 ms
    assert found["expected_seconds"] == pytest.approx({"0": 0.21, "1": 0.17, "2": 0.17})
    assert found["times_synchronous"]["0"] == 1.0
    assert_measured(found["seconds"])


@pytest.mark.slow
def test_overlap_of_real_workers(stories15m):
    found = run(
        "overlap.py --real --seeds 1 --judge-seconds 0.1 run.updates=2 evaluation.count=4 "
        "sampling.prompts_per_update=4 sampling.max_new_tokens=4 cluster.address=inline"
    )
    assert set(found["seconds"]) == {"0", "1"}
    for of_side in found["quality"].values():
        assert [set(by_judge) for by_judge in of_side] == [{"slow_sentiment", "polarity"}]
    assert_measured([found["seconds"], found["times_synchronous"], found["round_seconds"]])


@pytest.mark.slow
def test_a_plan_beside_sleeping_workers():
    found = run(
        "plan.py --simulated --generators 1 2 --in-flight 0 --rounds 2 --repeats 1 "
        "--generate 0.02 --learn 0.01"
    )
    assert set(found["sides"]) == {"1, 0", "2, 0"}
    # two rounds of 4 units of 20 ms, shared by the generators, and of 4 updates of 10 ms
    assert found["sides"]["1, 0"]["predicted"] == pytest.approx([0.24])
    assert found["sides"]["2, 0"]["predicted"] == pytest.approx([0.16])
    assert_measured(found["sides"])


@pytest.mark.vllm
def test_generate(stories15m):
    found = run("generate.py --repeats 1 --new-tokens 4")
    assert set(found["ours_times"]) == {"direct", "direct_ids", "direct_plain", "transformers"}
    assert found["same_tokens"]
    assert_measured([found["tokens_per_second"], found["tokens_per_cpu_second"]])


@pytest.mark.vllm
def test_vllm_of_a_gpu():
    found = run("gpu/generate.py --tiny --repeats 1")
    assert not found["skipped"]
    assert found["same_tokens"]
    assert_measured([found["tokens_per_second"], found["vllm_load_seconds"]])


@pytest.mark.vllm
def test_weight_sync_into_vllm(stories15m):
    found = run("weight_sync.py --repeats 1 --transports gloo --sets stories15m")
    assert set(found["sets"]["stories15m"]["sides"]) == {"gloo", "vllm, gloo"}
    assert_measured(found["sets"])
