"""Commands beside a run's own: label, export, push, compare, fetch, explain, demo, doctor."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from judges.errors import UserError

EXIT_FAILURE, EXIT_MISTAKE, EXIT_STOPPED = 1, 2, 3

tools = typer.Typer()
demo = typer.Typer(
    help="Small worlds in which every number can be computed, to be watched.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
tools.add_typer(demo, name="demo")

RunDir = Annotated[
    str, typer.Argument(metavar="RUN_DIR", help="A run directory, e.g. runs/x, or s3://BUCKET/x.")
]


@tools.command(
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
    one_process_environment("inline")
    from pipeline.label import label, summary

    out = out or file.parent / f"{file.stem}.labels.parquet"
    try:
        labelled = label(file, options, out, say=lambda line: typer.echo(line, err=True))
    except KeyboardInterrupt:
        place = out.with_suffix(".judge") if options.cache in (AUTO, OFF) else Path(options.cache)
        kept = f"what was answered and cached is kept in {place}"
        complain(f"stopped: {kept if place.exists() else 'no answer was kept'}; run this again")
        raise typer.Exit(EXIT_STOPPED) from None
    Console().print(summary(labelled))
    typer.echo(f"written to {out}")


@tools.command(epilog="Example: `freshpairs export runs/quickstart --out pairs.parquet`")
def export(
    run_dir: RunDir,
    out: Annotated[Path, typer.Option("--out", help="File to write: .parquet or .jsonl.")],
) -> None:
    """Write the pairs a run learned from as a preference data set (prompt, chosen, rejected)."""
    from pipeline.export import export_pairs
    from pipeline.storage import PAIRS, run_here

    with run_here(run_dir, PAIRS) as run:
        typer.echo(export_pairs(run, out).told(out))


@tools.command(epilog="Example: `freshpairs push runs/quickstart --repo me/quickstart`")
def push(
    run_dir: RunDir,
    repo: Annotated[
        str | None,
        typer.Option("--repo", metavar="OWNER/NAME", help="The model's; else YOU/NAME of the run."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", metavar="OWNER/NAME", help="The pairs'; else REPO-pairs."),
    ] = None,
    pairs: Annotated[bool, typer.Option("--pairs/--no-pairs", help="Also push the pairs.")] = True,
    private: Annotated[
        bool, typer.Option("--private/--public", help="Who may see new repositories.")
    ] = True,
    force: Annotated[
        bool, typer.Option("--force", help="Also where another program's repository is.")
    ] = False,
) -> None:
    """Publish a finished run's policy, card and pairs on the Hugging Face hub (HF_ENDPOINT's)."""
    from pipeline.push import PushError, push
    from pipeline.storage import PAIRS, POLICY, run_here

    if dataset is not None and not pairs:
        raise UserError(f"--dataset={dataset}, --no-pairs: give one of them")
    try:
        with run_here(run_dir, [*PAIRS, POLICY]) as run:
            links = push(run, repo, dataset, pairs=pairs, private=private, force=force)
    except PushError as error:
        complain("\n".join([str(error), *getattr(error, "__notes__", [])]))
        raise typer.Exit(EXIT_FAILURE) from None
    for link in links:
        typer.echo(link)


@tools.command(epilog="Example: `freshpairs compare runs/a runs/b --out compared.png`")
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN…", help="Run directories, or a sweep's; paths or URLs."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Also draw: a .png, .svg or .pdf file.")
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the numbers: a file.")
    ] = None,
) -> None:
    """Put runs side by side: what differs in their configs, and what came of it."""
    from pipeline.compare import compare

    Console().print(compare(runs, out, as_json), crop=False)
    for done, file in (("drawn in", out), ("written to", as_json)):
        if file is not None:
            typer.echo(f"{done} {file}")


@demo.callback()
def _demos() -> None:
    """``drift`` stays a command while it is the only one."""


@demo.command("drift", epilog="Example: `freshpairs demo drift --out drift.gif`")
def demo_drift(
    out: Annotated[Path, typer.Option("--out", help="The animated picture: a .gif file.")] = Path(
        "drift.gif"
    ),
    seed: Annotated[int, typer.Option("--seed", help="Another seed, other worlds.")] = 0,
) -> None:
    """Watch offline learning leak to what nobody judged, and resampling cure it."""
    from pipeline.demo.drift import demo_drift

    demo_drift(out, seed, Console(force_interactive=None if sys.stdout.isatty() else False))


@tools.command(epilog="Example: `freshpairs fetch stories15m`")
def fetch(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="stories15m, smollm2-135m-instruct, minilm-l6-v2")
    ],
) -> None:
    """Download a small model, check it, and keep it in the cache in Hugging Face format."""
    from workers.models.fetch import fetch_model

    typer.echo(str(fetch_model(model, say=typer.echo)))


@tools.command(epilog="Example: `freshpairs explain dpo beta=0.5 --run runs/quickstart`")
def explain(
    objective: Annotated[
        str, typer.Argument(metavar="OBJECTIVE", help="A built-in name, or path/to/file.py:name.")
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Its hyper-parameters.")
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", help="A run directory, to draw its policy's path.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write: .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Draw an objective: its loss, where its gradient pulls, and the path that a run took."""
    from pipeline import explain
    from pipeline.storage import RECORDS, run_here

    with nullcontext() if run is None else run_here(run, RECORDS) as here:
        for line in explain.explain(objective, settings or [], here, out):
            typer.echo(line)


@tools.command(epilog="Example: `freshpairs doctor`")
def doctor() -> None:
    """Say what this machine can run, and what is missing."""
    from pipeline.doctor import examine

    for line in examine():
        typer.echo(line)


def one_process_environment(address: str) -> None:
    """An inline run computes here: torch must find its thread settings before it is imported."""
    from workers.threads import thread_environment

    if address == "inline":
        for name, value in thread_environment(len(os.sched_getaffinity(0))).items():
            os.environ.setdefault(name, value)


def complain(message: str) -> None:
    Console(stderr=True).print(message, style="red", markup=False, highlight=False, soft_wrap=True)
