"""`freshpairs demo drift`: its worlds against torch's; what it shows, writes and refuses."""

from __future__ import annotations

import io
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from judges.errors import UserError
from pipeline.demo import drift
from pipeline.demo.chart import Axis, Board, draw, fits
from pipeline.demo.drift import demo_drift
from pipeline.demo.words import conclusion, percent, sentence
from pipeline.demo.worlds import (
    GOOD,
    SETTINGS,
    UPDATES,
    Pairs,
    Policies,
    Snapshot,
    dpo_gradient,
    draw_worlds,
    learn,
)
from tests import test_out_of_distribution as study
from tests.tabular import TabularLearner, TabularPolicy
from workers.learner.objectives import PairLogps, build_objective
from workers.messages import BatchCompletion, Completion, Fate, Pair, UpdateBatch

LANES, COMPLETIONS = 3, 40


@pytest.fixture(scope="module")
def three_worlds() -> list[Snapshot]:
    return list(learn(draw_worlds(range(3)), every=64))


def random_pairs(rng: np.random.Generator, pairs: int = 16) -> Pairs:
    chosen, rejected = rng.integers(0, COMPLETIONS, (2, LANES, pairs))
    return Pairs(chosen, rejected)


# --- the worlds ------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_objective_by_autograd():
    """Of logits, through the normaliser, over the pairs that are not identical."""
    rng = np.random.default_rng(0)
    pairs = random_pairs(rng)
    pairs.rejected[0, :5] = pairs.chosen[0, :5]
    pairs.rejected[2] = pairs.chosen[2]  # nothing to learn from
    logits = torch.tensor(rng.normal(0, 2, (LANES, COMPLETIONS)), requires_grad=True)
    reference = torch.tensor(rng.normal(0, 2, (LANES, COMPLETIONS))).log_softmax(-1)
    logratios = (logits - reference).detach().numpy()  # of the policy's logits, not normalised
    policy = logits.log_softmax(-1)
    objective = build_objective({"name": "dpo", "beta": 0.1})
    for lane in range(2):
        keep_mask = pairs.chosen[lane] != pairs.rejected[lane]
        chosen, rejected = (
            torch.tensor(side[lane][keep_mask]) for side in (pairs.chosen, pairs.rejected)
        )
        one_token = torch.ones_like(chosen)
        objective(
            PairLogps(
                policy_chosen=policy[lane, chosen],
                policy_rejected=policy[lane, rejected],
                ref_chosen=reference[lane, chosen],
                ref_rejected=reference[lane, rejected],
                chosen_tokens=one_token,
                rejected_tokens=one_token,
            )
        ).loss.mean().backward(retain_graph=True)
    expected = logits.grad
    assert expected is not None
    np.testing.assert_allclose(dpo_gradient(logratios, pairs), expected.numpy(), atol=1e-15)
    assert not dpo_gradient(logratios, pairs)[2].any()


def update_batch(chosen: np.ndarray, rejected: np.ndarray) -> UpdateBatch:
    """A world's pairs that are not identical, as the learner gets them."""
    nothing, recorded = np.zeros(0, np.int64), np.zeros(1, np.float32)
    completions, examples = [], []
    for prompt, pair in enumerate(zip(chosen.tolist(), rejected.tolist(), strict=True)):
        if pair[0] == pair[1]:
            continue
        at = len(completions)
        examples.append(Pair(prompt, at, at + 1, 1.0, Fate.LEARN))
        completions += [
            BatchCompletion(
                nothing,
                Completion(prompt, i, 0, 0, np.array([token]), recorded, None, True, ""),
            )
            for i, token in enumerate(pair)
        ]
    return UpdateBatch(tuple(completions), tuple(examples))


def test_a_trajectory_is_that_of_torch_on_the_same_pairs():
    rng = np.random.default_rng(1)
    worlds, torch_worlds = draw_worlds(range(LANES)), study.worlds_of(range(LANES))
    policies = Policies(worlds.features_WVD, worlds.reference_WV)
    policy = TabularPolicy(torch_worlds)
    learner = TabularLearner(
        torch_worlds,
        policy,
        build_objective({"name": "dpo", "beta": 0.1}),
        learning_rate=0.02,
        adam_betas=(0.9, 0.99),
    )
    for update in range(200):
        pairs = random_pairs(rng)
        if update % 10 == 3:
            pairs.rejected[1] = pairs.chosen[1]  # an update without a pair is an update, too
        policies.update(pairs)
        sides = zip(pairs.chosen, pairs.rejected, strict=True)
        learner.update([update_batch(chosen, rejected) for chosen, rejected in sides])
        expected = policy.logprobs().detach().numpy()
        np.testing.assert_allclose(np.log(policies.probs()), expected, rtol=0, atol=1e-9)


def test_the_worlds_are_those_of_the_study_and_their_optimum_is_enumerated():
    worlds, theirs = draw_worlds(range(4)), study.worlds_of(range(4))
    np.testing.assert_array_equal(worlds.features_WVD, theirs.features_WVD.numpy())
    np.testing.assert_array_equal(worlds.rewards_WV, theirs.rewards_WV.numpy())
    np.testing.assert_allclose(worlds.reference_WV, theirs.reference_WV.numpy(), atol=1e-12)
    for world, found in enumerate(worlds.optimum()):
        odds = [
            math.exp(logprob + reward / 0.1)
            for logprob, reward in zip(
                worlds.reference_WV[world], worlds.rewards_WV[world], strict=True
            )
        ]
        np.testing.assert_allclose(found, np.array(odds) / math.fsum(odds), rtol=1e-12)
        by_hand = math.fsum(p * r for p, r in zip(found, worlds.rewards_WV[world], strict=True))
        assert worlds.reward(worlds.optimum())[world] == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize(
    ("index", "options"),
    [
        (0, study.OFFLINE_256_PAIRS),
        pytest.param(1, study.OFFLINE, marks=pytest.mark.slow),
        (2, study.every(256)),
        pytest.param(3, study.every(16), marks=pytest.mark.slow),
        pytest.param(4, study.every(1), marks=pytest.mark.slow),
    ],
    ids=[setting.label for setting in SETTINGS],
)
def test_a_setting_is_that_of_the_dial(three_worlds, index, options):
    """The pipeline's own rounds and passes over the same draws give the same policy."""
    expected = study.learn(study.worlds_of(range(1, 2)), options).probs_WV.numpy()
    np.testing.assert_allclose(three_worlds[-1].probs_SWV[index, 1:2], expected, atol=1e-9)


def test_the_facts(three_worlds):
    """Fact 4 of the study on three worlds: 20 of 20 there are 3 of 3 here."""
    worlds, last = draw_worlds(range(3)), three_worlds[-1]
    best = worlds.reward(worlds.optimum()).mean()
    of_the_bad = worlds.rewards_WV[:, GOOD:].mean()
    rewards = last.reward_SW.mean(1)
    assert [snapshot.update for snapshot in three_worlds] == list(range(0, UPDATES + 1, 64))
    for offline in (0, 1):
        assert last.leaked[offline] == 3
        assert rewards[offline] == pytest.approx(of_the_bad, abs=0.1)
    for resampled in (3, 4):
        assert last.leaked[resampled] == 0
        assert rewards[resampled] == pytest.approx(best, abs=0.1)
    assert not last.judged_bad_SW[0].any()  # what offline leaked to is what nobody judged
    assert (last.judged_SW[0] <= 256).all()
    assert last.judged_bad_SW[3].any()


def test_a_snapshot_counts_and_sums(three_worlds):
    last, worlds = three_worlds[-1], draw_worlds(range(3))
    for setting, world in np.ndindex(len(SETTINGS), 3):
        probs = last.probs_SWV[setting, world].tolist()
        assert math.fsum(probs) == pytest.approx(1.0, abs=1e-12)
        assert last.bad_mass[setting, world] == pytest.approx(math.fsum(probs[36:]), rel=1e-12)
        reward = math.fsum(p * r for p, r in zip(probs, worlds.rewards_WV[world], strict=True))
        assert last.reward_SW[setting, world] == pytest.approx(reward, abs=1e-12)


def test_pairs_with_a_bad_completion_are_those_that_were_judged():
    pairs = Pairs(np.array([[35, 36, 39, 0]]), np.array([[0, 36, 2, 37]]))
    assert pairs.learn_mask.tolist() == [[True, False, True, True]]
    assert pairs.bad_mask.tolist() == [[False, False, True, True]]


# --- what is shown ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (1.0, "100 %"),
        (0.9999, "100 %"),
        (0.1482, "14.8 %"),
        (0.01, "1 %"),
        (0.00999, "1 %"),
        (0.003, "0.3 %"),
        (1.4e-5, "0.001 %"),
        (1e-6, "0.0001 %"),
        (9.9e-7, "< 0.0001 %"),
    ],
)
def test_a_probability_in_words(share, words):
    assert percent(share) == words


AXIS = Axis("title", 0.0, 1.0, ((0.0, "low"), (1.0, "high")), dotted=0.0)
COLUMNS = 16


def drawn(updates: list[float], *lines: list[float], rows: int) -> tuple[list[str], list[str]]:
    """The rows of a chart of sixteen columns, and what stands right of them."""
    width = len(" high│ ") - 1 + COLUMNS + len(lines)
    shown = draw(AXIS, np.array(updates), np.array(lines), width, rows).plain.split("\n")
    assert shown[0] == "title"
    assert shown[rows + 1] == "     └" + "─" * COLUMNS
    assert shown[rows + 2] == "      0  updates  1024"
    assert [row[:6] for row in shown[1 : rows + 1]] == [
        {1: "high │", rows: " low │"}.get(row, "     │") for row in range(1, rows + 1)
    ]
    cells = [row[6 : 6 + COLUMNS] for row in shown[1 : rows + 1]]
    return cells, [row[6 + COLUMNS :] for row in shown[1 : rows + 1]]


def test_level_lines_are_the_highest_and_the_lowest_dots_as_far_as_they_go():
    cells, keys = drawn([0.0, UPDATES / 2], [0.0, 0.0], [1.0, 1.0], rows=2)
    assert cells == ["⠉" * 8 + " " * 8, "⣀" * 8 + " ·" * 4]
    assert keys == ["b", "a"]


def test_a_diagonal_climbs_a_dot_a_column():
    """Of 32 dots across and 32 up: in each cell the left dot is one below the right."""
    cells, keys = drawn([0.0, UPDATES], [0.0, 1.0], rows=8)
    for from_below, row in enumerate(reversed(cells)):
        assert row[2 * from_below : 2 * from_below + 2] == "⡠⠊"
        assert set(row[: 2 * from_below] + row[2 * from_below + 2 :]) <= set(" ·")
    assert keys == ["a", *[""] * 7]


def test_a_jump_leaves_no_gap():
    cells, _ = drawn([0.0, 511.0, 512.0, UPDATES], [0.0, 0.0, 1.0, 1.0], rows=4)
    assert all(ord(max(row)) >= 0x2800 for row in cells)


def test_two_lines_that_end_in_one_place_are_both_named():
    _, keys = drawn([0.0, UPDATES], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0], rows=3)
    assert keys == ["ab", "", "c"]


def snapshot(update: int, leaked: tuple[int, int], rewards: tuple[float, float]) -> Snapshot:
    """Two worlds; offline and resampled every 16 updates have these, the others nothing."""
    probs = np.zeros((len(SETTINGS), 2, COMPLETIONS))
    reward = np.zeros((len(SETTINGS), 2))
    for setting, worlds, mean in zip((0, 3), leaked, rewards, strict=True):
        probs[setting, :worlds, GOOD] = 0.5
        reward[setting] = mean - 1.0, mean + 1.0
    judged, with_bad = np.full(reward.shape, 100), np.zeros(reward.shape, int)
    with_bad[3] = 3, 9
    return Snapshot(update, probs, reward, judged, with_bad)


def test_the_sentences_follow_from_the_numbers():
    assert sentence(snapshot(0, (0, 0), (1.0, 1.0)), SETTINGS) == (
        "All start as the reference, which says one of the bad four in < 0.0001 % of cases."
    )
    assert sentence(snapshot(64, (0, 0), (-1.0, 2.5)), SETTINGS) == (
        "No leak so far: true reward is −1.00 offline, 2.50 resampled every 16 updates."
    )
    assert sentence(snapshot(64, (2, 1), (-1.0, 2.5)), SETTINGS) == (
        "More than 1 % on the bad four: offline in 2 of 2 worlds, resampled every 16 updates in 1."
    )
    told = conclusion(
        snapshot(0, (0, 0), (0.5, 0.5)), snapshot(1024, (2, 1), (-6.0, 4.5)), SETTINGS, 4.75
    )
    assert told == (
        "Offline, 2 of 2 policies leaked to what no judged pair had shown (true reward from 0.50 "
        "to −6.00); resampled every 16 updates, 1 of 2 did (4.50; the optimum has 4.75), because "
        "what a policy begins to say is judged: 6 of 100 judged pairs a world held one of the bad "
        "four."
    )


def console(width: int = 80, height: int = 24, *, terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    made = Console(
        file=file,
        width=width,
        height=height,
        force_terminal=terminal,
        force_interactive=terminal,
        color_system="truecolor" if terminal else None,
        legacy_windows=False,
        _environ={},
    )
    return made, file


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 50), (79, 20), (78, 25), (60, 24)])
def test_the_board_is_no_larger_than_the_terminal(three_worlds, width, height):
    board = Board(draw_worlds(range(3)), SETTINGS)
    terminal, _ = console(width, height, terminal=True)
    assert fits(terminal)
    for so_far in (three_worlds[:1], three_worlds[:3], three_worlds):
        lines = terminal.render_lines(board.show(so_far, width, height), pad=False)
        assert len(lines) <= height
        assert all(sum(segment.cell_length for segment in line) <= width for line in lines)
        shown = "".join(segment.text for line in lines for segment in line)
        assert "…" not in shown
        assert all(setting.label in shown for setting in SETTINGS)


def test_charts_are_for_terminals_that_have_room():
    assert not fits(console(59, 40, terminal=True)[0])
    assert not fits(console(79, 19, terminal=True)[0])
    assert not fits(console(78, 23, terminal=True)[0])
    assert not fits(console(80, 40, terminal=False)[0])


# --- the whole demo --------------------------------------------------------------------------


@pytest.fixture
def _fewer_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "UPDATES_PER_FRAME", 64)


@pytest.mark.usefixtures("_fewer_frames")
def test_without_a_terminal_it_prints_plain_lines_and_writes_an_animation(tmp_path):
    out = tmp_path / "drift.gif"
    plain, file = console(terminal=False)
    demo_drift(out, 0, plain)
    text = file.getvalue()
    assert text.replace("\n", "").isprintable()

    lines = text.splitlines()
    found = [line for line in lines if re.match(r" *\d+ +−?\d+\.\d\d ", line)]
    rows = [re.findall(r"[−.\d]+", line) for line in found]
    assert [int(row[0]) for row in rows] == list(range(0, UPDATES + 1, 128))
    # Update, then reward and percentage of each setting: fact 4 of the study.
    assert (rows[-1][1], rows[-1][2]) == ("−6.14", "100")
    assert float(rows[-1][7]) == pytest.approx(4.71, abs=0.03)
    table = {line[2:23].strip(): line[23:].split() for line in lines if " of 20 " in line}
    assert table["offline, 256 pairs"] == ["−6.14", "100", "%", "20", "of", "20", "0.0"]
    assert table["offline, 16,384 pairs"][3:6] == ["20", "of", "20"]
    assert table["every 16 updates"][-4:-1] == table["every update"][-4:-1] == ["0", "of", "20"]
    assert lines[-2:] == [f"animation written to {out}", "read on: docs/resampling.md"]

    with Image.open(out) as film:
        assert film.format == "GIF"
        assert film.n_frames == UPDATES // 64 + 1
        assert film.info["loop"] == 0
        frames = []
        for frame in range(film.n_frames):
            film.seek(frame)
            frames.append(np.asarray(film.convert("RGB")))
    assert (frames[0][0, 0] == 255).all()  # paper is white
    for colour in ((0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):
        drawn_in = [int((np.abs(frame - np.array(colour)).max(-1) <= 8).sum()) for frame in frames]
        assert drawn_in[-1] > drawn_in[0] > 0  # a legend, then a line


@pytest.mark.usefixtures("_fewer_frames")
def test_in_a_terminal_the_charts_move_and_stay(tmp_path):
    terminal, file = console(terminal=True)
    demo_drift(tmp_path / "drift.gif", 1, terminal)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    assert len(re.findall(r"update \d+/1024", text)) >= UPDATES // 64 + 1
    assert "⣀" in text
    assert text.rstrip().endswith("read on: docs/resampling.md")


@pytest.mark.parametrize(
    ("name", "seed", "said"),
    [
        ("there.gif", 0, "exists already and is not overwritten; choose another name"),
        ("drift.png", 0, "does not end in .gif; choose a name that does"),
        ("no/drift.gif", 0, "no such directory"),
        ("drift.gif", -1, "--seed -1: is negative; choose a whole number from 0"),
    ],
)
def test_it_refuses_before_it_computes(tmp_path, name, seed, said):
    (tmp_path / "there.gif").write_bytes(b"mine")
    plain, file = console(terminal=False)
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        demo_drift(tmp_path / name, seed, plain)
    assert "\n" not in str(refused.value)
    assert file.getvalue() == ""
    assert [path.name for path in tmp_path.iterdir()] == ["there.gif"]
    assert (tmp_path / "there.gif").read_bytes() == b"mine"
