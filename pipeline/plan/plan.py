"""A config's plan: where its workers sit, what they hold, how long its rounds take."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from judges.errors import UserError
from pipeline.config import Config, threads_of
from pipeline.job import cores
from pipeline.launch.crew import CrewPlan, Say, plan_crew
from pipeline.parts import unit_size
from pipeline.placement import Layout, Node, groups_of, lay_out, learner_names
from pipeline.plan.accelerators import GIB, gpu_named, roofline
from pipeline.plan.memory import (
    Memory,
    Sizes,
    generator_memory,
    judge_memory,
    learner_memory,
    sizes_of,
)
from pipeline.plan.rates import (
    Law,
    Lengths,
    Rates,
    given_rates,
    lengths_of,
    parse_rates,
    rates_of_run,
)
from pipeline.plan.simulation import Simulated, recommended, simulate

CPUS_A_GPU = 8
"""Of a node whose CPUs nobody says."""

HERE = "this machine"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a user says beside the config; ``nodes`` as --nodes has them."""

    nodes: str | None = None
    address: str | None = None
    run: str | None = None
    rates: str | None = None
    gpu: str | None = None
    generators: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """A config's plan.

    ``memory``: of each worker by name; ``capacity``: bytes of a GPU, or of each node's RAM, where
    known. ``runs`` by number of generators, all with the config's rounds in flight; ``other`` is
    the config with rounds that wait where its overlap, or one in flight where they wait; ``room``:
    the numbers of generators for which the nodes have room.
    """

    cfg: Config
    nodes: tuple[Node, ...]
    layout: Layout
    memory: Mapping[str, Memory]
    capacity: Mapping[str, float]
    sizes: Sizes
    rates: Rates
    runs: tuple[Simulated, ...]
    other: Simulated
    room: frozenset[int]

    @property
    def units(self) -> int:
        """Work units that a round can be cut into: generators beyond have nothing to do in it."""
        cfg, prompts = self.cfg, self.cfg.sampling.prompts_per_update
        updates = int(min(cfg.resampling.updates_per_round, cfg.run.updates))
        fixed = unit_size(cfg, prompts).fixed
        return updates * prompts if fixed is None else updates

    @property
    def best(self) -> Simulated:
        """The number of generators that is worth it, of those that there is room for."""
        return recommended([run for run in self.runs if run.generators in self.room] or self.runs)

    def on_gpus(self) -> dict[tuple[str, int], int]:
        """Bytes on each GPU that is used, by node and number."""
        held: dict[tuple[str, int], int] = {}
        for worker, seat in self.layout.seats.items():
            for gpu in seat.gpus:
                at = (seat.node, gpu)
                held[at] = held.get(at, 0) + self.memory[worker].total
        return held

    def too_full(self) -> list[str]:
        """A line for each GPU whose workers need more than it has, or this machine's RAM."""
        gpu, ram = self.capacity.get("GPU"), self.capacity.get("RAM")
        lines = [
            f"{node}, GPU {number}: {held / GIB:.1f} GiB needed, {gpu / GIB:.1f} there"
            for (node, number), held in sorted(self.on_gpus().items())
            if gpu is not None and held > gpu
        ]
        in_ram = sum(memory.total for memory in self.memory.values() if not memory.gpus)
        if ram is not None and in_ram > ram:
            lines.append(f"{HERE}: {in_ram / GIB:.1f} GiB of RAM needed, {ram / GIB:.1f} there")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Everything that is printed, in bytes and seconds."""
        return {
            "run": self.cfg.run.name,
            "nodes": {node.name: dict(node.resources) for node in self.nodes},
            "layout": {worker: asdict(seat) for worker, seat in self.layout.seats.items()},
            "absent": list(self.layout.absent),
            "memory": {worker: dict(memory.parts) for worker, memory in self.memory.items()},
            "capacity": dict(self.capacity),
            "too_full": self.too_full(),
            "policy": asdict(self.sizes.policy),
            "rates": asdict(self.rates) | {"origin": dict(self.rates.origin)},
            "simulated": [_record(run) for run in (*self.runs, self.other)],
            "recommended_generators": self.best.generators,
        }


def _record(run: Simulated) -> dict[str, Any]:
    return asdict(run) | {"bottleneck": run.bottleneck}


def make_plan(cfg: Config, asked: Asked, say: Say) -> Plan:
    """Lay out, measure or compute, simulate.

    Raises UserError for what does not fit the nodes, cannot be had or is not said.
    """
    if asked.address is not None:
        cluster = cfg.cluster.model_copy(update={"address": asked.address})
        cfg = cfg.model_copy(update={"cluster": cluster})
    here = asked.nodes is None and cfg.cluster.address in ("local", "inline")
    nodes = _this_machine() if here else _nodes(cfg, asked)
    crew = plan_crew(cfg, *threads_of(cfg, cores()))
    layout = lay_out(groups_of(crew), nodes)
    sizes = sizes_of(cfg)
    capacity = _capacity(asked, here)
    rates = _rates(cfg, asked, sizes, say)
    memory = _memory(cfg, crew, sizes, rates.lengths, capacity.get("GPU"))
    numbers = sorted({*(asked.generators or (1, 2, 4, 8)), cfg.generator.replicas})
    runs = tuple(simulate(cfg, rates, number) for number in numbers)
    other = simulate(cfg, rates, in_flight=0 if cfg.resampling.rounds_in_flight else 1)
    room = frozenset(number for number in numbers if _has_room(cfg, number, nodes))
    return Plan(cfg, nodes, layout, memory, capacity, sizes, rates, runs, other, room)


def _nodes(cfg: Config, asked: Asked) -> tuple[Node, ...]:
    if asked.nodes is not None:
        return parse_nodes(asked.nodes)
    from pipeline.launch.ray_cluster import ray_session

    try:
        with ray_session(cfg.cluster.address) as nodes:
            return tuple(nodes.now())
    except UserError as error:
        raise UserError(f"{error}; or say what it has: --nodes 2x8") from error


def _this_machine() -> tuple[Node, ...]:
    from workers.models.footprint import gpus_here

    resources = {"CPU": float(cores()), "GPU": float(len(gpus_here()))}
    return (Node(HERE, {name: count for name, count in resources.items() if count}),)


def parse_nodes(text: str) -> tuple[Node, ...]:
    """``2x8``: two nodes of 8 GPUs and 8 CPUs a GPU; ``2x8x96``: of 96 CPUs each; with 0 GPUs the
    CPUs must be said. Raises UserError for anything else."""
    try:
        count, gpus, *more = (int(part) for part in text.lower().split("x"))
        (cpus,) = more or (CPUS_A_GPU * gpus,)
    except ValueError:
        count = gpus = cpus = -1
    if count < 1 or gpus < 0 or cpus < 1:
        raise UserError(
            f"--nodes {text}: must be NODESxGPUS or NODESxGPUSxCPUS, e.g. 2x8 or 2x8x64"
        )
    has = {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})
    return tuple(Node(f"node {number}", has) for number in range(count))


def _capacity(asked: Asked, here: bool) -> dict[str, float]:
    """Bytes of a GPU: the one named, else, where the nodes are this machine, its smallest; of its
    RAM. Nobody knows those of other nodes."""
    from workers.models.footprint import gpus_here

    found: dict[str, float] = {}
    if asked.gpu is not None:
        found["GPU"] = gpu_named(asked.gpu).gib * GIB
    elif here and (gpus := gpus_here()):
        found["GPU"] = float(min(gpus))
    if here:
        found["RAM"] = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return found


def _rates(cfg: Config, asked: Asked, sizes: Sizes, say: Say) -> Rates:
    said = {} if asked.rates is None else parse_rates(asked.rates)
    if asked.run is not None and asked.gpu is not None:
        raise UserError(f"--from {asked.run}, --gpu {asked.gpu}: give one of them")
    if asked.run is not None:
        return given_rates(said, cfg, rates_of_run(asked.run, cfg))
    if asked.gpu is not None:
        judge = (
            Law(cfg.sampling.completions_per_prompt / said["judge"]) if "judge" in said else None
        )
        lengths = lengths_of(said, cfg)
        return given_rates(said, cfg, roofline(cfg, sizes, gpu_named(asked.gpu), lengths, judge))
    if asked.rates is not None:
        return given_rates(said, cfg)
    _refuse_calibration(cfg, asked)
    from pipeline.plan.calibration import calibrate

    say("calibrating: three rounds by the real workers, the first to warm up …")
    return calibrate(cfg, say)


def _refuse_calibration(cfg: Config, asked: Asked) -> None:
    """Raises UserError where this config cannot be run where the plan is made."""
    from workers.models.footprint import gpus_here

    wanted = max(cfg.learner.gpus, cfg.generator.gpus, cfg.judge.gpus)
    elsewhere = asked.nodes is not None
    local = cfg.cluster.address in ("local", "inline")
    if cfg.learner.workers > 1 or elsewhere or (local and wanted > len(gpus_here())):
        why = (
            f"learner.workers={cfg.learner.workers}: more than one is not built yet"
            if cfg.learner.workers > 1
            else f"--nodes {asked.nodes}: they are not this machine"
            if elsewhere
            else f"generator.gpus={cfg.generator.gpus:g}, learner.gpus={cfg.learner.gpus:g}, "
            f"judge.gpus={cfg.judge.gpus:g}: this machine has {len(gpus_here())} GPUs"
        )
        raise UserError(
            f"{why}, so nothing can be measured: give --from RUN_DIR (a run's own figures), "
            "--gpu NAME (arithmetic from its data sheet) or --rates generate=…,judge=…,learn=…"
        )


def _memory(
    cfg: Config, crew: CrewPlan, sizes: Sizes, lengths: Lengths, capacity: float | None
) -> dict[str, Memory]:
    learner = learner_memory(cfg, sizes)
    generator = generator_memory(cfg, sizes, lengths, capacity)
    judge = judge_memory(cfg, sizes, capacity)
    return (
        dict.fromkeys(learner_names(crew.learner_processes), learner)
        | {worker.name: generator for worker in crew.generators}
        | {worker.name: judge for worker in crew.judges}
    )


def _has_room(cfg: Config, generators: int, nodes: Sequence[Node]) -> bool:
    """Whether the nodes have room for so many generators."""
    asked = {"replicas": generators, "min_replicas": None}
    several = cfg.model_copy(update={"generator": cfg.generator.model_copy(update=asked)})
    try:
        lay_out(groups_of(plan_crew(several, 1, 1)), nodes)
    except UserError:
        return False
    return True
