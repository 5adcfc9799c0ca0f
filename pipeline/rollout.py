"""Rollout: prompts become a judged round, while the learner does something else if it likes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.handles import Future, Handle
from pipeline.pairing import Pairing
from pipeline.prompts import PromptStream
from pipeline.resampling import RoundPlan
from workers.generator import SampledUnit, SampleRequest
from workers.judge_worker import JudgedUnit, refuse_invalid_rounds
from workers.messages import Prompt, PromptGroup, Round


@dataclass(frozen=True, slots=True)
class _Unit:
    """One work unit on its way through generator and judge."""

    prompts: tuple[Prompt, ...]
    sampled: Future[SampledUnit]
    judged: Future[JudgedUnit]


class PendingRound:
    """A round being sampled and judged; ``result`` waits for it, and a dead worker raises here."""

    def __init__(self, index: int, version: int, units: Sequence[_Unit], rollout: Rollout) -> None:
        self._index = index
        self._version = version
        self._units = units
        self._rollout = rollout

    def result(self) -> Round:
        """Wait, pair the completions, and refuse a round that too few verdicts survived.

        Raises JudgeFailed when more than ``judge.max_invalid_share`` of them are INVALID.
        """
        return self._rollout.assemble(self._index, self._version, self._units)


class Rollout:
    """Generators and judge seen as one: ``submit`` a plan, get a round."""

    def __init__(
        self,
        prompts: PromptStream,
        generators: Sequence[Handle],
        judge: Handle,
        pairing: Pairing,
        *,
        judge_name: str,
        reference_shares: Sequence[float],
        prompts_per_unit: int,
        max_invalid_share: float,
        run_seed: int,
    ) -> None:
        self._prompts = prompts
        self._generators = generators
        self._judge = judge
        self._pairing = pairing
        self._judge_name = judge_name
        self._reference_shares = tuple(reference_shares)
        self._prompts_per_unit = prompts_per_unit
        self._max_invalid_share = max_invalid_share
        self._run_seed = run_seed

    def submit(self, plan: RoundPlan, version: int) -> PendingRound:
        """Start a round with the weights that the generators hold or are about to receive."""
        prompts = self._prompts.take(plan.start, plan.prompts)
        requests = work_units(
            prompts, self._prompts_per_unit, self._reference_shares, self._run_seed, "sampling"
        )
        units: list[_Unit] = []
        for request, sampled in submit_units(self._generators, requests):
            part = request.prompts
            judged: Future[JudgedUnit] = self._judge.submit(
                "judge", self._judge_name, part, sampled
            )
            units.append(_Unit(part, sampled, judged))
        return PendingRound(plan.index, version, units, self)

    def assemble(self, index: int, version: int, units: Sequence[_Unit]) -> Round:
        """Pair what came back into a round."""
        groups: list[PromptGroup] = []
        generate = judge = 0.0
        for unit in units:
            sampled, judged = unit.sampled.result(), unit.judged.result()
            generate += sampled.seconds
            judge += judged.seconds
            for prompt, completions, judgement in zip(
                unit.prompts, sampled.completions, judged.judgements, strict=True
            ):
                wrong = {c.version for c in completions} - {version}
                if wrong:
                    raise RuntimeError(
                        f"round {index} was asked of version {version}, "
                        f"a generator sampled with version {sorted(wrong)[0]}"
                    )
                judged_prompt = (prompt, completions, judgement)
                pairs = self._pairing.pairs(*judged_prompt)
                labels = self._pairing.labels(*judged_prompt)
                groups.append(PromptGroup(prompt, tuple(completions), judgement, pairs, labels))
        refuse_invalid_rounds(groups, self._max_invalid_share, self._judge_name)
        seconds = {
            "generate": generate / len(self._generators),
            "judge": judge,
        }
        return Round(index, version, tuple(groups), self._judge_name, seconds)


def work_units(
    prompts: Sequence[Prompt],
    size: int,
    reference_shares: Sequence[float],
    run_seed: int,
    purpose: str,
) -> list[SampleRequest]:
    """Cut prompts into work units of ``size``: the same whatever the number of generators.

    ``reference_shares`` has an entry for each sample of a prompt, as in ``SampleRequest``.
    """
    shares = tuple(reference_shares)
    return [
        SampleRequest(tuple(prompts[first : first + size]), len(shares), run_seed, purpose, shares)
        for first in range(0, len(prompts), size)
    ]


def submit_units(
    generators: Sequence[Handle], requests: Sequence[SampleRequest]
) -> list[tuple[SampleRequest, Future[SampledUnit]]]:
    """Share work units among the generators, in turns."""
    return [
        (request, generator.submit("sample", request))
        for request, generator in zip(requests, itertools.cycle(generators), strict=False)
    ]
