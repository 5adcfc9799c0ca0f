"""Prompt and completion fit into generator.max_model_len; the tiny model has a context of 64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from judges.errors import UserError
from pipeline import job
from pipeline.config import Config
from pipeline.inputs import check_inputs
from tests import tiny


def config(model: Path, folder: Path, longest: int | None, **sections: Any) -> Config:
    """The longest training prompt has 4 tokens, <s> among them, a completion 8."""
    cfg = tiny.config(model, folder, generator={"max_model_len": longest}, **sections)
    assert cfg.sampling.max_new_tokens == 8
    assert cfg.prompts.path is not None
    rows = [json.loads(line) for line in Path(cfg.prompts.path).read_text().splitlines()]
    words = [len(row["prompt"].split()) for row in rows if row["split"] == "train"]
    assert max(words) == 3
    return cfg


@pytest.mark.parametrize(
    ("longest", "context", "probe"),
    [(None, 64, 60), (64, 64, 60), (40, 40, 36), (12, 12, 8)],
)
def test_the_context_of_prompts_and_probe(
    tiny_model: Path, tmp_path: Path, longest: int | None, context: int, probe: int
) -> None:
    inputs = check_inputs(config(tiny_model, tmp_path, longest))
    assert inputs.context == context
    assert len(inputs.probe_ids()) == probe


@pytest.mark.parametrize(
    ("longest", "said"),
    [
        (65, "generator.max_model_len=65: {} has a context of 64 tokens; set it to that at most"),
        (8, "generator.max_model_len=8: leaves no token for a prompt beside sampling.max_new_to"),
        (11, "prompts.path={} row 3: the prompt has 4 tokens, with sampling.max_new_tokens=8 gen"),
    ],
)
def test_what_does_not_fit_is_one_line(
    tiny_model: Path, tmp_path: Path, longest: int, said: str
) -> None:
    cfg = config(tiny_model, tmp_path, longest)
    with pytest.raises(UserError) as mistake:
        job.run(cfg, quiet=True)
    place = cfg.prompts.path if "prompts.path" in said else cfg.policy.model
    assert str(mistake.value).startswith(said.format(place))
    assert "\n" not in str(mistake.value)
    assert not cfg.run_dir.exists()


def test_the_probe_of_a_push_needs_room(tiny_model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 2, "prompts_per_update": 4}
    cfg = tiny.config(tiny_model, tmp_path, generator={"max_model_len": 4}, sampling=options)
    with pytest.raises(UserError, match=r"max_model_len=4: every push is proved by 4 tokens .* 5"):
        job.run(cfg, quiet=True)


def test_a_run_at_its_longest(tiny_model: Path, tmp_path: Path) -> None:
    cfg = config(tiny_model, tmp_path, 12, run={"updates": 1, "dir": str(tmp_path / "run")})
    job.run(cfg, quiet=True)
    assert tiny.records(cfg.run_dir)[0]["update"] == 1


def test_template_arguments_of_a_config(tiny_model: Path, tmp_path: Path) -> None:
    """Each for its own prompts: those of the evaluation are not those of the run."""
    args = {"enable_thinking": False}
    held_out = {"path": str(tmp_path / "prompts.jsonl"), "chat_template_args": args}
    for sections, key in (
        ({"prompts": {"chat_template_args": args}}, "prompts.path"),
        ({"evaluation": {"prompts": held_out}}, "evaluation.prompts.path"),
    ):
        cfg = tiny.config(tiny_model, tmp_path, **sections)
        with pytest.raises(UserError, match=rf"^{key}=.*: a text prompt passes no chat template"):
            job.run(cfg, quiet=True)
