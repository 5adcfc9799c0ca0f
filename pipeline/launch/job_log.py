"""A job's log as it comes: taken up where it broke off, whole when the job has ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.launch.jobs import ClusterFailed, Job, Jobs

QUIET_SECONDS = 20.0
"""After so long without a line, the job is asked whether it goes on."""


@dataclass(slots=True)
class JobLog:
    """A job's log as far as it was written. ``heard``: when the cluster was last heard of."""

    jobs: Jobs
    name: str
    write: Callable[[str], object]
    written: int = 0
    heard: float = field(default_factory=time.monotonic)

    def follow(self) -> Job:
        """Write what there is to come. Raises what breaks the stream while the job goes on."""
        job = self.jobs.job(self.name)
        self.heard = time.monotonic()
        if not job.ended:
            asyncio.run(self._stream())
            job = self.jobs.job(self.name)
        if not job.ended:
            raise ClusterFailed(f"{self.name}: its log ended before it did")
        if job.exit_code is not None or job.status == "STOPPED":
            self._from(0, self.jobs.logs(self.name))
        return job

    async def _stream(self) -> None:
        at = 0
        lines = self.jobs.lines(self.name)
        coming = asyncio.ensure_future(anext(lines, None))
        try:
            while True:
                done, _ = await asyncio.wait({coming}, timeout=QUIET_SECONDS)
                if not done:
                    if self.jobs.job(self.name).ended:
                        return
                else:
                    text = coming.result()
                    if text is None:
                        return
                    self._from(at, text)
                    at += len(text)
                    coming = asyncio.ensure_future(anext(lines, None))
                self.heard = time.monotonic()
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
            await lines.aclose()

    def _from(self, at: int, text: str) -> None:
        """Write what of the text, which begins at character ``at`` of the log, is new."""
        new = text[max(0, self.written - at) :]
        if new:
            self.write(new)
            self.written = at + len(text)
