"""A real Ray head of a test's own: with a token, on free ports, ended by its own process group."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

TOKEN = "a-token-of-the-tests-0123456789"


@dataclass(frozen=True)
class Cluster:
    """``address``: the dashboard's; ``gcs``: host:port that other nodes join and drivers use.

    ``client`` is Ray's client server, ``environment`` what a client needs besides its own.
    """

    address: str
    gcs: str
    client: str
    environment: dict[str, str]


@contextmanager
def head(tmp_path: Path, token: str = TOKEN, cpus: int = 2) -> Iterator[Cluster]:
    """Start a head with its dashboard; it has ended when the block has, and all its processes."""
    gcs, dashboard, client = free_port(), free_port(), free_port()
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        # of jobs: this Python is the cluster's
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # sockets: short names
        with (tmp_path / "head.log").open("wb") as log:
            process = subprocess.Popen(
                [
                    *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"),
                    *(
                        f"--port={gcs}",
                        "--dashboard-host=127.0.0.1",
                        f"--dashboard-port={dashboard}",
                    ),
                    *("--include-dashboard=true", f"--num-cpus={cpus}", f"--temp-dir={folder}"),
                    f"--dashboard-agent-listen-port={free_port()}",
                    f"--ray-client-server-port={client}",
                ],
                env=without_ray(os.environ) | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=tmp_path,
                start_new_session=True,
            )
        address = f"http://127.0.0.1:{dashboard}"
        try:
            wait_for_dashboard(address, token, process)
            joined_at = _joined_at(tmp_path / "head.log")
            yield Cluster(address, joined_at, f"ray://127.0.0.1:{client}", environment)
        finally:
            end(process, Path(folder))


def without_ray(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment that names no cluster."""
    return {name: value for name, value in environment.items() if not name.startswith("RAY_")}


def _joined_at(log: Path) -> str:
    """The address that the head tells other nodes to join, once it is told."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines():
            if "--address='" in line:
                return line.split("'")[1]
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def free_port() -> int:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """End a head and all that it started: what is in its session, and drivers in its folder."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(3)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 20
    while left := [*in_session(process.pid), *working_in(folder)]:
        number = signal.SIGTERM if time.monotonic() < deadline - 18 else signal.SIGKILL
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        if time.monotonic() > deadline:
            raise AssertionError(f"still there: {left}")
        time.sleep(0.2)


def in_session(session: int) -> list[int]:
    """The processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(sid) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def working_in(folder: Path) -> list[int]:
    """The processes whose working directory lies in a folder."""
    found = []
    for cwd in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):
            if cwd.readlink().is_relative_to(folder):
                found.append(int(cwd.parent.name))
    return found


def wait_for_dashboard(address: str, token: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "the head has ended"
        try:
            headers = {"Authorization": f"Bearer {token}"}
            if httpx.get(f"{address}/api/jobs/", headers=headers, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    raise AssertionError(f"no dashboard on {address}")
