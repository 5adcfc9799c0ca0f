"""A finished run on a hub of Hugging Face's protocol: its policy, and the pairs it learned from."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from judges.errors import UserError
from pipeline.config import Config
from pipeline.export import export_pairs
from pipeline.launch.crew import judges_of
from pipeline.pair_card import TAG, pair_card, public_name
from pipeline.run_directory import read_run_config
from workers.places import files_of

CARD = "README.md"
ADAPTER = "adapter/adapter_config.json"
PAIRS_FILE = "data/train-00000-of-00001.parquet"

NOBODYS = {".gitattributes"}
"""Files that a hub puts into a repository as it is made."""

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
"""An earlier push's would be loaded in place of this one's: they go with the commit."""


class PushError(RuntimeError):
    """The hub could not take what was sent."""


@dataclass(frozen=True, slots=True)
class Repository:
    """One of the hub's, as it is to be: what it holds, by path."""

    name: str
    kind: Literal["model", "dataset"]
    files: Mapping[str, Path | bytes]

    def link(self, hub: str) -> str:
        """Where people find it."""
        return f"{hub}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"


@dataclass(frozen=True, slots=True)
class Found:
    """What the hub has under a repository's name: its last commit and its files, if any."""

    commit: str | None = None
    files: tuple[str, ...] = ()


def push(
    run_dir: Path,
    repo: str | None = None,
    dataset: str | None = None,
    *,
    pairs: bool = True,
    private: bool = True,
    force: bool = False,
) -> list[str]:
    """Publish RUN/policy as ``repo`` and the run's pairs as ``dataset``; the links.

    Without names they are USER/NAME of the run and that with ``-pairs``. ``pairs``: false
    publishes the model alone; so does a run on given pairs unless ``dataset`` is named, for they
    are somebody's. One commit a repository: it is there whole or not at all. A repository that is
    there must be empty or pushed by us (its card has our tag), or ``force``, and as private as is
    asked for; both are looked at before either is written. The hub is ``HF_ENDPOINT``'s.

    Raises UserError for all that, and for a run without a policy, a missing or refused token and a
    hub that is not reached; PushError where the hub fails.
    """
    policy = run_dir / "policy"
    cfg, _ = read_run_config(run_dir)
    if not policy.is_dir():
        raise UserError(f"{run_dir}: no policy yet; `freshpairs resume {run_dir}` first")
    for option, name in (("--repo", repo), ("--dataset", dataset)):
        _refuse_name(option, name)
    token = get_token()
    if token is None:
        raise UserError("no token for the hub: `hf auth login` first, or set HF_TOKEN")
    hub = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
    api = HfApi(endpoint=hub, token=token)
    links: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        exported = None
        if pairs and (dataset is not None or cfg.prompts.pairs is None):
            exported = _exported(run_dir, Path(folder))
        with _explained(hub, links):
            user = api.whoami()["name"]
            if repo is None:
                repo = f"{user}/{cfg.run.name}"
                _refuse_name("--repo", repo)
            repositories = [Repository(repo, "model", _policy_files(cfg, run_dir))]
            if exported is not None:
                card = pair_card(cfg, exported, repo).encode()
                files: dict[str, Path | bytes] = {CARD: card, PAIRS_FILE: exported}
                repositories.append(Repository(dataset or f"{repo}-pairs", "dataset", files))
            found = [_look_up(api, repository, hub, private, force) for repository in repositories]
            for repository, before in zip(repositories, found, strict=True):
                _publish(api, repository, before, cfg.run.name, private)
                links.append(repository.link(hub))
    return links


def _refuse_name(option: str, name: str | None) -> None:
    if name is None:
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        reason = str(error).split(": '")[0].rstrip(".")
        raise UserError(f"{option}={name}: no repository's name ({reason}); name another") from None
    if "/" not in name:
        raise UserError(f"{option}={name}: a repository's name is OWNER/NAME")


def _policy_files(cfg: Config, run_dir: Path) -> dict[str, Path | bytes]:
    """All of RUN/policy; its texts without what only this machine knows."""
    named = {
        cfg.policy.model,
        *judges_of(cfg),
        str(run_dir.absolute()),
        str(cfg.run_dir.absolute()),
    }
    private = sorted((name for name in named if name.startswith("/")), key=len, reverse=True)
    policy = run_dir / "policy"
    files: dict[str, Path | bytes] = {}
    for path in files_of(policy):
        name = path.relative_to(policy).as_posix()
        text = _text_of(path)
        public = None if text is None else _public_text(cfg, name, text, private)
        files[name] = path if public is None or public == text else public.encode()
    return files


def _text_of(path: Path) -> str | None:
    """What a file says, or None where it is no text, as weights."""
    with path.open("rb") as file:
        if b"\0" in file.read(8192):
            return None
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        return None


def _public_text(cfg: Config, name: str, text: str, private: Sequence[str]) -> str:
    """The text with files by name, and with no base model that is not a hub's.

    A path of one part (``/model``) tells nothing of a machine, and may be a word of a tokenizer.
    """
    model = cfg.policy.model
    if model.startswith("/") or "/" not in model:
        if name == CARD:
            text = text.replace(f"base_model: {model}\n", "", 1)
        if name == ADAPTER:  # null is PEFT's own default, where the base is given as a model
            text = json.dumps(json.loads(text) | {"base_model_name_or_path": None}, indent=2)
    for place in private:
        if name == CARD or place.count("/") > 1:
            text = text.replace(place, public_name(place))
    return text


def _exported(run_dir: Path, folder: Path) -> Path:
    """The set as ``export`` writes it."""
    pairs = folder / "pairs.parquet"
    try:
        export_pairs(run_dir, pairs)
    except UserError as mistake:
        raise UserError(f"{mistake}; or push the model alone, with --no-pairs") from None
    return pairs


def _look_up(api: Any, repository: Repository, hub: str, private: bool, force: bool) -> Found:
    """What is there already. Raises UserError where it is not ours to write to."""
    name, link = repository.name, repository.link(hub)
    try:
        info = api.repo_info(name, repo_type=repository.kind)
    except RepositoryNotFoundError:
        return Found()
    files = tuple(sibling.rfilename for sibling in info.siblings or ())
    tags = getattr(info.card_data, "tags", None) or []
    if set(files) - NOBODYS and TAG not in tags and not force:
        raise UserError(
            f"{link}: exists and was not pushed by Freshpairs (its card has no tag {TAG}); "
            "name another repository, or --force to put a commit on top of it"
        )
    if info.private is not private:
        there, asked = ("private", "--public") if info.private else ("public", "--private")
        raise UserError(
            f"{link}: exists and is {there}, {asked} does not change that: push with --{there}, or "
            "change it in the repository's settings first"
        )
    return Found(info.sha, files)


def _publish(api: Any, repository: Repository, found: Found, run: str, private: bool) -> None:
    """One commit on top of the one that was found: nobody's in between is overwritten."""
    name, kind, files = repository.name, repository.kind, repository.files
    if found.commit is None:
        api.create_repo(name, repo_type=kind, private=private)
    stale = [
        path
        for path in found.files
        if path not in files and any(fnmatch(path, pattern) for pattern in WEIGHTS)
    ]
    api.create_commit(
        name,
        [CommitOperationAdd(path, content) for path, content in files.items()]
        + [CommitOperationDelete(path) for path in stale],
        commit_message=f"Freshpairs: {run}",
        repo_type=kind,
        parent_commit=found.commit,
    )


@contextmanager
def _explained(hub: str, links: list[str]) -> Iterator[None]:
    """What goes wrong with a hub, in a line; with what was published before it, in another."""
    try:
        with _in_a_line(hub):
            yield
    except (UserError, PushError) as error:
        if links:
            error.add_note(f"published before that: {', '.join(links)}")
        raise


@contextmanager
def _in_a_line(hub: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set: unset it to push to a hub") from None
    except HfHubHTTPError as error:
        raise _refusal(hub, error) from error
    except HTTPError as error:
        raise UserError(
            f"{hub}: not reached ({_line(error)}); look at the network and at HF_ENDPOINT"
        ) from error
    except (ConnectionError, RuntimeError) as error:  # of hf_xet, and of an upload's thread
        said = _line(error.__cause__ or error)
        raise PushError(
            f"{hub}: the upload broke off ({said}); run this again, with HF_HUB_DISABLE_XET=1 "
            "where a hub has no Xet storage"
        ) from error
    except ValueError as error:  # of a card, or of an answer that is none of the protocol's
        raise PushError(f"{hub}: {_line(error)}") from error


def _refusal(hub: str, error: Any) -> UserError | PushError:
    status = error.response.status_code
    said = _line(error.server_message or error.response.reason_phrase or error)
    match status:
        case 401:
            return UserError(
                f"{hub}: refuses the token ({said}); `hf auth login --force`, or a valid HF_TOKEN"
            )
        case 403:
            return UserError(
                f"{hub}: the token may not do that ({said}); give one that may write there, or "
                "another --repo"
            )
        case 409 | 412:
            return UserError(
                f"{hub}: the repository was changed meanwhile ({said}); look at it, then run this "
                "again"
            )
    return PushError(f"{hub}: answered {status} ({said}); run this again later")


def _line(text: object) -> str:
    return " ".join(str(text).split()).rstrip(".")
