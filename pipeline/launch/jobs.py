"""Ray's jobs on a cluster: submitted, followed, stopped. What goes wrong is told in a line."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from judges.errors import UserError

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 10.0
"""An address that does not answer within this is a wrong one."""

UPLOAD_SECONDS = 300.0
"""Within which a cluster that is known to be one takes a package or a job."""

PATIENCE = 600.0
"""Seconds without a word of the cluster after which it is not waited for any longer."""

TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
ADDRESS = "RAY_API_SERVER_ADDRESS"


class Unreachable(UserError):  # noqa: N818 (as UserError is told)
    """The cluster does not answer, or not any more."""


class ClusterFailed(Exception):  # noqa: N818 (what failed, as JudgeFailed)
    """The cluster answers, and did not do as it was asked."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a cluster knows of a job. ``began``: when it was submitted; ``exit_code``: its driver's,
    None where it has none."""

    name: str
    status: str
    exit_code: int | None
    message: str
    began: datetime | None
    metadata: Mapping[str, str]

    @property
    def ended(self) -> bool:
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")

    @property
    def run_dir(self) -> str:
        return self.metadata.get("run_dir", "")

    @property
    def state(self) -> str:
        """Its status in our words."""
        if self.status == "FAILED" and self.exit_code == 3:
            return "stopped"
        words = {"PENDING": "waiting", "SUCCEEDED": "finished"}
        return words.get(self.status, self.status.lower())

    @property
    def code(self) -> int:
        """The exit code of `freshpairs` that stands for how it ended."""
        if self.status == "SUCCEEDED":
            return 0
        if self.status == "STOPPED":
            return 3
        return self.exit_code if self.exit_code in (2, 3) else 1


class Jobs:
    """The jobs of the cluster whose dashboard is at ``address``, http(s)://host:port.

    The token is the one that Ray finds: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or, with
    RAY_AUTH_MODE=token, ~/.ray/auth_token. Methods raise UserError for a job that is not there or a
    token that is refused, Unreachable, or ClusterFailed.
    """

    def __init__(self, address: str) -> None:
        """Asks the cluster for its version, within seconds."""
        self.address = address
        if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        with self._told():
            self._client = _client(address)

    def submit(
        self,
        name: str,
        entrypoint: str,
        runtime_env: Mapping[str, Any],
        metadata: Mapping[str, str],
    ) -> None:
        """Send the package and start the job under that name."""
        with self._told():
            try:
                self._client.submit_job(
                    submission_id=name,
                    entrypoint=entrypoint,
                    runtime_env=dict(runtime_env),
                    metadata=dict(metadata),
                )
            except (ValueError, TypeError) as error:  # what Ray says of a runtime environment
                raise UserError(f"--runtime-env: {_one_line(error)}") from error

    def job(self, name: str) -> Job:
        """The job of that name."""
        with self._told(name):
            return _job(self._client.get_job_info(name))

    def all(self) -> list[Job]:
        """Every job of ours that the cluster knows, the newest first."""
        with self._told():
            jobs = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        ours = [job for job in jobs if "freshpairs" in job.metadata]
        return sorted(ours, key=lambda job: job.began or datetime.min, reverse=True)

    def logs(self, name: str) -> str:
        """What its driver has printed."""
        with self._told(name):
            return str(self._client.get_job_logs(name))

    def stop(self, name: str) -> None:
        """Ask it to end: its driver gets SIGTERM."""
        with self._told(name):
            self._client.stop_job(name)

    def wait(self, name: str, seconds: float) -> Job:
        """The job, once it has ended. Raises ClusterFailed if it has not, after so long."""
        deadline = time.monotonic() + seconds
        while not (job := self.job(name)).ended:
            if time.monotonic() > deadline:
                raise ClusterFailed(f"{name} still runs, {seconds / 60:.0f} minutes on")
            time.sleep(0.5)
        return job

    def follow(
        self, name: str, write: Callable[[str], object], say: Callable[[str], object]
    ) -> Job:
        """Write its log as it comes until it has ended: how it ended.

        A stream that breaks is taken up again where it broke; ``say`` is told. Raises Unreachable
        when nothing was heard of the cluster for ten minutes.
        """
        import aiohttp
        from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential

        from pipeline.launch.job_log import JobLog

        log = JobLog(self, name, write)

        def lost(state: RetryCallState) -> None:
            if state.attempt_number == 1:
                say(f"lost the connection to {self.address}; the job goes on: trying again …")

        broken = (Unreachable, ClusterFailed, aiohttp.ClientError, RuntimeError, OSError)
        retrying = Retrying(
            retry=retry_if_exception_type(broken),
            wait=wait_exponential(multiplier=0.5, max=15.0),
            stop=lambda _: time.monotonic() - log.heard > PATIENCE,
            before_sleep=lost,
            reraise=True,
        )
        job: Job = retrying(log.follow)
        return job

    async def lines(self, name: str) -> Any:
        """The log from its beginning, as it comes."""
        async for text in self._client.tail_job_logs(name):
            yield text

    @contextmanager
    def _told(self, job: str | None = None) -> Iterator[None]:
        """What Ray's client raises, as ours. (It gives other statuses than these as text.)"""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except UserError:
            raise
        except AuthenticationError as error:
            raise UserError(f"--address={self.address}: {_refused(str(error))}") from error
        except ConnectionError as error:
            raise self._unreachable(error) from error
        except RuntimeError as error:
            if job is not None and "status code 404" in str(error):
                raise UserError(
                    f"{job}: no such job on {self.address}: `freshpairs status --address "
                    f"{self.address}` lists them"
                ) from error
            if "Version check returned 404" in str(error):
                raise self._no_dashboard("it has no jobs") from error
            raise ClusterFailed(f"{self.address}: {_one_line(error)}") from error
        except (KeyError, ValueError, OSError) as error:
            # requests' own: a time-out, a body that is no JSON, a status nobody expected
            if type(error).__name__ in ("ConnectTimeout", "ReadTimeout", "ConnectionError"):
                raise self._unreachable(error) from error
            raise self._no_dashboard(_one_line(error)) from error

    def _unreachable(self, error: BaseException) -> Unreachable:
        return Unreachable(
            f"--address={self.address}: cannot be reached ({_reason(error)}): give the address of "
            "the cluster's dashboard, http://HEAD:8265"
        )

    def _no_dashboard(self, why: str) -> UserError:
        return UserError(
            f"--address={self.address}: not a Ray dashboard ({why}): give the address of the "
            "cluster's, http://HEAD:8265"
        )


def _client(address: str) -> Any:
    """Ray's client, which waits for no answer longer than it should."""
    from ray.job_submission import JobSubmissionClient

    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)

    class Client(JobSubmissionClient):  # type: ignore[misc]
        seconds = ANSWER_SECONDS

        def _do_request(self, *args: Any, **kwargs: Any) -> Any:
            return super()._do_request(*args, timeout=(CONNECT_SECONDS, self.seconds), **kwargs)

    before = os.environ.get(ADDRESS)
    os.environ[ADDRESS] = address  # which Ray would otherwise read from RAY_ADDRESS
    try:
        client = Client(address)
    finally:
        if before is None:
            del os.environ[ADDRESS]
        else:
            os.environ[ADDRESS] = before
    client.seconds = UPLOAD_SECONDS
    return client


def _job(details: Any) -> Job:
    began = details.start_time and datetime.fromtimestamp(details.start_time / 1000)
    return Job(
        name=details.submission_id,
        status=str(details.status),
        exit_code=details.driver_exit_code,
        message=_hidden(_one_line(details.message or ""), details.runtime_env or {}),
        began=began or None,
        metadata=details.metadata or {},
    )


def _hidden(message: str, runtime_env: Mapping[str, Any]) -> str:
    """The message without the values of variables: what is passed on may be a key."""
    values = {str(value) for value in (runtime_env.get("env_vars") or {}).values()}
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= 8:
            message = message.replace(value, "***")
    return message


def _refused(error: str) -> str:
    if error.startswith("Authentication required"):
        return (
            "the cluster wants a token: set RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH, a file's) to "
            "that of its head"
        )
    return "the cluster refused the token: set RAY_AUTH_TOKEN to that of its head"


def _reason(error: BaseException) -> str:
    """What the system said of the connection."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    for cause in reversed(causes):
        if "timed out" in str(cause):
            return "no answer"
        if found := re.search(r"\[(?:Errno -?\d+|SSL[^\]]*)\] ([^(')\"]+)", str(cause)):
            return found[1].strip()
    return _one_line(error)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
