"""The command that says what a config takes before it is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from judges.errors import UserError
from pipeline.cli_tools import one_process_environment

plans = typer.Typer()


@plans.command(
    epilog="Example: `freshpairs plan configs/cluster/qwen3-8b-reward-model.yaml --nodes 1x8 "
    "--gpu h100`"
)
def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The run's config.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]…", help="Overrides.")
    ] = None,
    nodes: Annotated[
        str | None,
        typer.Option("--nodes", metavar="NxGPUS[xCPUS]", help="e.g. 2x8; else this machine."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", help="A running cluster, whose nodes are taken: auto, ray://…"),
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option("--from", metavar="RUN_DIR", help="Take what rounds of a run took."),
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(
            "--rates",
            metavar="KEY=NUMBER,…",
            help="generate (tokens a second of a generator), judge (completions a second of a "
            "worker), learn (tokens a second), push (seconds); prompt, completion (mean tokens).",
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="Arithmetic from a data sheet: a100, h100, h200, l40s."),
    ] = None,
    generators: Annotated[
        str, typer.Option("--generators", metavar="N,N…", help="Numbers of them to try.")
    ] = "1,2,4,8",
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the numbers: a file.")
    ] = None,
) -> None:
    """Lay a config out: memory of every worker, the round's time, what more generators bring.

    Without --from, --rates or --gpu its own workers are timed here for some minutes, and its judge
    is asked about three rounds of completions: one that costs money is paid.
    """
    from pipeline.config import load_config

    cfg = load_config(config, overrides or [])
    one_process_environment(cfg.cluster.address)
    from pipeline.plan.plan import Asked, make_plan
    from pipeline.plan.report import report

    asked = Asked(nodes, address, from_, rates, gpu, _numbers(generators))
    made = make_plan(cfg, asked, lambda line: typer.echo(line, err=True))
    Console().print(report(made), crop=False)
    if as_json is not None:
        as_json.write_text(json.dumps(made.to_json(), indent=1) + "\n")
        typer.echo(f"written to {as_json}")


def _numbers(text: str) -> tuple[int, ...]:
    """Raises UserError for what is no list of whole numbers from 1."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = (0,)
    if min(found) < 1:
        raise UserError(f"--generators {text}: must be whole numbers from 1, e.g. 1,2,4")
    return found
