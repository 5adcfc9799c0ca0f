"""Rollout: prompts become a judged round, while the learner does something else if it likes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.fleet import least_busy
from pipeline.handles import Future
from pipeline.judging import Judges, Judging, LearnerJudging
from pipeline.learner import RemoteLearner
from pipeline.pairing import Pairing
from pipeline.prompts import PromptStream
from pipeline.replica import Replica, Unit
from pipeline.resampling import RoundPlan
from pipeline.selection import Selected, Selection
from pipeline.sync import WeightSync
from workers.generator import SampledUnit, SampleRequest
from workers.messages import Completion, Prompt, PromptGroup, Round
from workers.verdicts import judging_record, refuse_invalid_rounds


@dataclass(frozen=True, slots=True)
class UnitSize:
    """How many prompts are sampled in one call.

    ``fixed``: so many, whatever the replicas, because a completion's last bits depend on what is
    computed beside it. ``replicas``: each gets its share of the round in one call, up to
    ``ENGINE_COMPLETIONS``, because an engine batches by itself and its last bits vary anyway.
    """

    fixed: int | None = None
    replicas: int = 1

    def of(self, prompts: int, samples: int) -> int:
        """Prompts of a unit, when so many prompts are given so many samples each."""
        if self.fixed is not None:
            return self.fixed
        return max(1, min(-(-prompts // self.replicas), ENGINE_COMPLETIONS // samples))


ENGINE_COMPLETIONS = 1024
"""Completions of a unit that an engine batches: they keep it full, and are lost with a replica."""


@dataclass(frozen=True, slots=True)
class _Unit:
    """One work unit on its way through generator and judge.

    ``attempt`` is that of the samples which the judge was given: a generator that was mended draws
    them again, and they are judged again.
    """

    prompts: tuple[Prompt, ...]
    sampled: Unit
    attempt: int
    judged: Judging | LearnerJudging


class Pending(Protocol):
    """A round on its way."""

    def result(self) -> Round:
        """Wait for it."""
        ...


class RoundSource(Protocol):
    """Where rounds come from: sampled from the policy, or given."""

    def submit(self, plan: RoundPlan, learner: RemoteLearner, sync: WeightSync) -> Pending:
        """Start the planned round; waits for nothing."""
        ...


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
        replicas: Sequence[Replica],
        judges: Judges,
        selection: Selection,
        pairing: Pairing,
        *,
        judge_name: str,
        second_judge: str | None,
        reference_shares: Sequence[float],
        unit_size: UnitSize,
        max_invalid_share: float,
        in_flight_updates: bool,
        rest_between_rounds: bool,
        run_seed: int,
    ) -> None:
        self._prompts = prompts
        self._replicas = replicas
        self._judges = judges
        self._selection = selection
        self._pairing = pairing
        self._judge_name = judge_name
        self._second_judge = second_judge
        self._reference_shares = tuple(reference_shares)
        self._unit_size = unit_size
        self._max_invalid_share = max_invalid_share
        self._in_flight_updates = in_flight_updates
        self._rest_between_rounds = rest_between_rounds
        self._run_seed = run_seed

    def submit(self, plan: RoundPlan, learner: RemoteLearner, sync: WeightSync) -> PendingRound:
        """Start a round by the learner's weights, which every generator is sent first."""
        sync.push(learner)
        prompts = self._prompts.take(plan.start, plan.prompts)
        size = self._unit_size.of(len(prompts), len(self._reference_shares))
        shares, seed = self._reference_shares, self._run_seed
        requests = work_units(prompts, size, shares, seed, "sampling", plan.index)
        units: list[_Unit] = []
        for request, sampled in zip(requests, submit_units(self._replicas, requests), strict=True):
            selected = self._selection.of(request.prompts, sampled.future)
            judged = self._judged(request.prompts, sampled.future, selected)
            units.append(_Unit(request.prompts, sampled, sampled.attempt, judged))
        return PendingRound(plan.index, learner.version, units, self)

    def _judged(
        self,
        prompts: Sequence[Prompt],
        samples: Future[SampledUnit] | SampledUnit,
        selected: Selected,
    ) -> Judging | LearnerJudging:
        second = self._second_judge
        return self._judges.judge(self._judge_name, prompts, samples, selected, second)

    def assemble(self, index: int, version: int, units: Sequence[_Unit]) -> Round:
        """Pair what came back into a round.

        All samples first: a lost generator is noticed, and its prompts sampled again, while the
        judges are still at work.
        """
        groups: list[PromptGroup] = []
        generate = judge = 0.0
        counts: Counter[str] = Counter()
        for unit, sampled, judging in [self._sampled(unit) for unit in units]:
            judged = judging.result()
            generate += sampled.seconds
            judge += judged.seconds
            counts.update(judged.counts)
            for prompt, completions, judgement in zip(
                unit.prompts, sampled.completions, judged.judgements, strict=True
            ):
                self._check_versions(index, version, completions)
                judged_prompt = (prompt, completions, judgement)
                pairs = self._pairing.pairs(*judged_prompt)
                labels = self._pairing.labels(*judged_prompt)
                groups.append(PromptGroup(prompt, tuple(completions), judgement, pairs, labels))
        if self._rest_between_rounds:
            for replica in self._replicas:
                replica.rest()
        refuse_invalid_rounds(groups, self._max_invalid_share, self._judge_name)
        seconds = {
            "generate": generate / max(1, sum(r.present for r in self._replicas)),
            "judge": judge / len(self._judges.replicas),
        }
        record = judging_record(counts, groups)
        return Round(index, version, tuple(groups), self._judge_name, seconds, judging=record)

    def _sampled(self, unit: _Unit) -> tuple[_Unit, SampledUnit, Judging | LearnerJudging]:
        """A unit's samples, and what is said of them; anew, where they were sampled again."""
        sampled: SampledUnit = unit.sampled.result()
        if unit.attempt == unit.sampled.attempt:
            return unit, sampled, unit.judged
        unit.judged.forget()
        selected = self._selection.of(unit.prompts, sampled)
        return unit, sampled, self._judged(unit.prompts, sampled, selected)

    def _check_versions(self, index: int, version: int, completions: Sequence[Completion]) -> None:
        """Raises RuntimeError where a completion is of another version than its round allows."""
        for completion in completions:
            newer = self._in_flight_updates and completion.version > version
            mixed = completion.last_version is not None and not self._in_flight_updates
            if mixed or not (newer or completion.version == version):
                raise RuntimeError(
                    f"round {index} was asked of version {version}, "
                    f"a generator sampled with version {completion.version}"
                )


def work_units(
    prompts: Sequence[Prompt],
    size: int,
    reference_shares: Sequence[float],
    run_seed: int,
    purpose: str,
    round_: int | None = None,
) -> list[SampleRequest]:
    """Cut prompts into work units of ``size``.

    ``reference_shares`` has an entry for each sample of a prompt, as in ``SampleRequest``.
    """
    shares = tuple(reference_shares)
    units = [tuple(prompts[first : first + size]) for first in range(0, len(prompts), size)]
    return [
        SampleRequest(unit, len(shares), run_seed, purpose, shares, round=round_) for unit in units
    ]


def submit_units(replicas: Sequence[Replica], requests: Sequence[SampleRequest]) -> list[Unit]:
    """Share work units among the generators that hold weights: each to who will have it first."""
    here = [replica for replica in replicas if replica.present]
    return [least_busy(here, len(r.prompts)).sample(r) for r in requests]
