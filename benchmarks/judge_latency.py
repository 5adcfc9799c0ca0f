"""How much of a slow judge the loop hides behind sampling and learning.

The real loop, rollout, ledger and judge worker, with a generator and a learner that sleep for as
long as their work would take, each in a thread of its own, so that nothing competes for the cores
and what is left is the loop's own doing. The judge is an asynchronous function that answers every
question after 200 ms, as an API might, 64 at a time. Sides, in turns: the same run with a judge
that answers at once; with the slow one, synchronous (rounds_in_flight 0); with the slow one and
rounds_in_flight 1. Hidden is 1 − (seconds with the slow judge − seconds with the instant one at the
same rounds_in_flight) / (rounds × latency): of a pipeline the first round cannot be hidden. The
first repeat is not counted, medians are quoted. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from sleeping_workers import run_seconds, sleeping_config

from judges.options import JudgeOptions
from pipeline.config import Config

JUDGE = """
import asyncio

async def score(prompts, completions, seconds):
    await asyncio.sleep(seconds)
    return [float(c.split()[0]) for c in completions]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds an answer takes")
    parser.add_argument("--generate", type=float, default=0.3, help="seconds a round is sampled")
    parser.add_argument("--learn", type=float, default=0.6, help="seconds an update takes")
    options = parser.parse_args()
    sides: dict[tuple[str, int], list[float]] = {
        (name, in_flight): [] for in_flight in (0, 1) for name in ("instant", "slow")
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "judge.py").write_text(JUDGE)
        for repeat in range(options.repeats + 1):
            for (name, in_flight), seconds in sides.items():
                latency = options.latency if name == "slow" else 0.0
                directory = Path(folder) / f"{name}-{in_flight}-{repeat}"
                cfg = config(Path(folder), directory, options.rounds, in_flight, latency)
                took = run_seconds(cfg, options.generate, options.learn)
                if repeat:
                    seconds.append(took)
    report(sides, options)


def config(folder: Path, run_dir: Path, rounds: int, in_flight: int, latency: float) -> Config:
    """Rounds of one update of 32 prompts; each of the judge's calls asks one question."""
    judge = JudgeOptions(
        name=f"{folder}/judge.py:score", args={"seconds": latency}, batch_size=1, concurrency=64
    )
    return sleeping_config(run_dir, rounds, in_flight, judge)


def report(sides: dict[tuple[str, int], list[float]], options: argparse.Namespace) -> None:
    """The table, and the JSON object."""
    medians = {side: statistics.median(seconds) for side, seconds in sides.items()}
    judged = options.rounds * options.latency
    hidden = {
        in_flight: 1.0 - (medians["slow", in_flight] - medians["instant", in_flight]) / judged
        for in_flight in (0, 1)
    }
    table = Table(
        "rounds_in_flight",
        "instant judge, s",
        f"{options.latency * 1e3:g} ms judge, s",
        "hidden",
        title=f"{options.rounds} rounds: sample {options.generate:g} s, learn {options.learn:g} s",
    )
    for in_flight in (0, 1):
        table.add_row(
            str(in_flight),
            f"{medians['instant', in_flight]:.2f}",
            f"{medians['slow', in_flight]:.2f}",
            f"{hidden[in_flight]:.1%}",
        )
    Console(width=100).print(table)
    found = {
        "benchmark": "judge_latency",
        "rounds": options.rounds,
        "repeats": options.repeats,
        "seconds": {f"{name}, {in_flight}": runs for (name, in_flight), runs in sides.items()},
        "hidden": {str(in_flight): share for in_flight, share in hidden.items()},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
