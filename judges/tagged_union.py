"""A section of a config with several forms, told apart by what stands in it: torch-free."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


@dataclass(frozen=True, slots=True, eq=False)
class TaggedUnion:
    """Pydantic metadata: a value is validated as the branch that ``tag`` names for it.

    ``tag`` raises ValueError for a value that belongs to none.
    """

    tag: Callable[[Any], str]
    branches: Mapping[str, Any]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        choices: dict[Hashable, CoreSchema] = {
            tag: handler.generate_schema(branch) for tag, branch in self.branches.items()
        }
        union = core_schema.tagged_union_schema(choices, self.tag)
        return core_schema.no_info_before_validator_function(self._known, union)

    def _known(self, value: Any) -> Any:
        self.tag(value)
        return value
