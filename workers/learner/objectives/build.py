"""From a name in a config to the function that computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor

from judges.errors import UserError
from judges.plugins import is_plugin, load_plugin
from workers.learner.objectives.pairwise import dpo_loss
from workers.learner.objectives.records import ObjectiveOutput, PairLogps
from workers.learner.options import ObjectiveOptions

Objective: TypeAlias = Callable[[PairLogps], ObjectiveOutput]


def build_objective(options: ObjectiveOptions | Mapping[str, Any]) -> Objective:
    """The objective a config names; mappings are validated first.

    An objective of the user's own is called as ``fn(logps: PairLogps, **args)`` and returns the
    loss of each pair, a differentiable tensor [B]. Raises pydantic's ValidationError for options
    out of range and UserError for a plug-in that cannot be loaded or returns another shape.
    """
    if not isinstance(options, ObjectiveOptions):
        options = ObjectiveOptions(**options)
    if is_plugin(options.name):
        return partial(_own_objective, load_plugin(options.name, key="objective.name"), options)
    return partial(_dpo, options)


def _dpo(options: ObjectiveOptions, logps: PairLogps) -> ObjectiveOutput:
    return ObjectiveOutput(dpo_loss(logps, options.beta, options.label_smoothing))


def _own_objective(
    function: Callable[..., Tensor], options: ObjectiveOptions, logps: PairLogps
) -> ObjectiveOutput:
    loss = function(logps, **options.args)
    pairs = logps.policy_chosen.shape
    if not isinstance(loss, Tensor) or loss.shape != pairs:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise UserError(
            f"objective.name={options.name}: returned {got}; return one loss a pair, "
            f"a tensor of shape {tuple(pairs)}"
        )
    return ObjectiveOutput(loss)
