"""Whether `freshpairs plan` says what then happens: its prediction beside real runs.

``--simulated``: the real loop around generators and a learner that sleep, each in a thread of its
own; the plan's simulation is told the same seconds, for several numbers of generators and rounds in
flight. ``--real``: the quickstart, shortened; for every side the config is calibrated, simulated,
and run by ``freshpairs train``, in turns; a round's seconds are those of the rounds after the
first. The number quoted is predicted / real. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from sleeping_workers import run_seconds, sleeping_config

from judges.options import JudgeOptions
from pipeline.config import Config, load_config
from pipeline.plan.calibration import calibrate
from pipeline.plan.rates import Law, Lengths, Rates
from pipeline.plan.simulation import Simulated, simulate
from pipeline.tracking import metrics

CHECKOUT = Path(__file__).resolve().parents[1]
JUDGE = """
def score(prompts, completions):
    return [float(c.split()[0]) for c in completions]
"""
UNITS = 4
"""Work units, and updates, of a round of the sleeping workers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    side = parser.add_mutually_exclusive_group(required=True)
    side.add_argument("--simulated", action="store_true", help="workers that sleep")
    side.add_argument("--real", action="store_true", help="the quickstart, shortened")
    parser.add_argument(
        "--generators", type=int, nargs="+", default=None, help="default 1 2 4 / 1 2"
    )
    parser.add_argument("--in-flight", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--generate", type=float, default=0.2, help="simulated: seconds a unit")
    parser.add_argument("--learn", type=float, default=0.1, help="simulated: seconds an update")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY.PATH=VALUE", help="real: of the config"
    )
    options = parser.parse_args()
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"this machine is not idle (load {load:.1f}): expect noise", flush=True)
    numbers = options.generators or ([1, 2, 4] if options.simulated else [1, 2])
    found: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as name:
        for in_flight in options.in_flight:
            for generators in numbers:
                asleep = options.simulated
                measure = sleeping if asleep else training
                predicted, real = measure(options, Path(name), generators, in_flight)
                found[f"{generators}, {in_flight}"] = {
                    "predicted": predicted,
                    "real": real,
                    "ratio": statistics.median(predicted) / statistics.median(real),
                }
    report(found, options)


def sleeping(
    options: argparse.Namespace, folder: Path, generators: int, in_flight: int
) -> tuple[list[float], list[float]]:
    """Seconds of a whole run, predicted and real."""
    (folder / "judge.py").write_text(JUDGE)
    judge = JudgeOptions(name=f"{folder}/judge.py:score")
    real = []
    for repeat in range(options.repeats):
        run_dir = folder / f"{generators}-{in_flight}-{repeat}"
        cfg = several(
            sleeping_config(run_dir, options.rounds * UNITS, in_flight, judge), generators
        )
        real.append(run_seconds(cfg, options.generate, options.learn))
    return [run_of(cfg, options.generate, options.learn).seconds], real


def several(cfg: Config, generators: int) -> Config:
    """So many generators, and rounds of several units."""
    asked = {"replicas": generators, "backend": "transformers"}
    return cfg.model_copy(
        update={
            "generator": cfg.generator.model_copy(update=asked),
            "resampling": cfg.resampling.model_copy(update={"updates_per_round": UNITS}),
        }
    )


def run_of(cfg: Config, generate: float, learn: float) -> Simulated:
    """The run in virtual time, of workers that take so long for a unit and for an update."""
    prompts = cfg.sampling.prompts_per_update
    none = Law()
    rates = Rates(Law(generate / prompts), none, none, Law(learn / prompts), Lengths(1.0, 8.0))
    return simulate(cfg, rates)


def training(
    options: argparse.Namespace, folder: Path, generators: int, in_flight: int
) -> tuple[list[float], list[float]]:
    """Seconds of a round, predicted from a calibration and real, in turns."""
    predicted, real = [], []
    for repeat in range(options.repeats):
        run_dir = folder / f"{generators}-{in_flight}-{repeat}"
        overrides = [
            "generator.backend=transformers",
            f"generator.replicas={generators}",
            f"resampling.updates_per_round={generators}",
            f"resampling.rounds_in_flight={in_flight}",
            f"run.updates={options.rounds * generators}",
            "evaluation={}",
            "checkpoint.every=1000000",
            *options.overrides,
            f"run.dir={run_dir}",
        ]
        config = CHECKOUT / "configs" / "quickstart.yaml"
        cfg = load_config(config, overrides)
        rates = calibrate(cfg, lambda line: None)
        predicted.append(simulate(cfg, rates).round_seconds)
        freshpairs = Path(sys.executable).with_name("freshpairs")
        command = [str(freshpairs), "train", str(config), *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        real.append(round_seconds(run_dir))
        print(f"{generators}, {in_flight}: {predicted[-1]:.2f} / {real[-1]:.2f} s", flush=True)
    return predicted, real


def round_seconds(run_dir: Path) -> float:
    """Mean wall-clock seconds of the rounds after the first, from what each sampled a second."""
    rounds = [r for r in metrics(run_dir) if r["kind"] == "round" and r["round"] > 0]
    walls = [r["completions"] * r["length_mean"] / r["tokens_per_second"] for r in rounds]
    return statistics.fmean(walls)


def report(found: dict[str, dict[str, object]], options: argparse.Namespace) -> None:
    """The table, and the JSON object."""
    what = "a run" if options.simulated else "a round after the first"
    headings = ("generators", "rounds_in_flight", "predicted, s", "real, s", "ratio")
    table = Table(*headings, title=f"Seconds of {what}")
    for side, sides in found.items():
        predicted, real = (statistics.median(sides[key]) for key in ("predicted", "real"))  # type: ignore[arg-type]
        table.add_row(*side.split(", "), f"{predicted:.2f}", f"{real:.2f}", f"{sides['ratio']:.3f}")
    Console(width=100).print(table)
    kind = "simulated" if options.simulated else "real"
    print(
        json.dumps({"benchmark": "plan", "workers": kind, "rounds": options.rounds, "sides": found})
    )


if __name__ == "__main__":
    main()
