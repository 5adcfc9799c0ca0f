"""When a round's pairs have gone stale: what each update says of them, and who decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from judges.errors import UserError
from judges.plugins import FORM, args_key, is_plugin, load_plugin, open_parameters, required
from pipeline.resampling_options import EarlyOptions

Rule: TypeAlias = Callable[[Mapping[str, Any]], str | None]
"""From an update's record to why the round should end now; None: go on with it."""

KEY = "resampling.early.rule"


class Staleness:
    """Says after each update whether its round's pairs are too stale to go on with.

    The measures come from the log-probabilities that the update computed, before its step. Raises
    UserError for a rule that cannot be loaded or does not take its args.
    """

    def __init__(self, options: EarlyOptions) -> None:
        self._options = options
        self._rule = None if options.rule is None else _own_rule(options.rule, options.args)

    def reason(self, record: Mapping[str, Any]) -> str | None:
        """Why the round ends after the update of this record; None where it goes on."""
        for key in ("ess_below", "ess_per_token_below"):
            measure = f"policy_{key.removesuffix('_below')}"
            least, found = getattr(self._options, key), record[measure]
            if least is not None and found is not None and found < least:
                return f"{measure} {found:.3g} is below resampling.early.{key}={least:g}"
        most, moved = self._options.kl_above, record["kl_from_sampler"]
        if most is not None and moved is not None and moved > most:
            return f"kl_from_sampler {moved:.3g} is above resampling.early.kl_above={most:g}"
        return None if self._rule is None else self._rule(record)


def _own_rule(spec: str, args: Mapping[str, Any]) -> Rule:
    if not is_plugin(spec):
        raise UserError(f"{KEY}={spec}: no such rule: write {FORM}")
    function = load_plugin(spec, key=KEY)
    open_, _ = open_parameters(function, args, key=KEY, spec=spec)
    if missing := required(open_)[1:]:
        raise UserError(f"{args_key(KEY)}: {spec} needs {', '.join(missing)}: give it there")

    def rule(record: Mapping[str, Any]) -> str | None:
        try:
            said = function(dict(record), **args)
        except Exception as error:
            raise UserError(
                f"{KEY}={spec}: raised {type(error).__name__}: {error}: mend the rule"
            ) from error
        if isinstance(said, str):
            return said or None
        if said is None or isinstance(said, bool) or type(said).__name__ == "bool":
            return f"{KEY}={spec} says so" if said else None
        raise UserError(
            f"{KEY}={spec}: returned {said!r}: return True to resample, or text that says why; "
            "False or None to go on"
        )

    return rule
