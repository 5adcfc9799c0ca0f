"""The same run as Ray actors: same bits as in one process, errors that reach the user."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from judges.errors import UserError
from pipeline import job
from pipeline.config import Config
from pipeline.handles import WorkerDied
from pipeline.launch.crew import CrewPlan, WorkerPlan, plan_crew
from tests import tiny
from workers.generator import SampleRequest
from workers.verdicts import JudgeFailed
from workers.weight_sync.buckets import Receipt, WeightPush


def on_ray(cfg: Config, run_dir: Path) -> Config:
    run = cfg.run.model_copy(update={"dir": str(run_dir)})
    cluster = cfg.cluster.model_copy(update={"address": "local"})
    return cfg.model_copy(update={"run": run, "cluster": cluster})


OWN = """
from workers.learner.objectives import needs

@needs(per_token=True)
def first_token(logps):
    sides = (logps.chosen_logprobs, logps.rejected_logprobs)
    chosen, rejected = (side.policy_BT[:, 0] - side.ref_BT[:, 0] for side in sides)
    return (1.0 - chosen + rejected).clamp_min(0.0)
"""


@pytest.mark.parametrize(
    ("objective", "rounds_in_flight"),
    [
        ({"name": "dpo"}, 0),
        ({"name": "dpo"}, 1),
        pytest.param({"name": "kto"}, 1, marks=pytest.mark.slow),
        pytest.param({"name": "nash_md"}, 1, marks=pytest.mark.slow),
        pytest.param({"name": "{folder}/own.py:first_token"}, 1, marks=pytest.mark.slow),
    ],
)
def test_ray_and_inline_agree_to_the_bit(
    tiny_model: Path, tmp_path: Path, objective: dict[str, str], rounds_in_flight: int
) -> None:
    prompts = {"path": str(tmp_path / "prompts.jsonl")}
    (tmp_path / "own.py").write_text(OWN)
    cfg = tiny.config(
        tiny_model,
        tmp_path,
        objective={"name": objective["name"].format(folder=tmp_path)},
        pairing={"ties": "keep" if objective["name"] == "nash_md" else "drop"},
        resampling={"updates_per_round": 2, "rounds_in_flight": rounds_in_flight},
        evaluation={"every": 3, "count": 5, "prompts": prompts},
    )
    inline = job.run(cfg, quiet=True).run_dir
    ray = job.run(on_ray(cfg, tmp_path / "on-ray"), quiet=True).run_dir
    assert tiny.records(ray) == tiny.records(inline)
    one, other = (load_file(path / "policy" / "model.safetensors") for path in (ray, inline))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert no_ray_processes()


def no_ray_processes() -> bool:
    """Whether this process has left no Ray daemon behind."""
    listing = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True
    ).stdout
    return "raylet" not in listing and "gcs_server" not in listing


def test_the_number_of_replicas_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    cfg = tiny.config(tiny_model, tmp_path, resampling={"updates_per_round": 3})
    one = job.run(cfg, quiet=True).run_dir
    three = cfg.model_copy(
        update={
            "generator": cfg.generator.model_copy(update={"replicas": 3}),
            "run": cfg.run.model_copy(update={"dir": str(tmp_path / "three")}),
        }
    )
    job.run(three, quiet=True)
    assert tiny.records(three.run_dir) == tiny.records(one)


def test_a_workers_error_arrives_as_itself(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "needs.py").write_text("def score(completions, answer):\n    return answer\n")
    cfg = tiny.config(tiny_model, tmp_path, judge={"name": f"{tmp_path}/needs.py:score"})
    with pytest.raises(UserError, match="it needs the column answer"):
        job.run(on_ray(cfg, tmp_path / "first"), quiet=True)
    assert not (tmp_path / "first").exists()
    (tmp_path / "needs.py").write_text("def score(completions):\n    raise OSError('offline')\n")
    with pytest.raises(JudgeFailed, match="offline"):
        job.run(on_ray(cfg, tmp_path / "second"), quiet=True)


@pytest.mark.slow
def test_a_judge_that_cannot_be_built_says_why(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "built.py").write_text(
        "class Judge:\n"
        "    def __init__(self):\n        raise LookupError('no weights at /x')\n"
        "    def __call__(self, completions):\n        return [0.0] * len(completions)\n"
    )
    cfg = tiny.config(tiny_model, tmp_path, judge={"name": f"{tmp_path}/built.py:Judge"})
    with pytest.raises(Exception, match="no weights at /x"):
        job.run(on_ray(cfg, tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_dead_worker_is_named_and_the_run_goes_on_later(tiny_model: Path, tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    cfg = tiny.config(tiny_model, tmp_path)
    working = judge.read_text()
    judge.write_text("import os\n\ndef score(completions):\n    os.kill(os.getpid(), 9)\n")
    with pytest.raises(WorkerDied, match="judge 0 ended") as death:
        job.run(on_ray(cfg, tmp_path / "run"), quiet=True)
    assert f"freshpairs resume {tmp_path / 'run'}" in death.value.__notes__[0]
    judge.write_text(working)
    assert job.resume(tmp_path / "run", quiet=True).run_dir == tmp_path / "run"


def mortal(plan: CrewPlan, marker: Path, how: str) -> CrewPlan:
    """The plan with generators of which the first to sample prompt 9 dies or, once, lies."""

    def hosted(worker: WorkerPlan) -> WorkerPlan:
        def build() -> object:
            generator = worker.build()
            sample, load = generator.sample, generator.load

            def dying(request: SampleRequest) -> object:
                ours = any(prompt.position == 9 for prompt in request.prompts)
                if how == "dies" and ours and not marker.exists():
                    marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return sample(request)

            def deaf(push: WeightPush) -> object:
                if how == "lies" and push.version == 2 and not marker.exists():
                    marker.touch()
                    generator._standing.received = Receipt(push.version, push.checksum)
                    generator.version = push.version
                    return generator._standing.received
                return load(push)

            generator.sample, generator.load = dying, deaf
            return generator

        return dataclasses.replace(worker, build=build)

    return dataclasses.replace(plan, generators=tuple(map(hosted, plan.generators)))


@pytest.mark.parametrize(
    ("how", "rounds_in_flight"),
    [("dies", 1), pytest.param("lies", 0, marks=pytest.mark.slow)],
)
def test_a_generator_that_dies_or_lies_changes_nothing(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    rounds_in_flight: int,
) -> None:
    """Restarted or pushed to again, given its prompts again: the run is the undisturbed one."""
    overlap = {"rounds_in_flight": rounds_in_flight}
    cfg = tiny.config(tiny_model, tmp_path, resampling=overlap)
    job.run(cfg, quiet=True)
    undisturbed = tiny.records(cfg.run_dir)

    marker = tmp_path / "happened"
    monkeypatch.setattr(job, "plan_crew", lambda *args: mortal(plan_crew(*args), marker, how))
    mended = on_ray(cfg, tmp_path / "mended")
    job.run(mended, quiet=True)
    assert marker.exists()
    assert tiny.records(mended.run_dir) == undisturbed
    for ledger in sorted((cfg.run_dir / "ledger").glob("*.parquet")):
        other = mended.run_dir / "ledger" / ledger.name
        assert pq.read_table(other).equals(pq.read_table(ledger))


@pytest.mark.slow
def test_a_users_folder_does_not_come_before_ours(tiny_model: Path, tmp_path: Path) -> None:
    """Ray puts the driver's directory first on its workers' path: ours must be it."""
    cfg = tiny.config(tiny_model, tmp_path, run={"updates": 1, "dir": str(tmp_path / "run")})
    theirs = tmp_path / "theirs"
    for package in ("judges", "workers", "pipeline"):
        (theirs / package).mkdir(parents=True)
        (theirs / package / "__init__.py").write_text("raise ImportError('the wrong one')\n")
    (theirs / "go.py").write_text(
        "import sys\n"
        "sys.path = [p for p in sys.path if p not in ('', sys.argv[1])]\n"
        "from pathlib import Path\n"
        "from pipeline import run\n"
        "from pipeline.config import Config\n"
        "run(Config.model_validate_json(Path('cfg.json').read_text()), quiet=True)\n"
    )
    (theirs / "cfg.json").write_text(on_ray(cfg, tmp_path / "run").model_dump_json())
    found = subprocess.run(
        [sys.executable, "go.py", str(theirs)],
        cwd=theirs,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "run" / "policy").is_dir()
