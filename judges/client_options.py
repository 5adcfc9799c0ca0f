"""Which served model an AI judge asks, and what it costs: torch-free."""

from __future__ import annotations

import ipaddress
import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

OPENAI = "https://api.openai.com/v1"
OURS = frozenset({"model", "messages", "n", "stream"})
"""What a request says that ``extra_body`` may not change: the reply would not be read right."""


def without_secrets(text: str) -> str:
    """The text of a value, as it may be shown: without a password or query of an address in it."""
    if "://" in text:
        text = re.sub(r"\?\S*", "?…", text)
    return re.sub(r"//.*@|\S+:\S*@", "…@", text)


class OpenAIOptions(BaseModel):
    """A model behind any endpoint that speaks OpenAI's chat completions.

    The key is never part of a config: ``api_key_env`` names the variable that holds it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["openai"]
    model: str = Field(min_length=1, description="The name that the server knows it by")
    base_url: str | None = Field(
        default=None,
        description="Where it is served, e.g. http://127.0.0.1:8000/v1; null = OpenAI itself",
    )
    api_key_env: str = Field(
        default="OPENAI_API_KEY",
        min_length=1,
        description="The environment variable that holds the key; a server on this machine or in "
        "its private network is asked without one where there is none",
    )
    extra_body: dict[str, Any] = Field(
        default_factory=dict,
        description="More of each request, e.g. {reasoning_effort: low}; null takes a parameter "
        "out, e.g. {temperature: null}",
    )
    max_tokens_parameter: Literal["max_completion_tokens", "max_tokens"] = Field(
        default="max_completion_tokens",
        description="What the server calls the limit: OpenAI and vLLM know the former, older "
        "servers only max_tokens",
    )
    logprobs: bool = Field(
        default=True,
        description="Ask for log-probabilities; false for a model that thinks before it answers",
    )
    usd_per_million_input: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="Price of a million tokens read"
    )
    usd_per_million_output: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="Price of a million tokens written"
    )

    @property
    def url(self) -> str:
        """Where it is served."""
        return self.base_url or OPENAI

    @property
    def is_near(self) -> bool:
        """Whether the server is on this machine or in its private network."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_private
        except ValueError:
            return host == "localhost"

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            parts = urlsplit(value)
            named = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # its port is no number, its IPv6 address no address
            named = False
        if not named:
            raise ValueError("must be an address such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError("must hold no key: put it into the variable that api_key_env names")
        return value

    @field_validator("extra_body")
    @classmethod
    def _leaves_ours_alone(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(OURS & value.keys()):
            raise ValueError(f"must not set {', '.join(taken)}: the judge does")
        return value
