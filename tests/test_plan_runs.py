"""The plan's simulation beside runs in real time, of workers that sleep: sleeps dominate."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from judges.options import JudgeOptions

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/plan.py, which stands beside the sleeping workers."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("plan", "sleeping_workers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("plan")


@pytest.mark.slow
@pytest.mark.parametrize("in_flight", [0, 1])
def test_real_runs_take_what_was_foretold(
    bench: ModuleType, tmp_path: Path, in_flight: int
) -> None:
    """Two rounds of four units of 1 s and four updates of 0.25 s, by 1, 2 and 4 generators.

    Sleeping takes no less than was asked for, so no run is faster than foretold; and the numbers of
    generators stand in the foretold order.
    """
    (tmp_path / "judge.py").write_text(bench.JUDGE)
    judge = JudgeOptions(name=f"{tmp_path}/judge.py:score")
    foretold, real = [], []
    for generators in (1, 2, 4):
        run_dir = tmp_path / f"{generators}"
        one = bench.sleeping_config(run_dir, 2 * bench.UNITS, in_flight, judge)
        cfg = bench.several(one, generators)
        foretold.append(bench.run_of(cfg, 1.0, 0.25).seconds)
        real.append(bench.run_seconds(cfg, 1.0, 0.25))
    # All units of a round by one, two, four generators; its updates; with one in flight the second
    # round is sampled beside the first one's updates, or right after the first.
    by_hand = {0: [2 * (4 + 1), 2 * (2 + 1), 2 * (1 + 1)], 1: [4 + 4 + 1, 2 + 2 + 1, 1 + 1 + 1]}
    assert foretold == pytest.approx(by_hand[in_flight])
    assert all(took >= seconds for took, seconds in zip(real, foretold, strict=True))
    assert real == sorted(real, reverse=True)
