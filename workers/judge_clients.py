"""A judge panel, and the models that its AI judges ask: over HTTP, in this process, the policy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from judges.budget import Account
from judges.calls import Calls
from judges.client_options import OpenAIOptions
from judges.completing import Complete
from judges.desk import Desk
from judges.errors import UserError
from judges.model_clients import ClientOptions, LocalClientOptions, PolicyClientOptions
from judges.options import AskOptions
from workers.generator import Generator, GeneratorOptions, SamplingOptions
from workers.generator_client import GeneratorClient
from workers.judge_worker import JudgePanel
from workers.options import PolicyOptions


def build_panel(
    judges: Mapping[str, AskOptions],
    *,
    folder: Path | None,
    replicas: int = 1,
    policy: PolicyOptions | None = None,
    generator: GeneratorOptions | None = None,
    url: str | None = None,
) -> JudgePanel:
    """The judges of one process, by title.

    ``folder`` is where they keep answers and accounts, ``url`` the run's where that is in object
    storage; ``policy`` and its ``generator`` options
    are the run's, for judges whose client is the policy.
    """
    clients = _Clients(policy, generator)
    desk = Desk(clients.build, folder, replicas, url)
    return JudgePanel(judges, desk, lambda: clients.policy_generator)


def build_desk(folder: Path) -> Desk:
    """Where judges are built without a run; what they must keep is in ``folder``."""
    return Desk(_Clients(None, None).build, folder)


class _Clients:
    def __init__(self, policy: PolicyOptions | None, generator: GeneratorOptions | None) -> None:
        self._policy = policy
        self._generator = generator or GeneratorOptions()
        self.policy_generator: Generator | None = None

    def build(self, options: ClientOptions, calls: Calls, account: Account | None) -> Complete:
        match options:
            case OpenAIOptions():
                return _over_http(options, calls, account)
            case LocalClientOptions():
                policy = PolicyOptions(model=options.model)
                of_its_own = GeneratorOptions(
                    backend=options.kind,
                    dtype=options.dtype,
                    max_model_len=options.max_model_len,
                    engine=options.engine,
                    gpus=self._generator.gpus,
                )
                return _client(_build_generator(policy, of_its_own), policy, of_its_own)
            case PolicyClientOptions():
                if self._policy is None:
                    raise UserError(
                        "judge.client.kind=policy: without a run there is no policy: name a model, "
                        "e.g. {kind: transformers, model: RUN/policy}"
                    )
                if self.policy_generator is None:
                    self.policy_generator = _build_generator(self._policy, self._generator)
                return _client(self.policy_generator, self._policy, self._generator)


def _over_http(options: OpenAIOptions, calls: Calls, account: Account | None) -> Complete:
    from judges.clients import OpenAIClient

    def charge(read: int, written: int, usd: float) -> None:
        calls.counts.update({"tokens": read + written, "usd": usd})
        if account is not None:
            account.charge(read + written, usd)

    return OpenAIClient(
        options, calls, before=None if account is None else account.check, charge=charge
    )


def _build_generator(policy: PolicyOptions, options: GeneratorOptions) -> Any:
    sampling = SamplingOptions()
    if options.backend == "vllm":
        from workers.vllm_generator import VllmGenerator

        return VllmGenerator(policy, sampling, options)
    from workers.transformers_generator import TransformersGenerator

    return TransformersGenerator(policy, sampling)


def _client(generator: Any, policy: PolicyOptions, options: GeneratorOptions) -> Complete:
    from transformers import AutoConfig, AutoTokenizer

    from workers.models.resolve import resolve_model

    location = resolve_model(policy.model)
    window = int(AutoConfig.from_pretrained(location).max_position_embeddings)
    context = min(window, options.max_model_len or window)
    tokenizer = AutoTokenizer.from_pretrained(location)
    return GeneratorClient(generator, tokenizer, context, model=policy.model)
