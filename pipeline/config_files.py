"""The files that a config names: found, and made absolute so that it means the same anywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from judges.model_clients import LocalClientOptions
from judges.options import AUTO, OFF, AskOptions, JudgeOptions
from judges.plugins import is_plugin, resolve_plugin_path
from pipeline.drift_options import DriftOptions
from pipeline.prompts import PromptOptions
from pipeline.resampling_options import EarlyOptions
from workers.places import is_url

if TYPE_CHECKING:
    from pipeline.config import Config

CHECKOUT = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "workers", "judges")
"""Ours, in the checkout."""

Kind: TypeAlias = Literal["plugin", "data", "arg", "model", "place"]
"""A plug-in's spec; rows, or a hub's data set; an arg that may be a file; a model; what is written.
"""

Change: TypeAlias = Callable[[Kind, str, str], str]
"""From a file's kind, its name in the config and the key it stands under: what stands there now."""


def with_files(config: Config, change: Change) -> Config:
    """The config with each file it names changed, the run directory left as it is."""
    evaluation: dict[str, Any] = {
        "judges": _others(config.evaluation.judges, change, "evaluation.judges")
    }
    held_out = config.evaluation.prompts
    if held_out is not None:
        files = _prompt_files(held_out, change, "evaluation.prompts")
        evaluation["prompts"] = held_out.model_copy(update=files)
    prompts = _prompt_files(config.prompts, change, "prompts")
    prompts["pairs"] = _data(config.prompts.pairs, change, "prompts.pairs")
    updates: dict[str, dict[str, Any]] = {
        "judge": judge_files(config.judge, change, "judge"),
        "pairing": {
            "strategy": _plugin(config.pairing.strategy, change, "pairing.strategy"),
            "args": _arg_files(config.pairing.args, change, "pairing.args"),
        },
        "objective": _objective_files(config.objective, change),
        "evaluation": evaluation,
        "prompts": prompts,
        "drift": _drift_files(config.drift, change),
        "resampling": {"early": _early(config.resampling.early, change)},
        "policy": {"model": change("model", config.policy.model, "policy.model")},
    }
    return config.model_copy(
        update={
            section: getattr(config, section).model_copy(update=update)
            for section, update in updates.items()
        }
    )


def absolute(config: Config, base: Path) -> Config:
    """The config with its files made absolute, so that it means the same from anywhere."""
    found = with_files(config, absolute_from(base))
    place = config.run_place
    directory = place if is_url(place) else str(config.run_dir.absolute())
    run = found.run.model_copy(update={"dir": directory})
    return found.model_copy(update={"run": run})


def absolute_from(base: Path) -> Change:
    """Makes absolute what is found; plug-ins beside the config, in ``base``, or else in the cwd."""

    def change(kind: Kind, name: str, key: str) -> str:
        match kind:
            case "plugin":
                return resolve_plugin_path(name, base, key=key)
            case "place":
                return str(Path(name).expanduser().absolute())
            case "model":
                found = find_model(name, base)
            case "data" | "arg":
                found = find_data(name, base)
        return name if found is None else str(found)

    return change


def find_data(name: str, base: Path) -> Path | None:
    """The file or directory in the working directory, beside the config, or in our checkout."""
    for root in (Path.cwd(), base, CHECKOUT):
        path = root / name
        if os.path.exists(path):  # False also for a text that is no path
            return path.absolute()
    return None


def find_model(name: str, base: Path) -> Path | None:
    """The directory in the working directory or beside the config."""
    for root in (Path.cwd(), base):
        if name and os.path.isdir(root / name):
            return (root / name).absolute()
    return None


def judge_files(judge: AskOptions, change: Change, key: str) -> dict[str, Any]:
    """What of a judge's options changes: plug-in, files in args, cache, client's model."""
    store = judge.args.get("store") if judge.name == "human" else None
    read = {name: value for name, value in judge.args.items() if store is None or name != "store"}
    found: dict[str, Any] = {
        "name": _plugin(judge.name, change, f"{key}.name"),
        "args": _arg_files(read, change, f"{key}.args"),
    }
    if isinstance(store, str):
        found["args"]["store"] = change("place", store, f"{key}.args.store")
    if judge.cache not in (AUTO, OFF):
        found["cache"] = change("place", judge.cache, f"{key}.cache")
    if isinstance(judge.client, LocalClientOptions):
        model = change("model", judge.client.model, f"{key}.client.model")
        found["client"] = judge.client.model_copy(update={"model": model})
    if isinstance(judge, JudgeOptions):
        found["select_by"] = _others(judge.select_by, change, f"{key}.select_by")
        if judge.second is not None:
            found["second"] = _other(judge.second, change, f"{key}.second")
    return found


def _others(judges: Sequence[AskOptions], change: Change, key: str) -> list[AskOptions]:
    return [_other(judge, change, f"{key}[{at}]") for at, judge in enumerate(judges)]


def _other(judge: AskOptions, change: Change, key: str) -> AskOptions:
    return judge.model_copy(update=judge_files(judge, change, key))


def _arg_files(value: Any, change: Change, key: str) -> Any:
    """Args in which what looks like a file's path is changed."""
    match value:
        case str() if is_plugin(value) and ".py:" in value:
            return change("plugin", value, key)
        case str() if "/" in value or Path(value).suffix:
            return change("arg", value, key)
        case Mapping():
            return {name: _arg_files(item, change, f"{key}.{name}") for name, item in value.items()}
        case list():
            return [_arg_files(item, change, f"{key}[{at}]") for at, item in enumerate(value)]
    return value


def _objective_files(objective: Any, change: Change) -> dict[str, Any]:
    found: dict[str, Any] = {"name": _plugin(objective.name, change, "objective.name")}
    if getattr(objective, "args", None):
        found["args"] = _arg_files(objective.args, change, "objective.args")
    if getattr(objective, "embedding_model", None):
        model = objective.embedding_model
        found["embedding_model"] = change("model", model, "objective.embedding_model")
    return found


def _drift_files(drift: DriftOptions, change: Change) -> dict[str, Any]:
    held_out = drift.held_out
    if held_out is not None:
        path = change("data", held_out.path, "drift.held_out.path")
        held_out = held_out.model_copy(update={"path": path})
    return {"bad": _data(drift.bad, change, "drift.bad"), "held_out": held_out}


def _early(early: EarlyOptions, change: Change) -> EarlyOptions:
    if early.rule is None:
        return early
    rule = _plugin(early.rule, change, "resampling.early.rule")
    args = _arg_files(early.args, change, "resampling.early.args")
    return early.model_copy(update={"rule": rule, "args": args})


def _plugin(name: str, change: Change, key: str) -> str:
    return change("plugin", name, key) if is_plugin(name) else name


def _prompt_files(prompts: PromptOptions, change: Change, key: str) -> dict[str, Any]:
    mixture = [
        source.model_copy(update={"path": _data(source.path, change, f"{key}.mixture[{at}].path")})
        for at, source in enumerate(prompts.mixture)
    ]
    return {"path": _data(prompts.path, change, f"{key}.path"), "mixture": mixture}


def _data(path: str | None, change: Change, key: str) -> str | None:
    return None if path is None else change("data", path, key)
