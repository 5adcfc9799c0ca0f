"""Whole runs with each kind of objective: losses recomputed by other code, resumed, replicated."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from judges.errors import UserError
from pipeline import job, stopping
from pipeline.config import Config
from pipeline.learner import RemoteLearner
from pipeline.ledger import Ledger
from pipeline.stopping import Stopped
from tests import recomputation, tiny
from workers.learner.density_ratio import DensityRatio

FOUR = {"prompts_per_update": 4, "max_new_tokens": 8, "completions_per_prompt": 4}
TWO_A_ROUND = {"updates_per_round": 2}
KEPT = {"ties": "keep"}
RUNS: dict[str, dict[str, Any]] = {
    "robust": {"objective": {"name": "robust_dpo", "flip_probability": 0.2}},
    "cdpo": {"objective": {"label_smoothing": 0.1, "nll_weight": 0.5}, "resampling": TWO_A_ROUND},
    "wpo": {"objective": {"wpo": True}, "resampling": TWO_A_ROUND},
    "ipo": {"objective": {"name": "ipo", "length_normalized": True}},
    "simpo": {"objective": {"name": "simpo"}},
    "orpo": {"objective": {"name": "orpo", "nll_weight": 0.25}},
    "cpo": {"objective": {"name": "cpo"}},
    "kto": {"objective": {"name": "kto", "undesirable_weight": 1.5}, "resampling": TWO_A_ROUND},
    "kto by threshold": {
        "objective": {"name": "kto"},
        "pairing": {"strategy": "threshold", "threshold": 0.1},
    },
    "bco": {"objective": {"name": "bco"}, "resampling": TWO_A_ROUND},
    "ranking": {
        "objective": {"name": "plackett_luce", "beta": 0.3},
        "pairing": {"strategy": "ranking"},
        "sampling": FOUR,
    },
    "xpo": {"objective": {"name": "xpo", "alpha": 0.01}},
    "nash-md": {"objective": {"name": "nash_md", "mixture": 0.25}, "pairing": KEPT},
    "pdpo": {"objective": {"name": "pdpo", "score_weight": 0.5}, "pairing": KEPT},
    "pdpo, stale": {
        "objective": {
            "name": "pdpo",
            "baseline": "leave_one_out",
            "weights": "self_normalized",
            "score_weight": 1.0,
        },
        "pairing": KEPT,
        "resampling": {"updates_per_round": 3},
    },
    "pdpo, tempered": {
        "objective": {"name": "pdpo", "weights": "clipped"},
        "pairing": KEPT,
        "sampling": {"prompts_per_update": 4, "max_new_tokens": 8, "temperature": 0.8},
        "resampling": TWO_A_ROUND,
    },
    "reset": {"reference": {"update": {"every_rounds": 2}}},
    "average": {"reference": {"update": {"ema": 0.5}}, "resampling": TWO_A_ROUND},
    "kto, average": {"objective": {"name": "kto"}, "reference": {"update": {"ema": 0.7}}},
}


def config(model: Path, folder: Path, sections: dict[str, Any], **more: Any) -> Config:
    return tiny.config(
        model, folder, checkpoint={"every": 1, "keep": 9}, **{"run": {}, **sections, **more}
    )


@pytest.mark.parametrize("name", RUNS)
def test_every_loss_is_that_of_other_code(tiny_model: Path, tmp_path: Path, name: str) -> None:
    """In micro-batches that hold an example or two, so that whole updates need both passes."""
    learner = {"learning_rate": 3e-3, "threads": 1, "tokens_per_micro_batch": 40}
    cfg = config(tiny_model, tmp_path, RUNS[name], learner=learner)
    job.run(cfg, quiet=True)
    updates = [r for r in tiny.records(cfg.run_dir) if r["kind"] == "update"]
    assert sum(record["pairs"] for record in updates) > 6
    expected = recomputation.losses(cfg)
    for record, loss in zip(updates, expected, strict=True):
        assert (record["loss"] is None) == (loss is None)
        if loss is not None:
            assert record["loss"] == pytest.approx(loss, rel=2e-4, abs=2e-4)
    assert len({round(loss, 4) for loss in expected if loss is not None}) > 2


@pytest.mark.parametrize("rounds_in_flight", [0, 1])
@pytest.mark.parametrize("name", ["kto", "bco", "xpo", "reset", "average", "kto, average"])
def test_stopped_and_resumed_equals_uninterrupted(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    rounds_in_flight: int,
) -> None:
    resampling = RUNS[name].get("resampling", {}) | {"rounds_in_flight": rounds_in_flight}
    whole = config(tiny_model, tmp_path / "a", RUNS[name], resampling=resampling)
    job.run(whole, quiet=True)

    stops: list[stopping.Stop] = []
    update = RemoteLearner.update

    def update_then_ask(learner: RemoteLearner, batch: Any) -> dict[str, Any]:
        record = update(learner, batch)
        stops[0].requested |= learner.version == 3
        return record

    with monkeypatch.context() as patch:
        patch.setattr(job, "Stop", lambda where: stops.append(stopping.Stop(where)) or stops[0])
        patch.setattr(RemoteLearner, "update", update_then_ask)
        cut = config(tiny_model, tmp_path / "b", RUNS[name], resampling=resampling)
        with pytest.raises(Stopped):
            job.run(cut, quiet=True)
    job.resume(cut.run_dir, quiet=True)
    assert tiny.records(cut.run_dir) == tiny.records(whole.run_dir)
    mine, theirs = (load_file(c.run_dir / "policy/model.safetensors") for c in (cut, whole))
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize(
    ("update", "updates_per_round", "rounds", "each_update"),
    [
        ("frozen", 2, [0, 0, 0], [0, 0, 0, 0, 0, 0]),
        ({"every_rounds": 1}, 2, [0, 2, 4], [0, 0, 2, 2, 4, 4]),
        ({"every_rounds": 2}, 1, [0, 0, 2, 2, 4, 4], [0, 0, 2, 2, 4, 4]),
        ({"ema": 0.9}, 2, [0, 2, 4], [0, 0, 2, 2, 4, 4]),
    ],
)
@pytest.mark.parametrize("rounds_in_flight", [0, 1])
def test_when_the_reference_moves(
    tiny_model: Path,
    tmp_path: Path,
    update: Any,
    updates_per_round: int,
    rounds: list[int],
    each_update: list[int],
    rounds_in_flight: int,
) -> None:
    cfg = tiny.config(
        tiny_model,
        tmp_path,
        reference={"update": update},
        resampling={"updates_per_round": updates_per_round, "rounds_in_flight": rounds_in_flight},
    )
    job.run(cfg, quiet=True)
    records = tiny.records(cfg.run_dir)
    assert [r["reference_version"] for r in records if r["kind"] == "round"] == rounds
    assert [r["reference_version"] for r in records if r["kind"] == "update"] == each_update
    assert [r.reference_version for r in Ledger(cfg.run_dir / "ledger")] == rounds
    if update == {"every_rounds": 1}:  # each round starts from its own policy
        starts = [r for r in records if r["kind"] == "update"][::2]
        assert [r["loss"] for r in starts] == pytest.approx([math.log(2)] * 3, abs=1e-6)


def test_the_average_is_what_it_says(tiny_model: Path, tmp_path: Path) -> None:
    """Decay 0.5, two updates a round: a quarter of the old reference, three of the new policy."""
    cfg = config(tiny_model, tmp_path, RUNS["average"])
    job.run(cfg, quiet=True)

    def state(update: int) -> dict[str, Any]:
        path = cfg.run_dir / "checkpoints" / f"update-{update:06d}" / "learner.pt"
        found: dict[str, Any] = torch.load(path, weights_only=True)
        return found

    start = load_file(tiny_model / "model.safetensors")
    expected = start
    for update in (2, 4):
        policy = state(update)["policy"]
        expected = {name: 0.25 * expected[name] + 0.75 * policy[name] for name in start}
        reference = state(update + 1)["reference"]
        assert (reference["version"], reference["round"]) == (update, update // 2)
        for name in start:
            torch.testing.assert_close(reference["model"][name], expected[name])
        moved = max(float((expected[n] - start[n]).abs().max()) for n in start)
        assert moved > 1e-3


def test_without_a_reference_none_is_kept_or_scored(tiny_model: Path, tmp_path: Path) -> None:
    cfg = config(tiny_model, tmp_path, RUNS["simpo"])
    job.run(cfg, quiet=True)
    assert not list((cfg.run_dir / "ledger").glob("*.reference.parquet"))
    state = torch.load(cfg.run_dir / "checkpoints/update-000006/learner.pt", weights_only=True)
    assert state["reference"] is None
    for record in tiny.records(cfg.run_dir):
        assert record.get("reference_version") is None
        if record["kind"] == "round":
            missing = ("kl_to_reference", "kl_per_token", "off_reference_share")
            assert [record[key] for key in missing] == [None] * 3
        elif record["pairs"]:
            assert record["rewards_chosen"] < 0  # β · mean log-probability


def test_drift_may_ask_for_a_reference(tiny_model: Path, tmp_path: Path) -> None:
    plain = config(tiny_model, tmp_path / "a", RUNS["simpo"])
    asked = config(tiny_model, tmp_path / "b", RUNS["simpo"], drift={"reference": True})
    job.run(plain, quiet=True)
    job.run(asked, quiet=True)
    last = [r for r in tiny.records(asked.run_dir) if r["kind"] == "round"][-1]
    assert last["kl_to_reference"] != 0.0
    assert last["off_reference_share"] is not None
    losses = [
        [r["loss"] for r in tiny.records(c.run_dir) if r["kind"] == "update"]
        for c in (plain, asked)
    ]
    assert losses[0] == losses[1]


def test_xpo_plays_against_the_reference_and_nash_md_against_the_mixture(
    tiny_model: Path, tmp_path: Path
) -> None:
    for name, share in (("xpo", 1.0), ("nash-md", 0.25)):
        cfg = config(tiny_model, tmp_path / name, RUNS[name])
        job.run(cfg, quiet=True)
        rows = pq.read_table(cfg.run_dir / "ledger/round-000005.parquet").to_pylist()
        assert [row["reference_share"] for row in rows] == [0.0, share] * 4
        assert [row["sampling_logprobs"] is None for row in rows] == [True, False] * 4
        record = [r for r in tiny.records(cfg.run_dir) if r["kind"] == "round"][-1]
        own = [row for row in rows if row["sample"] == 0]
        assert record["length_mean"] == sum(len(row["ids"]) for row in own) / len(own)
        assert record["score_mean"] == pytest.approx(sum(row["score"] for row in own) / len(own))
        path = cfg.run_dir / "ledger/round-000005.reference.parquet"
        reference = {(r["position"], r["sample"]): r for r in pq.read_table(path).to_pylist()}
        kl = [
            sum(row["logprobs"]) - sum(reference[row["position"], 0]["reference_logprobs"])
            for row in own
        ]
        assert record["kl_to_reference"] == pytest.approx(sum(kl) / len(kl), rel=1e-4)


def test_measures_of_the_objective_are_logged(tiny_model: Path, tmp_path: Path) -> None:
    names = {"kto": {"kl"}, "bco": {"delta"}, "pdpo": {"preference_loss", "weight"}, "ipo": set()}
    for name, expected in names.items():
        cfg = config(tiny_model, tmp_path / name, RUNS[name])
        job.run(cfg, quiet=True)
        records = [r for r in tiny.records(cfg.run_dir) if r["kind"] == "update" and r["pairs"]]
        assert all(set(r["objective"]) == expected for r in records)
    assert records[0]["rewards_chosen"] == 0.0


def test_undesirable_completions_are_weighed_by_their_prompts(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learner's loss with the weights that the classifier gave; resumed, the same."""
    encoder = tiny.save_encoder(tmp_path / "encoder")
    given: list[torch.Tensor] = []

    def recorded(ratio: DensityRatio, examples: Any) -> torch.Tensor:
        given.append(weigh(ratio, examples))
        return given[-1]

    weigh = DensityRatio.__call__
    sections = {
        "objective": {"name": "bco", "embedding_model": str(encoder)},
        "pairing": {"strategy": "threshold", "threshold": 0.1},
    }
    monkeypatch.setattr(DensityRatio, "__call__", recorded)
    cfg = config(tiny_model, tmp_path / "a", sections)
    job.run(cfg, quiet=True)
    weights = torch.cat(given)
    assert len({round(w, 3) for w in weights.tolist()}) > 5
    assert 0.5 <= float(weights.min()) < 0.9
    assert float(weights.max()) > 1.1
    expected = recomputation.losses(cfg, [0])[0]
    labels = pq.read_table(cfg.run_dir / "ledger/round-000000.parquet").to_pylist()
    learned = [row for row in labels if row["fate"] == "learn"]
    # At step 0 every log-ratio is 0: each loss is ln 2, times its weight where undesirable.
    plain = [math.log(2)] * len(learned)
    assert expected == pytest.approx(sum(plain) / len(plain), rel=1e-5)
    first = tiny.records(cfg.run_dir)[0]["loss"]
    assert first == pytest.approx(math.log(2) * float(given[0].mean()), rel=1e-5)

    with monkeypatch.context() as patch:
        update, calls = RemoteLearner.update, iter(range(3))

        def dies(learner: RemoteLearner, batch: Any) -> dict[str, Any]:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return update(learner, batch)

        patch.setattr(RemoteLearner, "update", dies)
        cut = config(tiny_model, tmp_path / "b", sections)
        with pytest.raises(Stopped):
            job.run(cut, quiet=True)
    job.resume(cut.run_dir, quiet=True)
    assert tiny.records(cut.run_dir) == tiny.records(cfg.run_dir)


def test_an_encoder_that_is_not_there_is_one_line(tiny_model: Path, tmp_path: Path) -> None:
    sections = {"objective": {"name": "bco", "embedding_model": "no such"}}
    with pytest.raises(UserError, match=r"objective\.embedding_model=no such: no such directory"):
        job.run(config(tiny_model, tmp_path, sections), quiet=True)


PER_TOKEN = """
import torch
from workers.learner.objectives import PairLogps, needs

@needs(per_token=True, whole_update={whole})
def first_tokens(logps: PairLogps, count: int):
    def ratio(side):
        return ((side.policy_BT - side.ref_BT) * side.keep_mask_BT)[:, :count].sum(-1)
    d = ratio(logps.chosen_logprobs) - ratio(logps.rejected_logprobs)
    return torch.nn.functional.softplus(-0.1 * d)
"""


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("count", [3, 99])
def test_an_objective_of_ones_own_on_tokens(
    tiny_model: Path, tmp_path: Path, whole: bool, count: int
) -> None:
    """With every token it is DPO itself; whole updates and micro-batches give the same."""
    path = tmp_path / "mine.py"
    path.write_text(PER_TOKEN.format(whole=whole))
    learner = {"learning_rate": 3e-3, "threads": 1, "tokens_per_micro_batch": 40}
    own = {"name": f"{path}:first_tokens", "args": {"count": count}}
    cfg = config(tiny_model, tmp_path / "own", {"objective": own}, learner=learner)
    plain = config(tiny_model, tmp_path / "dpo", {}, learner=learner)
    job.run(cfg, quiet=True)
    job.run(plain, quiet=True)
    mine, theirs = (
        [r["loss"] for r in tiny.records(c.run_dir) if r["kind"] == "update" and r["pairs"]]
        for c in (cfg, plain)
    )
    same = mine == pytest.approx(theirs, abs=1e-5)
    assert same == (count == 99)


def test_an_objective_of_ones_own_without_a_reference_on_labels(
    tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "from workers.learner.objectives import needs\n"
        "@needs('unpaired', reference=False)\n"
        "def likelihood(logps):\n"
        "    assert logps.ref is None\n"
        "    return -logps.desirable.float() * logps.policy / logps.tokens\n"
    )
    cfg = config(tiny_model, tmp_path, {"objective": {"name": f"{tmp_path}/mine.py:likelihood"}})
    job.run(cfg, quiet=True)
    record = next(r for r in tiny.records(cfg.run_dir) if r["pairs"])
    rows = pq.read_table(cfg.run_dir / "ledger/round-000000.parquet").to_pylist()
    pairs = pq.read_table(cfg.run_dir / "ledger/round-000000.pairs.parquet").to_pylist()
    means = {(r["position"], r["sample"]): sum(r["logprobs"]) / len(r["logprobs"]) for r in rows}
    learned = [p for p in pairs if p["fate"] == "learn"]
    chosen = [means[p["position"], p["chosen"]] for p in learned]
    assert record["loss"] == pytest.approx(-sum(chosen) / (2 * len(chosen)), rel=1e-4)
    assert record["pairs"] == 2 * len(chosen)


MISFITS = [
    ({"objective": {"name": "plackett_luce"}}, "set pairing.strategy to ranking"),
    ({"objective": {"name": "kto"}, "pairing": KEPT}, "one side of a tie desirable"),
    ({"objective": {"nll_weight": 1.0}, "pairing": KEPT}, "a tie has none"),
    ({"objective": {"name": "orpo"}, "pairing": KEPT}, "a tie has none"),
    ({"objective": {"name": "sft"}, "pairing": KEPT}, "a tie has none"),
    ({"objective": {"name": "nash_md"}}, "set pairing.ties to keep"),
    ({"objective": {"name": "pdpo"}}, "set pairing.ties to keep"),
    (
        {"objective": {"name": "pdpo"}, "pairing": KEPT | {"min_margin": 0.1}},
        "min_margin to 0",
    ),
    (
        {"objective": {"name": "nash_md"}, "pairing": KEPT, "sampling": {"truncated": "mask"}},
        "sampling.truncated to train",
    ),
    (
        {"objective": {"name": "nash_md"}, "pairing": KEPT, "sampling": {"temperature": 0.5}},
        "not the policy's own",
    ),
    ({"pairing": {"strategy": "threshold", "threshold": 0}}, "dpo needs pairs"),
    ({"pairing": {"strategy": "threshold"}}, "threshold: a number"),
    ({"pairing": {"threshold": 1}}, "threshold: a number"),
    ({"objective": {"name": "xpo"}, "sampling": FOUR}, "it needs 2"),
    (
        {"objective": {"name": "xpo"}, "reference": {"update": {"ema": 0.9}}},
        "it must be frozen",
    ),
    ({"objective": {"name": "simpo"}, "reference": {"update": {"ema": 0.9}}}, "no reference"),
    (
        {"reference": {"update": {"every_rounds": 3}}, "resampling": TWO_A_ROUND},
        "the reference would never move",
    ),
    (
        {"reference": {"update": {"ema": 0.9}}, "resampling": {"updates_per_round": math.inf}},
        "the reference would never move",
    ),
    ({"objective": {"name": "pdpo"}, "sampling": FOUR}, "drawn at random"),
    (
        {"objective": {"name": "pdpo"}, "pairing": KEPT, "sampling": {"top_p": 0.9}},
        "sampling.top_p=0.9: so reshaped, samples are not the policy's own",
    ),
    (
        {
            "objective": {"name": "pdpo"},
            "pairing": KEPT,
            "sampling": {"temperature": 0.7, "top_k": 50, "min_p": 0.05},
        },
        "sampling.temperature=0.7, min_p=0.05, top_k=50: so reshaped",
    ),
    (
        {"objective": {"name": "kto"}, "sampling": {"prompts_per_update": 1}},
        "it needs at least 2",
    ),
]


@pytest.mark.parametrize(("sections", "said"), MISFITS)
def test_what_does_not_fit_is_one_line(
    tiny_model: Path, tmp_path: Path, sections: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as mistake:
        tiny.config(tiny_model, tmp_path, **sections)
    assert said in str(mistake.value)
    assert "\n" not in str(mistake.value)


def test_what_an_objective_of_ones_own_needs_must_fit(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from workers.learner.objectives import needs\n"
        "@needs('ranked')\n"
        "def f(logps):\n    return logps.policy_GK.sum(-1)\n"
    )
    cfg = tiny.config(tiny_model, tmp_path, objective={"name": f"{tmp_path}/mine.py:f"})
    with pytest.raises(UserError, match="learns from whole rankings"):
        job.run(cfg, quiet=True)
    assert not cfg.run_dir.exists()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("    return -logps.margin.detach()\n", "its loss does not depend on the policy"),
        ("    return logps.nothing\n", "mine.py:2: AttributeError"),
        ("    return logps.margin.sum()\n", "return one loss a pair"),
    ],
)
def test_a_bad_objective_of_ones_own_is_one_line(
    tiny_model: Path, tmp_path: Path, source: str, said: str
) -> None:
    (tmp_path / "mine.py").write_text("def f(logps):\n" + source)
    cfg = tiny.config(tiny_model, tmp_path, objective={"name": f"{tmp_path}/mine.py:f"})
    with pytest.raises(UserError) as mistake:
        job.run(cfg, quiet=True)
    assert said in str(mistake.value)
    assert "\n" not in str(mistake.value)


@pytest.mark.parametrize("asked", ["'nonsense'", "'pairs', mismatched=True"])
def test_needs_that_nobody_can_meet(tiny_model: Path, tmp_path: Path, asked: str) -> None:
    (tmp_path / "mine.py").write_text(
        f"from workers.learner.objectives import needs\n@needs({asked})\ndef f(logps):\n    pass\n"
    )
    cfg = tiny.config(tiny_model, tmp_path, objective={"name": f"{tmp_path}/mine.py:f"})
    with pytest.raises(UserError, match=r"@needs\("):
        job.run(cfg, quiet=True)
    assert not cfg.run_dir.exists()


def test_fresh_pairs_have_weight_one_whoever_the_opponent(tiny_model: Path, tmp_path: Path) -> None:
    cfg = config(tiny_model, tmp_path, RUNS["xpo"])
    job.run(cfg, quiet=True)
    records = [r for r in tiny.records(cfg.run_dir) if r["kind"] == "update" and r["pairs"]]
    assert [(r["ess"], r["ess_per_token"]) for r in records] == [(1.0, 1.0)] * len(records)


def test_a_pulled_policy_learns_from_every_prompt(tiny_model: Path, tmp_path: Path) -> None:
    """Nash-MD's pull to the reference is in ties and identical completions, too."""
    cfg = config(tiny_model, tmp_path, RUNS["nash-md"])
    (tmp_path / "judge.py").write_text(
        "def score(prompts, completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    job.run(cfg, quiet=True)
    records = [r for r in tiny.records(cfg.run_dir) if r["kind"] == "update"]
    assert [r["pairs"] for r in records] == [4] * 6
    assert all(abs(r["loss"]) < 1e-6 for r in records)  # at the reference nothing pulls


def test_evaluating_again_does_not_mistake_the_reference(tiny_model: Path, tmp_path: Path) -> None:
    prompts = {"path": str(tmp_path / "prompts.jsonl")}
    held_out = {"every": 3, "count": 5, "prompts": prompts}
    cfg = tiny.config(
        tiny_model, tmp_path, evaluation=held_out, reference={"update": {"every_rounds": 1}}
    )
    job.run(cfg, quiet=True)
    (again,) = job.evaluate(cfg).evaluations
    last = [r for r in tiny.records(cfg.run_dir) if r["kind"] == "evaluation"][-1]
    assert (again["quality"], again["kl_to_reference"]) == (last["quality"], None)


def test_the_band_is_that_of_each_reference(tiny_model: Path, tmp_path: Path) -> None:
    """A reset reference sampled its own round; an average of policies never sampled any."""
    shares = {}
    for name, update in (("reset", {"every_rounds": 2}), ("average", {"ema": 0.5})):
        cfg = tiny.config(tiny_model, tmp_path / name, reference={"update": update})
        job.run(cfg, quiet=True)
        rounds = [r for r in tiny.records(cfg.run_dir) if r["kind"] == "round"]
        shares[name] = [r["off_reference_share"] for r in rounds]
    assert None not in shares["reset"]
    assert shares["average"][0] is not None
    assert shares["average"][1:] == [None] * 5
