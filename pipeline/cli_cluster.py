"""Commands of a cluster: submit a run as a Ray job, follow it, stop it, go on with it."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.table import Table

from judges.errors import UserError
from pipeline.cli_tools import EXIT_FAILURE, EXIT_STOPPED, complain

if TYPE_CHECKING:
    from pipeline.launch.jobs import Job, Jobs
    from pipeline.submission import Submission

cluster = typer.Typer()

ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="The cluster's dashboard, http://HEAD:8265; else RAY_API_SERVER_ADDRESS.",
    ),
]
Name = Annotated[str, typer.Argument(metavar="JOB", help="A job, as submit and status call it.")]
Detach = Annotated[
    bool, typer.Option("--detach", help="Leave once the job is submitted; else follow its log.")
]
There = Annotated[
    list[Path] | None,
    typer.Option(
        "--there",
        metavar="FOLDER",
        help="A folder that every node has under this path: files in it are not sent.",
    ),
]
RuntimeEnv = Annotated[
    Path | None,
    typer.Option(
        "--runtime-env",
        metavar="FILE.yaml",
        help="More of Ray's runtime environment: pip: [packages of a judge], env_vars, …",
    ),
]
Variables = Annotated[
    list[str] | None,
    typer.Option(
        "--env",
        metavar="NAME",
        help="A variable to pass on as it is set here, e.g. OPENAI_API_KEY.",
    ),
]


@cluster.command(
    epilog="Example: `freshpairs submit configs/quickstart.yaml run.dir=/shared/runs/first "
    "--address http://head:8265`"
)
def submit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The run's config.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]…", help="Overrides.")
    ] = None,
    address: Address = None,
    detach: Detach = False,
    env: Variables = None,
    runtime_env: RuntimeEnv = None,
    there: There = None,
) -> None:
    """Train on a cluster: send config, code and files there as a Ray job, and follow it."""
    from pipeline.submission import pack

    def packed(folder: Path) -> Submission:
        return pack(config, overrides or [], folder, there or [])

    send(packed, address, detach, env, runtime_env)


@cluster.command(epilog="Example: `freshpairs status --address http://head:8265`")
def status(
    job: Annotated[
        str | None, typer.Argument(metavar="[JOB]", help="One job; else all of Freshpairs'.")
    ] = None,
    address: Address = None,
) -> None:
    """Say how jobs on a cluster stand."""
    with _connected(address) as jobs:
        found = jobs.all() if job is None else [jobs.job(job)]
    if not found:
        typer.echo(f"no jobs of Freshpairs on {jobs.address}")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("job", "run", "state", "since", "run directory"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "job")
    for one in found:
        began = "" if one.began is None else f"{one.began:%Y-%m-%d %H:%M}"
        table.add_row(one.name, one.metadata.get("run", ""), one.state, began, one.run_dir)
    Console().print(table, crop=False)
    if job is not None and found[0].state == "failed":
        complain(why(found[0]))


@cluster.command(epilog="Example: `freshpairs logs first-20260101-120000 --follow`")
def logs(
    job: Name,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until it ends; then its exit code.")
    ] = False,
) -> None:
    """Print what a job has printed."""
    with _connected(address) as jobs:
        if follow:
            followed(jobs, job)
        _write(jobs.logs(job))


@cluster.command(epilog="Example: `freshpairs stop first-20260101-120000`")
def stop(job: Name, address: Address = None) -> None:
    """End a job after its update, with a checkpoint, and say how to go on with it."""
    from pipeline.submission import STOP_SECONDS

    with _connected(address) as jobs:
        found = jobs.job(job)
        if found.ended:
            typer.echo(f"{job} had ended: {found.state}")
        else:
            jobs.stop(job)
            typer.echo(f"stopping {job}: it ends after its update, with a checkpoint …")
            found = jobs.wait(job, STOP_SECONDS + 60)
            typer.echo(f"{job}: {found.state}")
        if found.state == "stopped":
            typer.echo(_resumed_by(found, jobs.address))


def send(
    packed: Callable[[Path], Submission],
    address: str | None,
    detach: bool,
    env: list[str] | None,
    runtime_env: Path | None,
) -> None:
    """Submit the package that ``packed`` writes into a folder; follow it unless detached."""
    from pipeline.submission import runtime_environment, submission_id, told_size

    url = dashboard(address)
    with tempfile.TemporaryDirectory(prefix="freshpairs-") as folder:
        submission = packed(Path(folder))
        environment = runtime_environment(submission.folder, runtime_env, env or [])
        name = submission_id(submission.name, datetime.now())
        with _connected(url) as jobs:
            _refuse_beside(jobs, submission.run_dir)
            typer.echo(f"sending {told_size(submission.size)} to {url} …")
            jobs.submit(name, submission.entrypoint, environment, submission.metadata)
    typer.echo(f"submitted {name}, which writes to {submission.run_dir}")
    typer.echo(f"dashboard: {url}/#/jobs/{name}")
    _say_how_to_go_on(name, url)
    if not detach:
        with _connected(url) as jobs:
            followed(jobs, name)


def _refuse_beside(jobs: Jobs, run_dir: str) -> None:
    """Raises UserError where a job that has not ended is at this run."""
    for job in jobs.all():
        if job.run_dir == run_dir and not job.ended:
            raise UserError(
                f"{run_dir}: {job.name} is at it: `freshpairs stop {job.name} --address "
                f"{jobs.address}` first"
            )


def followed(jobs: Jobs, name: str) -> None:
    """Write a job's log until it ends, and exit as it did; Ctrl-C leaves it running (3)."""
    try:
        job = jobs.follow(name, _write, lambda line: typer.echo(line, err=True))
    except KeyboardInterrupt:
        typer.echo(f"\n{name} goes on without you", err=True)
        _say_how_to_go_on(name, jobs.address, err=True)
        raise typer.Exit(EXIT_STOPPED) from None
    if job.state == "stopped":
        typer.echo(_resumed_by(job, jobs.address), err=True)
    elif job.code and job.exit_code not in (1, 2):  # which its log has told
        complain(why(job))
    raise typer.Exit(job.code)


def why(job: Job) -> str:
    """In a line, what became of a job that failed."""
    if job.exit_code is None:
        return f"{job.name} failed before its run began: {job.message}"
    if job.exit_code in (1, 2):
        return f"{job.name} failed: `freshpairs logs {job.name}` shows why"
    return f"{job.name} failed: its process ended with {job.exit_code} (killed, perhaps for memory)"


def dashboard(given: str | None) -> str:
    """The address as http(s)://host:port, from the option or the environment.

    Raises UserError where there is none, or it is no dashboard's.
    """
    from_environment = (os.environ.get(name, "") for name in ADDRESSES)
    found = given or next((a for a in from_environment if a.startswith(("http:", "https:"))), None)
    remedy = "give the address of the cluster's dashboard, http://HEAD:8265"
    if found is None:
        raise UserError(f"--address: missing: {remedy}, or set RAY_API_SERVER_ADDRESS to it")
    url = urlsplit(found if "://" in found else f"http://{found}")
    try:
        port = url.port
    except ValueError:
        raise UserError(f"--address={found}: its port is no number: {remedy}") from None
    if url.scheme not in ("http", "https") or not url.hostname or ("://" not in found and not port):
        raise UserError(f"--address={found}: not a dashboard's: {remedy}")
    return f"{url.scheme}://{url.netloc}{url.path.rstrip('/')}"


@contextmanager
def _connected(address: str | None) -> Iterator[Jobs]:
    """The cluster's jobs; where it fails to do as it was asked, that is told (1)."""
    from pipeline.launch.jobs import ClusterFailed, Jobs

    try:
        yield Jobs(dashboard(address))
    except ClusterFailed as failure:
        complain(str(failure))
        raise typer.Exit(EXIT_FAILURE) from None


def _say_how_to_go_on(name: str, url: str, err: bool = False) -> None:
    for verb, command in (("follow", f"logs {name} --follow"), ("stop", f"stop {name}")):
        typer.echo(f"{verb}: freshpairs {command} --address {url}", err=err)


def _resumed_by(job: Job, url: str) -> str:
    return f"go on with `freshpairs resume {job.run_dir} --address {url}`"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
