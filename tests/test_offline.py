"""Offline is a special case: given pairs pass through the same loop, to the bit."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from judges.errors import UserError
from pipeline import job
from pipeline.cli import main
from pipeline.config import Config
from pipeline.export import export_pairs
from pipeline.ledger import Ledger
from tests import tiny
from tests.interruption import Killed, assert_same_run, kill_at_call
from tests.pair_helpers import TEMPLATE
from workers.messages import Fate

OF_TIME = ("seconds", "tokens_per_second")
OF_RECORD = ("ess", "ess_per_token", "policy_ess", "policy_ess_per_token", "kl_from_sampler")
"""Exactly 1, 1 and 0 where the run itself sampled; from recorded log-probabilities, to rounding."""


def once(model: Path, folder: Path, name: str, updates: int = 4, **sections: Any) -> Config:
    """A run that samples once; or, with ``prompts``, one that learns from given pairs."""
    return tiny.config(
        model,
        folder,
        **{
            "run": {"name": "tiny", "updates": updates, "dir": str(folder / name)},
            "resampling": {"updates_per_round": math.inf},
            **sections,
        },
    )


def given(path: Path, **options: Any) -> dict[str, Any]:
    return {"prompts": {"path": None, "pairs": str(path), **options}}


def run(cfg: Config) -> list[dict[str, Any]]:
    job.run(cfg, quiet=True)
    return [r for r in tiny.records(cfg.run_dir) if r["kind"] == "update"]


def assert_replayed(original: Config, again: Config) -> None:
    """Every loss and gradient norm, and the final weights, are the same numbers."""
    before, after = (
        [r for r in tiny.records(c.run_dir) if r["kind"] == "update"] for c in (original, again)
    )
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        for key in one.keys() - {*OF_TIME, *OF_RECORD}:
            assert one[key] == other[key], key
        for key in OF_RECORD:
            assert one[key] == pytest.approx(other[key], abs=1e-5), key
    mine, theirs = (
        load_file(c.run_dir / "policy" / "model.safetensors") for c in (original, again)
    )
    assert all(mine[name].equal(theirs[name]) for name in mine)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "ties are dropped": {"judge": {"args": {}}, "pairing": {"min_margin": 0.3}},
    "two passes": {"resampling": {"updates_per_round": math.inf, "passes": 2}},
    "all pairs of three": {
        "sampling": {"prompts_per_update": 4, "max_new_tokens": 8, "completions_per_prompt": 3},
        "pairing": {"strategy": "all", "max_pairs": 2},
    },
    "tempered": {"sampling": {"prompts_per_update": 4, "max_new_tokens": 8, "temperature": 0.7}},
    "unpaired": {
        "objective": {"name": "bco"},
        "pairing": {"strategy": "threshold", "threshold": 0.5},
    },
    "cut in time": {"sampling": {"prompts_per_update": 4, "max_new_tokens": 3}},
}


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("case", CASES)
def test_an_exported_round_reproduces_the_run_that_wrote_it(tiny_model, tmp_path, case, suffix):
    sections = {name: value for name, value in CASES[case].items() if name != "judge"}
    original = once(tiny_model, tmp_path, "original", **sections)
    run(original)
    out = tmp_path / f"pairs{suffix}"
    export_pairs(original.run_dir, out)
    again = once(tiny_model, tmp_path, "again", **sections, **given(out))
    run(again)
    assert_replayed(original, again)
    dropped = [p for r in Ledger(original.run_dir / "ledger") for p in r.pairs]
    if case == "ties are dropped":
        assert any(pair.fate is not Fate.LEARN for pair in dropped)


def test_a_killed_offline_run_resumes_as_it_was(tiny_model, tmp_path, monkeypatch):
    original = once(tiny_model, tmp_path, "original")
    run(original)
    out = tmp_path / "pairs.parquet"
    export_pairs(original.run_dir, out)
    # Three updates a round, and past the end of the set into a second epoch.
    dial = {"resampling": {"updates_per_round": 3}, "checkpoint": {"every": 2}}
    whole = once(tiny_model, tmp_path, "whole", updates=6, **dial, **given(out))
    run(whole)
    for call in (2, 4, 6):
        cut = once(tiny_model, tmp_path, f"cut-{call}", updates=6, **dial, **given(out))
        with monkeypatch.context() as patch:
            kill_at_call(patch, job.RemoteLearner, "update", call)
            with pytest.raises(Killed):
                job.run(cut, quiet=True)
        job.resume(cut.run_dir, quiet=True)
        assert_same_run(cut.run_dir, whole.run_dir)


# --- sets of other origin ---------------------------------------------------------------------

TRL = [{"prompt": f"a {w}", "chosen": f" a {w} a", "rejected": f" b {w}"} for w in "cdefghij"]
KTO = [
    {"prompt": f"a {w}", "completion": f" {w} {s}", "label": s == "a"} for w in "cdef" for s in "ab"
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_plain_set_is_learned_from_row_by_row_each_epoch(tiny_model, tmp_path):
    path = write(tmp_path / "trl.jsonl", TRL)
    cfg = once(tiny_model, tmp_path, "plain", **given(path))
    updates = run(cfg)
    assert [r["pairs"] for r in updates] == [4, 4, 4, 4]
    assert updates[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert [r["lags"] for r in updates] == [{str(lag): 4} for lag in range(4)]
    assert [r["ess"] for r in updates] == [None] * 4  # nobody knows who wrote them
    [round_] = Ledger(cfg.run_dir / "ledger")
    assert round_.given
    prompts = [group.prompt.content for group in round_.groups]
    for epoch in (prompts[:8], prompts[8:]):
        assert sorted(epoch) == [row["prompt"] for row in TRL]
    [record] = [r for r in tiny.records(cfg.run_dir) if r["kind"] == "round"]
    assert record["kl_to_reference"] is None
    assert record["chosen_logps_change"] == 0.0
    assert (record["pairs"], record["score_mean"]) == (16, None)


def test_in_the_files_order_the_reference_may_follow_step_by_step(tiny_model, tmp_path):
    """sDPO, arXiv:2403.19270: a set cut in steps, each against the policy of the step before."""
    path = write(tmp_path / "trl.jsonl", TRL)
    cfg = once(
        tiny_model,
        tmp_path,
        "sdpo",
        **given(path, order="file"),
        resampling={"updates_per_round": 1},
        reference={"update": {"every_rounds": 1}},
    )
    updates = run(cfg)
    rounds = list(Ledger(cfg.run_dir / "ledger"))
    read = [group.prompt.content for round_ in rounds for group in round_.groups]
    assert read == 2 * [row["prompt"] for row in TRL]
    assert [r["loss"] for r in updates] == pytest.approx([math.log(2)] * 4, abs=1e-6)


@pytest.mark.parametrize("objective", ["kto", "bco"])
def test_labels_without_partners(tiny_model, tmp_path, objective):
    path = write(tmp_path / "kto.jsonl", KTO)
    updates = run(
        once(tiny_model, tmp_path, objective, objective={"name": objective}, **given(path))
    )
    assert [r["pairs"] for r in updates] == [4] * 4


def test_weights_of_given_pairs_are_by_declaration(tiny_model, tmp_path):
    """The reference is the policy at first: then the weights are 1, later exp of the log-ratio."""
    path = write(tmp_path / "trl.jsonl", TRL)
    cfg = once(
        tiny_model,
        tmp_path,
        "declared",
        **given(path, behaviour="reference"),
        resampling={"updates_per_round": math.inf, "correction": "clipped", "clip": 1.5},
        learner={"learning_rate": 0.01},
    )
    updates = run(cfg)
    weights = [r["objective"]["correction_weight"] for r in updates]
    assert weights[0] == pytest.approx(1.0, abs=1e-5)
    assert all(weight != 1.0 for weight in weights[1:])
    assert updates[0]["ess"] == pytest.approx(1.0, abs=1e-5)
    assert updates[3]["ess"] < 1.0


def test_declared_pairs_that_are_replayed_have_weights_too(tiny_model, tmp_path):
    path = write(tmp_path / "trl.jsonl", TRL)
    cfg = once(
        tiny_model,
        tmp_path,
        "replayed",
        **given(path, behaviour="reference"),
        resampling={"updates_per_round": 1, "replay": [0.5, 0.5], "correction": "clipped"},
    )
    for record in run(cfg):
        assert np.isfinite(record["grad_norm"])
        assert np.isfinite(record["objective"]["correction_weight"])


def test_wpo_weighs_given_pairs_from_the_first_update_on(tiny_model, tmp_path):
    path = write(tmp_path / "trl.jsonl", TRL)
    resampling = {"updates_per_round": 1, "correction": "wpo"}
    updates = run(once(tiny_model, tmp_path, "wpo", resampling=resampling, **given(path)))
    assert all(0 < r["objective"]["correction_weight"] < 0.99 for r in updates)


def test_an_export_that_begins_late_is_learned_from(tiny_model, tmp_path):
    """Its first positions are missing: ties, or prompts that nobody could judge."""
    original = once(tiny_model, tmp_path, "original")
    run(original)
    out = tmp_path / "pairs.jsonl"
    export_pairs(original.run_dir, out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    late = write(tmp_path / "late.jsonl", [row for row in rows if row["position"] >= 9])
    updates = run(once(tiny_model, tmp_path, "late", **given(late)))
    assert updates[0]["pairs"] == updates[1]["pairs"] == 0
    assert updates[3]["pairs"] > 0


def refusal(cfg: Any) -> str:
    with pytest.raises(UserError) as caught:
        run(cfg())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("rows", "sections", "said"),
    [
        (TRL, {"resampling": {"correction": "raw"}}, "declare prompts.behaviour=reference"),
        (TRL, {"resampling": {"early": {"ess_below": 0.5}}}, "are never sampled anew: leave out"),
        (TRL, {"resampling": {"adaptive": True}}, "are never sampled anew: leave out"),
        (TRL, {"drift": {"resample": {"ess": 0.5}}}, "are never sampled anew: leave out"),
        (TRL, {"objective": {"name": "nash_md"}}, "nash_md learns from the policy's own samples"),
        (TRL, {"objective": {"name": "xpo"}}, "xpo learns from the policy's own samples"),
        (TRL, {"objective": {"name": "pdpo"}}, "set objective.weights to clipped, raw or self"),
        (TRL, {"drift": {"stop": {"entropy": 1}}}, "needs fresh samples, and the pairs are given"),
        (TRL, {"drift": {"warn": {"logprob_gap": 1}}}, "needs fresh samples, and the pairs are g"),
        (
            TRL,
            {"drift": {"stop": {"judging.tie_rate": 1}}},
            "needs a judge, and the pairs are given",
        ),
        (KTO, {}, "completions with a label, and dpo learns from pairs: use kto or bco"),
        ([{"prompt": "a", "chosen": "b"}], {}, "row 1"),
    ],
)
def test_what_given_pairs_cannot_give_is_refused(tiny_model, tmp_path, rows, sections, said):
    path = write(tmp_path / "pairs.jsonl", rows)

    def config() -> Config:
        return once(tiny_model, tmp_path, "refused", **{**given(path), **sections})

    assert said in refusal(config)
    assert not (tmp_path / "refused").exists()


def foreign_notes(tiny_model, tmp_path, capsys, rows) -> str:
    path = write(tmp_path / "pairs.jsonl", rows)
    job.run(once(tiny_model, tmp_path, "told", **given(path)))
    return " ".join(capsys.readouterr().out.split())


def test_foreign_pairs_are_told_and_the_policys_own_are_not(tiny_model, tmp_path, capsys):
    original = once(tiny_model, tmp_path, "original", updates=8)
    run(original)
    own = tmp_path / "own.jsonl"
    export_pairs(original.run_dir, own)
    job.run(once(tiny_model, tmp_path, "own", **given(own)))
    said = " ".join(capsys.readouterr().out.split())
    assert "given pairs" in said
    assert "look foreign" not in said

    # The same pairs, each token of the chosen side the one that the policy least expects there.
    rows = [json.loads(line) for line in own.read_text().splitlines()]
    foreign = write(tmp_path / "foreign.jsonl", [unlikely(tiny_model, row) for row in rows])
    job.run(once(tiny_model, tmp_path, "foreign", **given(foreign)))
    said = " ".join(capsys.readouterr().out.split())
    assert "look foreign to the policy: 100% of their chosen completions" in said
    assert "freshpairs sft" in said


def unlikely(model: Path, row: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model)
    ids = list(row["prompt_ids"])
    with torch.no_grad():
        for _ in row["chosen_ids"]:
            ids.append(int(policy(torch.tensor([ids])).logits[0, -1].argmin()))
    chosen = ids[len(row["prompt_ids"]) :]
    text = AutoTokenizer.from_pretrained(model).decode(chosen, skip_special_tokens=True)
    return row | {"chosen_ids": chosen, "chosen": text}


def test_sft_on_the_chosen_side_by_the_command(tiny_model, tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "trl.jsonl", TRL)
    cfg = once(tiny_model, tmp_path, "offline", updates=6, **given(path))
    file = tmp_path / "offline.yaml"
    file.write_text(json.dumps(cfg.model_dump(mode="json", exclude_defaults=True)))
    argv = ["freshpairs", "sft", str(file), "learner.learning_rate=0.01", "evaluation={}"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    updates = [r for r in tiny.records(tmp_path / "offline-sft") if r["kind"] == "update"]
    assert updates[-1]["loss"] < updates[0]["loss"]
    assert updates[-1]["chosen_logps"] > updates[0]["chosen_logps"]


def test_sft_sets_aside_what_is_only_for_preferences(tiny_model, tmp_path, monkeypatch):
    path = write(tmp_path / "trl.jsonl", TRL)
    cfg = once(
        tiny_model,
        tmp_path,
        "sdpo",
        **given(path, behaviour="reference"),
        resampling={"updates_per_round": 2, "correction": "clipped"},
        reference={"update": {"every_rounds": 1}},
        drift={"stop": {"chosen_logps_change": -1e9}},
    )
    file = tmp_path / "sdpo.yaml"
    file.write_text(json.dumps(cfg.model_dump(mode="json", exclude_defaults=True)))
    monkeypatch.setattr("sys.argv", ["freshpairs", "sft", str(file), "evaluation={}"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert len(list(Ledger(tmp_path / "sdpo-sft" / "ledger"))) == 1


# --- the real sets ----------------------------------------------------------------------------


SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.mark.parametrize("name", ["dpo_en_demo", "hh_rlhf_harmless_test"])
def test_a_run_on_pairs_that_people_made(tiny_model, tmp_path, name):
    """With a vocabulary of 24 words all is <unk>: what counts is that every form passes through."""
    if not SHARED.is_dir():
        pytest.skip("the pair sets of ../shared are not here")
    rows = read_shared(name)[:40]
    path = write(tmp_path / "real.jsonl", rows)
    model = tmp_path / "chatting"
    shutil.copytree(tiny_model, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    cfg = once(model, tmp_path, name, **given(path, too_long="drop"))
    updates = run(cfg)
    assert updates[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert sum(r["pairs"] for r in updates) > 0
    assert all(np.isfinite(r["grad_norm"]) for r in updates if r["pairs"])


def read_shared(name: str) -> list[dict[str, Any]]:
    if name == "dpo_en_demo":
        rows: list[dict[str, Any]] = json.loads((SHARED / name / f"{name}.json").read_text())
        return rows
    with gzip.open(SHARED / name / "test.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]
