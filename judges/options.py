"""Who judges, and how it is asked: torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from judges.budget import BudgetOptions
from judges.calls import CallLimits
from judges.client_options import OpenAIOptions
from judges.model_clients import ClientOptions

AUTO, OFF = "auto", "off"

LinkName: TypeAlias = Literal["hard", "bradley_terry", "sampled"]


class AskOptions(BaseModel):
    """A judge, and how many questions it is asked at once, how often again, how long it may take.

    A question is a completion to score or a pair to compare; a call asks ``batch_size`` of them,
    or is one request of a judge that asks a served model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        default="sentiment",
        description="A built-in judge (docs/judges.md lists them), path/to/file.py:name or "
        "installed.module:name",
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the judge, or of its class"
    )
    alias: str | None = Field(
        default=None,
        min_length=1,
        description="What it is called in metrics, where one name stands for two judges; null = "
        "its name",
    )
    client: ClientOptions | None = Field(
        default=None, description="The model that an AI judge asks: {kind: openai, model: …}"
    )
    batch_size: int | None = Field(
        default=None, ge=1, description="Questions a call; null = all that there are"
    )
    concurrency: int | None = Field(
        default=None,
        ge=1,
        description="Calls at once; null = 16 requests over HTTP, one call of a function",
    )
    calls_per_minute: float | None = Field(
        default=None, gt=0, description="Calls begun in a minute, evenly spaced; null = no limit"
    )
    timeout: float | None = Field(
        default=None,
        gt=0,
        description="Seconds a call may take, after which its questions are INVALID; null = 60 for "
        "a request over HTTP, for ever for a function",
    )
    retries: int = Field(
        default=4,
        ge=0,
        description="Times a call is made again that failed for a passing reason (429, 5xx, lost "
        "connections), after a growing, jittered wait or what Retry-After says",
    )
    cache: str = Field(
        default=AUTO,
        description="Where answers are kept so that no question is paid twice: auto = the run's "
        "directory, for judges that ask over HTTP or have a budget; off; or a file's path, for any "
        "judge, shared by runs; with a budget and a run in object storage a path that every judge "
        "worker sees",
    )

    @property
    def title(self) -> str:
        """What it is called in metrics."""
        return self.alias or self.name

    def limits(self, over_http: bool) -> CallLimits:
        """As given, else as fits a request over HTTP, or a function."""
        default = CallLimits() if over_http else CallLimits(concurrency=1, timeout=None)
        return CallLimits(
            concurrency=self.concurrency or default.concurrency,
            calls_per_minute=self.calls_per_minute,
            timeout=self.timeout or default.timeout,
            retries=self.retries,
        )


def is_implicit(judge: AskOptions) -> bool:
    """Whether the judge is the policy in training, by its implicit reward."""
    return judge.name == "implicit_reward" and "policy" not in judge.args


def served_clients(client: object, args: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The clients over HTTP of a judge and, where it has any, of its members."""
    if isinstance(client, OpenAIOptions):
        yield client.model_dump()
    elif isinstance(client, Mapping) and client.get("kind") == "openai":
        yield client
    members = args.get("members")
    for member in [*(members if isinstance(members, list) else []), args.get("judge")]:
        if isinstance(member, Mapping):
            inner = member.get("args")
            yield from served_clients(
                member.get("client"), inner if isinstance(inner, Mapping) else {}
            )


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


OtherJudge = Annotated[AskOptions, BeforeValidator(_named)]
"""A judge beside the training judge: its name alone will do."""


class JudgeOptions(AskOptions):
    """The training judge: who it is, what it may cost, how its verdicts become labels."""

    link: LinkName = Field(
        default="hard",
        description="From two scores to P(first better): hard = 1 for the higher, equal is a tie; "
        "bradley_terry = σ(difference / link_temperature); sampled = a draw from that",
    )
    link_temperature: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="Difference of two scores that counts as one logit",
    )
    max_invalid_share: float = Field(
        default=0.5,
        ge=0.0,
        le=1.0,
        description="The run stops when a larger share of a round's scores is INVALID",
    )
    budget: BudgetOptions = Field(
        default_factory=BudgetOptions, description="What the judge may cost"
    )
    select: Literal["random", "uncertainty"] | None = Field(
        default=None,
        description="Which prompts of a round are judged when budget.labels is spread over the "
        "run: any, or where least is known; null = all, and the run stops when it is spent",
    )
    select_by: list[OtherJudge] = Field(
        default_factory=list,
        description="With select: uncertainty, cheap judges whose disagreement tells; none = the "
        "margin of the policy's implicit reward",
    )
    second: OtherJudge | None = Field(
        default=None, description="A judge whose agreement on the learned pairs is logged"
    )
    replicas: int = Field(default=1, ge=1, description="Judge workers, which share the limits")
    gpus: float = Field(default=0.0, ge=0.0, description="GPUs of each judge worker, or a fraction")
    resources: dict[str, Annotated[float, Field(gt=0.0, allow_inf_nan=False)]] = Field(
        default_factory=dict, description="Custom resources of the cluster that each worker needs"
    )
    threads: int = Field(default=1, ge=1, description="CPU threads of each judge worker")

    @model_validator(mode="after")
    def _budget_fits(self) -> JudgeOptions:
        clients = list(served_clients(self.client, self.args))
        prices = ("usd_per_million_input", "usd_per_million_output")
        priced = all(client.get(price) is not None for client in clients for price in prices)
        if self.budget.usd is not None and not (clients and priced):
            raise ValueError(
                "budget.usd: needs prices: give client.usd_per_million_input and "
                "client.usd_per_million_output"
            )
        if self.budget.tokens is not None and not clients:
            raise ValueError(
                f"budget.tokens: {self.name} counts none: a client {{kind: openai, …}} does"
            )
        if self.budget.labels is not None and self.cache == OFF:
            raise ValueError("cache: off: a budget of labels counts a question once: keep answers")
        if self.select is not None and self.budget.labels is None:
            raise ValueError("select: spreads budget.labels over the run: give it a number")
        if self.select_by and self.select != "uncertainty":
            raise ValueError("select_by: goes with select: uncertainty")
        if len(self.select_by) == 1:
            raise ValueError("select_by: a single judge cannot disagree: name two")
        return self
