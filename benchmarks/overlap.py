"""How much faster a run is whose rounds are sampled and judged while the learner learns.

``--simulated``: the real loop around a generator and a learner that sleep, an instant judge;
``rounds_in_flight`` 0, 1 and 2 in turns, the first repeat is not counted, medians are quoted. Of a
round that takes G to sample and L to learn from, a synchronous loop makes one in G + L; an
overlapping one makes the first in G + L and each further one in max(G, L).

``--real``: ``freshpairs train`` on a config, on Ray, with VADER as a judge that sleeps before it
answers; ``rounds_in_flight`` 0 and 1 in turns, for several seeds. Seconds are those from the end of
the baseline's evaluation, where the loop begins, to the last update: start-up and evaluation are
not in them, the pipeline's filling is. Beside them the final held-out quality by each judge.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from sleeping_workers import run_seconds, sleeping_config

from judges.errors import UserError
from judges.options import JudgeOptions
from pipeline.config import load_config
from pipeline.tracking import METRICS_FILE, metrics

CHECKOUT = Path(__file__).resolve().parents[1]
CONFIG = CHECKOUT / "configs" / "quickstart.yaml"
CORES = len(os.sched_getaffinity(0))
STAGES = ("generate", "judge", "learn")
SLOW = "slow_sentiment"
INSTANT_JUDGE = """
def score(prompts, completions):
    return [float(c.split()[0]) for c in completions]
"""
SLOW_JUDGE = """
import time

from judges.lexicon import sentiment

def score(prompts, completions, seconds):
    time.sleep(seconds)
    return sentiment(prompts, completions)
"""


@dataclass(frozen=True, slots=True)
class Trained:
    """One real run: seconds of its updates, final held-out quality by judge, KL in nats.

    ``stages``: median seconds of a round in the workers.
    """

    seed: int
    in_flight: int
    seconds: float
    quality: dict[str, float]
    kl_to_reference: float | None
    stages: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    side = parser.add_mutually_exclusive_group(required=True)
    side.add_argument("--simulated", action="store_true", help="workers that sleep")
    side.add_argument(
        "--real",
        nargs="?",
        const=str(CONFIG),
        metavar="CONFIG",
        help="a config with held-out prompts (default: the quickstart's)",
    )
    parser.add_argument("--rounds", type=int, default=20, help="simulated: of a run")
    parser.add_argument("--repeats", type=int, default=3, help="simulated: runs of each side")
    parser.add_argument("--generate", type=float, default=0.3, help="simulated: seconds a round")
    parser.add_argument("--learn", type=float, default=0.3, help="simulated: seconds an update")
    parser.add_argument("--seeds", type=int, default=3, help="real: seeds 0, 1, … of each side")
    parser.add_argument("--judge-seconds", type=float, default=8.0, help="real: of each call")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY.PATH=VALUE", help="real: of both sides' config"
    )
    options = parser.parse_args()
    if options.simulated:
        simulated(options)
    else:
        real(options)


def simulated(options: argparse.Namespace) -> None:
    """Sleeping workers: measure, print."""
    sides: dict[int, list[float]] = {0: [], 1: [], 2: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "judge.py").write_text(INSTANT_JUDGE)
        judge = JudgeOptions(name=f"{folder}/judge.py:score")
        for repeat in range(options.repeats + 1):
            for in_flight, seconds in sides.items():
                run_dir = folder / f"{in_flight}-{repeat}"
                cfg = sleeping_config(run_dir, options.rounds, in_flight, judge)
                took = run_seconds(cfg, options.generate, options.learn)
                if repeat:
                    seconds.append(took)
    medians = {side: statistics.median(seconds) for side, seconds in sides.items()}
    expected = {
        side: by_hand(options.rounds, side, options.generate, options.learn) for side in sides
    }
    times = {side: medians[0] / median for side, median in medians.items()}
    table = Table(
        "rounds_in_flight",
        "seconds",
        "by hand",
        "times synchronous",
        "by hand",
        title=f"{options.rounds} rounds: sample {options.generate:g} s, learn {options.learn:g} s",
    )
    for side in sides:
        table.add_row(
            str(side),
            f"{medians[side]:.2f}",
            f"{expected[side]:.2f}",
            f"{times[side]:.2f}",
            f"{expected[0] / expected[side]:.2f}",
        )
    Console(width=100).print(table)
    found = {
        "benchmark": "overlap",
        "workers": "simulated",
        "rounds": options.rounds,
        "repeats": options.repeats,
        "seconds": by_name(sides),
        "expected_seconds": by_name(expected),
        "times_synchronous": by_name(times),
    }
    print(json.dumps(found))


def by_hand(rounds: int, in_flight: int, generate: float, learn: float) -> float:
    """Seconds of a run whose loop costs nothing: of a pipeline the slower stage sets the pace."""
    each = generate + learn if in_flight == 0 else max(generate, learn)
    return generate + learn + (rounds - 1) * each


def real(options: argparse.Namespace) -> None:
    """Real workers and a slow judge: measure, print."""
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"this machine is not idle (load {load:.1f}): expect noise", flush=True)
    runs: list[Trained] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "judge.py").write_text(SLOW_JUDGE)
        for seed in range(options.seeds):
            for in_flight in (0, 1):
                trained = train(options, folder, seed, in_flight)
                runs.append(trained)
                print(
                    f"seed {seed}, rounds_in_flight {in_flight}: {trained.seconds:.1f} s",
                    flush=True,
                )
    report(runs, options)


def train(options: argparse.Namespace, folder: Path, seed: int, in_flight: int) -> Trained:
    """`freshpairs train` as users run it, timed from outside by the files it writes.

    Evaluated at the end only, and without a checkpoint before, so that nothing but rounds and
    updates lies between the two moments that are timed. Raises SystemExit where the run fails.
    """
    run_dir = folder / f"{in_flight}-{seed}"
    judge = {
        "name": f"{folder}/judge.py:score",
        "alias": SLOW,
        "args": {"seconds": options.judge_seconds},
    }
    overrides = [
        "generator.backend=transformers",
        *options.overrides,
        f"judge={json.dumps(judge)}",
        "evaluation.every=null",
        "checkpoint.every=1000000",
        f"resampling.rounds_in_flight={in_flight}",
        f"run.seed={seed}",
        f"run.dir={run_dir}",
    ]
    try:
        cfg = load_config(options.real, overrides)
    except UserError as mistake:
        sys.exit(str(mistake))
    if cfg.evaluation.prompts is None:
        sys.exit("evaluation.prompts=null: quality cannot be compared: name held-out prompts")
    command = [sys.executable, "-m", "pipeline.cli", "train", str(Path(options.real).resolve())]
    with subprocess.Popen([*command, *overrides], cwd=CHECKOUT, stdout=subprocess.DEVNULL) as child:
        seconds = seconds_of_updates(child, run_dir, cfg.run.updates)
    if child.returncode or seconds is None:
        sys.exit(f"freshpairs train failed (exit {child.returncode})")
    final = [r for r in metrics(run_dir) if r["kind"] == "evaluation"]
    spent = [r["seconds"] for r in metrics(run_dir) if r["kind"] == "round"]
    quality = {record["judge"]: record["quality"] for record in final}
    stages = {stage: statistics.median(s[stage] for s in spent) for stage in STAGES}
    return Trained(seed, in_flight, seconds, quality, final[0]["kl_to_reference"], stages)


def seconds_of_updates(child: subprocess.Popen[bytes], run_dir: Path, updates: int) -> float | None:
    """Wall-clock seconds from the end of the baseline's evaluation to the last update's record.

    Waits for the process to end. None if it ended before its last update.
    """
    baseline = run_dir / "evaluations" / "update-000000.parquet"
    began = ended = None
    while child.poll() is None:
        time.sleep(0.05)
        if began is None:
            began = time.perf_counter() if baseline.is_file() else None
        elif ended is None and updates_of(run_dir) == updates:
            ended = time.perf_counter()
    return None if began is None or ended is None else ended - began


def updates_of(run_dir: Path) -> int:
    """Updates recorded so far."""
    if not (run_dir / METRICS_FILE).is_file():
        return 0
    return sum(record["kind"] == "update" for record in metrics(run_dir))


def report(runs: Sequence[Trained], options: argparse.Namespace) -> None:
    """The table, and the JSON object."""
    sides = {side: [run for run in runs if run.in_flight == side] for side in (0, 1)}
    medians = {side: statistics.median(run.seconds for run in of) for side, of in sides.items()}
    stages = {
        side: {stage: statistics.median(run.stages[stage] for run in of) for stage in STAGES}
        for side, of in sides.items()
    }
    pairs = zip(sides[0], sides[1], strict=True)
    title = f"{Path(options.real).stem}, {CORES} cores, {options.seeds} seeds"
    table = Table("rounds_in_flight", *map(str, sides), title=title)
    table.add_row("seconds, median", *(f"{seconds:.1f}" for seconds in medians.values()))
    table.add_row("times synchronous", *(f"{medians[0] / medians[side]:.2f}" for side in sides))
    for stage in STAGES:
        table.add_row(f"  {stage}, s a round", *(f"{of[stage]:.1f}" for of in stages.values()))
    for judge in runs[0].quality:
        cells = [spread(run.quality[judge] for run in of) for of in sides.values()]
        table.add_row(f"quality by {judge}, mean (range)", *cells)
    cells = [spread(run.kl_to_reference for run in of) for of in sides.values()]
    table.add_row("KL to the reference, nats", *cells)
    Console(width=100).print(table)
    found = {
        "benchmark": "overlap",
        "workers": "real",
        "config": Path(options.real).name,
        "overrides": options.overrides,
        "cores": CORES,
        "seeds": options.seeds,
        "judge_seconds": options.judge_seconds,
        "seconds": by_name({side: [run.seconds for run in of] for side, of in sides.items()}),
        "times_synchronous": medians[0] / medians[1],
        "times_synchronous_by_seed": [first.seconds / second.seconds for first, second in pairs],
        "round_seconds": by_name(stages),
        "quality": by_name({side: [run.quality for run in of] for side, of in sides.items()}),
        "kl_to_reference": by_name(
            {side: [run.kl_to_reference for run in of] for side, of in sides.items()}
        ),
    }
    print(json.dumps(found))


def spread(values: Iterable[float | None]) -> str:
    """Mean (smallest to largest); – where one was not measured."""
    known = list(values)
    numbers = [value for value in known if value is not None]
    if len(numbers) < len(known):
        return "–"
    return f"{statistics.mean(numbers):.2f} ({min(numbers):.2f} to {max(numbers):.2f})"


def by_name(sides: Mapping[int, object]) -> dict[str, object]:
    """With the keys that JSON allows."""
    return {str(side): value for side, value in sides.items()}


if __name__ == "__main__":
    main()
