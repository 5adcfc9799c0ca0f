"""The command line: each command is a few lines over what Python users call."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from judges.budget import BudgetSpent
from judges.errors import UserError
from pipeline.handles import WorkerDied
from workers.verdicts import JudgeFailed
from workers.weight_sync.buckets import SyncError

if TYPE_CHECKING:
    from pipeline.job import RunResult

EXIT_FAILURE, EXIT_MISTAKE, EXIT_STOPPED = 1, 2, 3

app = typer.Typer(
    name="freshpairs",
    help="Online preference optimisation: sample fresh pairs from the policy, judge them, learn.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory, e.g. runs/x.")]


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
    _one_process_environment(cfg.cluster.address)
    from pipeline import job

    _show(job.run(cfg))


@app.command(epilog="Example: `freshpairs resume runs/quickstart`")
def resume(
    run_dir: RunDir,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[judge.budget.KEY=VALUE]…", help="More for the judge to spend."),
    ] = None,
) -> None:
    """Go on with a run that was stopped or killed, as if nothing had happened."""
    from pipeline.run_directory import read_run_config

    cfg, _ = read_run_config(run_dir)
    _one_process_environment(cfg.cluster.address)
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
    _one_process_environment(cfg.cluster.address)
    from pipeline import job

    _show(job.evaluate(cfg))


@app.command(
    epilog="Example: `freshpairs label pairs.jsonl --judge my_judge.py:fn --out labels.parquet`"
)
def label(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Rows of prompt and completion, or of pairs.")
    ],
    judge: Annotated[
        str, typer.Option("--judge", help="A name, path/to/file.py:name, or a config.yaml.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[judge.KEY=VALUE]…", help="The judge's options, as in a config."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write; else FILE.labels.parquet.")
    ] = None,
) -> None:
    """Try a judge: ask it about a file of completions or pairs, and write what it says."""
    from judges.options import AUTO, OFF
    from pipeline.judge_config import read_judge

    options = read_judge(judge, overrides or [])
    _one_process_environment("inline")
    from pipeline.label import label, summary

    out = out or file.parent / f"{file.stem}.labels.parquet"
    try:
        labelled = label(file, options, out, say=lambda line: typer.echo(line, err=True))
    except KeyboardInterrupt:
        place = out.with_suffix(".judge") if options.cache in (AUTO, OFF) else Path(options.cache)
        kept = f"what was answered and cached is kept in {place}"
        _complain(f"stopped: {kept if place.exists() else 'no answer was kept'}; run this again")
        raise typer.Exit(EXIT_STOPPED) from None
    Console().print(summary(labelled))
    typer.echo(f"written to {out}")


@app.command(epilog="Example: `freshpairs export runs/quickstart --out pairs.parquet`")
def export(
    run_dir: RunDir,
    out: Annotated[Path, typer.Option("--out", help="File to write: .parquet or .jsonl.")],
) -> None:
    """Write the pairs a run learned from as a preference data set (prompt, chosen, rejected)."""
    from pipeline.export import export_pairs

    count = export_pairs(run_dir, out)
    typer.echo(f"{count} pairs written to {out}")


@app.command(epilog="Example: `freshpairs fetch stories15m`")
def fetch(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="stories15m, smollm2-135m-instruct, minilm-l6-v2")
    ],
) -> None:
    """Download a small model, check it, and keep it in the cache in Hugging Face format."""
    from workers.models.fetch import fetch_model

    typer.echo(str(fetch_model(model, say=typer.echo)))


@app.command(epilog="Example: `freshpairs explain dpo beta=0.5 --run runs/quickstart`")
def explain(
    objective: Annotated[
        str, typer.Argument(metavar="OBJECTIVE", help="A built-in name, or path/to/file.py:name.")
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Its hyper-parameters.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="A run directory, to draw its policy's path.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write: .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Draw an objective: its loss, where its gradient pulls, and the path that a run took."""
    from pipeline import explain

    for line in explain.explain(objective, settings or [], run, out):
        typer.echo(line)


@app.command(epilog="Example: `freshpairs doctor`")
def doctor() -> None:
    """Say what this machine can run, and what is missing."""
    from pipeline.doctor import examine

    for line in examine():
        typer.echo(line)


def _one_process_environment(address: str) -> None:
    """An inline run computes here: torch must find its thread settings before it is imported."""
    from workers.threads import thread_environment

    if address == "inline":
        for name, value in thread_environment(len(os.sched_getaffinity(0))).items():
            os.environ.setdefault(name, value)


def _show(result: RunResult) -> None:
    from pipeline.report import final_table

    report = final_table(result.evaluations, result.samples, result.run_dir)
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
        _complain(_with_notes(mistake))
        sys.exit(EXIT_MISTAKE)
    except Stopped as stopped:
        command = f"freshpairs resume {stopped.run_dir} {stopped.changed}".rstrip()
        typer.echo(f"{stopped}: go on with `{command}`", err=True)
        sys.exit(EXIT_STOPPED)
    except BudgetSpent as spent:
        _complain(f"stopped ({spent}): what was answered is kept; raise it, and run this again")
        sys.exit(EXIT_STOPPED)
    except (JudgeFailed, SyncError, WorkerDied, FloatingPointError) as failure:
        _complain(f"the run failed: {_with_notes(failure)}")
        sys.exit(EXIT_FAILURE)


def _with_notes(error: Exception) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


def _complain(message: str) -> None:
    Console(stderr=True).print(message, style="red", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
