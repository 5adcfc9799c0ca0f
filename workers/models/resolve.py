"""What stands in ``policy.model``: a directory, a known model or a hub id."""

import re
from pathlib import Path

from judges.errors import UserError
from workers.models.cache import KNOWN_MODELS, cached_path, missing_parts, nearest_known

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def resolve_model(name: str) -> Path | str:
    """What ``from_pretrained`` is to load for ``policy.model: name``.

    A directory comes first and is returned as an absolute path, then a known model (in any case),
    whose cached directory is returned, then anything of the form ``org/name``, which is taken for
    a Hugging Face id and returned as it is.

    Raises:
        UserError: the directory is incomplete, the known model was not fetched, or ``name`` is
            none of the three.
    """
    directory = Path(name).expanduser().absolute()
    if name and directory.is_dir():
        if missing := missing_parts(directory):
            raise UserError(
                f"policy.model={name}: the directory {directory} has no {', no '.join(missing)}: "
                "give one that save_pretrained wrote for the model and its tokenizer"
            )
        return directory
    known = name.lower()
    if known in KNOWN_MODELS:
        if missing_parts(cached_path(known)):
            raise UserError(
                f"policy.model={name} is not on this machine: run `freshpairs fetch {known}`"
            )
        return cached_path(known)
    if _HUB_ID.fullmatch(name):
        return name
    raise UserError(
        f"policy.model={name}: no such directory, and neither a known model nor a Hugging Face id "
        f"(org/name); nearest is {nearest_known(name)}, known are {', '.join(KNOWN_MODELS)}"
    )
