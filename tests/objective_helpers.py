"""What the tests of the objectives share: formulas in plain Python, random pairs, slopes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workers.learner.objective_options import BUILT_IN
from workers.learner.objectives import PairLogps, build_objective
from workers.learner.pairwise_options import PairwiseOptions

PAIRWISE = sorted(
    name for name, options in BUILT_IN.items() if issubclass(options, PairwiseOptions)
)


class Row(NamedTuple):
    """A pair in plain numbers: summed log-probabilities and token counts."""

    policy_chosen: float
    policy_rejected: float
    ref_chosen: float
    ref_rejected: float
    n_w: int
    n_l: int

    @property
    def w(self) -> float:
        return self.policy_chosen - self.ref_chosen

    @property
    def l(self) -> float:  # noqa: E743
        return self.policy_rejected - self.ref_rejected

    @property
    def d(self) -> float:
        return self.w - self.l

    @property
    def mean_w(self) -> float:
        return self.policy_chosen / self.n_w

    @property
    def mean_l(self) -> float:
        return self.policy_rejected / self.n_l

    def swapped(self) -> Row:
        return Row(
            self.policy_rejected,
            self.policy_chosen,
            self.ref_rejected,
            self.ref_chosen,
            self.n_l,
            self.n_w,
        )


def sp(z: float) -> float:
    """log(1 + e^z)."""
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


def sigmoid(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-z)) if z >= 0 else math.exp(z) / (1.0 + math.exp(z))


def random_rows(seed: int, count: int, spread: float = 4.0) -> list[Row]:
    """Pairs whose log-ratios scatter by ``spread`` nats."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        n_w, n_l = draw.randint(1, 30), draw.randint(1, 30)
        ref_chosen, ref_rejected = -n_w * draw.uniform(1.5, 3), -n_l * draw.uniform(1.5, 3)
        rows.append(
            Row(
                min(ref_chosen + draw.gauss(0, spread), -0.05),
                min(ref_rejected + draw.gauss(0, spread), -0.05),
                ref_chosen,
                ref_rejected,
                n_w,
                n_l,
            )
        )
    return rows


def record(rows: Sequence[Row], dtype: torch.dtype = torch.float64, **columns: Any) -> PairLogps:
    """The pairs as an objective gets them, the policy's columns ready for gradients."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=dtype)

    return PairLogps(
        policy_chosen=column([row.policy_chosen for row in rows]).requires_grad_(),
        policy_rejected=column([row.policy_rejected for row in rows]).requires_grad_(),
        ref_chosen=column([row.ref_chosen for row in rows]),
        ref_rejected=column([row.ref_rejected for row in rows]),
        chosen_tokens=torch.tensor([row.n_w for row in rows]),
        rejected_tokens=torch.tensor([row.n_l for row in rows]),
        **{
            name: column(values) if isinstance(values, list) else values
            for name, values in columns.items()
        },
    )


def losses_and_gradients(
    options: dict[str, Any], logps: PairLogps
) -> tuple[list[float], list[float], list[float]]:
    """The losses [B], and their slopes along the chosen and the rejected log-probability."""
    loss = build_objective(options)(logps).loss
    # SimPO has no reference, NLL no rejected: what a loss does not touch has slope 0.
    columns = [logps.policy_chosen, logps.policy_rejected]
    chosen, rejected = torch.autograd.grad(loss.sum(), columns, materialize_grads=True)
    return loss.tolist(), chosen.tolist(), rejected.tolist()


def slope(function: Callable[[float], float], at: float, step: float = 1e-5) -> float:
    """The derivative by central differences."""
    return (function(at + step) - function(at - step)) / (2 * step)


def slopes(loss: Callable[[Row], float], row: Row) -> tuple[float, float]:
    """Along the chosen and the rejected log-probability, by central differences."""
    return (
        slope(lambda value: loss(row._replace(policy_chosen=value)), row.policy_chosen),
        slope(lambda value: loss(row._replace(policy_rejected=value)), row.policy_rejected),
    )


def require_close(found: Sequence[float], wanted: Sequence[float], tolerance: float) -> None:
    """Each within ``tolerance`` of 1 + |value|."""
    for value, want in zip(found, wanted, strict=True):
        assert abs(value - want) <= tolerance * (1.0 + abs(want)), (value, want)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found − wanted| / |wanted| of two vectors."""
    return float((found - wanted).norm() / wanted.norm())


def central_differences(
    function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5
) -> Tensor:
    """The gradient of a scalar function of a float64 tensor, in its shape."""
    gradient = torch.zeros_like(at)
    for index in range(at.numel()):
        shift = torch.zeros_like(at)
        shift.view(-1)[index] = step
        difference = function(at + shift) - function(at - shift)
        gradient.view(-1)[index] = difference / (2 * step)
    return gradient


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
