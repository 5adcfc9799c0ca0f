"""Runs that join a Ray cluster which is there: what they find, and what they are told."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import job
from pipeline.config import Config
from tests import tiny
from tests.interruption import assert_same_run
from tests.ray_cluster import Cluster, free_port, head, without_ray

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FRESHPAIRS = Path(sys.executable).parent / "freshpairs"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with head(tmp_path_factory.mktemp("cluster")) as started:
        yield started


def file_of(cfg: Config, path: Path) -> Path:
    """The config as a file, without what it derives."""
    path.write_text(cfg.model_dump_json())
    return path


def train(
    cfg: Config, tmp_path: Path, environment: dict[str, str], *overrides: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(FRESHPAIRS), "train", str(file_of(cfg, tmp_path / "config.yaml")), *overrides],
        env=without_ray(os.environ) | environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def refused(process: subprocess.Popen[str]) -> str:
    """What a mistake of the user's is told: one line."""
    _, told = process.communicate(timeout=150)
    assert process.returncode == 2, told
    lines = [
        line for line in told.splitlines() if "gcs_client" not in line and "rpc_cl" not in line
    ]
    assert len(lines) == 1, told
    return lines[0]


@pytest.mark.parametrize("way", ["auto", "client"])
def test_a_joined_run_is_the_run_of_one_process(
    cluster: Cluster, tiny_model: Path, tmp_path: Path, way: str
) -> None:
    cfg = tiny.config(tiny_model, tmp_path, resampling={"rounds_in_flight": 1})
    local = job.run(cfg, quiet=True).run_dir
    address = "auto" if way == "auto" else cluster.client
    environment = cluster.environment | ({"RAY_ADDRESS": cluster.gcs} if way == "auto" else {})
    there = tmp_path / "joined"
    joined = train(cfg, tmp_path, environment, f"cluster.address={address}", f"run.dir={there}")
    _, told = joined.communicate(timeout=300)
    assert joined.returncode == 0, told
    assert_same_run(there, local)


def test_what_does_not_fit_is_refused_with_what_the_cluster_has(
    cluster: Cluster, tiny_model: Path, tmp_path: Path
) -> None:
    cfg = tiny.config(tiny_model, tmp_path)
    joins = cluster.environment | {"RAY_ADDRESS": cluster.gcs}
    several = ("cluster.address=auto", "generator.replicas=5")
    said = refused(train(cfg, tmp_path, joins, *several))
    assert said.startswith(
        "cluster.address=auto: the run needs generators 5 × (1 CPU); 3 CPU missing: the cluster has"
    )
    waiting = train(cfg, tmp_path, joins, *several, "cluster.wait_minutes=0.05")
    told, _ = waiting.communicate(timeout=150)
    assert "waiting up to 0.05 minutes for nodes: cluster.address=auto: the run needs" in told
    assert waiting.returncode == 2
    custom = ("cluster.address=auto", "learner.resources={fast: 1}")
    assert "1 fast missing" in refused(train(cfg, tmp_path, joins, *custom))
    assert not (tmp_path / "run").exists()


def test_a_cluster_that_does_not_answer_is_one_line(
    cluster: Cluster, tiny_model: Path, tmp_path: Path
) -> None:
    cfg = tiny.config(tiny_model, tmp_path)
    nobody = {"RAY_ADDRESS": f"127.0.0.1:{free_port()}"}
    wrong = cluster.environment | {"RAY_ADDRESS": cluster.gcs, "RAY_AUTH_TOKEN": "another-token-42"}
    for environment in (nobody, wrong):
        said = refused(train(cfg, tmp_path, environment, "cluster.address=auto"))
        assert said.startswith("cluster.address=auto: no Ray cluster answers (")
        assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in said
    assert not (tmp_path / "run").exists()


HOLDER = """
import sys, time
import ray
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
held = ray.util.placement_group([{"CPU": 2}])
ray.get(held.ready())
print("held", flush=True)
sys.stdin.readline()
"""


def test_room_that_others_use_is_waited_for_and_that_is_said(
    cluster: Cluster, tiny_model: Path, tmp_path: Path
) -> None:
    joins = cluster.environment | {"RAY_ADDRESS": cluster.gcs}
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER)],
        env=os.environ | joins,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    try:
        assert holder.stdout.readline() == "held\n"
        run = train(tiny.config(tiny_model, tmp_path), tmp_path, joins, "cluster.address=auto")
        assert run.stdout is not None
        deadline = time.monotonic() + 120
        while "waiting for room that others use; free now:" not in run.stdout.readline():
            assert time.monotonic() < deadline
        assert not (tmp_path / "run" / "ledger").exists()
    finally:
        holder.communicate("\n", timeout=60)
    _, told = run.communicate(timeout=240)
    assert run.returncode == 0, told
