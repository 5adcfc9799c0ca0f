"""Two hosts with a network between them: network namespaces, and Ray nodes that live in them.

Where namespaces are not permitted they are two raylets of one host: nodes all the same, but with
no wire whose bytes could be counted.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.ray_cluster import TOKEN, free_port, in_session, wait_for_dashboard, working_in

BIN = Path(sys.executable).parent
IP = shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@dataclass
class Host:
    """A host: where it is, and how a command is run on it. ``wire`` is its end of the cable.

    Ray's folder is its own on each, at the same path: a driver finds its host's node by it.
    """

    name: str
    address: str
    prefix: tuple[str, ...] = ()
    wire: str | None = None
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def sent_bytes(self) -> int:
        """What has left this host by its wire."""
        assert self.wire is not None
        return int(Path(f"/sys/class/net/{self.wire}/statistics/rx_bytes").read_text())


@dataclass(frozen=True)
class Hosts:
    """A head on the first host; the second one joins and leaves.

    ``dashboard`` and ``gcs`` are the head's; ``environment`` is what a client needs.
    """

    first: Host
    second: Host
    folder: Path
    dashboard: str
    gcs: str
    environment: dict[str, str]

    def join(self, cpus: int, resources: str = "{}") -> None:
        """Let the second host be a node; returns once Ray counts it."""
        before = self.nodes()
        start_node(
            self.second,
            self.folder,
            self.environment,
            f"--address={self.gcs}",
            f"--num-cpus={cpus}",
            f"--resources={resources}",
        )
        deadline = time.monotonic() + 90
        while not self.nodes() - before:
            assert time.monotonic() < deadline, "the second host did not join"
            time.sleep(0.5)

    def cut(self) -> None:
        """Kill everything of the second host's, at once."""
        for node in self.second.nodes:
            for pid in in_session(node.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            node.wait()
        self.second.nodes.clear()

    def nodes(self) -> set[str]:
        """The nodes that Ray takes for alive, by their ids."""
        listed = httpx.get(
            f"{self.dashboard}/api/v0/nodes",
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=30,
        )
        found = listed.raise_for_status().json()["data"]["result"]["result"]
        return {node["node_id"] for node in found if node["state"] == "ALIVE"}


@contextmanager
def two_hosts(tmp_path: Path, cpus: int = 2, resources: str = "{}") -> Iterator[Hosts]:
    """Start the head on the first host; everything has ended when the block has."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp")))
        first, second = stack.enter_context(_wired(folder))
        environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }
        gcs, dashboard = free_port(), free_port()
        stack.callback(_end, [first, second], folder)
        start_node(
            first,
            folder,
            environment,
            "--head",
            f"--port={gcs}",
            f"--num-cpus={cpus}",
            f"--resources={resources}",
            "--include-dashboard=true",
            f"--dashboard-host={first.address}",
            f"--dashboard-port={dashboard}",
        )
        url = f"http://{first.address}:{dashboard}"
        wait_for_dashboard(url, TOKEN, first.nodes[0])
        hosts = Hosts(first, second, folder, url, f"{first.address}:{gcs}", environment)
        while not hosts.nodes():
            time.sleep(0.5)
        yield hosts


def start_node(host: Host, folder: Path, environment: dict[str, str], *options: str) -> None:
    """Start a Ray node on a host, in a session of its own."""
    ports = [
        f"--{name}={free_port()}"
        for name in (
            *("node-manager-port", "object-manager-port", "dashboard-agent-listen-port"),
            *("dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port"),
        )
    ]
    place = ["--temp-dir=" + str(folder)] if "--head" in options else []
    with (folder / f"{host.name}.log").open("ab") as log:
        host.nodes.append(
            subprocess.Popen(
                [
                    *host.prefix,
                    *(str(BIN / "ray"), "start", "--block", f"--node-ip-address={host.address}"),
                    *options,
                    *ports,
                    *place,
                ],
                env=os.environ | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                start_new_session=True,
            )
        )


@contextmanager
def _wired(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Two namespaces on one bridge, which this process reaches, too."""
    name = f"fp{os.getpid() % 100000}"
    net = f"10.{random.SystemRandom().randint(64, 250)}.{os.getpid() % 250}"
    bridge = f"{name}br"
    made = _ip("link", "add", bridge, "type", "bridge")
    if not made:
        yield Host("first", "127.0.0.1"), Host("second", "127.0.0.2")
        return
    own_folder = ("sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"')
    hosts = []
    for at, part in ((1, "first"), (2, "second")):
        private = folder.with_name(f"{folder.name}-{part}")
        private.mkdir()
        prefix = (str(IP), "netns", "exec", f"{name}{at}", *own_folder, str(private), str(folder))
        hosts.append(Host(part, f"{net}.{at}", prefix, f"{name}w{at}"))
    try:
        _must("addr", "add", f"{net}.254/24", "dev", bridge)
        _must("link", "set", bridge, "up")
        for at, host in enumerate(hosts, start=1):
            space = f"{name}{at}"
            assert host.wire is not None
            _must("netns", "add", space)
            _must("link", "add", host.wire, "type", "veth", "peer", "name", "eth0", "netns", space)
            _must("link", "set", host.wire, "master", bridge, "up")
            _must("-n", space, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _must("-n", space, "link", "set", "eth0", "up")
            _must("-n", space, "link", "set", "lo", "up")
        yield hosts[0], hosts[1]
    finally:
        for at, part in ((1, "first"), (2, "second")):
            _ip("netns", "del", f"{name}{at}")
            shutil.rmtree(folder.with_name(f"{folder.name}-{part}"))
        _ip("link", "del", bridge)


def _ip(*arguments: str) -> bool:
    if IP is None:
        return False
    done = subprocess.run([IP, *arguments], capture_output=True, timeout=30)
    return done.returncode == 0


def _must(*arguments: str) -> None:
    subprocess.run([str(IP), *arguments], check=True, timeout=30)


def _end(hosts: list[Host], folder: Path) -> None:
    """End the nodes and all that they started."""
    deadline = time.monotonic() + 20
    sessions = [node.pid for host in hosts for node in host.nodes]
    while left := [*(pid for s in sessions for pid in in_session(s)), *working_in(folder)]:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.2)
    for host in hosts:
        for node in host.nodes:
            node.wait()
