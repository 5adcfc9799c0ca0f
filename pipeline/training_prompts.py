"""What a run learns from: prompts that the policy completes, or pairs that were given."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.prompt_source import PromptSource
from pipeline.prompts import PromptOptions


class TrainingPrompts(PromptOptions):
    """The run's prompts, of one source or several; or a file of pairs, learned from as they are."""

    pairs: str | None = Field(
        default=None,
        description="A file of pairs (or of completions with a label) to learn from instead of "
        "sampling: offline. Forms: docs/offline.md",
    )
    behaviour: Literal["recorded", "reference"] = Field(
        default="recorded",
        description="Whose samples given pairs are, where they are weighed: as their rows record "
        "it, or the reference's, by declaration",
    )
    order: Literal["shuffled", "file"] = Field(
        default="shuffled",
        description="The order of given pairs: shuffled anew each epoch, or the file's",
    )
    too_long: Literal["error", "drop"] = Field(
        default="error",
        description="What becomes of a given pair that is empty or does not fit into the context",
    )

    def check_place(self) -> None:
        """Raises ValueError unless there is one place that prompts, or pairs, come from."""
        fields = type(self).model_fields
        if self.pairs is None:
            for name in ("behaviour", "order", "too_long"):
                if getattr(self, name) != fields[name].default:
                    raise ValueError(f"{name}: is of given pairs: set pairs, or leave it out")
            super().check_place()
            return
        of_pairs = {"split", "chat"}
        for name in {*PromptSource.model_fields, "mixture"} - of_pairs:
            if getattr(self, name) not in (fields[name].default, []):
                raise ValueError(f"either pairs or {name}: given pairs bring their own prompts")
