"""The quickstart as a job on two hosts with a network between them, of which one is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest

from pipeline.tracking import metrics
from tests.hosts import Hosts, two_hosts
from tests.ray_cluster import TOKEN
from tests.tiny import records

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

FRESHPAIRS = Path(sys.executable).parent / "freshpairs"
CHECKOUT = Path(__file__).resolve().parents[1]

GATED = """
import time
from pathlib import Path

from judges.lexicon import sentiment

class Gated:
    '''VADER; each round's verdicts wait until somebody has opened the round's gate.'''

    def __init__(self, gates, calls_per_round):
        self.gates, self.per_round, self.calls = Path(gates), calls_per_round, 0

    def __call__(self, prompts, completions):
        round_, self.calls = self.calls // self.per_round, self.calls + 1
        while not (self.gates / str(round_)).exists():
            time.sleep(0.1)
        return sentiment(prompts, completions)
"""

SMALL = (
    "sampling.prompts_per_update=8",
    "generator.backend=transformers",
    "generator.replicas=2",
    "generator.min_replicas=1",
    "generator.threads=1",
    "learner.threads=1",
    "evaluation.prompts=null",
    "evaluation.judges=[]",
)
"""The quickstart, in minutes for a machine whose cores are two hosts'."""


@pytest.fixture(autouse=True)
def _no_job_is_left() -> Iterator[None]:
    yield
    while FOLLOWED:
        FOLLOWED.pop().kill()


FOLLOWED: list[subprocess.Popen[str]] = []


def submit(hosts: Hosts, run_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    """``freshpairs submit`` of the quickstart, which follows the job."""
    settings = [*SMALL, f"run.dir={run_dir}", *overrides]
    command = [str(FRESHPAIRS), "submit", "configs/quickstart.yaml", *settings]
    job = subprocess.Popen(
        [*command, f"--address={hosts.dashboard}"],
        cwd=CHECKOUT,
        env=os.environ | hosts.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    FOLLOWED.append(job)
    return job


def ended(job: subprocess.Popen[str]) -> str:
    """What a job printed, once it has ended well."""
    told, _ = job.communicate(timeout=600)
    assert job.returncode == 0, told
    return told


def wait(what: Callable[[], bool], job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not what():
        assert job.poll() is None, ended(job)
        assert time.monotonic() < deadline, "it does not come to pass"
        time.sleep(0.3)


def rounds(run_dir: Path) -> int:
    return len(list((run_dir / "ledger").glob("round-??????.parquet")))


def workers(hosts: Hosts) -> int:
    """The run's workers that live."""
    listed = httpx.get(
        f"{hosts.dashboard}/api/v0/actors",
        headers={"Authorization": f"Bearer {TOKEN}"},
        timeout=30,
    )
    actors = listed.raise_for_status().json()["data"]["result"]["result"]
    return sum(a["state"] == "ALIVE" and a["class_name"] == "_Actor" for a in actors)


def same_ledger(one: Path, other: Path) -> None:
    parts = sorted(part.name for part in (one / "ledger").glob("*.parquet"))
    assert parts == sorted(part.name for part in (other / "ledger").glob("*.parquet"))
    for part in parts:
        assert pq.read_table(one / "ledger" / part).equals(pq.read_table(other / "ledger" / part))


def test_a_host_that_is_lost_and_comes_back_changes_nothing(
    stories15m: Path, tmp_path: Path
) -> None:
    """Two generators, of which one will do: both in a round, one lost in it, back in a later one.

    Gates hold each round's verdicts back until Ray has noticed what the test did to the hosts.
    """
    (tmp_path / "gated.py").write_text(GATED)
    gates = tmp_path / "gates"
    gates.mkdir()
    args = f"{{gates: {gates}, calls_per_round: 2}}"
    judge = f"judge={{name: {tmp_path}/gated.py:Gated, args: {args}}}"
    settings = ("run.updates=10", "resampling.updates_per_round=2", "checkpoint.every=4", judge)
    one, two = tmp_path / "one-host", tmp_path / "two-hosts"
    with two_hosts(tmp_path, cpus=1) as hosts:
        opened = [gates / str(round_) for round_ in range(5)]
        for gate in opened:
            gate.touch()
        alone = ended(submit(hosts, one, *settings))
        assert "joined" not in alone
        for gate in opened:
            gate.unlink()

        hosts.join(cpus=1)
        job = submit(hosts, two, *settings)
        wait(lambda: workers(hosts) == 4, job)
        opened[0].touch()
        wait(lambda: rounds(two) == 1, job)
        hosts.cut()
        wait(lambda: len(hosts.nodes()) == 1, job)  # else a new worker is sent to the lost node
        opened[1].touch()
        wait(lambda: rounds(two) == 2, job)
        hosts.join(cpus=1)
        wait(lambda: workers(hosts) == 4, job)
        for gate in opened:
            gate.touch()
        told = ended(job)
    assert told.count(" left (") == 1
    assert told.index(" left (") < told.rindex(" joined (2 of 2)")
    same_ledger(one, two)
    assert records(one) == records(two)
    weights = [(run / "policy" / "model.safetensors").read_bytes() for run in (one, two)]
    assert weights[0] == weights[1]


def test_a_push_crosses_the_wire_once_and_is_proved(stories15m: Path, tmp_path: Path) -> None:
    """Both generators prove every version; the wire carries the model's bytes for each of them."""
    run_dir = tmp_path / "run"
    model = sum(f.stat().st_size for f in stories15m.glob("*.safetensors"))
    with two_hosts(tmp_path, cpus=1) as hosts:
        if hosts.first.wire is None:
            pytest.skip("no network namespaces here: no wire whose bytes could be counted")
        hosts.join(cpus=1)
        before = hosts.first.sent_bytes()
        ended(submit(hosts, run_dir, "run.updates=4", "generator.min_replicas=2"))
        sent = hosts.first.sent_bytes() - before
    gaps = [record["logprob_gap"] for record in metrics(run_dir) if record["kind"] == "round"]
    assert len(gaps) == 4
    assert max(gaps) < 1e-3
    logs = [(run_dir / "logs" / f"generator-{i}.jsonl").read_text() for i in (0, 1)]
    assert {log.count('"prove"') >= 4 for log in logs} == {True}
    print(f"{sent / 4:.0f} bytes a push, {sent / 4 / model:.3f} of the model's {model}")
    assert 1.0 < sent / 4 / model < 1.1
