"""BCO's UDM weights: undesirable completions count as their prompts look like desirable ones'."""

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.optimize import minimize

from workers.learner import density_ratio as module
from workers.learner.density_ratio import DensityRatio, density_ratio
from workers.messages import BatchLabel

NELDER_MEAD = {"xatol": 1e-9, "fatol": 1e-13, "maxiter": 20_000, "maxfev": 20_000}
KINDS = {"story": (0.6, 0.8, 0.0), "recipe": (0.0, 0.6, 0.8)}


class FakeEncoder:
    """Embeds a prompt by its first word."""

    def __init__(self, model: str) -> None:
        assert model == "some-encoder"

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        return np.array([KINDS[text.split()[0]] for text in texts], np.float32)


@pytest.fixture(autouse=True)
def fake_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SentenceEncoder", FakeEncoder)


def labels(kind: str, *, desirable: int, undesirable: int) -> list[BatchLabel]:
    outcomes = [True] * desirable + [False] * undesirable
    return [BatchLabel(i, outcome, f"{kind} {i}") for i, outcome in enumerate(outcomes)]


FIRST = labels("story", desirable=4, undesirable=1) + labels("recipe", desirable=1, undesirable=5)
SECOND = labels("recipe", desirable=1, undesirable=2) + labels("story", desirable=5, undesirable=2)


def desirable_odds(seen: Sequence[BatchLabel]) -> dict[str, float]:
    """p/(1−p) of each kind by a logistic regression fitted to ``seen``, from its definition.

    Minimised is ½|w|² − Σ_i n/(2 n_{class of i}) log p_i; the intercept is free.
    """
    x = np.array([KINDS[label.prompt.split()[0]] for label in seen])
    y = np.array([1.0 if label.desirable else -1.0 for label in seen])
    class_weight = np.where(y > 0, len(y) / (2 * (y > 0).sum()), len(y) / (2 * (y < 0).sum()))

    def objective(parameters: npt.NDArray[np.float64]) -> float:
        w, intercept = parameters[:-1], parameters[-1]
        losses = np.logaddexp(0.0, -y * (x @ w + intercept))
        return float(w @ w / 2 + class_weight @ losses)

    found = minimize(objective, np.zeros(4), method="Nelder-Mead", options=NELDER_MEAD).x
    return {kind: float(np.exp(found[:-1] @ at + found[-1])) for kind, at in KINDS.items()}


def test_the_ratio_is_p_over_1_minus_p_between_a_half_and_ten() -> None:
    # .05/.95 and .3/.7 are below 1/2; .95/.05 = 19 and .999/.001 = 999 above 10.
    weights = density_ratio([0.05, 0.3, 0.5, 0.8, 0.95, 0.999])
    np.testing.assert_allclose(weights, [0.5, 0.5, 1.0, 4.0, 10.0, 10.0], rtol=1e-12)
    assert density_ratio([0.0, 1.0]).tolist() == [0.5, 10.0]


def test_the_undesirable_where_most_are_desirable_weigh_more() -> None:
    ratio = DensityRatio("some-encoder")
    for seen, batch in [(FIRST, FIRST), (FIRST + SECOND, SECOND)]:
        weights = ratio(batch)
        odds = desirable_odds(seen)
        assert 0.5 < odds["recipe"] < 0.8  # no number here is a bound
        assert 1.5 < odds["story"] < 10
        expected = [1.0 if b.desirable else odds[b.prompt.split()[0]] for b in batch]
        assert weights.dtype == torch.float32
        assert weights.tolist() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("desirable", [True, False])
def test_of_one_kind_alone_each_weighs_1(desirable: bool) -> None:
    ratio = DensityRatio("some-encoder")
    batch = labels("story", desirable=4 * desirable, undesirable=4 * (not desirable))
    assert ratio(batch).tolist() == [1.0] * 4
    assert ratio(batch).tolist() == [1.0] * 4


def test_only_the_latest_labels_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEMORY", 10)
    ratio = DensityRatio("some-encoder")
    ratio(FIRST)
    weights = ratio(SECOND[1:])  # nine: of FIRST its last, an undesirable recipe, remains
    odds = desirable_odds([FIRST[-1], *SECOND[1:]])
    assert odds["story"] != pytest.approx(desirable_odds(FIRST + SECOND[1:])["story"], rel=0.05)
    assert weights[-1].item() == pytest.approx(odds["story"], rel=1e-3)


def test_a_loaded_state_continues_bit_for_bit() -> None:
    ratio = DensityRatio("some-encoder")
    ratio(FIRST)
    checkpoint = io.BytesIO()
    torch.save(ratio.state(), checkpoint)
    checkpoint.seek(0)
    resumed = DensityRatio("some-encoder")
    resumed.load(torch.load(checkpoint, weights_only=True))
    straight = [ratio(SECOND), ratio(FIRST[3:8])]
    assert torch.equal(torch.cat([resumed(SECOND), resumed(FIRST[3:8])]), torch.cat(straight))
    assert not torch.equal(DensityRatio("some-encoder")(SECOND), straight[0])


def test_a_state_from_before_the_first_label_loads() -> None:
    resumed = DensityRatio("some-encoder")
    resumed.load(DensityRatio("some-encoder").state())
    assert torch.equal(resumed(FIRST), DensityRatio("some-encoder")(FIRST))
