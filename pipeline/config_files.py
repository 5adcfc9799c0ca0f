"""The files that a config names, found and made absolute: it means the same from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from judges.model_clients import LocalClientOptions
from judges.options import AUTO, OFF, AskOptions, JudgeOptions
from judges.plugins import is_plugin, resolve_plugin_path
from pipeline.drift_options import DriftOptions
from pipeline.prompts import PromptOptions
from pipeline.resampling_options import EarlyOptions

if TYPE_CHECKING:
    from pipeline.config import Config


def absolute(config: Config, base: Path) -> Config:
    """The config with its files made absolute, so that it means the same from anywhere."""
    plugins = {
        "judge": judge_files(config.judge, base, "judge"),
        "pairing": {"strategy": _plugin(config.pairing.strategy, base, "pairing.strategy")},
        "objective": {"name": _plugin(config.objective.name, base, "objective.name")},
        "evaluation": {
            "judges": _others(config.evaluation.judges, base, "evaluation.judges"),
        },
        "prompts": _prompt_files(config.prompts, base)
        | {"pairs": _data_path(config.prompts.pairs, base)},
        "drift": _drift_files(config.drift, base),
        "resampling": {"early": _early(config.resampling.early, base)},
        "policy": {"model": _model_directory(config.policy.model, base)},
        "run": {"dir": str(config.run_dir.absolute())},
    }
    updated = {
        section: getattr(config, section).model_copy(update=update)
        for section, update in plugins.items()
    }
    held_out = config.evaluation.prompts
    if held_out is not None:
        absolute = held_out.model_copy(update=_prompt_files(held_out, base))
        updated["evaluation"] = updated["evaluation"].model_copy(update={"prompts": absolute})
    return config.model_copy(update=updated)


def judge_files(judge: AskOptions, base: Path, key: str) -> dict[str, Any]:
    """What of a judge's options becomes absolute: plug-in, files in args, cache, client's model."""
    found: dict[str, Any] = {
        "name": _plugin(judge.name, base, f"{key}.name"),
        "args": _arg_files(judge.args, base, f"{key}.args"),
    }
    if judge.name == "human" and isinstance(store := judge.args.get("store"), str):
        found["args"]["store"] = str(Path(store).expanduser().absolute())
    if judge.cache not in (AUTO, OFF):
        found["cache"] = str(Path(judge.cache).expanduser().absolute())
    if isinstance(judge.client, LocalClientOptions):
        model = _model_directory(judge.client.model, base)
        found["client"] = judge.client.model_copy(update={"model": model})
    if isinstance(judge, JudgeOptions):
        found["select_by"] = _others(judge.select_by, base, f"{key}.select_by")
        if judge.second is not None:
            found["second"] = _other(judge.second, base, f"{key}.second")
    return found


def _others(judges: Sequence[AskOptions], base: Path, key: str) -> list[AskOptions]:
    return [_other(judge, base, f"{key}[{at}]") for at, judge in enumerate(judges)]


def _other(judge: AskOptions, base: Path, key: str) -> AskOptions:
    return judge.model_copy(update=judge_files(judge, base, key))


def _arg_files(value: Any, base: Path, key: str) -> Any:
    """Args in which what looks like a file's path, and is one, is absolute."""
    match value:
        case str() if is_plugin(value) and ".py:" in value:
            return _plugin(value, base, key)
        case str() if "/" in value or Path(value).suffix:
            return _data_path(value, base)
        case Mapping():
            return {name: _arg_files(item, base, key) for name, item in value.items()}
        case list():
            return [_arg_files(item, base, key) for item in value]
    return value


def _drift_files(drift: DriftOptions, base: Path) -> dict[str, Any]:
    held_out = drift.held_out
    if held_out is not None:
        held_out = held_out.model_copy(update={"path": _data_path(held_out.path, base)})
    return {"bad": _data_path(drift.bad, base), "held_out": held_out}


def _early(early: EarlyOptions, base: Path) -> EarlyOptions:
    if early.rule is None:
        return early
    rule = _plugin(early.rule, base, "resampling.early.rule")
    args = _arg_files(early.args, base, "resampling.early.args")
    return early.model_copy(update={"rule": rule, "args": args})


def _plugin(name: str, base: Path, key: str) -> str:
    return resolve_plugin_path(name, base, key=key) if is_plugin(name) else name


def _prompt_files(prompts: PromptOptions, base: Path) -> dict[str, Any]:
    mixture = [s.model_copy(update={"path": _data_path(s.path, base)}) for s in prompts.mixture]
    return {"path": _data_path(prompts.path, base), "mixture": mixture}


def _data_path(path: str | None, base: Path) -> str | None:
    """Absolute if it exists in the working directory, beside the config, or in our checkout."""
    if path is None:
        return None
    checkout = Path(__file__).resolve().parent.parent
    for root in (Path.cwd(), base, checkout):
        if (root / path).exists():
            return str((root / path).absolute())
    return path


def _model_directory(model: str, base: Path) -> str:
    for root in (Path.cwd(), base):
        if model and (root / model).is_dir():
            return str((root / model).absolute())
    return model
