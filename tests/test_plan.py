"""Virtual time against schedules drawn by hand; rates, nodes and the plan made of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from judges.errors import UserError
from pipeline.cli import app
from pipeline.config import Config
from pipeline.placement import Node
from pipeline.plan.calibration import Stopwatch, calibrate
from pipeline.plan.plan import Asked, make_plan, parse_nodes
from pipeline.plan.rates import Law, Lengths, Rates, given_rates, parse_rates, rates_of_run
from pipeline.plan.simulation import Simulated, recommended, simulate
from pipeline.run_directory import create_run_directory
from tests import tiny
from tests.object_storage import in_memory
from workers.places import to_write


def config(model: Path, folder: Path, **sections: Any) -> Config:
    return tiny.config(model, folder, **sections)


def rates(
    sample: float = 0.0, judge: float = 0.0, score: float = 0.0, update: float = 0.0, **more: Any
) -> Rates:
    """Seconds a prompt of each stage."""
    laws = [Law(seconds) for seconds in (sample, judge, score, update)]
    return Rates(*laws, lengths=Lengths(2.0, 8.0), **more)


# Virtual time ------------------------------------------------------------------------------------


def test_a_synchronous_round_is_its_stages_one_after_the_other(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Four prompts: 4·(0.5 + 0.25 + 0.125 + 1) + around 0.5 + the push 0.1 + 0.2 + 0.3 + 0.4.

    Packing and the probe are the learner's, loading and proving the generator's; it loads while
    the learner probes, and 0.2 of the push pass beside the 0.3 of loading.
    """
    cfg = config(tiny_model, tmp_path)
    told = rates(0.5, 0.25, 0.125, 1.0, pack=0.1, probe=0.2, load=0.3, prove=0.4, around=0.5)
    found = simulate(cfg, told)
    assert found.round_seconds == pytest.approx(2 + 1 + 0.5 + 4 + 0.5 + 0.1 + 0.3 + 0.4)
    assert found.seconds == pytest.approx(6 * found.round_seconds)
    assert found.run_seconds == pytest.approx(found.seconds)
    assert (found.lag_mean, found.lag_max) == (0.0, 0)
    assert found.busy["generators"] == pytest.approx((2 + 0.3 + 0.4) / found.round_seconds)
    assert found.busy["judges"] == pytest.approx(1 / found.round_seconds)
    assert found.busy["learner"] == pytest.approx((4.5 + 0.5 + 0.3) / found.round_seconds)
    assert found.bottleneck == "learner"


@pytest.mark.parametrize(
    ("sample", "judge", "update", "in_flight", "seconds"),
    [
        (0.25, 0.0, 0.25, 1, 1.0),  # max(G, L)
        (0.25, 0.0, 0.75, 1, 3.0),
        (0.75, 0.0, 0.25, 1, 3.0),
        (0.25, 0.25, 0.25, 1, 1.5),  # two rounds in three seconds: tests/test_admission.py
        (0.25, 0.25, 0.25, 2, 1.0),
    ],
)
def test_rounds_that_overlap_take_as_long_as_the_slowest_stage(
    tiny_model: Path,
    tmp_path: Path,
    sample: float,
    judge: float,
    update: float,
    in_flight: int,
    seconds: float,
) -> None:
    cfg = config(tiny_model, tmp_path, run={"updates": 500})
    found = simulate(cfg, rates(sample, judge, update=update), in_flight=in_flight)
    assert found.round_seconds == pytest.approx(seconds)
    assert found.lag_max == in_flight
    rest = 500 - found.updates
    assert rest > 0
    assert found.run_seconds == pytest.approx(found.seconds + rest * seconds)


def test_a_rounds_units_are_shared_among_generators(tiny_model: Path, tmp_path: Path) -> None:
    """Four units of 2 s: with 1, 2, 4, 8 generators 8, 4, 2, 2 s; then 4 updates of 1 s."""
    cfg = config(tiny_model, tmp_path, resampling={"updates_per_round": 4}, run={"updates": 40})
    told = rates(sample=0.5, update=0.25)
    runs = [simulate(cfg, told, generators=number) for number in (1, 2, 4, 8)]
    assert [run.round_seconds for run in runs] == pytest.approx([12, 8, 6, 6])
    assert [run.update_seconds for run in runs] == pytest.approx([3, 2, 1.5, 1.5])
    assert runs[-1].lag_max == 3
    assert runs[-1].lag_mean == pytest.approx(1.5)
    assert recommended(runs).generators == 4
    assert recommended(runs[:2]).generators == 2


def test_an_engine_shares_a_round_and_decodes_so_many_at_once(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Eight prompts, three at once, 1 s a wave and 0.5 s a prompt: one generator 3 + 4, two
    generators 2 + 2 each."""
    engine = {"generator": {"backend": "vllm"}, "resampling": {"updates_per_round": 2}}
    cfg = config(tiny_model, tmp_path, **engine)
    told = Rates(Law(0.5, 1.0, 3), Law(), Law(), Law(), Lengths(2.0, 8.0))
    assert simulate(cfg, told, generators=1).round_seconds == pytest.approx(7)
    assert simulate(cfg, told, generators=2).round_seconds == pytest.approx(4)


def test_offline_one_round_feeds_the_run(tiny_model: Path, tmp_path: Path) -> None:
    cfg = config(tiny_model, tmp_path, resampling={"updates_per_round": float("inf")})
    found = simulate(cfg, rates(sample=1.0, update=0.5))
    assert found.seconds == pytest.approx(6 * 4 * 1.0 + 6 * 4 * 0.5)
    assert found.lag_max == 5


def test_recommended_stops_where_the_next_is_less_than_a_tenth_faster() -> None:
    def run(generators: int, seconds: float) -> Simulated:
        busy = dict.fromkeys(("generators", "judges", "learner"), 0.5)
        return Simulated(generators, 0, 1, 1.0, seconds, seconds, 1.0, busy, 0.0, 0)

    assert recommended([run(1, 10.0), run(2, 9.0), run(4, 8.5)]).generators == 2
    assert recommended([run(1, 10.0), run(2, 9.2), run(4, 5.0)]).generators == 1


# Rates -------------------------------------------------------------------------------------------


def test_rates_that_are_given(tiny_model: Path, tmp_path: Path) -> None:
    """Two completions of 8 tokens a prompt, prompts of 2: 16 written, 20 learned from."""
    cfg = config(tiny_model, tmp_path)
    said = parse_rates("generate=32, judge=4,learn=10,push=3,prompt=2")
    found = given_rates(said, cfg)
    assert found.lengths == Lengths(2.0, 8.0)
    assert found.sample(4) == pytest.approx(4 * 16 / 32)
    assert found.judge(4) == pytest.approx(4 * 2 / 4)
    assert found.update(4) == pytest.approx(4 * 20 / 10)
    assert found.score(4) == pytest.approx(4 * 20 / 10 / 3)
    assert found.push == 3
    best = config(tiny_model, tmp_path, sampling={"completions_per_prompt": 4})
    of_four = given_rates(said, best)  # one pair is learned from, all are scored by the reference
    assert of_four.update(4) == pytest.approx(found.update(4))
    assert of_four.score(4) == pytest.approx(2 * found.score(4))
    assert given_rates({"judge": 2.0}, cfg, found).judge(4) == pytest.approx(4)
    assert given_rates({"judge": 2.0}, cfg, found).origin["generate"] == "given"


@pytest.mark.parametrize(
    "text", ["generate", "generate=fast", "speed=3", "generate=0", "generate=-1", "judge=inf"]
)
def test_rates_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match=r"^--rates "):
        parse_rates(text)


def test_a_stage_that_nobody_knows(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="judge, learn missing"):
        given_rates({"generate": 3.0}, config(tiny_model, tmp_path))


def test_a_stopwatch_parts_a_call_from_its_prompts() -> None:
    """The first round warms up. Of calls of 4 and 8 prompts, 3 and 5 s: 1 s a call, 0.5 a prompt;
    of one size all is the prompts'."""
    watch = Stopwatch()
    watch.note("sample", 8, 100.0)
    watch.round_ = 1
    for prompts, seconds in ((8, 4.0), (8, 6.0), (4, 3.0)):
        watch.note("sample", prompts, seconds)
    watch.note("update", 4, 2.0)
    watch.note("load", 0, 0.5)
    assert watch.law("sample") == Law(0.5, 1.0)
    assert watch.law("update") == Law(0.5)
    assert watch.law("judge") == Law()
    assert watch.mean("load") == 0.5
    watch.ends = [0.0, 50.0, 70.0]  # 20 s, of which 15.5 are calls
    assert watch.around() == pytest.approx(4.5)


def test_rates_of_a_run(tiny_model: Path, tmp_path: Path) -> None:
    """Two rounds count: 8 prompts sampled by 2 generators in 2 s each, judged in 1, an update of
    0.5 s each in learn's 1.5 s, 0.25 s of sync and idle each."""
    cfg = config(tiny_model, tmp_path, generator={"replicas": 2})
    create_run_directory(cfg, {"generator": 1, "learner": 1})
    seconds = {"generate": 2.0, "judge": 1.0, "learn": 1.5, "sync": 0.25, "idle": 0.25}
    lines: list[dict[str, Any]] = []
    for number in range(3):
        slow = 100.0 if number == 0 else 1.0
        timed = {stage: slow * spent for stage, spent in seconds.items()}
        where = {"schema": 1, "update": number, "round": number}
        lines.append({**where, "kind": "update", "seconds": 0.5 * slow})
        lines.append({**where, "kind": "round", "prompts": 4, "length_mean": 6.0, "seconds": timed})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (cfg.run_dir / "metrics.jsonl").write_text(text)
    found = rates_of_run(cfg.run_dir, cfg)
    assert found.sample(4) == pytest.approx(2 * 2.0)
    assert found.judge(4) == pytest.approx(1.0)
    assert found.update(4) == pytest.approx(0.5)
    assert found.score(4) == pytest.approx(1.0)
    assert (found.push, found.around) == pytest.approx((0.25, 0.25))
    assert found.lengths.completion == 6.0
    other = config(tiny_model, tmp_path, sampling={"max_new_tokens": 9})
    with pytest.raises(UserError, match=r"sampling\.max_new_tokens is 8, the config's 9"):
        rates_of_run(cfg.run_dir, other)


def test_rates_of_a_run_in_object_storage(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRESHPAIRS_CACHE", str(tmp_path / "cache"))
    url = f"{in_memory(monkeypatch)}/x"
    cfg = config(tiny_model, tmp_path, run={"dir": url})
    with pytest.raises(UserError, match=f"^{url}: not a run directory"):
        rates_of_run(url, cfg)
    create_run_directory(cfg, {"generator": 1, "learner": 1})
    with to_write(f"{url}/metrics.jsonl") as path:
        path.write_text("")
    with pytest.raises(UserError, match=f"^--from {url}: fewer than two rounds"):
        rates_of_run(url, cfg)


@pytest.mark.slow
def test_a_calibration_times_the_real_workers_and_leaves_nothing(
    tiny_model: Path, tmp_path: Path
) -> None:
    cfg = config(tiny_model, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    found = calibrate(cfg)
    assert min(law(4) for law in (found.sample, found.judge, found.score, found.update)) > 0
    assert min(found.pack, found.probe, found.load, found.prove, found.around) > 0
    assert found.lengths.completion == pytest.approx(8, abs=2)
    assert sorted(tmp_path.rglob("*")) == before
    assert simulate(cfg, found).round_seconds >= found.sample(4) + found.update(4)


# The plan ----------------------------------------------------------------------------------------

GIVEN = "generate=32,judge=4,learn=10,prompt=2"


def test_nodes() -> None:
    two = parse_nodes("2x8x96")
    assert [node.name for node in two] == ["node 0", "node 1"]
    assert two[0].resources == {"CPU": 96.0, "GPU": 8.0}
    assert parse_nodes("1x4")[0].resources == {"CPU": 32.0, "GPU": 4.0}
    assert parse_nodes("3x0x16")[0].resources == {"CPU": 16.0}
    for wrong in ("8", "2x", "0x8", "2x0", "axb", "1x2x3x4", "1x-1"):
        with pytest.raises(UserError, match="--nodes"):
            parse_nodes(wrong)


def test_a_plan_says_who_has_room(tiny_model: Path, tmp_path: Path) -> None:
    sections = {
        "generator": {"gpus": 1.0, "backend": "vllm", "replicas": 2},
        "learner": {"gpus": 0.5},
        "judge": {"gpus": 0.5},
        "cluster": {"address": "local"},
    }
    cfg = config(tiny_model, tmp_path, **sections)
    asked = Asked(nodes="1x4", rates=GIVEN, generators=(1, 4))
    plan = make_plan(cfg, asked, lambda line: None)
    assert [run.generators for run in plan.runs] == [1, 2, 4]
    assert plan.room == {1, 2}  # one GPU is shared by learner and judge, three are left
    used = {worker: seat.gpus for worker, seat in plan.layout.seats.items()}
    assert used["learner"] == used["judge 0"]
    assert not {*used["generator 0"], *used["generator 1"]} & {*used["learner"]}
    shared = plan.memory["learner"].total + plan.memory["judge 0"].total
    assert plan.on_gpus()["node 0", used["learner"][0]] == shared
    written = plan.to_json()
    assert written["recommended_generators"] in (1, 2)
    json.dumps(written)


@pytest.mark.parametrize("address", ["local", "auto"])
def test_a_clusters_nodes_are_not_measured_by_this_machine(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    @contextmanager
    def session(address: str) -> Iterator[Any]:
        yield SimpleNamespace(now=lambda: [Node("far", {"CPU": 64.0, "GPU": 8.0})])

    monkeypatch.setattr("pipeline.launch.ray_cluster.ray_session", session)
    monkeypatch.setattr("workers.models.footprint.gpus_here", lambda: [8 * 2**30])
    cfg = config(tiny_model, tmp_path, cluster={"address": address})
    here = {"GPU", "RAM"} if address == "local" else set()
    plan = make_plan(cfg, Asked(rates=GIVEN), lambda line: None)
    assert (set(plan.capacity), plan.nodes[0].name == "far") == (here, address == "auto")
    elsewhere = make_plan(cfg, Asked(rates=GIVEN, nodes="1x4"), lambda line: None)
    assert set(elsewhere.capacity) == set()


def test_a_cluster_that_does_not_answer(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def session(address: str) -> Iterator[Any]:
        raise UserError(f"cluster.address={address}: no Ray cluster answers")
        yield

    monkeypatch.setattr("pipeline.launch.ray_cluster.ray_session", session)
    cfg = config(tiny_model, tmp_path, cluster={"address": "auto"})
    with pytest.raises(UserError, match=r"^cluster\.address=auto: .* what it has: --nodes 2x8$"):
        make_plan(cfg, Asked(rates=GIVEN), lambda line: None)


@pytest.mark.parametrize("served", [True, False])
def test_a_judge_over_http_is_announced(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: bool
) -> None:
    """Three rounds of one update of 4 prompts, 2 completions each."""

    class Begun(Exception):  # noqa: N818
        """The workers would be started."""

    def start(*args: object) -> None:
        raise Begun

    monkeypatch.setattr("pipeline.plan.calibration.start_crew", start)
    client = {"kind": "openai", "model": "m", "base_url": "http://127.0.0.1:9/v1"}
    judge = {"name": "llm_pairwise", "client": client}
    cfg = config(tiny_model, tmp_path, **({"judge": judge} if served else {}))
    said: list[str] = []
    with pytest.raises(Begun):
        make_plan(cfg, Asked(), said.append)
    assert [line for line in said if line.startswith("asks ")] == (
        ["asks llm_pairwise about 24 completions, over HTTP: that may cost money"] if served else []
    )


def test_the_command(tiny_model: Path, tmp_path: Path) -> None:
    cfg = config(tiny_model, tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(cfg.model_dump(mode="json", exclude_unset=True)))
    out = tmp_path / "plan.json"
    arguments = ["plan", str(file), "--rates", GIVEN, "--generators", "1,3", "--json", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    for words in ("gradients", "given", "recommended", "Exact:"):
        assert words in done.output
    written = json.loads(out.read_text())
    assert [run["generators"] for run in written["simulated"]] == [1, 3, 1]
    assert written["memory"]["learner"]["weights"] == 19_360 * 4

    for mistake, remedy in (
        (["--generators", "0"], "whole numbers from 1"),
        (["--nodes", "1x1"], "nothing can be measured"),
        (["--gpu", "abacus"], "no such data sheet"),
    ):
        failed = CliRunner().invoke(app, ["plan", str(file), *mistake])
        assert isinstance(failed.exception, UserError)
        assert remedy in str(failed.exception)
        assert "\n" not in str(failed.exception)
