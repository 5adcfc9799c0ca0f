"""Runs with judges that fail, hang, cost, choose or are the policy itself."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from judges.errors import UserError
from pipeline import job
from pipeline.config import Config
from pipeline.handles import WorkerDied
from pipeline.launch.crew import plan_crew
from pipeline.ledger import Ledger
from pipeline.replica import Replica
from pipeline.resampling import Dial
from pipeline.stopping import Stopped
from tests import tiny
from tests.lessons import batches
from workers.generator import SampledUnit, SampleRequest
from workers.learner.learner import Learner
from workers.messages import Fate, PromptGroup, Round
from workers.transformers_generator import TransformersGenerator
from workers.verdicts import JudgeFailed

FAILING = """
import asyncio, hashlib

def unlucky(prompt, completion):
    \"\"\"One question in five, whatever else is asked.\"\"\"
    return hashlib.sha256((prompt + "|" + completion).encode()).digest()[0] % 5 == 0

def worth(completion):
    words = completion.split()
    return words.count("a") - words.count("b") / (1 + len(words))

async def score(prompts, completions, how):
    found = [worth(c) for c in completions]
    for i, (p, c) in enumerate(zip(prompts, completions)):
        if not unlucky(p, c):
            continue
        if how == "raises":
            raise ValueError("broken")
        if how == "times out":
            await asyncio.sleep(60)
        if how == "wrong count":
            return found + [0.0]
        if how == "returns text":
            return "I am sorry"
        found[i] = {"NaN": float("nan"), "None": None, "text": "best"}[how]
    return found
"""


def config(model: Path, folder: Path, source: str, **sections: Any) -> Config:
    """A tiny run whose judge is ``score`` of this source."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.py").write_text(textwrap.dedent(source))
    judge = {"name": f"{folder / 'mine.py'}:score"} | sections.pop("judge", {})
    return tiny.config(model, folder, judge=judge, **sections)


def rounds(cfg: Config) -> list[Round]:
    return list(Ledger(cfg.run_dir / "ledger"))


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "policy" / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def of_kind(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in tiny.records(run_dir) if record["kind"] == kind]


@pytest.mark.parametrize(
    "how", ["raises", "times out", "NaN", "None", "text", "wrong count", "returns text"]
)
def test_a_failing_judge_trains_on_exactly_the_others(
    tiny_model: Path, tmp_path: Path, how: str
) -> None:
    cfg = config(
        tiny_model,
        tmp_path,
        FAILING,
        run={"name": "tiny", "dir": str(tmp_path / "run"), "updates": 1},
        sampling={"prompts_per_update": 18, "max_new_tokens": 8},
        judge={
            "args": {"how": how},
            "batch_size": 1,
            "concurrency": 8,
            "timeout": 2.0,
            "max_invalid_share": 0.9,
        },
    )
    job.run(cfg, quiet=True)
    [round_] = rounds(cfg)
    failing: dict[str, Any] = {}
    exec(FAILING, failing)

    def is_unlucky(group: PromptGroup) -> bool:
        return any(failing["unlucky"](group.prompt.content, c.text) for c in group.completions)

    failed = [group for group in round_.groups if is_unlucky(group)]
    fine = [group for group in round_.groups if not is_unlucky(group)]
    assert len(failed) >= 4
    assert len(fine) >= 8
    for group in failed:
        assert {pair.fate for pair in group.pairs} == {Fate.INVALID}
    for group in fine:
        assert np.isfinite(group.judgement.scores).all()
        assert not {pair.fate for pair in group.pairs} & {Fate.INVALID, Fate.UNJUDGED}
    [record] = of_kind(cfg.run_dir, "round")
    unlucky = sum(
        failing["unlucky"](group.prompt.content, completion.text)
        for group in round_.groups
        for completion in group.completions
    )
    assert record["judging"]["invalid"] == unlucky
    assert record["judging"]["valid"] == 36 - unlucky
    assert record["judging"]["timeouts"] == (unlucky if how == "times out" else 0)

    # The same update by a learner that was only ever given the other prompts.
    without = Round(0, 0, tuple(fine), round_.judge, {}, reference_version=0)
    plan = Dial(cfg.resampling, 1, 18).admit()
    [batch] = batches(plan, without, cfg.sampling, cfg.objective.needs, 0)
    learner = Learner(cfg.policy, cfg.learner, cfg.objective, 1, cfg.reference)
    scores = iter(learner.score_reference([batch])[0])
    batch = replace(
        batch,
        completions=tuple(
            replace(c, completion=replace(c.completion, reference_logprobs=next(scores)))
            for c in batch.completions
        ),
    )
    learner.update(batch)
    (tmp_path / "without").mkdir()
    learner.export(tmp_path / "without")
    mine, theirs = weights(cfg.run_dir), load_file(tmp_path / "without" / "model.safetensors")
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


SLOW = """
import time

def score(prompts, completions, seconds):
    time.sleep(seconds)
    return [float(len(c)) for c in completions]
"""


def test_a_call_that_never_ends_stops_a_run_in_one_process(
    tiny_model: Path, tmp_path: Path
) -> None:
    cfg = config(
        tiny_model,
        tmp_path,
        SLOW,
        judge={"args": {"seconds": 600}, "timeout": 0.2, "max_invalid_share": 1.0},
    )
    with pytest.raises(JudgeFailed, match=r"judge\.timeout: a call of the judge still runs"):
        job.run(cfg, quiet=True)


STUCK_ONCE = """
import pathlib, time

def score(prompts, completions, marker):
    path = pathlib.Path(marker)
    if not path.exists():
        path.write_text("")
        time.sleep(600)
    return [float(len(set(c.split()))) + i / 100 for i, c in enumerate(completions)]
"""


@pytest.mark.slow
def test_a_stuck_worker_is_replaced_on_ray(tiny_model: Path, tmp_path: Path) -> None:
    cfg = config(
        tiny_model,
        tmp_path,
        STUCK_ONCE,
        run={"name": "tiny", "dir": str(tmp_path / "run"), "updates": 3},
        judge={
            "args": {"marker": str(tmp_path / "marker")},
            "timeout": 5.0,
            "max_invalid_share": 1.0,
        },
        cluster={"address": "local"},
    )
    job.run(cfg, quiet=True)
    first, *others = rounds(cfg)
    assert {pair.fate for pair in first.pairs} == {Fate.INVALID}
    assert all("timed out after 5 s" in str(r) for g in first.groups for r in g.judgement.reasons)
    assert len(others) == 2
    for round_ in others:
        assert all(np.isfinite(group.judgement.scores).all() for group in round_.groups)


def test_a_judges_file_reaches_a_machine_that_has_not_got_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    cfg = config(tiny_model, tmp_path, SLOW, judge={"args": {"seconds": 0}})
    plan = plan_crew(cfg, 1, 1)
    (tmp_path / "mine.py").unlink()
    program = (
        "import pickle, sys\n"
        "import cloudpickle\n"
        "from workers.generator import SampledUnit\n"
        "panel = pickle.loads(open(sys.argv[1], 'rb').read()).build()\n"
        "print(panel.check([]))\n"
    )
    (tmp_path / "plan").write_bytes(cloudpickle.dumps(plan.judges[0]))
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "plan")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == str({f"{tmp_path}/mine.py:score": False}), done.stderr


DYING_ONCE = """
import os, pathlib

def score(prompts, completions, marker):
    path = pathlib.Path(marker)
    if path.exists():
        path.unlink()
        os.kill(os.getpid(), 9)
    return [float(len(set(c.split()))) + i / 100 for i, c in enumerate(completions)]
"""


@pytest.mark.slow
@pytest.mark.parametrize("rounds_in_flight", [0, 1])
def test_a_judge_worker_that_dies_changes_nothing(
    tiny_model: Path, tmp_path: Path, rounds_in_flight: int
) -> None:
    ends = []
    for name in ("whole", "struck"):
        cfg = config(
            tiny_model,
            tmp_path,
            DYING_ONCE,
            run={"name": "tiny", "dir": str(tmp_path / name), "updates": 4},
            resampling={"rounds_in_flight": rounds_in_flight, "updates_per_round": 2},
            judge={"args": {"marker": str(tmp_path / "marker")}, "replicas": 2},
            cluster={"address": "local"},
        )
        if name == "struck":
            (tmp_path / "marker").touch()
        job.run(cfg, quiet=True)
        assert not (tmp_path / "marker").exists()
        ends.append(cfg.run_dir)
    assert_same_weights(*ends)
    assert tiny.records(ends[0]) == tiny.records(ends[1])


COUNTING = """
import os, pathlib

def score(prompts, completions):
    with pathlib.Path(os.environ["JUDGE_LOG"]).open("a") as file:
        file.writelines(f"{c!r} {p!r}\\n" for p, c in zip(prompts, completions))
    words = [c.split() for c in completions]
    return [w.count("a") - w.count("b") / (1 + len(w)) for w in words]
"""


def counting(model: Path, folder: Path, run_name: str, **judge: Any) -> Config:
    return config(
        model,
        folder,
        COUNTING,
        run={"name": "tiny", "dir": str(folder / run_name), "updates": 4},
        judge=judge,
    )


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What the counting judge was asked since the last look."""
    log = tmp_path / "asked.log"
    monkeypatch.setenv("JUDGE_LOG", str(log))

    def look() -> list[str]:
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    return look


@pytest.fixture(autouse=True)
def _log(asked: Callable[[], list[str]]) -> None:
    """The counting judge always has a file to write to."""


def test_a_spent_budget_stops_and_a_larger_one_goes_on_to_the_same_end(
    tiny_model: Path, tmp_path: Path, asked: Callable[[], list[str]]
) -> None:
    dial = {"updates_per_round": 2}
    whole = counting(tiny_model, tmp_path, "whole")
    dialled = whole.resampling.model_copy(update=dial)
    whole = whole.model_copy(update={"resampling": dialled})
    job.run(whole, quiet=True)
    questions = asked()
    cfg = counting(tiny_model, tmp_path, "run", budget={"labels": 27})
    cfg = cfg.model_copy(update={"resampling": dialled})
    with pytest.raises(Stopped, match=r"judge\.budget\.labels=27: ") as stopped:
        job.run(cfg, quiet=True)
    assert stopped.value.changed == "judge.budget.labels=…"
    paid = asked()
    assert 16 < len(paid) <= 27  # a round, and a part of the next, which is not in the ledger
    assert len(rounds(cfg)) == 1
    with pytest.raises(Stopped):
        job.resume(cfg.run_dir, quiet=True)
    with pytest.raises(UserError, match=r"only judge\.budget, drift\.stop, "):
        job.resume(cfg.run_dir, ["learner.learning_rate=1.0"], quiet=True)
    assert asked() == []
    job.resume(cfg.run_dir, ["judge.budget.labels=1000"], quiet=True)
    assert_same_weights(cfg.run_dir, whole.run_dir)
    paid += asked()
    assert len(paid) == len(set(paid))
    assert set(paid) == set(questions)


def test_a_cache_is_shared_by_runs(
    tiny_model: Path, tmp_path: Path, asked: Callable[[], list[str]]
) -> None:
    shared = str(tmp_path / "answers.sqlite")
    one, two = (counting(tiny_model, tmp_path, name, cache=shared) for name in ("one", "two"))
    job.run(one, quiet=True)
    assert asked()
    job.run(two, quiet=True)
    assert asked() == []
    assert_same_weights(one.run_dir, two.run_dir)
    for record in of_kind(two.run_dir, "round"):
        assert (record["judging"]["asked"], record["judging"]["cached"]) == (0, 8)


def test_a_spent_budget_of_an_ensemble_pays_nothing_twice(tiny_model: Path, tmp_path: Path) -> None:
    members = {"members": ["sentiment", {"name": "repetition"}]}
    ends = []
    for name, budget in (("whole", {}), ("run", {"labels": 26})):
        cfg = counting(tiny_model, tmp_path, name, name="ensemble", args=members, budget=budget)
        dialled = cfg.resampling.model_copy(update={"updates_per_round": 2})
        cfg = cfg.model_copy(update={"resampling": dialled})
        ends.append(cfg.run_dir)
        if not budget:
            job.run(cfg, quiet=True)
            continue
        with pytest.raises(Stopped):
            job.run(cfg, quiet=True)
        job.resume(cfg.run_dir, ["judge.budget.labels=32"], quiet=True)
    assert_same_weights(*ends)


def test_a_selection_survives_the_death_of_a_generator(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    sample = TransformersGenerator.sample
    for name in ("whole", "struck"):
        cfg = counting(tiny_model, tmp_path, name, budget={"labels": 19}, select="uncertainty")
        calls = iter(range(100))

        def mortal(
            generator: TransformersGenerator,
            request: SampleRequest,
            calls: Iterator[int] = calls,
            name: str = name,
        ) -> SampledUnit:
            if name == "struck" and next(calls) == 1:
                raise WorkerDied("the process of generator 0 ended")
            return sample(generator, request)

        monkeypatch.setattr(TransformersGenerator, "sample", mortal)
        job.run(cfg, quiet=True)
        ends.append(cfg.run_dir)
    assert_same_weights(*ends)


def test_judges_forget_what_they_answered(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = []
    ask = Replica.call

    def call(replica: Replica, *args: Any, **kwargs: Any) -> Any:
        found = ask(replica, *args, **kwargs)
        longest.append(len(replica._journal))
        return found

    monkeypatch.setattr(Replica, "call", call)
    job.run(counting(tiny_model, tmp_path, "run"), quiet=True)
    assert len(longest) > 4
    assert max(longest) == 1


def test_peoples_answers_are_where_the_run_was_started(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = tiny.config(tiny_model, tmp_path, judge={"name": "human", "args": {"store": "a.sqlite"}})
    assert cfg.judge.args["store"] == str(tmp_path / "a.sqlite")


@pytest.mark.parametrize("select", ["random", "uncertainty"])
@pytest.mark.parametrize("rounds_in_flight", [0, 1])
def test_a_selection_spreads_the_budget_over_the_run(
    tiny_model: Path,
    tmp_path: Path,
    select: str,
    rounds_in_flight: int,
    asked: Callable[[], list[str]],
) -> None:
    cfg = counting(tiny_model, tmp_path, "run", budget={"labels": 19}, select=select)
    resampling = cfg.resampling.model_copy(update={"rounds_in_flight": rounds_in_flight})
    cfg = cfg.model_copy(update={"resampling": resampling})
    job.run(cfg, quiet=True)
    judged_of = []  # 19 labels are 9 prompts of the 16, two completions each
    for round_ in rounds(cfg):
        judged = [g for g in round_.groups if np.isfinite(g.judgement.scores).all()]
        others = [g for g in round_.groups if g not in judged]
        assert {pair.fate for g in others for pair in g.pairs} == {Fate.UNJUDGED}
        judged_of.append(len(judged))
    assert judged_of == [2, 2, 2, 3]
    assert 14 < len(asked()) <= 18  # of two equal completions one is asked
    assert of_kind(cfg.run_dir, "round")[0]["dropped"]["unjudged"] == 2


def test_uncertain_prompts_are_those_of_the_smallest_implicit_margin(
    tiny_model: Path, tmp_path: Path
) -> None:
    cfg = counting(tiny_model, tmp_path, "run", budget={"labels": 16}, select="uncertainty")
    job.run(cfg, quiet=True)
    for round_ in rounds(cfg)[1:]:
        margins = {}
        for group in round_.groups:
            ratios = [float((c.logprobs - c.reference_logprobs).sum()) for c in group.completions]
            margins[group.prompt.position] = abs(ratios[0] - ratios[1])
        judged = {g.prompt.position for g in round_.groups if np.isfinite(g.judgement.scores).all()}
        assert judged == set(sorted(margins, key=margins.__getitem__)[:2])


def test_uncertain_prompts_may_be_those_that_cheap_judges_dispute(
    tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "cheap.py").write_text(
        "def longer(completions):\n    return [float(len(c)) for c in completions]\n"
        "def shorter_unless_a(completions):\n"
        "    return [float(len(c)) * (1 if 'a' in c else -1) for c in completions]\n"
    )
    names = [f"{tmp_path}/cheap.py:longer", f"{tmp_path}/cheap.py:shorter_unless_a"]
    cfg = counting(
        tiny_model, tmp_path, "run", budget={"labels": 16}, select="uncertainty", select_by=names
    )
    job.run(cfg, quiet=True)

    def disputed(group: PromptGroup) -> float:
        votes = []
        for sign in (lambda c: 1, lambda c: 1 if "a" in c.text else -1):
            one, other = (len(c.text) * sign(c) for c in group.completions)
            votes.append(np.sign(one - other))
        return float(np.var(votes))

    for round_ in rounds(cfg):
        judged = [g for g in round_.groups if np.isfinite(g.judgement.scores).all()]
        others = [g for g in round_.groups if g not in judged]
        assert len(judged) == 2
        assert min(map(disputed, judged)) >= max(map(disputed, others))


def test_a_bradley_terry_link_labels_softly(tiny_model: Path, tmp_path: Path) -> None:
    cfg = tiny.config(
        tiny_model,
        tmp_path,
        pairing={"strategy": "best_worst"},
        run={"updates": 2, "name": "x", "dir": str(tmp_path / "run")},
    )
    judge = cfg.judge.model_copy(update={"link": "bradley_terry", "link_temperature": 0.5})
    cfg = cfg.model_copy(update={"judge": judge})
    job.run(cfg, quiet=True)
    learned = 0
    for round_ in rounds(cfg):
        for group in round_.groups:
            scores = group.judgement.scores
            for pair in group.pairs:
                if pair.fate is Fate.LEARN:
                    margin = scores[pair.chosen] - scores[pair.rejected]
                    assert pair.label_prob == pytest.approx(1 / (1 + math.exp(-margin / 0.5)))
                    assert 0.5 < pair.label_prob < 1
                    learned += 1
    assert learned > 1


def test_a_sampled_link_draws_the_same_again(tiny_model: Path, tmp_path: Path) -> None:
    ends = []
    for name in ("one", "two"):
        cfg = counting(tiny_model, tmp_path, name, link="sampled", link_temperature=2.0)
        job.run(cfg, quiet=True)
        ends.append(cfg.run_dir)
        pairs = [
            (g.judgement.scores[p.chosen] - g.judgement.scores[p.rejected], p.label_prob)
            for r in rounds(cfg)
            for g in r.groups
            for p in g.pairs
            if p.fate is Fate.LEARN
        ]
        assert {label for _, label in pairs} == {1.0}
        assert any(margin < 0 for margin, _ in pairs)  # sometimes the worse one is drawn
        assert sum(margin > 0 for margin, _ in pairs) > 0
    assert_same_weights(*ends)


def test_the_policy_is_its_own_reward_model(tiny_model: Path, tmp_path: Path) -> None:
    cfg = tiny.config(
        tiny_model,
        tmp_path,
        objective={"name": "simpo", "gamma": 1.0},  # moves although all is a tie at the start
        drift={"reference": True},
        judge={"name": "implicit_reward", "args": {"beta": 0.3}},
        evaluation={"every": 3, "count": 4, "prompts": {"path": str(tmp_path / "prompts.jsonl")}},
        pairing={"ties": "keep"},
    )
    job.run(cfg, quiet=True)
    for round_ in rounds(cfg):
        for group in round_.groups:
            expected = [
                0.3 * float((c.logprobs - c.reference_logprobs).sum()) for c in group.completions
            ]
            np.testing.assert_allclose(group.judgement.scores, expected, atol=1e-4)
    assert any(abs(g.judgement.scores).max() > 1e-3 for r in rounds(cfg)[1:] for g in r.groups)
    assert of_kind(cfg.run_dir, "evaluation")[-1]["judge"] == "implicit_reward"


def test_agreement_with_a_second_judge_is_logged(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(
        "def score(completions):\n    return [-float(len(c)) for c in completions]\n"
    )
    cfg = tiny.config(tiny_model, tmp_path)
    second = {"second": {"name": f"{tmp_path}/other.py:score"}}
    cfg = tiny.config(tiny_model, tmp_path, judge={**cfg.judge.model_dump(), **second})
    job.run(cfg, quiet=True)
    for round_, record in zip(rounds(cfg), of_kind(cfg.run_dir, "round"), strict=True):
        same = []
        for group in round_.groups:
            mine = np.sign(np.subtract(*group.judgement.scores))
            theirs = np.sign(len(group.completions[1].text) - len(group.completions[0].text))
            if mine and theirs:
                same.append(mine == theirs)
        assert record["judging"]["agreement"] == (np.mean(same) if same else None)


def test_judge_workers_share_the_work_and_change_nothing(
    tiny_model: Path, tmp_path: Path, asked: Callable[[], list[str]]
) -> None:
    one = counting(tiny_model, tmp_path, "one")
    three = counting(tiny_model, tmp_path, "three", replicas=3)
    job.run(one, quiet=True)
    questions = asked()
    job.run(three, quiet=True)
    assert_same_weights(one.run_dir, three.run_dir)
    assert asked() == questions


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {
                "judge": {"link": "sampled"},
                "pairing": {"strategy": "ranking"},
                "objective": {"name": "plackett_luce"},
            },
            "judge.link=sampled: pairing.strategy=ranking goes by the scores",
        ),
        (
            {"judge": {"second": "implicit_reward"}},
            "judge.second, judge.select_by: the policy in training cannot judge beside another",
        ),
        (
            {"judge": {"name": "implicit_reward", "args": {"beta": -1}}},
            "judge.args.beta=-1: must be a number above 0",
        ),
        (
            {"judge": {"name": "implicit_reward", "args": {"betta": 1}}},
            "judge.args.betta: the policy in training takes beta alone",
        ),
        (
            {"judge": {"name": "implicit_reward", "budget": {"labels": 12}}},
            "judge.budget: the policy in training is asked by the learner, without it",
        ),
        (
            {"judge": {"budget": {"tokens": 9}}},
            "budget.tokens: ",
        ),
        (
            {"judge": {"budget": {"labels": 9}, "cache": "off"}},
            "judge: cache: off: a budget of labels counts a question once",
        ),
        (
            {"judge": {"budget": {"usd": 1.0}}},
            "judge: budget.usd: needs prices: give client.usd_per_million_input",
        ),
        (
            {"judge": {"select": "random"}},
            "judge: select: spreads budget.labels over the run",
        ),
        (
            {
                "judge": {"select": "uncertainty", "budget": {"labels": 9}},
                "objective": {"name": "simpo", "gamma": 1.0},
            },
            "drift.reference=false: simpo needs no reference, but judge.select=uncertainty does",
        ),
        (
            {"judge": {"name": "implicit_reward"}, "objective": {"name": "simpo", "gamma": 1.0}},
            "but the implicit reward does",
        ),
        (
            {
                "evaluation": {"judges": ["implicit_reward"]},
                "objective": {"name": "simpo", "gamma": 1.0},
            },
            "but the implicit reward does",
        ),
        (
            {
                "judge": {"name": "http", "args": {"url": "http://a"}},
                "evaluation": {"judges": [{"name": "http", "args": {"url": "http://b"}}]},
            },
            "evaluation.judges: http stands for two judges: give one an alias",
        ),
    ],
)
def test_misfits_are_told_before_anything_starts(
    tiny_model: Path, tmp_path: Path, sections: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as mistake:
        tiny.config(tiny_model, tmp_path, **sections)
    assert said in str(mistake.value)


def test_a_budget_that_evaluation_uses_up_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    held_out = {"count": 6, "prompts": {"path": str(tmp_path / "prompts.jsonl")}}
    cfg = counting(tiny_model, tmp_path, "run", budget={"labels": 13}, select="random")
    options = tiny.config(tiny_model, tmp_path, evaluation=held_out).evaluation
    cfg = cfg.model_copy(update={"evaluation": options})
    with pytest.raises(UserError, match="evaluation takes 12 of them"):
        job.run(cfg, quiet=True)
    assert not cfg.run_dir.exists()
