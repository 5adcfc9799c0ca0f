"""Ranges of numbers in a config, as mathematics writes them: torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


@dataclass(frozen=True, slots=True)
class Interval:
    """The range of a hyper-parameter, as it is written in mathematics: ``Interval("[0, 0.5)")``."""

    text: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def check(self, value: float) -> float:
        """The value itself; raises ValueError outside the range, also for NaN."""
        low, high = (float(end.replace("∞", "inf")) for end in self.text[1:-1].split(","))
        above = low < value or (self.text[0] == "[" and value == low)
        below = value < high or (self.text[-1] == "]" and value == high)
        if not (above and below):
            raise ValueError(f"must be in {self.text}")
        return value


Positive: TypeAlias = Annotated[float, Interval("(0, ∞)")]
NonNegative: TypeAlias = Annotated[float, Interval("[0, ∞)")]
FlipProbability: TypeAlias = Annotated[float, Interval("[0, 0.5)")]
