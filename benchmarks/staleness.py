"""How stale pairs are at each lag, as runs measured it: ESS, ESS a token, KL from the sampler.

    freshpairs train configs/quickstart.yaml resampling.updates_per_round=.inf run.name=once
    python benchmarks/staleness.py runs/once --out staleness.png

Prints a table for people and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.tracking import metrics

MEASURES = ("ess", "ess_per_token", "kl_from_sampler")


def by_lag(runs: Iterable[Path]) -> dict[int, dict[str, float]]:
    """The means of each measure over the updates whose pairs all had that lag."""
    found: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for record in metrics(run):
            if record["kind"] != "update" or record["lag_max"] != record["lag_mean"]:
                continue
            for name in MEASURES:
                if record[name] is not None:
                    found[int(record["lag_max"])][name].append(record[name])
    return {
        lag: {name: fmean(values) for name, values in found[lag].items()} for lag in sorted(found)
    }


def table(lags: Mapping[int, Mapping[str, float]], shown: Iterable[int]) -> Table:
    found = Table("lag", "ESS of sequences", "ESS per token", "KL, nats a token")
    for lag in shown:
        measured = lags[lag]
        found.add_row(str(lag), *(f"{measured[name]:.4g}" for name in MEASURES))
    return found


def draw(lags: Mapping[int, Mapping[str, float]]) -> Any:
    """ESS of both kinds against the lag; beside it the KL."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    at = list(lags)
    left.plot(at, [lags[lag]["ess"] for lag in at], marker="o", ms=3, label="of sequences")
    left.plot(at, [lags[lag]["ess_per_token"] for lag in at], marker="o", ms=3, label="per token")
    left.set(xlabel="lag, updates", ylabel="share of the pairs", ylim=(0, 1.03))
    left.set_title("Effective sample size", loc="left", fontweight="bold")
    left.legend(frameon=False)
    right.plot(at, [lags[lag]["kl_from_sampler"] for lag in at], marker="o", ms=3, color="#D55E00")
    right.set(xlabel="lag, updates", ylabel="nats a token")
    right.set_title("KL from the policy that sampled", loc="left", fontweight="bold")
    for axes in (left, right):
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="a picture to write")
    options = parser.parse_args()
    lags = by_lag(options.runs)
    shown = [lag for lag in lags if lag <= 8 or lag & (lag - 1) == 0 or lag == max(lags)]
    Console(width=80).print(table(lags, shown))
    if options.out is not None:
        draw(lags).savefig(options.out, dpi=110)
    print(json.dumps({"benchmark": "staleness", "lags": lags}))


if __name__ == "__main__":
    main()
