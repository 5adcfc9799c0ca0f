"""docker/: what its linters do not see. No image is built; of programs only scripts are run."""

from __future__ import annotations

import re
import signal
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from pipeline.cli import app
from pipeline.config import load_config

CHECKOUT = Path(__file__).resolve().parent.parent
DOCKER = CHECKOUT / "docker"
FILES = sorted(path for path in DOCKER.rglob("*") if path.is_file() and path.suffix != ".pyc")
TEXTS = {str(path.relative_to(CHECKOUT)): path.read_text() for path in FILES}
DOCKERFILE = TEXTS["docker/Dockerfile"]
README = TEXTS["docker/README.md"]
PYPROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PACKAGES = [
    pattern.rstrip("*")
    for pattern in PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
]


def document(name: str) -> Any:
    return yaml.safe_load(TEXTS[f"docker/{name}"])


CLUSTER = document("kuberay/raycluster.yaml")
JOB = document("kuberay/rayjob.yaml")


def pin(package: str) -> str:
    extras = [wanted for extra in PROJECT["optional-dependencies"].values() for wanted in extra]
    [found] = {
        wanted.partition("==")[2]
        for wanted in [*PROJECT["dependencies"], *extras]
        if re.match(rf"{re.escape(package)}(\[.*\])?==", wanted)
    }
    return found


def command_parts(name: str, text: str) -> Iterator[str]:
    """Where a file has commands: all of it, or the code of a page."""
    if not name.endswith(".md"):
        yield text
        return
    blocks = re.split(r"^```.*$", text, flags=re.MULTILINE)
    yield from blocks[1::2]
    for prose in blocks[::2]:
        yield from re.findall(r"`([^`]+)`", prose)


def recipe(*targets: str) -> set[str]:
    """The lines that make would run for these targets in a fresh checkout."""
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", "--no-print-directory", *targets],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines())


def test_every_command_is_one_of_ours() -> None:
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    used = {
        (name, command)
        for name, text in TEXTS.items()
        for part in command_parts(name, text)
        for command in re.findall(r'(?<![-/\w])freshpairs"?,? "?([a-z][a-z-]+)', part)
    }
    assert len(used) > 6
    assert {use for use in used if use[1] not in commands} == set()


def test_images_are_installed_by_what_ci_runs() -> None:
    installs = re.findall(r"^RUN make ([a-z-]+)", DOCKERFILE, re.MULTILINE)
    assert installs == ["install", "install-vllm"]
    ci = (CHECKOUT / ".ci/run").read_text().splitlines()
    assert {"make test", "make test-vllm", "make lint-docker"} <= set(ci)
    assert recipe("install") <= recipe("test")
    assert recipe("install-vllm") <= recipe("test-vllm")
    assert any("docker/install_vllm.py" in line for line in recipe("install-vllm"))


def test_a_changed_source_leaves_the_libraries_layer_alone() -> None:
    """What is copied before `make install` is what pip reads, and all of it is in the context."""
    before = DOCKERFILE.partition("RUN make install ")[0]
    sources = [
        source
        for line in re.findall(r"^COPY (.*)$", before, re.MULTILINE)
        for source in line.split()[1:-1]
    ]
    assert {source for source in sources if "/" in source} == {
        f"{package}/__init__.py" for package in PACKAGES
    }
    assert {"Makefile", "pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]} == {
        source for source in sources if "/" not in source
    }
    copied = {*sources, *re.findall(r"COPY \S+ (docker/\S+) docker/", DOCKERFILE)}
    run_there = {
        path
        for name, text in TEXTS.items()
        if not name.endswith(".md")
        for path in re.findall(r"/opt/freshpairs/((?:docker|configs)/[\w./-]+)", text)
    }
    assert run_there
    kept = {
        line[1:]
        for line in (CHECKOUT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    for path in copied | run_there:
        assert (CHECKOUT / path).is_file(), path
        assert any(path == keep or path.startswith(f"{keep}/") for keep in kept), path


def test_versions_are_the_projects() -> None:
    ray, torch, vllm = pin("ray"), pin("torch"), pin("vllm")
    for spec in (CLUSTER["spec"], JOB["spec"]["rayClusterSpec"]):
        assert spec["rayVersion"] == ray
    for text in TEXTS.values():
        for tag in re.findall(r"registry\.example\.com/freshpairs:([\w.]+)-\w+", text):
            assert tag == PROJECT["version"]
    [python] = re.findall(r"\bFROM python:(\d+\.\d+)\.\d+-\S+@sha256:[0-9a-f]{64} AS", DOCKERFILE)
    assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]
    for line in (f"torch {torch}", f"vLLM {vllm}", f"Ray {ray}"):
        assert line in README


def test_one_user_everywhere_and_never_root() -> None:
    uids = re.findall(
        r"--uid (\d+)|--chown=(\d+):(\d+)|^USER (\d+):(\d+)", DOCKERFILE, re.MULTILINE
    )
    assert {uid for found in uids for uid in found if uid} == {"1000", "0"}
    users = re.findall(r"^(?:USER|FROM) (\S+)", DOCKERFILE, re.MULTILINE)
    assert users[-1] == "1000:1000"
    for pod in pods():
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True
        assert {security[key] for key in ("runAsUser", "runAsGroup")} == {1000}
        assert security.get("fsGroup", 1000) == 1000


def test_no_file_holds_a_token() -> None:
    for name, text in TEXTS.items():
        assert not re.findall(r"kind: Secret\b", text), name
        given = re.findall(r"RAY_AUTH_TOKEN(?:=|: )(.*)", text)
        made = ("$(openssl", "$(kubectl", "${RAY_AUTH_TOKEN:?")
        assert all(value.startswith(made) for value in given), name
        without_digests = re.sub(r"sha256:[0-9a-f]{64}", "", text)
        assert not re.findall(r"\b[0-9a-f]{32,}\b", without_digests), name


def test_compose_publishes_to_this_machine_only() -> None:
    services = document("compose.yaml")["services"]
    assert set(services) == {"head", "worker", "tensorboard"}
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 2
    assert all(re.match(r"\$\{\w+_BIND:-127\.0\.0\.1\}:(\d+):\1$", port) for port in ports)
    for service in services.values():
        assert any(volume.startswith("runs:/runs") for volume in service["volumes"])
        assert service["healthcheck"]["test"]
    for name in ("head", "worker"):
        assert services[name]["environment"]["RAY_AUTH_MODE"] == "token"
        assert ":?" in services[name]["environment"]["RAY_AUTH_TOKEN"]
        assert services[name]["shm_size"]


def pods() -> list[dict[str, Any]]:
    """Every pod template of the manifests, as a pod."""
    spec = JOB["spec"]
    templates = [spec["submitterPodTemplate"], CLUSTER["spec"]["headGroupSpec"]["template"]]
    templates += [group["template"] for group in CLUSTER["spec"]["workerGroupSpecs"]]
    return [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
        for template in templates
    ]


@pytest.mark.parametrize("pod", pods(), ids=["submitter", "head", "gpu"])
def test_pods_fit_the_schema_and_ask_for_what_they_may_take(pod: dict[str, Any]) -> None:
    kubernetes_validate.validate(pod, "1.37", strict=True)
    for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]:
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_the_job_runs_on_the_same_cluster() -> None:
    assert JOB["spec"]["rayClusterSpec"] == CLUSTER["spec"]


def test_no_cluster_is_rented_for_what_is_no_failure() -> None:
    """KubeRay retries whatever the exit code: a mistake (2), a stop on purpose (3)."""
    assert JOB["spec"]["backoffLimit"] == 0


def test_the_cluster_grows_and_asks_for_a_token() -> None:
    spec = CLUSTER["spec"]
    assert spec["authOptions"]["mode"] == "token"
    assert spec["authOptions"]["secretName"] in README
    assert spec["enableInTreeAutoscaling"] is True
    [group] = spec["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] < group["maxReplicas"]
    for pod in pods()[1:]:
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        [ray] = pod["spec"]["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in ray["volumeMounts"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        claim = volumes[mounts["/runs"]]["persistentVolumeClaim"]["claimName"]
        assert claim == document("kuberay/runs.yaml")["metadata"]["name"]


def in_bytes(size: str) -> int:
    assert size.endswith(("Gi", "gb"))  # Docker's are binary, too
    return int(size[:-2]) * 2**30


def test_rays_store_fits_into_shared_memory() -> None:
    """Where it does not, Ray puts it on the disk."""
    spec = CLUSTER["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        [shm] = [
            volume["emptyDir"]["sizeLimit"]
            for volume in group["template"]["spec"]["volumes"]
            if "emptyDir" in volume
        ]
        assert 0 < int(group["rayStartParams"]["object-store-memory"]) < 0.95 * in_bytes(shm)
    for service in ("head", "worker"):
        chosen = document("compose.yaml")["services"][service]
        [store] = re.findall(r"--object-store-memory=\S+:-(\d+)}", " ".join(chosen["command"]))
        assert 0 < int(store) < 0.95 * in_bytes(chosen["shm_size"].split(":-")[1].rstrip("}"))


def test_the_jobs_run_is_a_valid_one() -> None:
    """Its config and overrides are accepted, and it fits the cluster that is made for it."""
    program, config, run_dir, *overrides = JOB["spec"]["entrypoint"].split()
    assert Path(program).name == "train.sh"
    path = CHECKOUT / Path(config).relative_to("/opt/freshpairs")
    cfg = load_config(path, ["cluster.address=auto", f"run.dir={run_dir}", *overrides])
    assert cfg.run.dir == run_dir
    [group] = CLUSTER["spec"]["workerGroupSpecs"]
    needed = cfg.generator.gpus * cfg.generator.replicas + cfg.learner.gpus * cfg.learner.workers
    assert 0 < needed <= group["maxReplicas"]


# ── the scripts ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A checkout whose programs only write down how they were called."""
    (tmp_path / "docker").mkdir()
    for name in ("train.sh", "slurm.sh", "healthy.sh"):
        (tmp_path / "docker" / name).symlink_to(DOCKER / name)
    fakes = tmp_path / ".venv/bin"
    fakes.mkdir(parents=True)
    (tmp_path / "calls").touch()
    calls = f"{tmp_path}/calls"
    programs = {
        "python": f'exec {sys.executable} "$@"',
        "hostname": "echo 10.0.0.1 10.1.0.1",
        # One process for each task, as long as it is wanted.
        "srun": f"""echo "srun $*" >> {calls}
            for a in "$@"; do case $a in --ntasks=*) n=${{a#*=}};; esac; done
            while [ "$1" != ray ]; do shift; done
            for _ in $(seq "$n"); do "$@"; done
            exec sleep 60""",
        "ray": f"""case $1 in
            start) echo "ray $*" >> {calls}; exit "${{START_CODE:-0}}";;
            health-check) grep -q '^ray start --head' {calls};;
            list) echo "[$(grep '^ray start' {calls} | sed 's/.*/0/' | paste -sd,)]";;
            esac""",
        "scontrol": f"""[ "$1" = show ] && printf 'node1\\nnode2\\nnode3\\n' && exit
            echo "scontrol $*" >> {calls}""",
        "freshpairs": f"""stat -c %a "$RAY_AUTH_TOKEN_PATH" > {tmp_path}/mode 2> {tmp_path}/none
            trap 'echo stopped >> {calls}; exit 3' TERM
            echo "freshpairs $*" >> {calls}
            [ "${{RUN_CODE:-}}" = wait ] || exit "${{RUN_CODE:-0}}"
            for _ in $(seq 600); do sleep 0.05; done""",
    }
    for name, body in programs.items():
        (fakes / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (fakes / name).chmod(stat.S_IRWXU)
    return tmp_path


def environment(site: Path, **more: str) -> dict[str, str]:
    return {
        "PATH": f"{site}/.venv/bin:/usr/bin:/bin",
        "HOME": str(site),
        "SLURM_SUBMIT_DIR": str(site),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_CPUS_ON_NODE": "4",
        "WAIT_INTERVAL": "0.05",
        **more,
    }


def calls(site: Path) -> list[str]:
    return (site / "calls").read_text().splitlines()


def run_script(site: Path, name: str, *arguments: str, **more: str) -> tuple[int, str]:
    done = subprocess.run(
        ["bash", f"docker/{name}", *arguments],
        cwd=site,
        env=environment(site, **more),
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stderr


def test_train_goes_on_where_there_is_a_run(site: Path) -> None:
    run = site / "run"
    assert run_script(site, "train.sh", "c.yaml", str(run), "run.seed=1", RUN_CODE="3")[0] == 3
    run.mkdir()
    (run / "config.yaml").touch()
    assert run_script(site, "train.sh", "c.yaml", str(run), "run.seed=1")[0] == 0
    assert calls(site) == [
        f"freshpairs train c.yaml cluster.address=auto run.dir={run} run.seed=1",
        f"freshpairs resume {run}",
    ]
    (run / "policy").mkdir()
    (run / "policy/README.md").touch()  # finished: `resume` would call it a mistake
    assert run_script(site, "train.sh", "c.yaml", str(run), "run.seed=1", RUN_CODE="2")[0] == 0
    assert len(calls(site)) == 2
    code, said = run_script(site, "train.sh", "c.yaml")
    assert (code, len(said.splitlines())) == (2, 1)


def test_health_is_asked_for_where_ray_was_started(site: Path) -> None:
    assert run_script(site, "healthy.sh", RAY_TMPDIR=str(site))[0] == 0
    (site / "ray").mkdir()
    (site / "ray/ray_current_cluster").touch()
    (site / ".venv/bin/python").write_text('#!/bin/sh\necho "$2" > asked\nexit 1\n')
    assert run_script(site, "healthy.sh", RAY_TMPDIR=str(site))[0] == 1
    port = CLUSTER["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["livenessProbe"][
        "httpGet"
    ]
    assert f"http://127.0.0.1:{port['port']}{port['path']}" in (site / "asked").read_text()


@pytest.mark.parametrize("code", [0, 1, 3])
def test_slurm_starts_a_node_each_and_passes_the_exit_code_on(site: Path, code: int) -> None:
    assert run_script(site, "slurm.sh", "c.yaml", "/disk/run", RUN_CODE=str(code))[0] == code
    lines = calls(site)
    head = (
        "ray start --head --node-ip-address=10.0.0.1 --port=6379 --temp-dir=/tmp/ray-77"
        " --num-cpus=4 --block"
    )
    worker = "ray start --address=10.0.0.1:6379 --num-cpus=4 --block"
    assert [line for line in lines if not line.startswith("srun")] == [
        head,
        worker,
        worker,
        "freshpairs train c.yaml cluster.address=auto run.dir=/disk/run",
    ]
    first, second = (line for line in lines if line.startswith("srun"))
    assert "--nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist=node1 " in first
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1 --exclude=node1 " in second
    assert (site / "mode").read_text() == "600\n"
    assert list(site.glob(".freshpairs-*")) == []


@pytest.mark.parametrize(
    ("number", "after"), [(signal.SIGUSR1, ["scontrol requeue 77"]), (signal.SIGTERM, [])]
)
def test_slurm_lets_the_run_stop_and_goes_back_to_the_queue_at_the_time_limit(
    site: Path, number: signal.Signals, after: list[str]
) -> None:
    with subprocess.Popen(
        ["bash", "docker/slurm.sh", "c.yaml", "/disk/run"],
        cwd=site,
        env=environment(site, RUN_CODE="wait"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as script:
        until = time.monotonic() + 60
        while not any(line.startswith("freshpairs") for line in calls(site)):
            assert time.monotonic() < until
            time.sleep(0.02)
        script.send_signal(number)
        assert script.wait(60) == 3
    assert calls(site)[-1 - len(after) :] == ["stopped", *after]
    assert list(site.glob(".freshpairs-*")) == []


def test_slurm_says_that_a_node_did_not_come(site: Path) -> None:
    (site / ".venv/bin/srun").write_text("#!/bin/sh\nexit 1\n")
    code, said = run_script(site, "slurm.sh", "c.yaml", "/disk/run")
    assert code == 1
    assert said.splitlines()[-1].startswith(
        "a node's `ray start` ended while waiting for Ray's head"
    )
    assert not any(line.startswith("freshpairs") for line in calls(site))
