"""The judge workers as one: work units are shared among them, a stuck worker is replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from judges.model_clients import PolicyClientOptions
from judges.options import AskOptions, is_implicit
from pipeline.fleet import least_busy
from pipeline.handles import Future, Handle
from pipeline.replica import Replica, Unit
from workers.generator import SampledUnit
from workers.judge_worker import Disputed, JudgedUnit
from workers.messages import Prompt
from workers.verdicts import JudgeFailed


@dataclass(frozen=True, slots=True)
class Judging:
    """The judgements of a work unit, on their way."""

    judges: Judges
    unit: Unit

    def result(self) -> JudgedUnit:
        """Wait for them; a worker that died or is stuck is replaced. Raises what judging raises."""
        return self.judges.answered(self.unit)

    def forget(self) -> None:
        """Nobody waits for them any more."""
        self.unit.owed = False


@dataclass(frozen=True, slots=True)
class LearnerJudging:
    """The policy's own judgements of a work unit, on their way."""

    future: Future[JudgedUnit]

    def result(self) -> JudgedUnit:
        """Wait for them."""
        return self.future.result()

    def forget(self) -> None:
        """Nobody waits for them any more."""


class Judges:
    """Asks the least busy judge worker; the ``learner`` where the policy itself is the judge.

    ``in_one_process``: nothing can end a call that hangs, so the run has to stop.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        learner: Handle,
        judges: Mapping[str, AskOptions],
        *,
        in_one_process: bool,
    ) -> None:
        self.replicas = replicas
        clients = [judge.client for judge in judges.values()]
        by_policy = any(isinstance(client, PolicyClientOptions) for client in clients)
        self.given_weights = replicas if by_policy else ()
        """The workers that hold the policy, and receive every push of it."""
        self._learner = learner
        self._implicit = {t: j.args.get("beta", 0.1) for t, j in judges.items() if is_implicit(j)}
        self._in_one_process = in_one_process

    def check(self, prompts: Sequence[Prompt]) -> dict[str, bool]:
        """Which judges compare. Raises UserError if one needs a column that no prompt has."""
        found: dict[str, bool] = self.replicas[0].call("check", tuple(prompts)).result()
        return found | dict.fromkeys(self._implicit, False)

    def judge(
        self,
        name: str,
        prompts: Sequence[Prompt],
        sampled: Future[SampledUnit] | SampledUnit,
        selected: Future[frozenset[int]] | frozenset[int] | Disputed | None = None,
        second: str | None = None,
    ) -> Judging | LearnerJudging:
        """What the judge of that name says of a work unit; waits for nothing.

        ``selected`` prompts alone are asked about; a ``second`` judge's agreement is counted.
        """
        if name in self._implicit:
            beta = self._implicit[name]
            future = self._learner.submit("implicit_reward", tuple(prompts), sampled, beta)
            return LearnerJudging(future)
        replica = least_busy(self.replicas, len(prompts))
        asked = (name, tuple(prompts), sampled, selected, second)
        unit = replica.call("judge", *asked, prompts=len(prompts))
        return Judging(self, unit)

    def answered(self, unit: Unit) -> JudgedUnit:
        """What a worker said; it is replaced where a call that it gave up still runs."""
        judged: JudgedUnit = unit.result()
        if judged.stuck and unit.lives == unit.replica.lives:
            if self._in_one_process:
                raise JudgeFailed(
                    "judge.timeout: a call of the judge still runs as long again after its "
                    "deadline, and in one process nothing can end it: give the judge a time limit "
                    "of its own, or run with cluster.address=local, where its worker is replaced"
                )
            unit.replica.replace()
        return judged
