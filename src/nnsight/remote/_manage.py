"""Looking after jobs and models on a server, as the command line does."""

from __future__ import annotations

import json
from urllib.parse import quote

from ..protocol import JobList, JobState, JobSummary
from ._ask import ask, order


def list_jobs() -> list[JobSummary]:
    """Your jobs on the server, the newest first.

    Raises:
        RemoteError: No server is set, it cannot be reached, or it does not know the key.
    """
    return ask("/v1/jobs", JobList).jobs


def find_job(start: str) -> str:
    """The one of your jobs whose id begins so.

    Raises:
        ServerError: There is none, or more than one.
    """
    found = [job.id for job in list_jobs() if job.id.startswith(start)]
    return found[0] if len(found) == 1 else start


def state_of(job: str, after: int = 0, *, known: str = "") -> JobState:
    """Where a job of yours stands; with `known`, as soon as its status is another or there are events."""
    wait = f"&known={known}&wait=20" if known else ""
    return ask(f"/v1/jobs/{quote(job, safe='')}?after={after}{wait}", JobState)


def cancel_job(job: str) -> None:
    """End a job of yours."""
    order("DELETE", f"/v1/jobs/{quote(job, safe='')}")


def deploy(model: str) -> None:
    """Have the server serve another model; for administrators."""
    order("POST", "/v1/models", content=json.dumps({"model": model}))


def evict(model: str) -> None:
    """Have the server serve a model no longer; for administrators."""
    order("DELETE", f"/v1/models/{quote(model)}")
