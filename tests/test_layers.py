"""Who may import whom, what stays unloaded, and whose ``judges`` comes first."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.ledger import Ledger
from tests import tiny

CHECKOUT = Path(__file__).resolve().parent.parent
FRESHPAIRS = Path(sys.executable).parent / "freshpairs"
OURS = {"judges", "workers", "pipeline", "tests", "benchmarks"}


def imports_of(source: str) -> set[str]:
    """Every module that a source imports, wherever in it; ``from a import b`` is a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found |= {name.name for name in names}
            case ast.ImportFrom(module=module, names=names, level=level):
                assert level == 0, "imports are absolute"
                assert module is not None
                found |= {module, *(f"{module}.{name.name}" for name in names)}
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                found.add(module)
    return found


def tops(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def imports(layer: str) -> Iterator[tuple[str, set[str]]]:
    """Each file of a layer, relative to the checkout, and the modules it imports."""
    files = sorted((CHECKOUT / layer).rglob("*.py"))
    assert files
    for file in files:
        yield str(file.relative_to(CHECKOUT)), imports_of(file.read_text())


def who_imports(layer: str, *forbidden: str) -> list[tuple[str, str]]:
    return [
        (file, top)
        for file, modules in imports(layer)
        for top in sorted(tops(modules))
        if top in forbidden
    ]


def test_imports_are_found_wherever_they_stand():
    source = """
        import a.b, c as d
        if True:
            from e.f import g
        class K:
            def f(self):
                import h
                importlib.import_module("i.j")
                import_module("k")
                __import__("l")
    """
    found = imports_of(textwrap.dedent(source))
    assert found == {"a.b", "c", "e.f", "e.f.g", "h", "i.j", "k", "l"}
    assert tops(found) == {"a", "c", "e", "h", "i", "k", "l"}


def test_judges_import_nothing_of_ours():
    assert who_imports("judges", *(OURS - {"judges"}), "ray", "vllm") == []


def test_workers_import_judges_only_and_no_ray():
    assert who_imports("workers", *(OURS - {"judges", "workers"}), "ray") == []


def test_the_pipeline_imports_no_torch_and_ray_only_where_it_launches():
    assert who_imports("pipeline", "torch", "vllm", "tests", "benchmarks") == []
    users_of_ray = {file for file, _ in who_imports("pipeline", "ray")}
    assert {Path(file).parent.as_posix() for file in users_of_ray} == {"pipeline/launch"}


def test_vllm_stays_in_its_generator_and_transfer_files():
    for file, _ in who_imports("workers", "vllm"):
        assert file.startswith("workers/vllm_")


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)


COMMAND = "import pipeline.cli; sys.argv = ['freshpairs', *{}]; ended(pipeline.cli.main)"


@pytest.mark.parametrize(
    "statement",
    [
        "import pipeline.config",
        "import pipeline; pipeline.load_config",
        "import pipeline.run_directory",
        COMMAND.format(["--help"]),
        COMMAND.format(["train", "-h"]),
        COMMAND.format(["train", "no.yaml"]),
        "import judges.build, workers.messages, workers.options, workers.generator",
        "import workers.learner.options, workers.judge_worker, pipeline.sync",
    ],
)
def test_what_reads_a_config_loads_no_machinery(statement):
    program = (
        "import json, sys\n"
        "def ended(command):\n"
        "    try:\n"
        "        command()\n"
        "    except SystemExit:\n"
        "        pass\n"
        f"{statement}\n"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'datasets', 'scipy'}\n"
        "print(json.dumps(sorted(heavy & set(sys.modules))))\n"
    )
    done = run(sys.executable, "-c", program, cwd=CHECKOUT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


@pytest.fixture
def users_folder(tmp_path: Path, tiny_model: Path) -> Path:
    """A folder with packages named like ours, that say so when they are imported, and a config."""
    for package in ("judges", "workers", "pipeline"):
        (tmp_path / package).mkdir()
        for module in ("__init__.py", "interface.py"):
            (tmp_path / package / module).write_text("raise RuntimeError('the user's')\n")
    (tmp_path / "mine.py").write_text(
        "import judges.interface\n"
        "from judges.interface import Score\n"
        "from workers.messages import Fate\n"
        "def score(prompts, completions, **columns):\n"
        "    return [Score(len(set(c.split())) + i / 100, judges.interface.__file__)\n"
        "            for i, c in enumerate(completions)]\n"
    )
    tiny.write_prompts(tmp_path / "prompts.jsonl")
    config = {
        "run": {"name": "mine", "updates": 1},
        "policy": {"model": str(tiny_model)},
        "prompts": {"path": "prompts.jsonl"},
        "sampling": {"prompts_per_update": 2, "max_new_tokens": 4},
        "generator": {"backend": "transformers"},
        "judge": {"name": "mine.py:score"},
        "tracking": {"tensorboard": False},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_the_doctor_answers_in_a_folder_with_packages_named_like_ours(users_folder):
    done = run(FRESHPAIRS, "doctor", cwd=users_folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "can run" in done.stdout


@pytest.mark.parametrize(
    "address", ["inline", pytest.param("local", marks=pytest.mark.slow, id="local (Ray)")]
)
def test_a_run_in_such_a_folder_uses_our_packages_and_the_users_judge(users_folder, address):
    done = run(FRESHPAIRS, "train", "mine.yaml", f"cluster.address={address}", cwd=users_folder)
    assert done.returncode == 0, done.stderr
    record = json.loads((users_folder / "runs/mine/metrics.jsonl").read_text().splitlines()[0])
    assert (record["kind"], record["update"]) == ("update", 1)
    assert record["pairs"] > 0
    for group in Ledger(users_folder / "runs/mine/ledger").read(0).groups:
        assert set(group.judgement.reasons) == {str(CHECKOUT / "judges" / "interface.py")}
