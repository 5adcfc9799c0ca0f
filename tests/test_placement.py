"""Which worker goes where, found by hand; what does not fit is refused with what is missing."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from judges.errors import UserError
from pipeline.config import Config
from pipeline.launch.crew import plan_crew
from pipeline.placement import Bundle, Group, Layout, Node, Seat, groups_of, lay_out
from tests import tiny


def config(tmp_path: Path, **sections: Mapping[str, Any]) -> Config:
    """Of a cluster with GPUs, whose model nobody loads."""
    given = {"generator": {"backend": "vllm", "gpus": 1.0, "replicas": 4}, "learner": {"gpus": 1.0}}
    merged = {name: given.get(name, {}) | dict(sections.get(name, {})) for name in given | sections}
    return tiny.config(tmp_path, tmp_path, **merged)


def layout(cfg: Config, *nodes: Node) -> Layout:
    return lay_out(groups_of(plan_crew(cfg, 1, 1)), nodes)


def node(name: str, gpus: int, cpus: int = 16, **custom: float) -> Node:
    return Node(name, {"CPU": cpus, "GPU": gpus, **custom})


def test_the_learner_is_packed_and_the_generators_are_spread(tmp_path: Path) -> None:
    cfg = config(tmp_path, learner={"workers": 2})
    found = layout(cfg, node("a", 4), node("b", 4))
    learners = {found.seats[name].node for name in ("learner 0", "learner 1")}
    assert learners == {"a"}
    generators = [found.seats[f"generator {i}"].node for i in range(4)]
    assert sorted(generators) == ["a", "a", "b", "b"]
    gpus = [(seat.node, gpu) for seat in found.seats.values() for gpu in seat.gpus]
    assert len(gpus) == len(set(gpus)) == 6


def test_fractions_share_a_gpu_but_never_straddle_two(tmp_path: Path) -> None:
    """Of 0.6 each GPU holds one, however much of it is left in all."""
    cfg = config(tmp_path, generator={"gpus": 0.6, "replicas": 2}, learner={"gpus": 0.4})
    found = layout(cfg, node("a", 2))
    (first,), (second,) = (found.seats[f"generator {i}"].gpus for i in range(2))
    assert {first, second} == {0, 1}
    three = config(tmp_path, generator={"gpus": 0.6, "replicas": 3}, learner={"gpus": 0.0})
    with pytest.raises(UserError, match="no node has room for all that is left"):
        layout(three, node("a", 2))


def test_colocated_workers_have_one_gpu_between_them(tmp_path: Path) -> None:
    cfg = config(
        tmp_path,
        generator={"gpus": 0.5, "replicas": 2},
        learner={"gpus": 0.5},
        cluster={"placement": "colocated"},
    )
    found = layout(cfg, node("a", 2))
    assert found.seats["generator 0"] == found.seats["learner"]
    assert found.seats["generator 1"].gpus != found.seats["learner"].gpus
    for together in (1.0, 0.5):
        with pytest.raises(UserError, match="of the GPU that they share"):
            config(tmp_path, generator={"gpus": together}, cluster={"placement": "colocated"})
    with pytest.raises(UserError, match="colocated: the learner and generators share GPUs"):
        config(tmp_path, learner={"gpus": 0.0}, cluster={"placement": "colocated"})


def test_custom_resources_choose_the_node(tmp_path: Path) -> None:
    cfg = config(tmp_path, generator={"resources": {"spot": 1}, "replicas": 2}, judge={"gpus": 1.0})
    found = layout(cfg, node("a", 2), node("b", 2, spot=2))
    assert {found.seats[f"generator {i}"].node for i in range(2)} == {"b"}
    assert found.seats["learner"].node == found.seats["judge 0"].node == "a"


def test_generators_that_may_come_and_go_need_no_room(tmp_path: Path) -> None:
    cfg = config(tmp_path, generator={"min_replicas": 1})
    found = layout(cfg, node("a", 3))
    assert found.absent == ("generator 2", "generator 3")
    with pytest.raises(UserError, match="1 GPU missing"):
        layout(cfg, node("a", 1))


def test_a_misfit_is_one_line_of_what_is_missing_and_what_there_is(tmp_path: Path) -> None:
    cfg = config(tmp_path, generator={"replicas": 8}, resampling={"rounds_in_flight": 1})
    with pytest.raises(UserError) as refusal:
        layout(cfg, node("a", 4, cpus=8), node("b", 0, cpus=8))
    assert str(refusal.value) == (
        "cluster: the run needs learner 1 × (1 CPU, 1 GPU), generators 8 × (1 CPU, 1 GPU); 5 GPU "
        "missing: the cluster has a (8 CPU, 4 GPU), b (8 CPU); lower generator.replicas, "
        "generator.gpus, judge.gpus or learner.gpus (fractions share a GPU), or add nodes"
    )


def test_resources_that_nobody_has_are_named(tmp_path: Path) -> None:
    cfg = config(tmp_path, learner={"resources": {"fast_disk": 1}})
    with pytest.raises(UserError, match=r"\(1 GPU, 1 fast_disk\).*; 1 fast_disk missing"):
        layout(cfg, node("a", 8))


@pytest.mark.parametrize(
    ("section", "options", "said"),
    [
        ("generator", {"resources": {"GPU": 1}}, "generator.resources.GPU=1: GPU is Ray's own"),
        ("judge", {"resources": {"x": 1.5}}, "judge.resources.x=1.5: must be a whole number"),
        ("generator", {"gpus": 1.5}, "generator.gpus=1.5: must be a whole number"),
    ],
)
def test_amounts_that_ray_has_not_got(
    tmp_path: Path, section: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as refusal:
        config(tmp_path, **{section: options})
    assert said in str(refusal.value)


def test_whoever_takes_turns_on_the_cpu_needs_no_seat(tmp_path: Path) -> None:
    """A synchronous learner and judges without GPUs work while the generators wait for them."""
    for in_flight, seated in ((0, []), (1, ["learner"])):
        cfg = tiny.config(
            tmp_path,
            tmp_path,
            generator={"replicas": 2},
            resampling={"rounds_in_flight": in_flight},
        )
        names = [w for g in groups_of(plan_crew(cfg, 1, 1)) for b in g.bundles for w in b.workers]
        assert names == [*seated, "generator 0", "generator 1"]


def fits(bundles: list[float], gpus: list[int]) -> bool:
    """Whether shares or whole numbers of GPUs fit on nodes, by trying every way."""
    places = [(at, gpu) for at, count in enumerate(gpus) for gpu in range(count)]
    choices = [
        [(place,) for place in places]
        if wanted <= 1
        else [c for c in itertools.combinations(places, int(wanted)) if len({p[0] for p in c}) == 1]
        for wanted in bundles
    ]
    for seats in itertools.product(*choices):
        load = dict.fromkeys(places, 0.0)
        for wanted, taken in zip(bundles, seats, strict=True):
            for place in taken:
                load[place] += min(1.0, wanted)
        if all(held < 1.0 + 1e-9 for held in load.values()):
            return True
    return False


@pytest.mark.parametrize("seed", range(40))
def test_it_fits_if_and_only_if_some_layout_does(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [rng.choice([0.3, 0.5, 0.6, 1.0, 2.0]) for _ in range(rng.randint(1, 5))]
    gpus = [rng.randint(1, 2) for _ in range(rng.randint(1, 2))]
    groups = [
        Group("g", rng.choice(["PACK", "SPREAD"]), (Bundle((f"w{at}",), {"GPU": size}),))
        for at, size in enumerate(sizes)
    ]
    nodes = [Node(str(at), {"GPU": float(count)}) for at, count in enumerate(gpus)]
    if not fits(sizes, gpus):
        with pytest.raises(UserError):
            lay_out(groups, nodes)
        return
    found = lay_out(groups, nodes)
    load: dict[tuple[str, int], float] = {}
    for at, size in enumerate(sizes):
        seat: Seat = found.seats[f"w{at}"]
        assert len(seat.gpus) == max(1, size)
        for gpu in seat.gpus:
            assert gpu < gpus[int(seat.node)]
            load[seat.node, gpu] = load.get((seat.node, gpu), 0.0) + min(1.0, size)
    assert max(load.values()) < 1.0 + 1e-9
