"""The Ray cluster that a run is on: joined or started, its nodes, and seats for the workers."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from judges.errors import UserError
from pipeline.config_files import CHECKOUT, PACKAGES
from pipeline.handles import WorkerDied
from pipeline.launch.crew import CrewPlan, Say, WorkerPlan
from pipeline.placement import Bundle, Group, Layout, Node, amounts, lay_out

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""In the environment of what Ray runs as a job: it has our packages from there."""

LOOK = 2.0
"""Seconds between two looks at the cluster's nodes."""

HOLD = 20.0
"""Seconds that a part of what a run needs is held while the rest is not free."""


class Nodes:
    """The nodes of the cluster, as they come and go. ``name`` is what the cluster is called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def now(self) -> list[Node]:
        """Those that are alive, this machine's first."""
        import ray

        here = ray.get_runtime_context().get_node_id()
        alive = [node for node in ray.nodes() if node["Alive"]]
        alive.sort(key=lambda node: (node["NodeID"] != here, node["NodeManagerHostname"]))
        return [Node(_name(node, alive), node["Resources"]) for node in alive]

    def layout(self, groups: Sequence[Group]) -> Layout:
        """Where the groups would go now. Raises UserError where they do not fit."""
        try:
            return lay_out(groups, self.now())
        except UserError as misfit:
            raise UserError(str(misfit).replace("cluster:", f"{self.name}:", 1)) from None

    def wait_for(self, groups: Sequence[Group], minutes: float, say: Say) -> None:
        """Wait so long for nodes that they fit on; an autoscaler, if there is one, is asked.

        Raises UserError where they do not fit even then.
        """
        from ray.autoscaler.sdk import request_resources

        until = time.monotonic() + 60.0 * minutes
        asked = False
        try:
            while True:
                try:
                    self.layout(groups)
                    return
                except UserError as misfit:
                    if time.monotonic() >= until:
                        raise
                    if not asked:
                        say(f"waiting up to {minutes:g} minutes for nodes: {misfit}")
                        request_resources(bundles=[dict(b.resources) for b in _required(groups)])
                    asked = True
                time.sleep(LOOK)
        finally:
            if asked:
                request_resources(bundles=[])


def _required(groups: Sequence[Group]) -> list[Bundle]:
    return [bundle for group in groups if not group.optional for bundle in group.bundles]


def _name(node: Mapping[str, Any], alive: Sequence[Mapping[str, Any]]) -> str:
    """Its host; with its address where two are called alike."""
    host = str(node["NodeManagerHostname"])
    alike = [other for other in alive if other["NodeManagerHostname"] == host]
    if len(alike) == 1:
        return host
    same = [other for other in alike if other["NodeManagerAddress"] == node["NodeManagerAddress"]]
    own = node["NodeManagerAddress"] if len(same) == 1 else node["NodeID"][:8]
    return f"{host} {own}"


@contextmanager
def ray_session(address: str) -> Iterator[Nodes]:
    """Start Ray here (``local``) or join the cluster at ``address``, and leave it in the end.

    Raises UserError where no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of calls that are made again
    local = address == "local"
    if not local:
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "3")  # else a wrong address takes long
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if local:
        options |= {"num_cpus": len(os.sched_getaffinity(0)), "include_dashboard": False}
    elif JOB not in os.environ:
        ours = [str(CHECKOUT / package) for package in PACKAGES]
        options["runtime_env"] = {"py_modules": ours, "excludes": ["__pycache__"]}
    # Ray puts the directory it was started from first on its workers' import path. Ours must be
    # it: a user's folder may hold a `judges/` too.
    with contextlib.chdir(CHECKOUT):
        try:
            ray.init(address=address, **options)
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            if local:
                raise
            raise UserError(_no_cluster(address, error)) from error
    try:
        yield Nodes("this machine" if local else f"cluster.address={address}")
    finally:
        ray.shutdown()


def _no_cluster(address: str, error: Exception) -> str:
    said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    start = "`ray start` here" if address == "auto" else "a cluster with Ray's client server there"
    return (
        f"cluster.address={address}: no Ray cluster answers ({said}): join or start one with "
        f"{start}, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN if it asks for a token, or run on "
        "this machine alone with cluster.address=local"
    )


class Seating:
    """Where each worker is to go: into its bundle of a placement group, or wherever there is room.

    Workers that need nothing stay on the driver's node (Ray spills a soft wish of them anywhere).
    What is set aside is given back when the session ends.
    """

    def __init__(self, plan: CrewPlan, groups: Sequence[Group], nodes: Nodes) -> None:
        self._plan = plan
        self._groups = groups
        self._nodes = nodes
        self._bundles: dict[str, tuple[Any, int]] = {}

    def reserve(self, say: Say) -> None:
        """Set aside what must be there; waits where others use it, and says so.

        What is had of it is given back for a while when the rest does not come: two runs that each
        hold a part would wait for each other.
        """
        import ray

        told = False
        while not self._reserved():
            free = amounts(ray.available_resources()) or "nothing"
            self._release()
            self._nodes.layout(self._groups)
            if not told:
                say(f"waiting for room that others use; free now: {free}")
            told = True
            time.sleep(random.SystemRandom().uniform(LOOK, 10.0 * LOOK))

    def _reserved(self) -> bool:
        """Ask for every required group; whether all of them were had within ``HOLD`` seconds."""
        import ray
        from ray.util import placement_group

        wanted = []
        for group in self._groups:
            if group.optional:
                continue
            reserved = placement_group(
                [dict(bundle.resources) for bundle in group.bundles], strategy=group.strategy
            )
            wanted.append(reserved.ready())
            for at, bundle in enumerate(group.bundles):
                for worker in self._names(bundle.workers):
                    self._bundles[worker] = (reserved, at)
        had, _ = ray.wait(wanted, num_returns=len(wanted), timeout=HOLD) if wanted else ([], [])
        return len(had) == len(wanted)

    def _names(self, workers: Sequence[str]) -> list[str]:
        """The learner's first process is the one that this run has."""
        return [self._plan.learner.name if name == "learner 0" else name for name in workers]

    def _release(self) -> None:
        from ray.util import remove_placement_group

        for reserved in {id(group): group for group, _ in self._bundles.values()}.values():
            remove_placement_group(reserved)
        self._bundles.clear()

    def options(self, worker: WorkerPlan) -> dict[str, Any]:
        """Ray's options for the worker's actor."""
        import ray
        from ray.util.scheduling_strategies import (
            NodeAffinitySchedulingStrategy,
            PlacementGroupSchedulingStrategy,
        )

        if worker.name in self._bundles:
            group, at = self._bundles[worker.name]
            return {
                "scheduling_strategy": PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=at
                )
            }
        if any(worker.resources.values()):
            return {"scheduling_strategy": "SPREAD"}
        here = ray.get_runtime_context().get_node_id()
        return {"scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}

    def refuse_lost_room(self, worker: WorkerPlan) -> None:
        """Raises WorkerDied where the nodes that are left cannot hold the required workers."""
        try:
            self._nodes.layout(self._groups)
        except UserError as misfit:
            raise WorkerDied(f"{worker.name} has no node to run on: {misfit}") from misfit
