"""A plan for people: tables that say of each figure whether it is measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.placement import amounts
from pipeline.plan.memory import GIB, Memory
from pipeline.plan.plan import Plan
from pipeline.plan.simulation import WORTH, Simulated

PLAIN: dict[str, Any] = {"title_justify": "left", "box": SIMPLE, "padding": (0, 1, 0, 0)}
SPLIT = ("generate", "judge", "learn", "push", "loop")


def report(plan: Plan) -> RenderableType:
    """Layout and memory, the round's time, and what more generators would bring."""
    policy, cfg = plan.sizes.policy, plan.cfg
    head = (
        f"{cfg.run.name}: {cfg.policy.model}, {policy.parameters / 1e6:,.1f} M parameters, "
        f"{policy.trainable / 1e6:,.1f} M of them learned, {cfg.policy.dtype}"
    )
    return Group(
        Text(head, style="bold"),
        _memory_table(plan),
        *(Text(f"does not fit: {line}", style="red") for line in plan.too_full()),
        Text(
            "Exact: parameters, activations (every token a completion's), keys and values. "
            "Assumed: process, engine.",
            style="dim",
        ),
        Text(""),
        _time_table(plan),
        Text(_lengths(plan), style="dim"),
        Text(""),
        _throughput_table(plan),
        *(Text(line, style="dim") for line in _notes(plan)),
        Text(_advice(plan), style="bold"),
    )


def _memory_table(plan: Plan) -> Table:
    table = Table(
        title="Workers and their memory, GiB",
        title_justify="left",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for heading in ("worker", "where", "each"):
        table.add_column(heading, justify="right" if heading == "each" else "left")
    table.add_column("of which")
    for workers, where, memory in _alike(plan):
        parts = ", ".join(f"{name} {held / GIB:.2f}" for name, held in memory.parts.items())
        note = f" ({memory.note})" if memory.note else ""
        table.add_row(workers, where, f"{memory.total / GIB:.1f}", parts + note)
    gpu = plan.capacity.get("GPU")
    held = plan.on_gpus()
    if held:
        fullest = max(held.values())
        of = f" of {gpu / GIB:.1f}" if gpu is not None else ""
        table.caption = f"the fullest GPU holds {fullest / GIB:.1f}{of} GiB"
    return table


def _alike(plan: Plan) -> Iterator[tuple[str, str, Memory]]:
    """Workers of one memory in a row: names, places."""
    rows: dict[str, list[str]] = {}
    for worker in plan.memory:
        rows.setdefault(worker.split()[0], []).append(worker)
    for workers in rows.values():
        seats = [plan.layout.seats.get(worker) for worker in workers]
        places: dict[str, list[int]] = {}
        for seat in seats:
            places.setdefault("the driver's node" if seat is None else seat.node, []).extend(
                () if seat is None else seat.gpus
            )
        where = "; ".join(
            f"{node}: GPU {', '.join(map(str, sorted(set(gpus))))}" if gpus else node
            for node, gpus in places.items()
        )
        absent = sum(worker in plan.layout.absent for worker in workers)
        name = workers[0] if len(workers) == 1 else f"{workers[0]} … {len(workers) - 1}"
        missing = f" ({absent} without room yet)" if absent else ""
        yield name + missing, where, plan.memory[workers[0]]


def _time_table(plan: Plan) -> Table:
    """Of a round of the config as it is: each stage as if nothing overlapped."""
    cfg, rates = plan.cfg, plan.rates
    run = _own(plan)
    updates = run.round_seconds / run.update_seconds if run.update_seconds else 1.0
    passes = cfg.resampling.passes
    prompts = round(cfg.sampling.prompts_per_update * updates / passes)
    share = cfg.generator.replicas
    seconds = {
        "generate": rates.sample(-(-prompts // share)),
        "judge": rates.judge(-(-prompts // cfg.judge.replicas)),
        "learn": rates.score(prompts) + updates * rates.update(cfg.sampling.prompts_per_update),
        "push": rates.push,
        "loop": rates.around,
    }
    whole = sum(seconds.values()) or 1.0
    title = f"A round of {prompts} prompts and {updates:g} updates, one stage after the other"
    table = Table(title=title, **PLAIN)
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    table.add_column("figures from")
    for stage in SPLIT:
        origin = rates.origin.get(stage, rates.origin.get("learn", "")) if stage != "loop" else ""
        table.add_row(stage, f"{seconds[stage]:.2f}", f"{seconds[stage] / whole:.0%}", origin)
    return table


def _own(plan: Plan) -> Simulated:
    """The config as it is."""
    return next(r for r in plan.runs if r.generators == plan.cfg.generator.replicas)


def _lengths(plan: Plan) -> str:
    lengths = plan.rates.lengths
    return f"prompts of {lengths.prompt:.0f} tokens, completions of {lengths.completion:.0f}"


def _throughput_table(plan: Plan) -> Table:
    title = f"The loop in virtual time, to {plan.cfg.run.updates} updates"
    table = Table(title=title, **PLAIN)
    headings = ("gens", "flight", "s/round", "upd/h", "busy G", "J", "L", "lag", "max", "hours")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for run in plan.runs:
        marks = ["config"] if run is _own(plan) else []
        marks += [] if run.generators in plan.room else ["no room"]
        table.add_row(*_row(run), ", ".join(marks))
    table.add_row(*_row(plan.other), "other", style="dim")
    return table


def _row(run: Simulated) -> tuple[str, ...]:
    return (
        str(run.generators),
        str(run.rounds_in_flight),
        f"{run.round_seconds:.1f}",
        f"{3600 / run.update_seconds:,.0f}" if run.update_seconds else "∞",
        f"{run.busy['generators']:.0%}",
        f"{run.busy['judges']:.0%}",
        f"{run.busy['learner']:.0%}",
        f"{run.lag_mean:.1f}",
        str(run.lag_max),
        f"{run.run_seconds / 3600:.2f}",
    )


def _notes(plan: Plan) -> Iterator[str]:
    yield (
        "gens: generators; flight: rounds in flight; busy: the share of its time that a generator "
        "(G), a judge worker (J), the learner (L) works; lag: mean. Every generator is as fast as "
        "any other; start-up, evaluations and checkpoints are not in it."
    )
    if plan.units < max(run.generators for run in plan.runs):
        yield (
            f"A round is {plan.units} work unit{'s' if plan.units > 1 else ''} of one generator "
            "each: further ones have nothing to do but in rounds in flight (a larger "
            "resampling.updates_per_round makes more units; vLLM splits a round evenly)."
        )
    held = [(s.node, gpu) for s in plan.layout.seats.values() for gpu in s.gpus]
    if len(set(held)) < len(held):
        yield "Workers that share a GPU are taken to have it to themselves: they will be slower."
    if not (plan.cfg.generator.gpus or plan.cfg.learner.gpus):
        has = "; ".join(amounts(node.resources) for node in plan.nodes[:4])
        yield (
            "On CPUs this holds where each worker has cores of its own: those that share a node's "
            f"({has}) slow each other down."
        )


def _advice(plan: Plan) -> str:
    best, tried = plan.best, [run for run in plan.runs if run.generators in plan.room]
    said = f"{best.generators} generator{'s' if best.generators > 1 else ''} recommended: "
    if best is plan.runs[-1] or (tried and best is tried[-1]):
        said += f"of those that there is room for, each is at least {WORTH:.0%} faster than fewer"
    else:
        said += f"the next number tried is less than {WORTH:.0%} faster"
    return f"{said}. Busiest then: {best.bottleneck} ({best.busy[best.bottleneck]:.0%})."
