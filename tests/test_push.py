"""Publishing a run, over HTTP to a hub of this machine: the very bytes, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from typer.testing import CliRunner, Result

from judges.errors import UserError
from pipeline.cli_tools import tools
from pipeline.config import parse_config
from pipeline.export import export_pairs
from pipeline.push import PushError, push
from pipeline.run_directory import create_run_directory
from tests.fake_hub import TOKEN, Hub, Repository, fake_hub
from tests.test_export import write_run

# The hub's client to its own HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

WEIGHTS = bytes(range(256)) * 4096
FILES = {
    "model.safetensors": WEIGHTS,
    "config.json": b"{}\n",
    "tokenizer.json": b'{"word": 1}',
    "adapter/adapter_model.safetensors": b"low rank",
}
CARD = """---
base_model: {model}
tags: [freshpairs, preference-optimization]
---

# mine

`{model}` aligned.

- judge: {judge}
"""


@pytest.fixture(scope="module")
def _hub() -> Iterator[Hub]:
    with fake_hub() as hub:
        yield hub


@pytest.fixture
def hub(_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    _hub.repositories.clear()
    _hub.asked.clear()
    _hub.fail.clear()
    _hub.busy = False
    monkeypatch.setenv("HF_ENDPOINT", _hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    return _hub


def run_in(folder: Path, model: str = "org/base", **sections: Any) -> Path:
    """A finished run of two rounds, three pairs in all."""
    run = folder / "run"
    judge = {"name": "length"}
    raw = {
        "run": {"dir": str(run), "name": "mine"},
        "policy": {"model": model},
        "prompts": {"path": "stories.jsonl"},
        "judge": judge,
    }
    cfg = parse_config(raw | sections, base=folder)
    create_run_directory(cfg, {"generator": 1, "learner": 1})
    write_run(run, "once")
    for name, content in FILES.items():
        (run / "policy" / name).parent.mkdir(parents=True, exist_ok=True)
        (run / "policy" / name).write_bytes(content)
    card = CARD.format(model=cfg.policy.model, judge=cfg.judge.title)
    (run / "policy" / "README.md").write_text(card)
    return run


def line_of(run: Path, *args: Any, error: type[Exception] = UserError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        push(run, *args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_hub_receives_the_very_bytes(hub: Hub, tmp_path: Path) -> None:
    run = run_in(tmp_path)
    assert push(run) == [f"{hub.url}/me/mine", f"{hub.url}/datasets/me/mine-pairs"]
    model, dataset = hub.model("me/mine"), hub.dataset("me/mine-pairs")
    card = (run / "policy/README.md").read_bytes()
    assert model.files == FILES | {"README.md": card, ".gitattributes": b""}
    out = tmp_path / "set.parquet"
    export_pairs(run, out)
    pairs = dataset.files.pop("data/train-00000-of-00001.parquet")
    assert pairs == out.read_bytes()
    assert set(dataset.files) == {"README.md", ".gitattributes"}
    assert model.private
    assert dataset.private
    assert [len(repository.commits) for repository in (model, dataset)] == [2, 2]
    sent = [path for path in hub.asked if "/commit/" in path]
    assert sent == [
        "POST /api/models/me/mine/commit/main",
        "POST /api/datasets/me/mine-pairs/commit/main",
    ]


def test_the_card_of_the_pairs(hub: Hub, tmp_path: Path) -> None:
    run = run_in(tmp_path)
    push(run, "me/other", "me/set", private=False)
    dataset = hub.dataset("me/set")
    assert not dataset.private
    assert dataset.tags() == ["freshpairs", "preference"]
    card = dataset.files["README.md"].decode()
    # write_run: round 0 has one pair of prompt 0, round 1 two pairs of prompt 10
    assert (
        "3 pairs on 2 prompts, from 2 rounds: what [me/other](/me/other) learned from, exported "
        "by Freshpairs.\n"
    ) in card
    assert "- prompts: `stories.jsonl`\n" in card
    assert "- judge: length\n" in card
    assert "license:" not in card
    assert "Licence: none is stated here." in card
    (tmp_path / "set.parquet").write_bytes(dataset.files["data/train-00000-of-00001.parquet"])
    columns = [line.split(" | ")[0][2:] for line in card.splitlines() if line.startswith("| ")]
    assert columns[2:] == pq.read_schema(tmp_path / "set.parquet").names


def test_files_of_this_machine_are_named_without_their_place(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "kind.py").write_text("def score(prompts, completions): ...")
    judge = {"name": f"{tmp_path}/kind.py:score"}
    run = run_in(tmp_path, model=str(tmp_path / "base"), judge=judge)
    push(run)
    card = hub.model("me/mine").files["README.md"].decode()
    assert card == CARD.replace("base_model: {model}\n", "").format(
        model="base", judge="kind.py:score"
    )
    assert str(tmp_path) not in hub.dataset("me/mine-pairs").files["README.md"].decode()


def test_no_text_names_this_machine(hub: Hub, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    run = run_in(tmp_path, model=str(base))
    adapter = {"base_model_name_or_path": str(base), "r": 2}
    (run / "policy/adapter/adapter_config.json").write_text(json.dumps(adapter))
    (run / "policy/config.json").write_text(f'{{"a": "{base}", "b": "{run}/policy", "c": "é"}}')
    push(run, pairs=False)
    files = hub.model("me/mine").files
    # null is what PEFT has where none is said; a name of ours would be looked for on the hub
    assert json.loads(files["adapter/adapter_config.json"]) == {
        "base_model_name_or_path": None,
        "r": 2,
    }
    assert files["config.json"].decode() == '{"a": "base", "b": "run/policy", "c": "é"}'
    assert files["model.safetensors"] == WEIGHTS
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]


def test_an_adapter_names_a_base_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    run = run_in(tmp_path)
    adapter = b'{"base_model_name_or_path": "org/base"}'
    (run / "policy/adapter/adapter_config.json").write_bytes(adapter)
    push(run, pairs=False)
    assert hub.model("me/mine").files["adapter/adapter_config.json"] == adapter


def test_pushing_again_is_a_commit_on_top(hub: Hub, tmp_path: Path) -> None:
    run = run_in(tmp_path)
    push(run, pairs=False)
    assert ("dataset", "me/mine-pairs") not in hub.repositories
    model = hub.model("me/mine")
    model.files |= {"model-00001-of-00002.safetensors": b"old", "picture.png": b"theirs"}
    (run / "policy/config.json").write_bytes(b"{1}")
    push(run, pairs=False)
    assert len(model.commits) == 3
    assert model.files["config.json"] == b"{1}"
    assert model.files["picture.png"] == b"theirs"
    assert "model-00001-of-00002.safetensors" not in model.files  # would be loaded


def test_what_others_hold_is_left_alone(hub: Hub, tmp_path: Path) -> None:
    theirs = {"README.md": b"---\ntags: [cats]\n---\n", "model.bin": b"mine"}
    hub.repositories["dataset", "me/mine-pairs"] = Repository(True, dict(theirs))
    run = run_in(tmp_path)
    assert line_of(run) == (
        f"{hub.url}/datasets/me/mine-pairs: exists and was not pushed by Freshpairs (its card has "
        "no tag freshpairs); name another repository, or --force to put a commit on top of it"
    )
    assert hub.dataset("me/mine-pairs").files == theirs
    assert len(hub.repositories) == 1  # not the model either
    push(run, force=True)
    held = hub.dataset("me/mine-pairs").files
    assert held["model.bin"] == b"mine"
    assert "data/train-00000-of-00001.parquet" in held


def test_an_empty_repository_is_filled(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["model", "me/mine"] = Repository(True)
    push(run_in(tmp_path), pairs=False)
    assert hub.model("me/mine").files["model.safetensors"] == WEIGHTS


@pytest.mark.parametrize("private", [True, False])
def test_as_private_as_was_asked(hub: Hub, tmp_path: Path, private: bool) -> None:
    run = run_in(tmp_path)
    push(run, pairs=False, private=private)
    there, other = ("private", "--public") if private else ("public", "--private")
    assert line_of(run, pairs=False, private=not private) == (
        f"{hub.url}/me/mine: exists and is {there}, {other} does not change that: push with "
        f"--{there}, or change it in the repository's settings first"
    )


def test_a_push_that_breaks_off_publishes_nothing(hub: Hub, tmp_path: Path) -> None:
    run = run_in(tmp_path)
    hub.fail["/datasets/me/mine-pairs/commit"] = 400
    with pytest.raises(PushError) as caught:
        push(run)
    assert str(caught.value) == f"{hub.url}: answered 400 (so it is said); run this again later"
    assert caught.value.__notes__ == [f"published before that: {hub.url}/me/mine"]
    assert set(hub.dataset("me/mine-pairs").files) == {".gitattributes"}
    hub.fail.clear()
    push(run)  # takes up the empty repository
    assert "README.md" in hub.dataset("me/mine-pairs").files


def test_somebody_who_commits_meanwhile(hub: Hub, tmp_path: Path) -> None:
    run = run_in(tmp_path)
    push(run, pairs=False)
    hub.busy = True
    assert line_of(run, pairs=False) == (
        f"{hub.url}: the repository was changed meanwhile (main is elsewhere); look at it, then "
        "run this again"
    )


def test_given_pairs_are_somebodys(hub: Hub, tmp_path: Path) -> None:
    run = run_in(tmp_path, prompts={"pairs": "theirs.jsonl"})
    assert push(run) == [f"{hub.url}/me/mine"]
    push(run, dataset="me/theirs")
    card = hub.dataset("me/theirs").files["README.md"].decode()
    assert "- a given set, `theirs.jsonl`: this run sampled and judged none of it\n" in card


def test_a_refused_token(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_in(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    said = line_of(run)
    assert said.startswith(f"{hub.url}: refuses the token (")
    assert said.endswith("); `hf auth login --force`, or a valid HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert line_of(run, "you/mine") == (
        f"{hub.url}: the token may not do that (You don't own you); give one that may write there, "
        "or another --repo"
    )
    monkeypatch.delenv("HF_TOKEN")
    hub.asked.clear()
    assert line_of(run) == "no token for the hub: `hf auth login` first, or set HF_TOKEN"
    assert not hub.asked


def test_no_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_in(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    said = line_of(run)
    assert said.startswith("http://127.0.0.1:9: not reached (")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert line_of(run) == "HF_HUB_OFFLINE is set: unset it to push to a hub"


def test_a_hub_without_xet(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    said = line_of(run_in(tmp_path), error=PushError)
    assert said.startswith(f"{hub.url}: the upload broke off (")
    assert said.endswith("run this again, with HF_HUB_DISABLE_XET=1 where a hub has no Xet storage")
    assert set(hub.model("me/mine").files) == {".gitattributes"}


@pytest.mark.parametrize("name", ["mine", "me/-mine", "me/a--b", "a/b/c", "me/a b"])
def test_names(hub: Hub, tmp_path: Path, name: str) -> None:
    said = line_of(run_in(tmp_path), dataset=name)
    assert said.startswith(f"--dataset={name}: ")
    assert not hub.asked


def test_a_run_that_is_not_finished(hub: Hub, tmp_path: Path) -> None:
    assert line_of(tmp_path) == f"{tmp_path}: not a run directory (it has no config.yaml)"
    run = run_in(tmp_path)
    (run / "policy").rename(run / "elsewhere")
    assert line_of(run) == f"{run}: no policy yet; `freshpairs resume {run}` first"
    (run / "elsewhere").rename(run / "policy")
    (run / "ledger").rename(run / "gone")
    assert line_of(run).endswith("; or push the model alone, with --no-pairs")
    assert not hub.asked


def invoke(*args: str) -> Result:
    return CliRunner().invoke(tools, ["push", *args])


def test_the_command(hub: Hub, tmp_path: Path) -> None:
    run = str(run_in(tmp_path))
    found = invoke(run, "--repo", "me/x", "--dataset", "me/y", "--public")
    assert (found.exit_code, found.stdout) == (0, f"{hub.url}/me/x\n{hub.url}/datasets/me/y\n")
    assert not hub.model("me/x").private
    found = invoke(run, "--dataset", "me/y", "--no-pairs")
    assert str(found.exception) == "--dataset=me/y, --no-pairs: give one of them"
    hub.fail["/api/models/me/z"] = 418
    found = invoke(run, "--repo", "me/z", "--no-pairs")
    assert found.exit_code == 1
    assert found.stderr == f"{hub.url}: answered 418 (so it is said); run this again later\n"
