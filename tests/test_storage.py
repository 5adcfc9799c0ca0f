"""Runs in object storage: the same to the bit, killed anywhere, on whatever machine they go on."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
import yaml
from s3fs import S3FileSystem
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from judges.budget import Account, BudgetOptions
from judges.errors import UserError
from pipeline import job, run_directory
from pipeline.cli import app
from pipeline.config import Config, parse_config
from pipeline.learner import RemoteLearner
from pipeline.ledger import Ledger
from pipeline.stopping import Stopped
from pipeline.storage import run_here, storage_at, working_copy
from pipeline.sweep import _point
from tests import tiny
from tests.interruption import Killed, assert_same_run
from tests.object_storage import BUCKET, count_writes, fetched, in_memory, s3_server, stored
from workers import places
from workers.places import ObjectStore, StorageFailed, normalised, to_read, to_write


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where working copies are."""
    monkeypatch.setenv("FRESHPAIRS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(places, "LONGEST_WAIT", 0.0)
    return tmp_path / "cache"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> str:
    return in_memory(monkeypatch)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and judge that all runs here share."""
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def local(tiny_model: Path, folder: Path) -> Path:
    """The run that all others here must equal, in a directory."""
    return job.run(config(tiny_model, folder, str(folder / "local")), quiet=True).run_dir


def config(model: Path, folder: Path, place: str, **sections: Any) -> Config:
    """Four updates, two a round; checkpoints inside rounds and at their ends."""
    heldout = {"every": 3, "count": 3, "prompts": {"path": str(folder / "prompts.jsonl")}}
    given: dict[str, Any] = {
        "run": {"name": "tiny", "updates": 4, "dir": place},
        "resampling": {"updates_per_round": 2, "rounds_in_flight": 1},
        "evaluation": heldout,
        "checkpoint": {"every": 1, "keep": 2},
    }
    return tiny.config(model, folder, **(given | sections))


def assert_same_stored(
    url: str, local: Path, directory: Path, superfluous: frozenset[str] = frozenset()
) -> None:
    """What is stored is what the local run wrote, records, ledger and weights, and nothing more.

    But for a checkpoint that a run which was killed then would have removed: ``superfluous``.
    """
    there = fetched(url, directory)
    assert_same_run(there, local)
    mine, theirs = Ledger(there / "ledger"), Ledger(local / "ledger")
    assert len(mine) == len(theirs) > 0
    for one, other in zip(mine, theirs, strict=True):
        assert [c.ids.tolist() for c in one.completions] == [
            c.ids.tolist() for c in other.completions
        ]
    names, found = (
        {
            name
            for path in places.files_of(directory)
            if not (name := path.relative_to(directory).as_posix()).startswith(("logs/", "files/"))
        }
        for directory in (local, there)
    )
    assert names <= found
    assert {PurePosixPath(name).parent.name for name in found - names} <= superfluous
    latest = sorted((local / "checkpoints").iterdir())[-1].name
    state, other_state = (
        torch.load(path / "checkpoints" / latest / "learner.pt") for path in (there, local)
    )
    assert state["version"] == other_state["version"]
    for name, tensor in state["policy"].items():
        assert torch.equal(tensor, other_state["policy"][name])


def test_a_run_in_object_storage_is_the_local_run(
    tiny_model: Path, folder: Path, local: Path, memory: str, tmp_path: Path
) -> None:
    cfg = config(tiny_model, folder, f"{memory}/a/tiny")
    result = job.run(cfg, quiet=True)
    assert result.place == cfg.run.dir == f"{memory}/a/tiny"
    assert result.run_dir == cfg.run_dir == working_copy(result.place)
    assert_same_stored(result.place, local, tmp_path / "there")
    with pytest.raises(UserError, match=f"^run.dir={memory}/a/tiny: already exists; `freshpairs"):
        job.run(cfg, quiet=True)
    with pytest.raises(UserError, match="this run is finished; its policy is in memory://"):
        job.resume(result.place, quiet=True)


def kill(patch: pytest.MonkeyPatch, write: int) -> list[str]:
    """The process ends just before this write to the storage: none comes after it."""

    def die(number: int, name: str) -> None:
        if number >= write:
            raise Killed

    return count_writes(patch, die)


def run_killed_at(write: int, cfg: Config, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Run until that write; what it was to write, None where the run was over before."""
    with monkeypatch.context() as patch:
        done = kill(patch, write)
        try:
            job.run(cfg, quiet=True)
        except Killed:
            return done[write - 1]
    return None


def go_on(cfg: Config, *, elsewhere: bool = True) -> None:
    """Resume the run as far as it came; as on another machine, nothing is here but the storage."""
    if elsewhere:
        shutil.rmtree(cfg.run_dir, ignore_errors=True)
    there = stored(cfg.run_place)
    if "config.yaml" not in there:
        job.run(cfg, quiet=True)
    elif "policy/README.md" not in there:
        job.resume(cfg.run_place, quiet=True)


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(1, id="before anything is there", marks=pytest.mark.slow),
        pytest.param(14, id="between a round's two files", marks=pytest.mark.slow),
        pytest.param(29, id="late"),
    ],
)
def test_killed_and_resumed_on_another_machine(
    tiny_model: Path,
    folder: Path,
    local: Path,
    memory: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: int,
) -> None:
    cfg = config(tiny_model, folder, f"{memory}/tiny")
    assert run_killed_at(write, cfg, monkeypatch) is not None
    go_on(cfg)
    assert_same_stored(cfg.run_place, local, tmp_path / "there")


@pytest.mark.slow
def test_killed_at_every_write(
    tiny_model: Path,
    folder: Path,
    local: Path,
    memory: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the machine stays the same and its working copy is older or newer."""
    killed = []
    for write in range(1, 200):
        cfg = config(tiny_model, folder, f"{memory}/{write}/tiny")
        name = run_killed_at(write, cfg, monkeypatch)
        if name is None:
            break
        killed.append(name)
        go_on(cfg, elsewhere=write % 2 == 0)
        old = frozenset({"update-000002"} if name.startswith("- checkpoints/update-000002") else ())
        assert_same_stored(cfg.run_place, local, tmp_path / str(write), old)
    for written in (
        "config.yaml",
        "ledger/round-000000.pairs.parquet",
        "ledger/round-000000.parquet",
        "ledger/round-000001.reference.parquet",
        "checkpoints/update-000002/cursor.json",
        "- checkpoints/update-000001/cursor.json",
        "learner.pt",
        "policy/model.safetensors",
        "policy/README.md",
        "metrics.jsonl",
        "evaluations/update-000003.parquet",
    ):
        assert written in killed


def test_a_run_goes_on_where_the_files_it_was_begun_with_are_not(
    tiny_model: Path, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its judges are called in the records what they were called from the start."""
    begun_in = tmp_path / "mine"
    second = {"second": f"{begun_in}/second.py:f"}
    one, other = (
        config(tiny_model, begun_in, place, run={"name": "x", "updates": 2, "dir": place})
        for place in (str(tmp_path / "local"), f"{memory}/tiny")
    )
    (begun_in / "second.py").write_text("def f(prompts, completions):\n    return [0.0] * 9\n")
    one, other = (
        parse_config(cfg.model_dump() | {"judge": cfg.judge.model_dump() | second}, base=begun_in)
        for cfg in (one, other)
    )
    local = job.run(one, quiet=True).run_dir
    assert run_killed_at(14, other, monkeypatch) is not None
    begun_in.rename(tmp_path / "gone")
    shutil.rmtree(other.run_dir)
    job.resume(other.run_place, quiet=True)
    assert_same_stored(other.run_place, local, tmp_path / "there")
    kept = yaml.safe_load(stored(other.run_place)["config.yaml"])
    assert kept["judge"]["name"] == "files/judge.py:score"
    assert kept["judge"]["alias"] == f"{begun_in}/judge.py:score"
    assert kept["prompts"]["path"] == kept["evaluation"]["prompts"]["path"]
    names = {name for name in stored(other.run_place) if name.startswith("files/")}
    assert names == {"files/judge.py", "files/second.py", "files/prompts.jsonl"}


def test_a_sweep_knows_its_runs_in_object_storage_again(
    tiny_model: Path, folder: Path, memory: str
) -> None:
    cfg = config(tiny_model, folder, f"{memory}/tiny")
    run_directory.create_run_directory(cfg, {"generator": 1, "learner": 1})
    assert _point("tiny", cfg).begun
    other = config(tiny_model, folder, f"{memory}/tiny", learner={"learning_rate": 1e-3})
    with pytest.raises(UserError, match="learning_rate"):
        _point("tiny", other)


def test_a_stale_working_copy_is_replaced(
    tiny_model: Path,
    folder: Path,
    local: Path,
    memory: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A round that only the working copy holds does not count; judges' answers stay."""
    cfg = config(tiny_model, folder, f"{memory}/tiny")
    run_killed_at(20, cfg, monkeypatch)
    ledger = cfg.run_dir / "ledger"
    shutil.copy(ledger / "round-000000.parquet", ledger / "round-000009.parquet")
    (cfg.run_dir / "judge.sqlite").write_text("answers")
    (cfg.run_dir / "metrics.jsonl").write_text("not JSON\n")
    storage_at(cfg.run_place).fetch()
    assert not (ledger / "round-000009.parquet").exists()
    assert (cfg.run_dir / "judge.sqlite").read_text() == "answers"
    here = {path.relative_to(cfg.run_dir).as_posix() for path in places.files_of(cfg.run_dir)}
    learners = {name for name in stored(cfg.run_place) if name.startswith("checkpoints/")}
    kept = {name for name in here if name.startswith(("judge.sqlite", "logs/"))}
    assert len(kept) == 4
    assert here - kept == set(stored(cfg.run_place)) - learners
    assert learners


def test_a_new_run_begins_with_an_empty_working_copy(
    tiny_model: Path, folder: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(tiny_model, folder, f"{memory}/tiny")
    cfg.run_dir.mkdir(parents=True)
    (cfg.run_dir / "judge.sqlite").write_text("of a run that was there before")
    run_killed_at(2, cfg, monkeypatch)
    assert not (cfg.run_dir / "judge.sqlite").exists()


def test_what_is_half_uploaded_is_neither_a_checkpoint_nor_a_policy(memory: str) -> None:
    kept = storage_at(f"{memory}/x")
    final = kept.run_dir / "checkpoints" / "update-000002"

    def half() -> None:
        with kept.appearing(final, "cursor.json") as (_, there):
            with to_write(f"{there}/learner.pt") as path:
                path.write_text("weights")
            raise Killed

    with pytest.raises(Killed):
        half()
    assert list(stored(f"{memory}/x")) == ["checkpoints/update-000002/learner.pt"]
    assert kept.whole(final.parent, "cursor.json") == []
    with kept.appearing(final, "cursor.json") as (here, _):
        assert stored(f"{memory}/x") == {}
        (here / "cursor.json").write_text("{}")
    assert kept.whole(final.parent, "cursor.json") == [final]
    assert kept.read(final / "cursor.json") == "{}"
    kept.forget(final, "cursor.json")
    assert kept.whole(final.parent, "cursor.json") == []


def test_the_file_that_makes_a_directory_whole_is_written_and_removed_last(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = storage_at(f"{memory}/x")
    done = count_writes(monkeypatch, lambda number, name: None)
    with kept.appearing(kept.run_dir / "policy", "README.md") as (here, _):
        for name in ("README.md", "config.json", "tokenizer.json"):
            (here / name).write_text(name)
    kept.forget(kept.run_dir / "policy", "README.md")
    names = ["policy/config.json", "policy/tokenizer.json", "policy/README.md"]
    assert done == [*names, *(f"- {name}" for name in names)]


def test_a_directory_is_kept_as_it_is(memory: str) -> None:
    kept = storage_at(f"{memory}/x")
    events = kept.run_dir / "tensorboard"
    events.mkdir(parents=True)
    (events / "old").write_text("1")
    kept.keep(events)
    (events / "old").unlink()
    (events / "new").write_text("2")
    kept.keep(events)
    assert stored(f"{memory}/x") == {"tensorboard/new": b"2"}


def test_files_and_directories_go_to_a_place_and_back(memory: str, tmp_path: Path) -> None:
    for place in (str(tmp_path / "here"), f"{memory}/there"):
        with to_write(place) as directory:
            (directory / "inner").mkdir(parents=True)
            (directory / "inner" / "a").write_text("A")
            (directory / "b").write_text("B")
        with to_write(f"{place}/c") as path:
            path.write_text("C")
        with to_read(place) as directory:
            found = {p.relative_to(directory).as_posix() for p in places.files_of(directory)}
            assert found == {"b", "c", "inner/a"}
        with to_read(f"{place}/inner/a") as path:
            assert (path.name, path.read_text()) == ("a", "A")
    with pytest.raises(StorageFailed, match="not there"), to_read(f"{memory}/nothing"):
        pass


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("ftp://host/x", "run.dir=ftp://host/x: no storage of this kind is known: use a path, or"),
        ("s3://", "run.dir=s3://: names no bucket: s3://BUCKET/NAME"),
        ("file://x", "run.dir=file://x: a file's URL has three slashes: file:///shared/runs/x"),
    ],
)
def test_a_place_that_is_none(tiny_model: Path, tmp_path: Path, place: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        config(tiny_model, tmp_path, place)
    (line,) = str(caught.value).splitlines()
    assert said in line


def test_a_file_url_is_a_path(tiny_model: Path, tmp_path: Path) -> None:
    cfg = config(tiny_model, tmp_path, f"file://{tmp_path}/run")
    assert cfg.run.dir == cfg.run_place == str(cfg.run_dir) == f"{tmp_path}/run"
    assert normalised("s3://bucket/x/") == "s3://bucket/x"
    assert normalised("runs/x") == "runs/x"
    with run_here(f"file://{tmp_path}/run", ["config.yaml"]) as run:
        assert run == tmp_path / "run"


def test_a_missing_package_is_told_before_anything_is_written(
    tiny_model: Path, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "s3fs" else find_spec(name)
    )
    with pytest.raises(UserError) as caught:
        job.run(config(tiny_model, folder, "s3://bucket/x"), quiet=True)
    assert str(caught.value) == (
        's3://bucket/x: s3fs is not installed: pip install "freshpairs[s3]"'
    )
    assert not cache.exists()


class Broken:
    """Files of a storage that fails so many times, then works."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)

    def cat_file(self, path: str) -> bytes:
        if self.failures:
            raise self.failures.pop(0)
        return b"text"


@pytest.mark.parametrize(
    ("failures", "said"),
    [
        ([TimeoutError("slow"), OSError("reset")], None),
        ([OSError("reset")] * 9, "does not answer as it should (reset): check the network"),
        ([PermissionError("Forbidden")], "refused (Forbidden): check the credentials"),
    ],
)
def test_what_fails_for_a_moment_is_asked_again(
    memory: str, monkeypatch: pytest.MonkeyPatch, failures: list[Exception], said: str | None
) -> None:
    files = Broken(*failures)
    store = ObjectStore(f"{memory}/x")
    monkeypatch.setattr(store, "_connected", lambda: files)
    if said is None:
        assert store.read("config.yaml") == b"text"
        return
    with pytest.raises(StorageFailed) as caught:
        store.read("config.yaml")
    assert str(caught.value).startswith(f"{memory}/x: {said}")
    assert len(failures) - len(files.failures) == (1 if len(failures) == 1 else places.ATTEMPTS)


def test_storage_that_fails_in_the_middle_of_a_run_says_how_to_go_on(
    tiny_model: Path,
    folder: Path,
    local: Path,
    memory: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = config(tiny_model, folder, f"{memory}/tiny")

    def fail(number: int, name: str) -> None:
        if number > 12:
            raise StorageFailed(f"{memory}/tiny: gone")

    with monkeypatch.context() as patch:
        count_writes(patch, fail)
        with pytest.raises(StorageFailed) as caught:
            job.run(cfg, quiet=True)
    note = f"nothing is lost: `freshpairs resume {memory}/tiny` goes on from here"
    assert caught.value.__notes__ == [note]
    job.resume(f"{memory}/tiny", quiet=True)
    assert_same_stored(cfg.run_place, local, tmp_path / "there")


@pytest.mark.parametrize("kind", ["path", "URL"])
def test_a_learner_that_does_not_see_the_run_directory(
    tiny_model: Path,
    folder: Path,
    memory: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    place = f"{memory}/tiny" if kind == "URL" else str(tmp_path / "run")
    monkeypatch.setattr(RemoteLearner, "look", lambda self, place: ("node7", "No such file"))
    with pytest.raises(UserError) as caught:
        job.run(config(tiny_model, folder, place), quiet=True)
    (line,) = str(caught.value).splitlines()
    unseen = "the learner's machine (node7) does not see it (No such file)"
    assert line.startswith(f"run.dir={place}: {unseen}: ")
    monkeypatch.undo()
    run_directory.refuse_existing_run(tmp_path / "run")
    assert not places.files_of(tmp_path / "run")


def test_the_learner_reads_what_was_written_and_not_what_was_there(tmp_path: Path) -> None:
    seen: list[str] = []

    class Learner:
        def look(self, place: str) -> tuple[str, str]:
            seen.append(Path(place).read_text())
            return "here", seen[-1]

    learner: Any = Learner()
    for _ in range(2):
        storage_at(tmp_path / "run").check_seen_by(learner)
    assert len(set(seen)) == 2
    learner.look = lambda place: ("there", seen[0])
    with pytest.raises(UserError, match="does not see it"):
        storage_at(tmp_path / "run").check_seen_by(learner)
    assert list((tmp_path / "run").iterdir()) == []


def test_people_need_a_store_that_lasts(tiny_model: Path, tmp_path: Path, memory: str) -> None:
    human = {"name": "human", "args": {"port": 0}}
    for judge in (human, {"name": "ensemble", "args": {"members": [human, "rules"]}}):
        with pytest.raises(UserError) as caught:
            config(tiny_model, tmp_path, f"{memory}/x", judge=judge)
        assert f"judge.args.store: not set, and run.dir={memory}/x cannot" in str(caught.value)
        config(tiny_model, tmp_path, str(tmp_path / "run"), judge=judge)
    lasting = {"name": "human", "args": {"store": str(tmp_path / "people.sqlite")}}
    config(tiny_model, tmp_path, f"{memory}/x", judge=lasting)


def test_what_is_on_its_way_is_on_the_caches_disk(
    memory: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
    with to_write(f"{memory}/x/learner.pt") as path:
        assert path.is_relative_to(cache)
        path.write_text("weights")
    with to_read(f"{memory}/x/learner.pt") as path:
        assert (path.is_relative_to(cache), path.read_text()) == (True, "weights")
    kept = storage_at(f"{memory}/x")
    with kept.appearing(kept.run_dir / "policy", "README.md") as (here, _):
        assert here.is_relative_to(cache)
        (here / "README.md").write_text("")
    with run_here(f"{memory}/x", ["learner.pt"]) as here:
        assert here.is_relative_to(cache)
    assert places.files_of(cache) == []


def test_a_budget_needs_an_account_that_every_machine_sees(
    tiny_model: Path, tmp_path: Path, memory: str
) -> None:
    """Runs that share answers do not share what they may spend."""
    budget = {"labels": 10}
    with pytest.raises(UserError) as caught:
        config(tiny_model, tmp_path, f"{memory}/x", judge={"budget": budget})
    (line,) = str(caught.value).splitlines()
    assert f"judge.cache=auto: judge.budget is counted in its file, and run.dir={memory}" in line
    config(tiny_model, tmp_path, str(tmp_path / "run"), judge={"budget": budget})
    config(tiny_model, tmp_path, f"{memory}/x", judge={"args": {}})
    shared = tmp_path / "shared.sqlite"
    for name in ("x", "y"):  # which share answers, not what they may spend
        url = f"{memory}/{name}"
        judge = {"name": f"{tmp_path}/judge.py:score", "budget": budget, "cache": str(shared)}
        cfg = config(tiny_model, tmp_path, url, judge=judge, run={"seed": len(name), "dir": url})
        with pytest.raises(Stopped, match=r"judge\.budget\.labels=10: 8 are spent"):
            job.run(cfg, quiet=True)
        assert Account(shared, f"{url} {cfg.judge.title}", BudgetOptions()).spent().labels == 8
        shutil.rmtree(cfg.run_dir)
        with pytest.raises(Stopped, match=r"judge\.budget\.labels=10: 8 are spent"):
            job.resume(url, quiet=True)


def test_what_a_job_left_that_ended_before_its_run_began_is_no_run(
    memory: str, tmp_path: Path
) -> None:
    for name in (".marker", "files/judge.py"):
        with to_write(f"{memory}/x/{name}") as path:
            path.write_text("")
    run_directory.refuse_existing_run(f"{memory}/x")
    with to_write(f"{memory}/x/notes.txt") as path:
        path.write_text("")
    with pytest.raises(UserError, match="already exists"):
        run_directory.refuse_existing_run(f"{memory}/x")


def test_working_copies_have_the_runs_name_and_are_told_apart(cache: Path) -> None:
    one, other = working_copy("s3://a/runs/x"), working_copy("s3://b/runs/x")
    assert one != other
    assert one.name == other.name == "x"
    assert one.is_relative_to(cache / "runs")


@pytest.mark.slow
def test_a_run_over_http_is_the_local_run(
    tiny_model: Path,
    folder: Path,
    local: Path,
    endpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With dashboards; its policy and its records are read from the URL alone."""
    url = f"s3://{BUCKET}/whole/tiny"
    cfg = config(tiny_model, folder, url, tracking={"tensorboard": True})
    result = job.run(cfg, quiet=True)
    names = [name for name in stored(url) if name.startswith("tensorboard/")]
    assert len(names) == 1
    ObjectStore(url).remove(names)
    assert_same_stored(url, local, tmp_path / "there")
    with pytest.raises(UserError, match=f"^run.dir={url}: already exists"):
        job.run(cfg, quiet=True)

    shutil.rmtree(result.run_dir)
    policy = tmp_path / "there" / "policy"
    model = AutoModelForCausalLM.from_pretrained(policy)
    ids = AutoTokenizer.from_pretrained(policy)("a b c", return_tensors="pt")
    assert torch.isfinite(model(**ids).logits).all()
    out, same = tmp_path / "there.jsonl", tmp_path / "local.jsonl"
    for command in (
        ["export", url, "--out", str(out)],
        ["export", str(local), "--out", str(same)],
        ["compare", url, str(local), "--json", str(tmp_path / "compared.json")],
        ["explain", "dpo", "--run", url, "--out", str(tmp_path / "dpo.png")],
    ):
        told = CliRunner().invoke(app, command)
        assert told.exit_code == 0, told.output
    assert out.read_text() == same.read_text()
    runs = json.loads((tmp_path / "compared.json").read_text())["runs"]
    assert [(run["run"], run["finished"]) for run in runs] == [(url, True), (str(local), True)]

    evaluated, _ = run_directory.read_run_config(url, ["evaluation.count=3"])
    again = job.evaluate(evaluated, say=lambda line: None)
    last = job.last_evaluations(local)
    assert again.place == url
    assert again.evaluations[0]["quality"] == last[0]["quality"] is not None
    assert any(name.startswith("evaluations/2") for name in stored(url))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "ledger/round-000000.parquet",
        "ledger/round-000001.reference.parquet",
        "checkpoints/update-000002/cursor.json",
        "- checkpoints/update-000001/cursor.json",
        "policy/model.safetensors",
        "policy/tokenizer.json",
        "policy/README.md",
    ],
)
def test_killed_over_http_and_resumed_on_another_machine(
    tiny_model: Path,
    folder: Path,
    local: Path,
    endpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    cfg = config(tiny_model, folder, f"s3://{BUCKET}/{tmp_path.name}/tiny")
    dead = False

    def die(number: int, written: str) -> None:
        nonlocal dead
        dead = dead or done[-1] == name
        if dead:
            raise Killed

    with monkeypatch.context() as patch:
        done = count_writes(patch, die)
        with pytest.raises(Killed):
            job.run(cfg, quiet=True)
    go_on(cfg)
    assert_same_stored(cfg.run_place, local, tmp_path / "there")


@pytest.mark.slow
def test_a_checkpoint_that_did_not_arrive_is_written_again(
    tiny_model: Path,
    folder: Path,
    local: Path,
    endpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The learner's upload ends in the middle: some of its bytes are there, under its name."""
    cfg = config(tiny_model, folder, f"s3://{BUCKET}/half/tiny")
    put, calls = ObjectStore.put, 0

    def half(store: ObjectStore, source: Path, name: str) -> None:
        nonlocal calls
        calls += name == "learner.pt"
        if calls == 3 and name == "learner.pt":
            source.write_bytes(source.read_bytes()[:1000])
            put(store, source, name)
        if calls == 3:
            raise Killed
        put(store, source, name)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "put", half)
        with pytest.raises(Killed):
            job.run(cfg, quiet=True)
    assert len(stored(cfg.run_place)["checkpoints/update-000003/learner.pt"]) == 1000
    go_on(cfg)
    assert_same_stored(cfg.run_place, local, tmp_path / "there")


@pytest.mark.slow
def test_mistakes_over_http_are_told_in_a_line_before_anything_is_written(
    tiny_model: Path, folder: Path, endpoint: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistake(url: str) -> str:
        S3FileSystem.clear_instance_cache()
        with pytest.raises(UserError) as caught:
            job.run(config(tiny_model, folder, url), quiet=True)
        (line,) = str(caught.value).splitlines()
        with pytest.raises(UserError), run_here(url, ["config.yaml"]):
            pass
        assert not cache.exists()
        return line

    said = mistake("s3://nobodys-bucket/x")
    assert said.startswith("run.dir=s3://nobodys-bucket/x: not there (The specified bucket does")
    assert said.endswith("): make the bucket, or name another")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    said = mistake(f"s3://{BUCKET}/x")
    assert said.startswith(f"run.dir=s3://{BUCKET}/x: no credentials (Unable to locate")
    assert "give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in said
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    said = mistake(f"s3://{BUCKET}/x")
    assert said.startswith(f"run.dir=s3://{BUCKET}/x: does not answer as it should (Could not con")
    assert said.endswith("): check AWS_ENDPOINT_URL and the network")
