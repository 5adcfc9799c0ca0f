"""What an objective must be given: torch-free, for the whole run to follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from judges.errors import UserError

Records: TypeAlias = Literal["pairs", "unpaired", "ranked", "sampled"]
"""What an objective is given: PairLogps, UnpairedLogps, RankedLogps or SampledLogps."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What an objective must be given, besides the policy's log-probabilities.

    ``whole_update``: all examples of an update at one time, because a loss depends on others'.
    ``mismatched``: log-ratios of completions under other prompts, always of the whole update.
    ``collisions``: the weights of WPO. ``opponent``: the reference's share in the distribution that
    draws the second completion of each prompt; 0 is the policy. ``sampling_logprobs``: those under
    the distribution that completions were really drawn from.
    """

    records: Records = "pairs"
    reference: bool = True
    whole_update: bool = False
    per_token: bool = False
    mismatched: bool = False
    collisions: bool = False
    opponent: float = 0.0
    sampling_logprobs: bool = False


_Function = TypeVar("_Function", bound=Callable[..., Any])
_ATTRIBUTE = "__freshpairs_needs__"


def needs(
    records: Records = "pairs",
    *,
    reference: bool = True,
    whole_update: bool = False,
    per_token: bool = False,
    mismatched: bool = False,
) -> Callable[[_Function], _Function]:
    """Says what an objective of your own must be given; without it, pairs and their reference.

    The arguments are those of ``Needs``. Raises UserError for what no learner can give.
    """
    if records not in get_args(Records):
        known = ", ".join(get_args(Records))
        raise UserError(f"@needs({records!r}): no such record: it is one of {known}")
    if mismatched and not (records == "unpaired" and reference):
        raise UserError("@needs(mismatched=True): only for unpaired records with a reference")
    wanted = Needs(records, reference, whole_update, per_token, mismatched)

    def mark(function: _Function) -> _Function:
        setattr(function, _ATTRIBUTE, wanted)
        return function

    return mark


def needs_of(function: Callable[..., Any]) -> Needs:
    """What a function decorated with ``@needs(…)`` asks for; the default of one that is not."""
    found: Needs = getattr(function, _ATTRIBUTE, Needs())
    return found
