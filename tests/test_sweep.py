"""A grid of runs: its points and names, going on with it, and what it refuses."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from judges.errors import UserError
from pipeline import job, stopping
from pipeline.learner import RemoteLearner
from pipeline.run_directory import create_run_directory
from pipeline.stopping import Stopped
from pipeline.sweep import Outcome, Sweep, plan, point_name, read_axis, run, split_values
from tests import tiny

GRID = ["resampling.updates_per_round=1,.inf", "run.seed=0,1"]
NAMES = [
    "updates_per_round=1,seed=0",
    "updates_per_round=1,seed=1",
    "updates_per_round=.inf,seed=0",
    "updates_per_round=.inf,seed=1",
]


@pytest.fixture
def config_file(tiny_model: Path, tmp_path: Path) -> Path:
    raw = tiny.config(tiny_model, tmp_path, run={"updates": 2}).model_dump(mode="json")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "tiny.yaml"


def swept(sweep: Sweep) -> tuple[Outcome, list[str]]:
    said: list[str] = []
    return run(sweep, say=said.append, quiet=True), said


def stop_at(
    monkeypatch: pytest.MonkeyPatch, call: int, do: Callable[[stopping.Stop], None]
) -> None:
    """``do`` it to the run's Stop after the given update, counted over all points from 1."""
    update = RemoteLearner.update
    stops: list[stopping.Stop] = []
    calls: list[int] = []

    def kept(where: Path) -> stopping.Stop:
        stops.append(stopping.Stop(where))
        return stops[-1]

    def counted(learner: RemoteLearner, *args: Any, **kwargs: Any) -> Any:
        record = update(learner, *args, **kwargs)
        calls.append(1)
        if len(calls) == call:
            do(stops[-1])
        return record

    monkeypatch.setattr(job, "Stop", kept)
    monkeypatch.setattr(RemoteLearner, "update", counted)


def ask(stop: stopping.Stop) -> None:
    stop.requested = True


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,4,16,.inf", ["1", "4", "16", ".inf"]),
        ("[1.0, 0.5]", ["[1.0, 0.5]"]),
        ("[1.0],[0.5, 0.5]", ["[1.0]", "[0.5, 0.5]"]),
        ("{name: a, args: {x: [1, 2]}},b", ["{name: a, args: {x: [1, 2]}}", "b"]),
        ("'a, b',\"c]\",it's,d", ["'a, b'", '"c]"', "it's", "d"]),
        ("", [""]),
    ],
)
def test_commas_inside_brackets_and_quotes_divide_nothing(text: str, values: list[str]) -> None:
    assert split_values(text) == values


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("seed", "form key.path=value,value"),
        ("=1,2", "form key.path=value,value"),
        ("run.seed=0,,1", "a value is missing"),
        ("run.seed=0,1,", "a value is missing"),
        ("run.seed=0,1,0", "0 is there twice"),
        ("run.name=a,b", "names its runs itself"),
        ("run.dir=a,b", "names its runs itself"),
    ],
)
def test_what_is_no_axis_is_told(argument: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_axis(argument)


def test_names_are_readable_files_that_differ() -> None:
    assert point_name({"updates_per_round": ".inf", "seed": "0"}) == "updates_per_round=.inf,seed=0"
    assert point_name({"learning_rate": "1e-5"}) == "learning_rate=1e-5"
    paths = [point_name({"judge": f"/{folder}/mine.py:score"}) for folder in "ab"]
    assert paths[0] != paths[1]
    odd = [*paths, point_name({"replay": "[1.0, 0.5]"}), point_name({"k": "é ../\n"})]
    assert odd[0].startswith("judge=mine.py-score-")
    assert odd[2].startswith("replay=1.0-0.5-")
    many = point_name({f"key{n}": "value" for n in range(60)})
    assert len(many) < 255
    for name in [*odd, many]:
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._+-=,")


def test_points_are_the_product_in_a_directory_beside_the_runs(
    config_file: Path, tmp_path: Path
) -> None:
    sweep = plan(config_file, [*GRID, "sampling.top_p=0.5"])
    assert [point.name for point in sweep.points] == NAMES
    assert [p.cfg.run_dir for p in sweep.points] == [tmp_path / "run-sweep" / n for n in NAMES]
    assert [p.cfg.run.seed for p in sweep.points] == [0, 1, 0, 1]
    assert [p.cfg.resampling.updates_per_round for p in sweep.points] == [1, 1, *2 * [float("inf")]]
    assert {p.cfg.sampling.top_p for p in sweep.points} == {0.5}
    assert not (tmp_path / "run-sweep").exists()
    assert shlex.split(sweep.command)[:2] == ["freshpairs", "sweep"]
    elsewhere = plan(config_file, GRID, tmp_path / "my sweep")
    assert elsewhere.points[0].cfg.run_dir == tmp_path / "my sweep" / NAMES[0]
    assert shlex.split(elsewhere.command)[-2:] == ["--dir", str(tmp_path / "my sweep")]


def test_keys_of_one_name_are_told_apart(config_file: Path) -> None:
    sweep = plan(config_file, ["checkpoint.every=1,2", "evaluation.every=3,4"])
    assert sweep.points[0].name == "checkpoint.every=1,evaluation.every=3"


def test_every_mistake_is_told_before_anything_is_run(config_file: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as mistake:
        plan(config_file, ["run.updates=2,none", "run.seed=0,1", "sampling.top_p=0.5,7"])
    first, second = sorted(str(mistake.value).splitlines())
    assert "run.updates=none" in first
    assert "sampling.top_p=7" in second
    for arguments, said in (
        (["run.seed=3"], "no key has several values"),
        (["run.seed=0,1", "run.seed=2"], "run.seed: given twice"),
        (["learner.learning_rat=1,2"], "did you mean 'learning_rate'"),
    ):
        with pytest.raises(UserError, match=said):
            plan(config_file, arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_grid_runs_is_skipped_when_repeated_and_refuses_another_config(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, said = swept(plan(config_file, GRID))
    places = [str(tmp_path / "run-sweep" / name) for name in NAMES]
    assert outcome == Outcome(runs=places)
    assert said == [f"({n}/4) {name}" for n, name in enumerate(NAMES, start=1)]
    alone = job.run(plan(config_file, GRID, tmp_path / "other").points[1].cfg, quiet=True).run_dir
    assert tiny.records(Path(places[1])) == tiny.records(alone)  # as if it had been the only one

    monkeypatch.setattr(job, "_run", None)  # nothing is run from here on
    again, said = swept(plan(config_file, GRID))
    assert again.runs == places
    assert said[2] == f"(3/4) {NAMES[2]}: finished before"
    budget = plan(config_file, [*GRID, "judge.budget.labels=1000"])  # which may change
    assert swept(budget)[0].runs == places

    with pytest.raises(UserError) as refused:
        plan(config_file, [*GRID, "learner.learning_rate=0.5", "run.updates=3"])
    lines = str(refused.value).splitlines()
    assert [line.partition(": ")[0] for line in lines] == places
    assert (
        "begun with run.updates=2, learner.learning_rate=0.01; asked for is run.updates=3, "
        in (lines[0])
    )
    (tmp_path / "run-sweep" / "seed=7").mkdir()
    (tmp_path / "run-sweep" / "seed=7" / "notes").write_text("")
    with pytest.raises(UserError, match="seed=7: already exists"):
        plan(config_file, ["run.seed=7,8"])


def test_a_run_that_settled_its_backend_is_the_one_asked_for(config_file: Path) -> None:
    grid = [*GRID, "generator.backend=auto"]
    asked = plan(config_file, grid).points[0].cfg
    settled = asked.generator.model_copy(update={"backend": "transformers"})
    create_run_directory(asked.model_copy(update={"generator": settled}), {})
    assert [point.begun for point in plan(config_file, grid).points] == [True, False, False, False]
    with pytest.raises(UserError, match=r"begun with generator.backend=transformers"):
        plan(config_file, [*GRID, "generator.backend=vllm"])


def test_ctrl_c_ends_a_sweep_that_the_same_command_goes_on_with(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = swept(plan(config_file, GRID, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stop_at(patch, 3, ask)
        with pytest.raises(Stopped, match="after update 1"):
            swept(plan(config_file, GRID))
    assert (tmp_path / "run-sweep" / NAMES[0] / "policy").is_dir()
    assert not (tmp_path / "run-sweep" / NAMES[1] / "policy").is_dir()
    assert not (tmp_path / "run-sweep" / NAMES[2]).exists()
    sweep = plan(config_file, GRID)
    assert [(p.begun, p.finished) for p in sweep.points] == [
        (True, True),
        (True, False),
        (False, False),
        (False, False),
    ]
    outcome, said = swept(sweep)
    assert said[0].endswith("finished before")
    assert [tiny.records(Path(r)) for r in outcome.runs] == [
        tiny.records(Path(r)) for r in whole.runs
    ]


def test_ctrl_c_before_a_run_listens_ends_the_sweep_too(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "run", interrupted)
    with pytest.raises(Stopped):
        swept(plan(config_file, GRID))


@pytest.mark.parametrize("error", [FloatingPointError("loss is NaN"), ZeroDivisionError("a bug")])
def test_a_failed_point_is_told_and_the_others_run(
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    def fail(stop: stopping.Stop) -> None:
        raise error

    with monkeypatch.context() as patch:
        stop_at(patch, 2, fail)
        outcome, said = swept(plan(config_file, GRID))
    assert len(said) == 4
    (told,) = outcome.failed
    assert told.startswith(NAMES[0])
    assert str(error) in told
    expected = isinstance(error, FloatingPointError)
    assert ("Traceback" in capsys.readouterr().err) is not expected
    finished = [(Path(r) / "policy").is_dir() for r in outcome.runs]
    assert finished == [False, True, True, True]
    assert swept(plan(config_file, GRID))[0].failed == []
    assert (tmp_path / "run-sweep" / NAMES[0] / "policy").is_dir()


def test_a_point_that_needs_a_change_is_told_and_goes_on_with_it(
    config_file: Path, tmp_path: Path
) -> None:
    """Each update asks about 4 prompts × 2 completions: 8 labels are one update's."""
    outcome, said = swept(plan(config_file, [*GRID, "judge.budget.labels=9"]))
    assert len(said) == 4
    assert [line.partition(":")[0] for line in outcome.stopped] == NAMES
    assert all("it goes on with judge.budget.labels=…" in line for line in outcome.stopped)
    assert outcome.failed == []
    more = plan(config_file, [*GRID, "judge.budget.labels=1000"])
    begun = [point for point in more.points if point.begun]
    budget = "judge.budget={labels: 1000, tokens: null, usd: null}"
    assert [point.more for point in begun] == [(budget,)] * len(begun)
    outcome, _ = swept(more)
    assert outcome.stopped == []
    assert all((tmp_path / "run-sweep" / name / "policy").is_dir() for name in NAMES)


STOP = "drift.stop={length_mean: {above: 500}, entropy: {below: 0.001}}"


@pytest.mark.parametrize(
    ("arguments", "more"),
    [
        (
            ["drift.stop={length_mean: {above: 500}}"],
            ("drift.stop={length_mean: {above: 500.0, below: null}}",),
        ),
        ([], ("drift.stop={}",)),
        (
            [STOP, "drift.warn.judging.tie_rate=0.5"],
            ("drift.warn={judging.tie_rate: {above: 0.5, below: null}}",),
        ),
    ],
)
def test_a_begun_point_goes_on_with_thresholds_added_and_left_out(
    config_file: Path, arguments: list[str], more: tuple[str, ...]
) -> None:
    first = plan(config_file, ["run.seed=0,1", STOP]).points[0].cfg
    create_run_directory(first, {"generator": 1, "learner": 1})
    sweep = plan(config_file, ["run.seed=0,1", *arguments])
    assert [point.more for point in sweep.points] == [more, ()]
    assert swept(sweep)[0].failed == []
    again = plan(config_file, ["run.seed=0,1", *arguments])
    assert [(point.finished, point.more) for point in again.points] == [(True, ())] * 2


def test_a_key_that_is_there_no_more_is_a_difference(config_file: Path, tmp_path: Path) -> None:
    warned = ["run.seed=0,1", "drift.bad=null", "drift.resample={entropy: {below: 0.5}}"]
    create_run_directory(plan(config_file, warned).points[0].cfg, {})
    with pytest.raises(UserError) as refused:
        plan(config_file, warned[:1])
    assert "entropy.below=0.5; asked for is drift.resample={}: sweep into" in str(refused.value)
    place, args = tmp_path / "args", "judge.args={x: 1, y: 2}"
    create_run_directory(plan(config_file, ["run.seed=0,1", args], place).points[0].cfg, {})
    with pytest.raises(UserError, match=r"begun with judge.args.y=2; asked for is no judge.args.y"):
        plan(config_file, ["run.seed=0,1", "judge.args={x: 1}"], place)


def test_a_file_where_the_runs_should_go_is_told_once(config_file: Path, tmp_path: Path) -> None:
    for place in (config_file, config_file / "below"):
        with pytest.raises(UserError) as told:
            plan(config_file, GRID, place)
        assert str(told.value) == (
            f"--dir {place}: {config_file} is a file, not a directory: choose another"
        )
    (tmp_path / "run-sweep").write_text("")
    with pytest.raises(UserError, match="run-sweep is a file"):
        plan(config_file, GRID)


def test_a_mistake_that_lets_no_point_begin_is_told_once(config_file: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone.jsonl"
    with pytest.raises(UserError) as told:
        swept(plan(config_file, [*GRID, f"prompts.path={gone}"]))
    (line,) = str(told.value).splitlines()
    assert line.startswith(f"prompts.path={gone}: ")
    assert not (tmp_path / "run-sweep").exists()
    outcome, _ = swept(plan(config_file, [f"prompts.path={tmp_path / 'prompts.jsonl'},{gone}"]))
    assert [len(outcome.runs), len(outcome.failed)] == [1, 1]
    assert outcome.failed[0].endswith(line)
