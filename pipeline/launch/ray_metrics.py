"""A run's figures as Ray metrics: in Ray's dashboard, and wherever Prometheus reads the nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from pipeline.replica import Replica

Record: TypeAlias = Mapping[str, Any]

GAUGES = {
    "updates": "Updates taken",
    "rounds": "Rounds finished",
    "loss": "Loss of the last update",
    "lag_mean_updates": "Mean lag of the last update's pairs",
    "lag_max_updates": "Largest lag of the last update's pairs",
    "update_seconds": "Seconds that the last update took",
    "rounds_in_flight": "Rounds that were asked for and are not collected yet",
    "prompts_owed": "Prompts whose samples are not collected yet",
    "generated_tokens_per_second": "Sampled tokens a second of the last round, by the clock",
    "score_mean": "Mean score of the last round's completions",
    "kl_to_reference_nats": "KL to the reference of the last round, a sequence",
    "judge_seconds_per_completion": "Seconds of a judge worker for a completion of the last round",
    "generate_seconds": "Seconds a generator that sampling the last round took",
    "judge_seconds": "Seconds a judge worker that judging the last round took",
    "learn_seconds": "Seconds of learning in the last round",
    "push_seconds": "Seconds of packing, loading and proving weights in the last round",
    "idle_seconds": "Seconds of the last round that no stage explains",
    "win_rate": "Against the starting model, of the last evaluation, by judge",
}
"""Names behind ``freshpairs_``, each with its unit where it has one."""


def samples(
    record: Record, replicas: Sequence[Replica], judges: int
) -> Iterator[tuple[str, float | None]]:
    """What a record of the run says, by the names of ``GAUGES``; None where it does not know.

    ``judges`` is the number of judge workers, ``replicas`` are the generators. The queue is what
    these owe as the record is written: while the learner learns, the rounds ahead of it.
    """
    yield "rounds_in_flight", len({round_ for replica in replicas for round_ in replica.rounds})
    yield "prompts_owed", sum(replica.backlog for replica in replicas)
    match record["kind"]:
        case "update":
            yield "updates", record["update"]
            yield "loss", record["loss"]
            yield "lag_mean_updates", record["lag_mean"]
            yield "lag_max_updates", record["lag_max"]
            yield "update_seconds", record["seconds"]
        case "round":
            seconds, completions = record["seconds"], record["completions"]
            yield "rounds", record["round"] + 1
            yield "generated_tokens_per_second", record["tokens_per_second"]
            yield "score_mean", record["score_mean"]
            yield "kl_to_reference_nats", record["kl_to_reference"]
            judged = seconds["judge"] * judges / completions if completions else None
            yield "judge_seconds_per_completion", judged
            for stage, name in STAGES.items():
                yield f"{name}_seconds", seconds[stage]
        case "evaluation":
            yield "win_rate", record["win_rate"]


STAGES = {s: s for s in ("generate", "judge", "learn", "idle")} | {"sync": "push"}


class RayMetrics:
    """Listens to a run's records and shows them as gauges, tagged with the run's name.

    What a record does not know keeps its gauge as it was.
    """

    def __init__(self, run: str, replicas: Sequence[Replica], judges: int) -> None:
        from ray.util.metrics import Gauge

        self._gauges = {
            name: Gauge(f"freshpairs_{name}", description, _tags(name))
            for name, description in GAUGES.items()
        }
        self._run, self._replicas, self._judges = run, replicas, judges

    def record(self, record: Record) -> None:
        """Show what this line of metrics.jsonl says."""
        for name, value in samples(record, self._replicas, self._judges):
            if value is None:
                continue
            tags = {"run": self._run}
            if name == "win_rate":
                tags["judge"] = record["judge"]
            self._gauges[name].set(value, tags)


def _tags(name: str) -> tuple[str, ...]:
    return ("run", "judge") if name == "win_rate" else ("run",)
