"""Functions and classes of the user's, named in a config by ``file.py:name`` or ``module:name``."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from judges.errors import UserError

FORM = "path/to/file.py:name or installed.module:name"

SHIPPED: dict[str, bytes] = {}
"""Plug-in files of the machine that the run was started on, by absolute path."""


def is_plugin(spec: str) -> bool:
    """Whether a config value names a plug-in rather than a built-in."""
    return ":" in spec


def nearest(name: str, options: Iterable[str]) -> str:
    """`` (did you mean …?)`` with the option most like the name, or nothing."""
    matches = difflib.get_close_matches(name, sorted(options), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]}?)" if matches else ""


def resolve_plugin_path(spec: str, base: Path, *, key: str = "plug-in") -> str:
    """The spec with its file made absolute: beside the config (``base``), else in the cwd.

    Built-in names and ``installed.module:name`` come back as they are. Raises UserError if the
    file is in neither place.
    """
    location, _, name = spec.rpartition(":")
    if not location or not _is_file(location):
        return spec
    candidates = [
        Path(os.path.abspath(folder / Path(location).expanduser())) for folder in (base, Path.cwd())
    ]
    for candidate in candidates:
        if candidate.is_file():
            return f"{candidate}:{name}"
    looked = " or ".join(dict.fromkeys(str(candidate.parent) for candidate in candidates))
    raise UserError(
        f"{key}={spec}: no file {Path(location).name} in {looked}: "
        "write its path relative to the config, or in full"
    )


def plugin_files(specs: Iterable[str]) -> dict[str, bytes]:
    """The files that these specs name, to be ``SHIPPED`` to where they are loaded."""
    paths = {spec.rpartition(":")[0] for spec in specs if is_plugin(spec)}
    return {path: Path(path).read_bytes() for path in paths if os.path.isfile(path)}


def load_plugin(spec: str, *, key: str) -> Callable[..., Any]:
    """The function or class that ``path/to/file.py:name`` or ``installed.module:name`` names.

    A file is run once per process, under a private module name and without its folder on the
    import path: a user's folder may hold packages named like ours. What it defines cannot be
    pickled by reference, so each worker loads its plug-ins by spec. ``key`` is the config key that
    holds the spec, for the messages. Raises UserError.
    """
    location, _, name = spec.rpartition(":")
    if not location or not name:
        raise UserError(f"{key}={spec}: not a plug-in: write {FORM}")
    if _is_file(location):
        module = _load_file(location, spec, key)
    else:
        module = _load_module(location, spec, key)
    if not hasattr(module, name):
        callables = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        raise UserError(
            f"{key}={spec}: {location} has no {name}{nearest(name, callables)}: "
            "name a function or class that it defines"
        )
    plugin = getattr(module, name)
    if not callable(plugin):
        raise UserError(
            f"{key}={spec}: {name} is a {type(plugin).__name__}: name a function or class"
        )
    return plugin  # type: ignore[no-any-return]


def open_parameters(
    function: Callable[..., Any], args: Mapping[str, Any], *, key: str, spec: str
) -> tuple[dict[str, inspect.Parameter], bool]:
    """The named parameters that the args leave open, and whether ``**kwargs`` takes any other.

    Raises UserError for an arg that the signature has no place for.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as error:
        raise UserError(f"{key}={spec}: {error}: wrap it in a Python function") from error
    named = {
        p.name: p
        for p in parameters
        if p.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    }
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    for arg in args:
        if arg not in named and not takes_any:
            raise UserError(
                f"{args_key(key)}.{arg}: {spec} takes no such argument{nearest(arg, named)}: "
                f"it takes {', '.join(named) or 'none'}"
            )
    return {n: p for n, p in named.items() if n not in args}, takes_any


def required(parameters: Mapping[str, inspect.Parameter]) -> tuple[str, ...]:
    """The names of those parameters that have no default."""
    return tuple(n for n, p in parameters.items() if p.default is inspect.Parameter.empty)


def args_key(key: str) -> str:
    """The config key of a plug-in's args: ``judge.name`` -> ``judge.args``."""
    return f"{key.rpartition('.')[0]}.args".removeprefix(".")


def _is_file(location: str) -> bool:
    return location.endswith(".py") or "/" in location or os.sep in location


def _load_file(location: str, spec: str, key: str) -> ModuleType:
    path = os.path.abspath(os.path.expanduser(location))
    shipped = None if os.path.isfile(path) else SHIPPED.get(path)
    if shipped is None and not os.path.isfile(path):
        raise UserError(f"{key}={spec}: no file {path}: correct the path")
    module_name = f"_freshpairs_plugin_{hashlib.sha256(path.encode()).hexdigest()[:16]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"{key}={spec}: {path} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # dataclasses and pickle look their module up while it runs
    try:
        if shipped is None:
            module_spec.loader.exec_module(module)
        else:
            exec(compile(shipped, path, "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[module_name]
        raise UserError(_import_failed(error, spec, key)) from error
    return module


def _load_module(location: str, spec: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(location)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and _is_within(location, error.name):
            raise UserError(
                f"{key}={spec}: no module named {error.name} is installed: "
                "install it, or write path/to/file.py:name"
            ) from error
        raise UserError(_import_failed(error, spec, key)) from error


def _is_within(location: str, missing: str | None) -> bool:
    return missing is not None and f"{location}.".startswith(f"{missing}.")


def _import_failed(error: Exception, spec: str, key: str) -> str:
    """One line: the exception, and the innermost line of the plug-in's file that it came through.

    That file is the first in the traceback after the import machinery; one that does not parse is
    not in the traceback, its SyntaxError names it.
    """
    machinery = (__file__, importlib.__file__)
    frames = [
        (frame.filename, frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in machinery and not frame.filename.startswith("<frozen ")
    ]
    if not frames and isinstance(error, SyntaxError) and error.filename:
        frames = [(error.filename, error.lineno)]
    where = ""
    if frames:
        path = frames[0][0]
        line = [number for filename, number in frames if filename == path][-1]
        where = f" at line {line} of {path}"
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    remedy = (
        "install it (a plug-in's own folder is not on the import path)"
        if isinstance(error, ModuleNotFoundError)
        else "mend that file"
    )
    return f"{key}={spec}: its import failed{where}: {reason}: {remedy}"
