"""What `freshpairs explain` computes, draws, says and refuses; the page of objectives."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import TypeAdapter

from judges.errors import UserError
from pipeline import cli
from pipeline.explain import explain, read_options, read_trajectory
from workers.interval import Interval
from workers.learner.landscape import (
    Region,
    is_surrogate,
    log_plane,
    ratio_plane,
    regions,
    shares,
)
from workers.learner.objective_options import BUILT_IN, ObjectiveOptions
from workers.learner.objectives import PairLogps, TokenLogprobs, build_objective
from workers.learner.pairwise_options import Options, PairwiseOptions

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "objectives.md"
AXIS = np.linspace(0.02, 2.0, 34)
PNG = b"\x89PNG\r\n\x1a\n"


def options(name: str, **values: Any) -> Options:
    adapter: TypeAdapter[Options] = TypeAdapter(ObjectiveOptions)
    return adapter.validate_python({"name": name, **values})


def own(folder: Path, body: str, decorator: str = "") -> str:
    """A plug-in with this body of ``fn(logps)``; its spec."""
    path = folder / "mine.py"
    path.write_text(
        "import torch\n"
        "from workers.learner.objectives import needs\n"
        f'{decorator}\ndef fn(logps, scale=1.0):\n    """Mine, and only mine."""\n    {body}\n'
    )
    return f"{path}:fn"


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 3.0])
def test_the_gradient_of_dpo_is_the_closed_form(beta: float) -> None:
    plane = ratio_plane(options("dpo", beta=beta), AXIS)
    x1, x2 = np.meshgrid(AXIS, AXIS)
    total = x1**beta + x2**beta
    np.testing.assert_allclose(plane.loss, -np.log(x1**beta / total), atol=1e-12)
    np.testing.assert_allclose(
        plane.chosen_gradient, -beta * x2**beta / (x1 * total), rtol=1e-9, atol=0.0
    )
    np.testing.assert_allclose(
        plane.rejected_gradient, beta * x2 ** (beta - 1.0) / total, rtol=1e-9, atol=0.0
    )


def test_in_log_space_the_two_pulls_of_dpo_are_equal_and_opposite() -> None:
    axis = np.linspace(-4.0, 4.0, 17)
    plane = log_plane(options("dpo", beta=0.5), axis)
    margin = axis[None, :] - axis[:, None]
    pull = 0.5 / (1.0 + np.exp(0.5 * margin))
    np.testing.assert_allclose(plane.chosen_gradient, -pull, rtol=1e-12)
    np.testing.assert_allclose(plane.rejected_gradient, pull, rtol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_the_regions_of_dpo_follow_x2_over_x1(beta: float) -> None:
    found = regions(ratio_plane(options("dpo", beta=beta), AXIS))
    ratio = AXIS[:, None] / AXIS[None, :]
    expected = np.full(ratio.shape, Region.SADDLE)
    expected[ratio < 0.5 - 1e-12] = Region.COLLAPSE
    expected[ratio > 2.0 + 1e-12] = Region.RESCUE
    assert found.tolist() == expected.tolist()
    assert {Region(value) for value in np.unique(found)} == set(list(Region)[:3])


def test_regions_beyond_the_three() -> None:
    settled = regions(ratio_plane(options("slic", beta=1.0), np.array([0.1, 1.0])))
    # Margins log(x₁/x₂): 0, 2.3 in the first row, −2.3, 0 in the second; the hinge is at 1.
    assert settled.tolist() == [[Region.SADDLE, Region.SETTLED], [Region.RESCUE, Region.SADDLE]]
    # IPO past its target, 1/(2τ) = 1 nat: both pulls turn round.
    reversed_ = regions(ratio_plane(options("ipo", tau=0.5), np.array([0.1, 1.0])))
    assert reversed_.tolist() == [[Region.SADDLE, Region.REVERSED], [Region.RESCUE, Region.SADDLE]]
    assert shares(settled)[Region.SETTLED] == 0.25


def test_single_completions_are_a_desirable_plus_an_undesirable_one() -> None:
    axis = np.array([math.log(0.5), 0.0, math.log(3.0)])
    w, l = np.meshgrid(axis, axis)  # noqa: E741
    sigmoid, softplus = (lambda z: 1.0 / (1.0 + np.exp(-z))), (lambda z: np.log1p(np.exp(z)))
    kto = log_plane(options("kto", beta=0.5, undesirable_weight=2.0), axis)
    np.testing.assert_allclose(kto.loss, sigmoid(-0.5 * w) + 2.0 * sigmoid(0.5 * l), rtol=1e-12)
    bco = log_plane(options("bco", beta=0.5), axis)
    np.testing.assert_allclose(bco.loss, softplus(-0.5 * w) + softplus(0.5 * l), rtol=1e-12)
    nash = log_plane(options("nash_md", beta=0.5), axis)
    np.testing.assert_allclose(nash.chosen_gradient, 0.5 * w - 0.5, atol=1e-12)
    np.testing.assert_allclose(nash.rejected_gradient, 0.5 * l + 0.5, atol=1e-12)


def test_a_ranking_of_two_and_a_reference_sample_are_dpo() -> None:
    axis = np.array([-1.0, 0.5, 2.0])
    dpo = log_plane(options("dpo", beta=0.7), axis)
    ranked = log_plane(options("plackett_luce", beta=0.7), axis)
    np.testing.assert_allclose(ranked.loss, dpo.loss, rtol=1e-12)
    xpo = log_plane(options("xpo", beta=0.7, alpha=0.25), axis)
    bonus = 0.25 * (-20.0 + axis[:, None])  # on the rejected, the reference's sample
    np.testing.assert_allclose(xpo.loss, dpo.loss + bonus, rtol=1e-12)


def test_without_a_reference_the_plane_is_still_that_of_ratios() -> None:
    axis = np.array([-1.0, 0.0, 1.0])
    plane = log_plane(options("simpo", beta=2.0, gamma=1.0), axis)
    margin = 2.0 * (axis[None, :] - axis[:, None]) / 20.0 - 1.0  # 20 tokens
    np.testing.assert_allclose(plane.loss, np.log1p(np.exp(-margin)), rtol=1e-12)


def test_what_depends_on_the_whole_update_is_one_update_a_point() -> None:
    # The other pair stands at the reference: leave-one-out is ln 2, as the constant baseline.
    axis = np.array([-1.5, 0.0, 2.0])
    constant = log_plane(options("pdpo", beta=0.6), axis)
    left_out = log_plane(options("pdpo", beta=0.6, baseline="leave_one_out"), axis)
    np.testing.assert_allclose(left_out.chosen_gradient, constant.chosen_gradient, rtol=1e-12)
    # ∇J = sw·(L − ln 2) − βσ(−βd) for the chosen, here with sw = 0.1.
    margin = 0.6 * (axis[None, :] - axis[:, None])
    loss = np.log1p(np.exp(-margin))
    expected = 0.1 * (loss - math.log(2.0)) - 0.6 / (1.0 + np.exp(margin))
    np.testing.assert_allclose(constant.chosen_gradient, expected, rtol=1e-12)


def test_which_losses_are_surrogates() -> None:
    assert {name for name in BUILT_IN if is_surrogate(options(name))} == {"pdpo", "nash_md"}


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_objective_is_drawn(name: str, tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    lines = explain(name, out=out)
    assert out.read_bytes()[:8] == PNG
    assert lines[-1] == f"drawn in {out}"
    doc = " ".join((BUILT_IN[name].__doc__ or "").split())
    assert lines[0] == f"{name}: {doc}"
    for key in BUILT_IN[name].model_fields.keys() - {"name"}:
        assert any(line.startswith(f"  {key}: ") for line in lines)


@pytest.mark.parametrize(
    ("decorator", "body"),
    [
        ("", "return scale * torch.nn.functional.softplus(-logps.margin)"),
        ('@needs("unpaired")', "return torch.where(logps.desirable, -1.0, 1.0) * logps.logratio"),
        (
            '@needs("ranked", whole_update=True)',
            "return logps.logratio[:, 1] - logps.logratio[:, 0]",
        ),
        ('@needs("sampled", reference=False)', "return (0.5 - logps.win_prob) * logps.policy"),
        (
            "@needs(per_token=True)",
            "return (logps.rejected_logprobs.policy_BT - logps.chosen_logprobs.policy_BT).sum(-1)",
        ),
    ],
)
def test_an_objective_of_ones_own_is_drawn(decorator: str, body: str, tmp_path: Path) -> None:
    spec = own(tmp_path, body, decorator)
    lines = explain(spec, ["args.scale=2.0"], out=tmp_path / "own.svg")
    assert lines[0] == "fn: Mine, and only mine."
    assert lines[1] == f"  source: {spec}"
    assert b"<svg" in (tmp_path / "own.svg").read_bytes()
    axis = np.array([-1.0, 0.25])
    plane = log_plane(read_options(spec, []), axis)
    side = 0.5 if "sampled" in decorator else 1.0
    if decorator:  # all of them fall evenly as the chosen rises, as the rejected falls
        np.testing.assert_allclose(plane.chosen_gradient, -side, rtol=1e-12)
        np.testing.assert_allclose(plane.rejected_gradient, side, rtol=1e-12)


def a_run(folder: Path, objective: dict[str, Any], rewards: list[Any]) -> Path:
    folder.mkdir()
    config = {
        "run": {"name": "walk"},
        "prompts": {"path": "prompts.jsonl"},
        "objective": objective,
        "environment": {},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with (folder / "metrics.jsonl").open("w") as file:
        for update, (chosen, rejected) in enumerate(rewards, start=1):
            record = {"rewards_chosen": chosen, "rewards_rejected": rejected}
            file.write(json.dumps({"kind": "update", "update": update} | record) + "\n")
            file.write(json.dumps({"kind": "round", "round": update}) + "\n")
    return folder


def test_the_path_of_a_run_is_its_records(tmp_path: Path) -> None:
    rewards = [[0.0, 0.0], [0.05, -0.1], [None, None], [-0.2, -1.2]]
    run = a_run(tmp_path / "walk", {"name": "dpo", "beta": 0.2}, rewards)
    found = read_trajectory(run)
    np.testing.assert_allclose(found.points, [[0.0, 0.0], [0.25, -0.5], [-1.0, -6.0]])
    assert found.run == "walk (dpo, 3 updates)"
    explain("ipo", run_dir=run, out=tmp_path / "ipo.png")
    assert (tmp_path / "ipo.png").read_bytes()[:8] == PNG
    # IPO logs its rewards by τ.
    other = a_run(tmp_path / "other", {"name": "ipo", "tau": 0.5}, [[1.0, -2.0]])
    np.testing.assert_allclose(read_trajectory(other).points, [[2.0, -4.0]])


def refused(*args: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The one line with which the command refuses."""
    monkeypatch.setattr(sys, "argv", ["freshpairs", "explain", *args])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    said = captured.err.strip()
    assert said.count("\n") == 0
    return said


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ("dpoo", "objective.name=dpoo: no such objective; did you mean 'dpo'?"),
        ("dpo beta=-1", "objective.beta=-1: must be in (0, ∞)"),
        ("dpo beta=large", "objective.beta=large: must be a number"),
        ("dpo betta=1", "objective.betta: unknown key; did you mean 'beta'?"),
        ("dpo beta", "beta: an override has the form key.path=value"),
        ("absent.py:fn", "no file absent.py"),
        ("dpo --out dpo.gif", "--out dpo.gif: ends in none of .png, .svg, .pdf"),
        ("dpo --out nowhere/dpo.png", "no such directory nowhere"),
        ("dpo --out there.png", "exists already"),
        ("dpo --out file/dpo.png", "no such directory file"),
        ("dpo --run .", "not a run directory"),
        ("dpo --run empty", "of 1 updates none has rewards_chosen and rewards_rejected"),
        ("dpo --run simpo", "simpo has no reference"),
        ("sppo beta=1e-200", "is inf"),
        ("mine.py:constant", "does not depend on the policy"),
        ("mine.py:broken", "mine.py:"),
        ("mine.py:scalar", "return one loss a pair"),
        ("mine.py:steep", "its gradient is not finite"),
    ],
)
def test_nonsense_is_one_clear_line(
    args: str,
    line: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "mine.py").write_text(
        "def constant(logps): return logps.margin.detach()\n"
        "def broken(logps): return logps.margins\n"
        "def scalar(logps): return logps.margin.mean()\n"
        "def steep(logps): return logps.margin.abs().sqrt()\n"
    )
    a_run(tmp_path / "empty", {"name": "dpo"}, [[None, None]])
    a_run(tmp_path / "simpo", {"name": "simpo"}, [[-1.0, -2.0]])
    before = sorted(path.name for path in tmp_path.iterdir())
    assert line in refused(*args.split(), capsys=capsys, monkeypatch=monkeypatch)
    after = sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__")
    assert after == before


def test_another_implicit_reward_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rewards.py"
    path.write_text(
        "from workers.learner.objectives import needs\n"
        "@needs(reference=False)\n"
        "def fn(logps): return logps.policy_rejected - logps.policy_chosen\n"
    )
    run = a_run(tmp_path / "own", {"name": f"{path}:fn"}, [[0.1, 0.0]])
    with pytest.raises(UserError, match="has no reference"):
        read_trajectory(run)
    run = a_run(tmp_path / "cpo", {"name": "cpo"}, [[0.1, 0.0]])
    with pytest.raises(UserError, match="has no reference"):
        read_trajectory(run)


def test_help_loads_no_machinery() -> None:
    program = (
        "import sys, pipeline.cli\n"
        "sys.argv = ['freshpairs', {!r}, '--help']\n"
        "try:\n    pipeline.cli.main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({{'torch', 'matplotlib', 'scipy'}} & set(sys.modules)))\n"
    )
    for command in ("explain", "--help"):
        done = subprocess.run(
            [sys.executable, "-c", program.format(command)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=120,
        )
        assert done.stdout.splitlines()[-1] == "[]", done.stderr
        assert "explain" in done.stdout


def test_the_command_writes_beside_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["freshpairs", "explain", "dpo", "beta=0.5"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code in (0, None)
    said = capsys.readouterr().out
    assert (tmp_path / "dpo.png").read_bytes()[:8] == PNG
    assert "drawn in dpo.png" in said
    assert "  beta: 0.5\n" in said
    # In [0.02, 2]²: x₂ < x₁/2 is ∫(x/2 − 0.02) from 0.04 to 2, of 1.98²: 24.5 %, twice.
    assert " 25%  rejected-collapse" in said or " 24%  rejected-collapse" in said
    assert " 51%  saddle" in said


# The page of objectives.


def sections() -> dict[str, str]:
    """The text of each ``### name`` on the page."""
    parts = re.split(r"^(?:##|###) +(.+)$", PAGE.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def hyper_parameters(name: str) -> dict[str, Interval | None]:
    """Those that are the objective's own, with the range of each that has one."""
    shared = PairwiseOptions.model_fields
    fields = BUILT_IN[name].model_fields
    return {
        key: next((m for m in field.metadata if isinstance(m, Interval)), None)
        for key, field in fields.items()
        if key != "name" and (key not in shared or key in BUILT_IN[name].__annotations__)
    }


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_objective_has_its_section_with_its_hyper_parameters(name: str) -> None:
    section = sections()[name]
    for key, interval in hyper_parameters(name).items():
        assert re.search(rf"\b{key}\b", section), key
        if interval is not None:
            assert f"{key} in {interval.text}" in section
    config = re.search(r"^objective: (\{.*?\})", section, flags=re.MULTILINE)
    assert config is not None
    written = yaml.safe_load(config[1])
    assert written.keys() == {"name", *hyper_parameters(name)}
    assert options(**written) == BUILT_IN[name]()  # what stands there is the default


def test_the_page_names_no_objective_that_is_not_there() -> None:
    text = PAGE.read_text()
    names = re.findall(r"^### (.+)$", text, flags=re.MULTILINE)
    assert names == list(BUILT_IN)
    for key in PairwiseOptions.__annotations__:
        assert f"`{key}" in text


def test_the_objective_of_the_page_is_what_it_says(tmp_path: Path) -> None:
    code = re.search(r"```python\n# my_objective\.py\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert code is not None
    assert len([line for line in code[1].splitlines() if line.strip()]) <= 10
    (tmp_path / "my_objective.py").write_text(code[1])
    line = re.search(r"^objective: (\{name: my_objective\.py.*\})", PAGE.read_text(), re.MULTILINE)
    assert line is not None
    config = yaml.safe_load(line[1])
    config["name"] = f"{tmp_path}/{config['name']}"
    objective = build_objective(config)
    assert objective.needs.per_token

    def tokens(policy: list[float], ref: list[float], keep: list[bool]) -> TokenLogprobs:
        return TokenLogprobs(
            policy_BT=torch.tensor([policy], requires_grad=True),
            ref_BT=torch.tensor([ref]),
            keep_mask_BT=torch.tensor([keep]),
        )

    chosen = tokens([-1.0, -0.5, 0.0], [-6.0, -1.5, 0.0], [True, True, False])
    rejected = tokens([-2.0, -4.0, -1.0], [-1.5, -1.0, -1.0], [True, True, True])
    record = PairLogps(
        policy_chosen=chosen.policy_BT.sum(-1),
        policy_rejected=rejected.policy_BT.sum(-1),
        ref_chosen=torch.tensor([-7.5]),
        ref_rejected=torch.tensor([-3.5]),
        chosen_tokens=torch.tensor([2]),
        rejected_tokens=torch.tensor([3]),
        chosen_logprobs=chosen,
        rejected_logprobs=rejected,
    )
    loss = objective(record).loss
    # Clipped to ±2 nats a token: w = 2 + 1 (from 5, 1), l = −0.5 − 2 + 0 (from −0.5, −3, 0); β 0.1.
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-0.1 * 5.5))], rel=1e-6)
    loss.sum().backward()
    pull = 0.1 / (1.0 + math.exp(0.1 * 5.5))
    assert chosen.policy_BT.grad is not None
    assert rejected.policy_BT.grad is not None
    assert chosen.policy_BT.grad[0].tolist() == pytest.approx([0.0, -pull, 0.0], rel=1e-6)
    assert rejected.policy_BT.grad[0].tolist() == pytest.approx([pull, 0.0, pull], rel=1e-6)


def test_the_pictures_of_the_page_are_small() -> None:
    pictures = re.findall(r"!\[[^\]]+\]\((images/[\w.-]+)\)", PAGE.read_text())
    assert len(pictures) >= 3
    for picture in pictures:
        assert (PAGE.parent / picture).stat().st_size < 200_000
