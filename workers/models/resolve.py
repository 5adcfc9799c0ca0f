"""What stands for a model in a config: a directory, a known model or a hub id."""

import re
from collections.abc import Sequence
from pathlib import Path

from judges.errors import UserError
from workers.models.cache import ENCODERS, KNOWN_MODELS, cached_path, missing_parts, nearest

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def resolve_model(name: str) -> Path | str:
    """What ``from_pretrained`` is to load for ``policy.model: name``.

    A directory comes first and is returned as an absolute path, then a known model (in any case),
    whose cached directory is returned, then anything of the form ``org/name``, which is taken for
    a Hugging Face id and returned as it is.

    Raises:
        UserError: the directory is incomplete, the known model was not fetched, or ``name`` is
            none of the three, an encoder's say.
    """
    return _resolve("policy.model", name, KNOWN_MODELS)


def resolve_encoder(name: str) -> Path | str:
    """What ``from_pretrained`` is to load for ``objective.embedding_model: name``.

    As ``resolve_model``, with the known encoders in place of the known models.

    Raises:
        UserError: as ``resolve_model``.
    """
    return _resolve("objective.embedding_model", name, ENCODERS)


def _resolve(option: str, name: str, models: Sequence[str]) -> Path | str:
    directory = Path(name).expanduser().absolute()
    if name and directory.is_dir():
        if missing := missing_parts(directory):
            raise UserError(
                f"{option}={name}: the directory {directory} has no {', no '.join(missing)}: "
                "give one that save_pretrained wrote for the model and its tokenizer"
            )
        return directory
    known = name.lower()
    if known in models:
        if missing_parts(cached_path(known)):
            raise UserError(
                f"{option}={name} is not on this machine: run `freshpairs fetch {known}`"
            )
        return cached_path(known)
    if known in ENCODERS:
        raise UserError(
            f"{option}={name}: an encoder, which embeds sentences and cannot write any; "
            f"known are {', '.join(models)}"
        )
    if _HUB_ID.fullmatch(name):
        return name
    raise UserError(
        f"{option}={name}: no such directory, and neither a known model nor a Hugging Face id "
        f"(org/name); nearest is {nearest(name, models)}, known are {', '.join(models)}"
    )
