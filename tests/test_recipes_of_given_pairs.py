"""The shipped pairs, the recipes that read them, and the forms that docs/offline.md shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from judges.build import build_judge
from judges.interface import Score
from pipeline import load_config
from pipeline.config import Config
from pipeline.pair_files import read_pairs
from pipeline.pair_rows import PairRow, read_pair_row
from pipeline.resampling import Dial, RoundPlan, Share, whole_run
from tests.pair_helpers import assistant, given, user
from workers.learner.options import ReferenceSchedule

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "configs/recipes"
PAIRS = ROOT / "configs/data/story_pairs.jsonl"


def recipe(name: str) -> Config:
    return load_config(RECIPES / f"{name}.yaml")


def plans_of(cfg: Config) -> list[RoundPlan]:
    size = cfg.sampling.prompts_per_update
    return list(whole_run(Dial(cfg.resampling, cfg.run.updates, size, cfg.run.seed)))


# --- the pairs --------------------------------------------------------------------------------


def shipped() -> list[PairRow]:
    rows = [row for _, row in read_pairs(PAIRS, "pairs", None, False, "train")]
    return [row for row in rows if isinstance(row, PairRow)]


def test_shipped_pairs_are_stories_with_a_cheerful_and_a_gloomy_end() -> None:
    rows = shipped()
    assert len({row.prompt for row in rows}) == len(rows) == 32
    for row in rows:
        assert isinstance(row.prompt, str)
        assert all(side.text.startswith(" ") for side in row.sides)
    openings = (ROOT / "configs/data/story_openings.jsonl").read_text().splitlines()
    assert not {json.loads(line)["prompt"] for line in openings} & {row.prompt for row in rows}


@pytest.mark.parametrize("name", ["sentiment", "polarity"])
def test_the_first_half_of_the_shipped_pairs_is_the_easier_one(name: str) -> None:
    """Every plain pair is told apart by a lexicon; the others lie half as far apart, at most."""
    rows = shipped()
    scores = []
    for at in (0, 1):
        texts = [row.sides[at].text for row in rows]
        asked = build_judge(name, {}).ask({}, prompts=["p"] * len(rows), completions=texts)
        scores.append([Score.read(score).value or 0.0 for score in asked])
    margins = [chosen - rejected for chosen, rejected in zip(*scores, strict=True)]
    assert min(margins[:16]) > 0
    assert sum(margins[16:]) < sum(margins[:16]) / 2


# --- the recipes ------------------------------------------------------------------------------


def test_a_step_of_sdpo_is_half_of_the_file_four_times() -> None:
    cfg = recipe("sdpo")
    assert cfg.prompts.order == "file"
    assert isinstance(cfg.reference.update, ReferenceSchedule)
    assert cfg.reference.update.every_rounds == 1
    assert plans_of(cfg) == [RoundPlan(0, 8, 0, 16), RoundPlan(1, 8, 16, 16)]


def test_dno_learns_from_three_rounds_by_hand() -> None:
    """64 prompts a round: 0.30 are 19.2 and 0.15 are 9.6, so 19 and 10, and 35 are new."""
    plans = plans_of(recipe("dno-prct"))
    assert plans[0] == RoundPlan(0, 4, 0, 64)
    assert plans[2].shares == (Share(2, 99, 35, 35), Share(1, 64, 35, 19), Share(0, 0, 64, 10))


def test_iterative_dpo_learns_from_everything_so_far() -> None:
    """Two rounds of 8 updates of 16 prompts; the second draws its 128 from 256."""
    first, second = plans_of(recipe("iterative-dpo"))
    assert (first.prompts, second.prompts, second.slots) == (128, 128, 128)
    assert [share.index for share in second.shares] == [1, 0]


@pytest.mark.parametrize("name", ["given-dpo", "preferred-ft", "sdpo", "zephyr"])
def test_recipes_of_given_pairs_read_the_shipped_ones(name: str) -> None:
    cfg = recipe(name)
    assert cfg.prompts.pairs == str(PAIRS)
    assert cfg.objective.name == ("sft" if name == "preferred-ft" else "dpo")


# --- the page ---------------------------------------------------------------------------------

CHAT = ([user("Hi")], (assistant("Hello!"), assistant("What?")))
TEXT = ("The cat sat", (" on the mat.", " on a nail."))
DIALOGUE = ("\n\nHuman: Hi\n\nAssistant:", (" Hello!", " What?"))
LABELLED = ("The cat sat", (" on the mat.",))
SHOWN = [TEXT, CHAT, CHAT, CHAT, DIALOGUE, LABELLED]


def test_the_rows_of_the_page_say_what_it_says_of_them(tmp_path: Path) -> None:
    page = (ROOT / "docs/offline.md").read_text()
    rows = [json.loads(row) for row in re.findall(r"```json\n(.*?)\n```", page)]
    assert len(rows) == len(SHOWN)
    for row, (prompt, answers) in zip(rows, SHOWN, strict=True):
        read = read_pair_row(row, None, has_template=False)
        assert read.prompt == prompt
        assert tuple(side.answer for side in read.sides) == answers
        assert read.desirable is (True if "label" in row else None)
    dialogue = read_pair_row(rows[4], None, has_template=True)
    assert (dialogue.prompt, tuple(side.answer for side in dialogue.sides)) == CHAT
    [group] = given(tmp_path, [rows[0]]).take(0, 1, 0)
    assert [completion.finished for completion in group.completions] == [True, True]
