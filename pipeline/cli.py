"""The command line: each command is a few lines over what Python users call."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from judges.budget import BudgetSpent
from judges.errors import UserError
from pipeline.cli_cluster import Address, Detach, RuntimeEnv, Variables, cluster, send
from pipeline.cli_plan import plans
from pipeline.cli_tools import (
    EXIT_FAILURE,
    EXIT_MISTAKE,
    EXIT_STOPPED,
    RunDir,
    complain,
    one_process_environment,
    tools,
)
from pipeline.handles import WorkerDied
from workers.places import StorageFailed
from workers.verdicts import JudgeFailed
from workers.weight_sync.buckets import SyncError

if TYPE_CHECKING:
    from pipeline.job import RunResult

app = typer.Typer(
    name="freshpairs",
    help="Online preference optimisation: sample fresh pairs from the policy, judge them, learn.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(tools)
app.add_typer(plans)
app.add_typer(cluster)


@app.command(
    epilog="Example: `freshpairs train configs/quickstart.yaml learner.learning_rate=1e-5`"
)
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The run's config.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]…", help="Overrides.")
    ] = None,
) -> None:
    """Start a new run and see it through."""
    from pipeline.config import load_config

    cfg = load_config(config, overrides or [])
    one_process_environment(cfg.cluster.address)
    from pipeline import job

    _show(job.run(cfg))


@app.command(epilog="Example: `freshpairs resume runs/quickstart`")
def resume(
    run_dir: RunDir,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY.PATH=VALUE]…",
            help="What stopped it: judge.budget.…, drift.stop.… (or warn); or cluster.…",
        ),
    ] = None,
    address: Address = None,
    detach: Detach = False,
    env: Variables = None,
    runtime_env: RuntimeEnv = None,
) -> None:
    """Go on with a run that was stopped or killed, as if nothing had happened.

    With --address as a job on a cluster, where RUN_DIR is a path or a URL that its nodes see.
    """
    if address is not None:
        from pipeline.submission import pack_resume

        send(
            lambda folder: pack_resume(str(run_dir), overrides or [], folder),
            *(address, detach, env, runtime_env),
        )
        return
    options = {"--detach": detach, "--env": env, "--runtime-env": runtime_env}
    if alone := [option for option, given in options.items() if given]:
        raise UserError(
            f"{', '.join(alone)}: of a job on a cluster: give its --address, or leave it out"
        )
    from pipeline.run_directory import read_run_config

    cfg, _ = read_run_config(run_dir, overrides or [])
    one_process_environment(cfg.cluster.address)
    from pipeline import job

    _show(job.resume(run_dir, overrides or []))


@app.command(epilog="Example: `freshpairs evaluate runs/quickstart evaluation.judges=[polarity]`")
def evaluate(
    run_dir: RunDir,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]…", help="Overrides.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option("--judge", help="Only by this judge: a name, or file.py:name.")
    ] = None,
) -> None:
    """Compare a finished run's policy with its starting model again, e.g. by another judge."""
    from pipeline.run_directory import read_run_config

    alone = (
        [] if judge is None else [f"judge={{name: {json.dumps(judge)}}}", "evaluation.judges=[]"]
    )
    cfg, _ = read_run_config(run_dir, [*alone, *(overrides or [])])
    one_process_environment(cfg.cluster.address)
    from pipeline import job

    _show(job.evaluate(cfg))


FOR_SFT = (
    "objective={name: sft}",
    "reference={}",
    "drift={}",
    "resampling={updates_per_round: .inf}",
    "prompts.behaviour=recorded",
)
"""What a config of preferences is changed by: references, weights and rounds are not for it."""


@app.command(epilog="Example: `freshpairs sft offline.yaml`, of a config with prompts.pairs")
def sft(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="A config of given pairs.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]…", help="Overrides.")
    ] = None,
) -> None:
    """Train on the chosen side of a config's given pairs, before preferences are learned."""
    from pipeline.config import load_config

    cfg = load_config(config, [*FOR_SFT, *(overrides or [])])
    if cfg.prompts.pairs is None:
        raise UserError("prompts.pairs: not set: sft learns from the chosen side of given pairs")
    if not any(override.startswith(("run.name=", "run.dir=")) for override in overrides or []):
        beside = {"dir": f"{cfg.run_place}-sft"}
        cfg = cfg.model_copy(update={"run": cfg.run.model_copy(update=beside)})
    one_process_environment(cfg.cluster.address)
    from pipeline import job

    _show(job.run(cfg))


@app.command(
    epilog="Example: `freshpairs sweep configs/quickstart.yaml "
    "resampling.updates_per_round=1,4,.inf run.seed=0,1`"
)
def sweep(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The runs' config.")],
    grid: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY.PATH=VALUE,VALUE…",
            help="Keys and their values, all combined; a key with one value is an override. "
            "Commas inside brackets, braces or quotes divide nothing.",
        ),
    ],
    directory: Annotated[
        str | None,
        typer.Option("--dir", help="Where the runs go; else the config's run directory + -sweep."),
    ] = None,
) -> None:
    """Run a grid of configs, or go on with it where it stopped, and compare the runs."""
    from pipeline.stopping import Stopped
    from pipeline.sweep import plan, run

    planned = plan(config, grid, directory)
    for point in planned.points:
        one_process_environment(point.cfg.cluster.address)
    try:
        outcome = run(planned, say=typer.echo)
    except Stopped as stopped:
        typer.echo(f"{stopped}: go on with `{planned.command}`", err=True)
        raise typer.Exit(EXIT_STOPPED) from None
    if outcome.runs:
        from pipeline.compare import compare

        Console().print(compare(outcome.runs), crop=False)
    for line in [*outcome.stopped, *outcome.failed]:
        complain(line)
    if outcome.failed or outcome.stopped:
        complain(f"once that is mended, go on with `{planned.command}`")
        raise typer.Exit(EXIT_FAILURE if outcome.failed else EXIT_STOPPED)


def _show(result: RunResult) -> None:
    from pipeline.report import final_table

    report = final_table(result.evaluations, result.samples, result.place)
    Console().print(report, crop=False)
    if result.human is not None:
        from pipeline.report import human_report

        Console().print(human_report(result.human), crop=False)


def main() -> None:
    """Run a command: exit 0 on success, 2 on a user's mistake, 3 stopped on purpose, 1 else."""
    from pipeline.stopping import Stopped

    try:
        app()
    except UserError as mistake:
        complain(_with_notes(mistake))
        sys.exit(EXIT_MISTAKE)
    except Stopped as stopped:
        command = f"freshpairs resume {stopped.place} {stopped.changed}".rstrip()
        typer.echo(f"{stopped}: go on with `{command}`", err=True)
        sys.exit(EXIT_STOPPED)
    except BudgetSpent as spent:
        complain(f"stopped ({spent}): what was answered is kept; raise it, and run this again")
        sys.exit(EXIT_STOPPED)
    except (JudgeFailed, SyncError, WorkerDied, StorageFailed, FloatingPointError) as failure:
        complain(f"the run failed: {_with_notes(failure)}")
        sys.exit(EXIT_FAILURE)


def _with_notes(error: Exception) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


if __name__ == "__main__":
    main()
