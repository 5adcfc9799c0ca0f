"""Placement: which worker goes to which node and GPU, and whether all of them fit.

Ray decides in the end, by placement groups made of the same bundles; this says beforehand what it
will find, and without Ray.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from judges.errors import UserError

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.launch.crew import CrewPlan, WorkerPlan

Strategy = Literal["PACK", "SPREAD"]

OWN = ("CPU", "GPU", "memory", "object_store_memory")
"""Ray's own resources: other keys of the config ask for them."""

STEPS = 20_000
"""Seats that are tried before workers are said not to fit."""

LEAST = 1e-4
"""Ray's smallest part of a resource."""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster and what it has: CPU, GPU, and custom resources by name."""

    name: str
    resources: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Bundle:
    """Workers that sit together, on one node and its GPUs, and what they need between them."""

    workers: tuple[str, ...]
    resources: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Group:
    """Bundles that are placed at once: packed on few nodes or spread over many.

    ``optional``: each for itself, when there is room.
    """

    name: str
    strategy: Strategy
    bundles: tuple[Bundle, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Seat:
    """A worker's place: a node's name, and the numbers of the GPUs it has there, or a share of."""

    node: str
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """Where every worker sits, by its name; ``absent`` are those without which a run begins."""

    seats: Mapping[str, Seat]
    absent: tuple[str, ...] = ()


def check_asks(cfg: Config) -> None:
    """Raises UserError where a worker asks for resources that Ray has not got in such amounts."""
    for section, asked in (
        ("generator", cfg.generator.resources),
        ("judge", cfg.judge.resources),
        ("learner", cfg.learner.resources),
    ):
        for name, amount in asked.items():
            key = f"{section}.resources.{name}={amount:g}"
            if name in OWN:
                raise UserError(
                    f"{key}: {name} is Ray's own: {section}.gpus asks for GPUs; name a custom "
                    "resource that nodes were started with"
                )
            if amount > 1.0 and amount % 1.0:
                raise UserError(f"{key}: must be a whole number, or a share of one")
    for section, gpus in (("generator", cfg.generator.gpus), ("judge", cfg.judge.gpus)):
        if gpus > 1.0 and gpus % 1.0:
            raise UserError(f"{section}.gpus={gpus:g}: must be a whole number, or a share of one")
    if cfg.cluster.placement == "colocated" and not (cfg.generator.gpus and cfg.learner.gpus):
        raise UserError(
            f"cluster.placement=colocated: the learner and generators share GPUs, but "
            f"generator.gpus={cfg.generator.gpus:g} and learner.gpus={cfg.learner.gpus:g}: give "
            "both a share of one, e.g. 0.5"
        )
    together = cfg.generator.gpus + cfg.learner.gpus
    if cfg.cluster.placement == "colocated" and together > 1.0:
        raise UserError(
            f"cluster.placement=colocated: generator.gpus={cfg.generator.gpus:g} and learner.gpus="
            f"{cfg.learner.gpus:g} are {together:g} of the GPU that they share: give them at most "
            "1 together, e.g. 0.5 each"
        )


def groups_of(plan: CrewPlan) -> tuple[Group, ...]:
    """The workers as Ray places them: the learner packed, generators and judges spread.

    Workers that need nothing (a judge that waits for others, the learner that takes turns with the
    generators on the CPU) are in no group: they stay on the driver's node.
    """
    learners = [(name, plan.learner) for name in learner_names(plan.learner_processes)]
    required = [(worker.name, worker) for worker in plan.generators[: plan.required]]
    more = [(worker.name, worker) for worker in plan.optional]
    shared = len(learners) if plan.placement == "colocated" else 0
    beside = [required[at : at + 1] if at < shared else [] for at in range(len(learners))]
    packed = [_bundle([own, *others]) for own, others in zip(learners, beside, strict=True)]
    groups = (
        Group("learner", "PACK", tuple(packed)),
        Group("generators", "SPREAD", tuple(_bundle([one]) for one in required[shared:])),
        Group("judges", "SPREAD", tuple(_bundle([(j.name, j)]) for j in plan.judges)),
        Group("more generators", "SPREAD", tuple(_bundle([one]) for one in more), optional=True),
    )
    wanted = (
        Group(group.name, group.strategy, bundles, group.optional)
        for group in groups
        if (bundles := tuple(bundle for bundle in group.bundles if bundle.resources))
    )
    return tuple(wanted)


def learner_names(processes: int) -> list[str]:
    """What the learner's processes are called."""
    return ["learner"] if processes == 1 else [f"learner {rank}" for rank in range(processes)]


def _bundle(workers: Sequence[tuple[str, WorkerPlan]]) -> Bundle:
    needed: Counter[str] = Counter()
    for _, worker in workers:
        needed.update(worker.resources)
    return Bundle(
        tuple(name for name, _ in workers),
        {name: amount for name, amount in needed.items() if amount},
    )


def lay_out(groups: Sequence[Group], nodes: Sequence[Node]) -> Layout:
    """Seat every bundle.

    Raises UserError, with what is missing and what there is, where the required ones do not fit.
    """
    rooms = [_Room.of(node) for node in nodes]
    required = [group for group in groups if not group.optional]
    queue = [(group, bundle) for group in required for bundle in group.bundles]
    queue.sort(key=lambda item: _fewest_rooms_first(item[1], rooms))
    seats = _seat(queue, rooms, _Steps())
    if seats is None:
        raise UserError(_misfit(required, nodes))
    absent: list[str] = []
    for group in groups:
        for bundle in group.bundles if group.optional else ():
            more = _seat([(group, bundle)], rooms, _Steps())
            if more is None:
                absent += bundle.workers
            else:
                seats |= more
    return Layout(seats, tuple(absent))


@dataclass(slots=True)
class _Steps:
    taken: int = 0


@dataclass(slots=True)
class _Room:
    """What a node has left; each GPU by itself, for a share is a share of one."""

    node: Node
    left: dict[str, float]
    gpus: list[float]
    held: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, node: Node) -> _Room:
        left = dict(node.resources)
        return cls(node, left, [1.0] * int(left.pop("GPU", 0.0)))

    def state(self, group: str) -> tuple[object, ...]:
        """Rooms of one state are as good as each other."""
        return (tuple(sorted(self.left.items())), tuple(sorted(self.gpus)), self.held[group])

    def gpus_for(self, wanted: float) -> tuple[int, ...] | None:
        """The GPUs to take, the fullest that will do; None where there are not so many."""
        if wanted < 1.0:
            order = sorted(range(len(self.gpus)), key=lambda at: (self.gpus[at], at))
            fit = [at for at in order if self.gpus[at] > wanted - LEAST]
            return tuple(fit[:1]) if wanted and fit else (None if wanted else ())
        whole = [at for at, left in enumerate(self.gpus) if left > 1.0 - LEAST]
        return tuple(whole[: int(wanted)]) if len(whole) >= wanted else None

    def take(self, group: str, bundle: Bundle) -> tuple[int, ...] | None:
        """Seat a bundle; the GPUs it has, None where it does not fit."""
        wanted = bundle.resources.get("GPU", 0.0)
        gpus = self.gpus_for(wanted)
        short = any(
            self.left.get(name, 0.0) < amount - LEAST
            for name, amount in bundle.resources.items()
            if name != "GPU"
        )
        if gpus is None or short:
            return None
        self._change(group, bundle, gpus, -1)
        return gpus

    def give_back(self, group: str, bundle: Bundle, gpus: tuple[int, ...]) -> None:
        self._change(group, bundle, gpus, 1)

    def _change(self, group: str, bundle: Bundle, gpus: tuple[int, ...], sign: int) -> None:
        for at in gpus:
            self.gpus[at] += sign * min(1.0, bundle.resources["GPU"])
        for name, amount in bundle.resources.items():
            if name != "GPU":
                self.left[name] += sign * amount
        self.held[group] -= sign


def _fewest_rooms_first(bundle: Bundle, rooms: Sequence[_Room]) -> tuple[float, ...]:
    fitting = 0
    for room in rooms:
        gpus = room.take("", bundle)
        if gpus is not None:
            room.give_back("", bundle, gpus)
            fitting += 1
    return (fitting, -bundle.resources.get("GPU", 0.0), -bundle.resources.get("CPU", 0.0))


def _seat(
    queue: Sequence[tuple[Group, Bundle]], rooms: Sequence[_Room], steps: _Steps
) -> dict[str, Seat] | None:
    """Seats of the bundles, or None; tries other rooms where the first choice leads nowhere."""
    if not queue:
        return {}
    (group, bundle), rest = queue[0], queue[1:]
    for room in _choices(group, rooms):
        steps.taken += 1
        if steps.taken > STEPS:
            return None
        gpus = room.take(group.name, bundle)
        if gpus is None:
            continue
        others = _seat(rest, rooms, steps)
        if others is not None:
            own = {worker: Seat(room.node.name, gpus) for worker in bundle.workers}
            return own | others
        room.give_back(group.name, bundle, gpus)
    return None


def _choices(group: Group, rooms: Sequence[_Room]) -> Iterator[_Room]:
    """Rooms worth trying, the best first: of those in one state, one."""
    fullest = group.strategy == "PACK"
    order = sorted(rooms, key=lambda r: -r.held[group.name] if fullest else r.held[group.name])
    seen: set[tuple[object, ...]] = set()
    for room in order:
        state = room.state(group.name)
        if state not in seen:
            seen.add(state)
            yield room


def _misfit(groups: Sequence[Group], nodes: Sequence[Node]) -> str:
    """What is asked for, what of it is missing, and what the cluster has: one line."""
    wanted: Counter[str] = Counter()
    for group in groups:
        for bundle in group.bundles:
            wanted.update(bundle.resources)
    there: Counter[str] = Counter()
    for node in nodes:
        there.update(node.resources)
    missing = {
        name: amount - there[name]
        for name, amount in wanted.items()
        if amount > there[name] + LEAST
    }
    asked = ", ".join(_group_text(group) for group in groups)
    lacks = f"{amounts(missing)} missing" if missing else "no node has room for all that is left"
    listed = [f"{node.name} ({amounts(node.resources) or 'nothing'})" for node in nodes]
    have = ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
    return (
        f"cluster: the run needs {asked}; {lacks}: the cluster has {have or 'no node'}; lower "
        "generator.replicas, generator.gpus, judge.gpus or learner.gpus (fractions share a GPU), "
        "or add nodes"
    )


def _group_text(group: Group) -> str:
    kinds = Counter(amounts(bundle.resources) for bundle in group.bundles)
    return f"{group.name} " + " + ".join(f"{n} × ({kind})" for kind, n in kinds.items())


def amounts(resources: Mapping[str, float]) -> str:
    """Resources for people: CPUs and GPUs first, without Ray's own marks of nodes and kinds."""
    shown = {
        name: amount
        for name, amount in resources.items()
        if amount and name not in OWN[2:] and ":" not in name
    }
    order = sorted(shown, key=lambda name: (OWN.index(name) if name in OWN else len(OWN), name))
    return ", ".join(f"{shown[name]:g} {name}" for name in order)
