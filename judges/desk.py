"""Where a process's judges are built: what they share, and what each is handed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from judges.asking import Asker
from judges.budget import Account, BudgetOptions
from judges.build import Judge, build_judge, contents
from judges.cache import Cache
from judges.calls import Calls
from judges.client_options import OpenAIOptions
from judges.completing import Complete
from judges.errors import UserError
from judges.functions import Functions
from judges.kept_replies import TOGETHER, KeptReplies
from judges.model_clients import ClientOptions, PolicyClientOptions
from judges.options import AUTO, OFF, AskOptions
from judges.plugins import args_key

OVER_HTTP = frozenset({"calls", "complete"})
"""What a judge takes that asks elsewhere: it keeps limits itself, and its answers are kept."""

OF_MEMBERS = ("cache", "calls_per_minute", "concurrency", "retries", "timeout")
"""What is said of each member of a judge that asks others, not of itself."""

KEPT_TOGETHER = 32
"""Questions to a judge that asks over HTTP whose answers are kept at once: a stop loses no more."""

BuildClient: TypeAlias = Callable[[ClientOptions, Calls, Account | None], Complete]


@dataclass(frozen=True, slots=True)
class Whole:
    """What a judge's members share with it: the account that pays for them, and the counts."""

    account: Account | None
    counts: Counter[str]


@dataclass(slots=True)
class Desk:
    """Builds judges, each once a process.

    ``folder`` is where they keep what they must (the run's directory; None: nowhere), ``replicas``
    how many processes share their limits, ``build_client`` makes what an AI judge asks. ``url`` is
    the run's, where it is in object storage: then each machine has a folder of its own, and the
    account of what was spent is in the file of ``judge.cache``.
    """

    build_client: BuildClient
    folder: Path | None = None
    replicas: int = 1
    url: str | None = None
    functions: Functions = field(default_factory=Functions)

    def asker(
        self,
        options: AskOptions,
        *,
        key: str = "judge.name",
        budget: BudgetOptions | None = None,
        whole: Whole | None = None,
    ) -> Asker:
        """A judge and everything around it, or a member of a ``whole``.

        A member is paid for by the whole's account where that has one, which counts the whole's
        labels. Raises UserError where ``build_judge`` does.
        """
        section = key.rpartition(".")[0]
        counts: Counter[str] = Counter() if whole is None else whole.counts
        calls = Calls(options.limits(over_http=True).shared_by(self.replicas), counts)
        payer = None if whole is None else whole.account
        account = self._account(options, budget) if payer is None else payer
        members: list[Judge] = []

        def ask_member(member: AskOptions, key: str) -> Asker:
            asker = self.asker(member, key=key, whole=Whole(account, counts))
            members.append(asker.judge)
            return asker

        def complete() -> Complete:
            if options.client is None:
                raise UserError(
                    f"{section}.client: {options.name} asks a model: name it, for example "
                    "{kind: openai, model: gpt-5-mini} or {kind: transformers, model: DIRECTORY}"
                )
            client = self.build_client(options.client, calls, account)
            cache = self._cache(options, True, budget)
            if cache is None:
                return client
            together = 1 if isinstance(options.client, OpenAIOptions) else TOGETHER
            return KeptReplies(client, cache, _asked_model(options.client), together)

        offered: Mapping[str, Callable[[], Any]] = {
            "calls": lambda: calls,
            "complete": complete,
            "store": lambda: str((self.folder or Path()) / store_name(options)),
            "ask_member": lambda: ask_member,
            "args_key": lambda: args_key(key),
        }
        judge = build_judge(options.name, options.args, key=key, offered=offered)
        if options.client is not None:
            if "complete" not in judge.took:
                raise UserError(f"{section}.client: {options.name} asks no model: leave it out")
            judge = replace(judge, identity=(*judge.identity, _asked_model(options.client)))
        if members:
            judge = replace(judge, members=tuple(members))
            keeps_account = self._keeps_account(options) and budget not in (None, BudgetOptions())
            for name in OF_MEMBERS:
                if name == "cache" and keeps_account:
                    continue
                if getattr(options, name) != AskOptions.model_fields[name].default:
                    raise UserError(
                        f"{section}.{name}: {options.name} asks its members: write it there"
                    )
        asks_itself = bool(members or judge.took & OVER_HTTP)
        own = options.limits(over_http=False).shared_by(self.replicas)
        return Asker(
            judge,
            batch_size=options.batch_size or (KEPT_TOGETHER if "calls" in judge.took else None),
            limits=None if asks_itself else own,
            functions=self.functions,
            cache=None if members else self._cache(options, bool(judge.took & OVER_HTTP), budget),
            account=account if payer is None else None,
            counts=counts,
        )

    def _cache(
        self, options: AskOptions, over_http: bool, budget: BudgetOptions | None
    ) -> Cache | None:
        if options.cache not in (AUTO, OFF):
            return Cache(Path(options.cache))
        wanted = over_http or (budget is not None and budget.labels is not None)
        changes = isinstance(options.client, PolicyClientOptions)
        keeps_itself = options.name == "human"
        if options.cache == OFF or not wanted or changes or keeps_itself or self.folder is None:
            return None
        return Cache(self.folder / "judge.sqlite")

    def _account(self, options: AskOptions, budget: BudgetOptions | None) -> Account | None:
        budget = budget or BudgetOptions()
        if self.folder is None or (options.client is None and budget == BudgetOptions()):
            return None
        if self._keeps_account(options):
            return Account(Path(options.cache), f"{self.url} {options.title}", budget)
        return Account(self.folder / "judge.sqlite", options.title, budget)

    def _keeps_account(self, options: AskOptions) -> bool:
        """Whether the account is where the judge's answers are kept, which runs may share."""
        return self.url is not None and options.cache not in (AUTO, OFF)


def store_name(options: AskOptions) -> str:
    """Of the file that a judge may keep for itself."""
    return re.sub(r"\W+", "-", Path(options.title).name).strip("-") + ".sqlite"


def _asked_model(client: ClientOptions) -> dict[str, Any]:
    """What of a client's options its answers depend on."""
    paid = {"usd_per_million_input", "usd_per_million_output", "api_key_env"}
    found = client.model_dump(exclude=paid)
    return found | {"model": contents(found["model"])} if "model" in found else found
