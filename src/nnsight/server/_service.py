"""Service: what a server does for a request, apart from HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..errors import ProtocolError
from ..protocol import JobList, ServerInfo, read_job, versions
from ..sandbox import can_share
from ._fleet import Fleet
from ._keys import Keys, NotAdminError, User
from ._limits import Limits
from ._monitor import Monitor
from ._news import News
from ._queue import Queue


class Service:
    """What the routes share."""

    def __init__(
        self, queue: Queue, fleet: Fleet, keys: Keys, limits: Limits, news: News, monitor: Monitor, *, trusted: bool
    ) -> None:
        self.queue = queue
        self.fleet = fleet
        self.keys = keys
        self.limits = limits
        self.news = news
        self.monitor = monitor
        self.trusted = trusted
        self.draining = False
        self.started = time.time()
        monitor.watch("nnsight_jobs_waiting", "Jobs that wait.", self._counts("queued"))
        monitor.watch("nnsight_jobs_running", "Jobs that run.", self._counts("running"))
        monitor.watch("nnsight_replicas_ready", "Replicas that take jobs.", fleet.ready)

    def _counts(self, status: str) -> Callable[[], dict[str, float]]:
        return lambda: dict.fromkeys(self.fleet.names(), 0.0) | self.queue.counts(status)

    def info(self, user: User | None) -> ServerInfo:
        """What is served; administrators see why something is not."""
        models = self.fleet.info(reasons=user is not None and user.admin)
        return ServerInfo(versions(), models, self.trusted, self.limits.public(), self.started)

    def submit(self, user: User, idempotency: str, body: bytes) -> str:
        """Take a job in; its name."""
        job, _ = read_job(body)
        model = job.model if job.revision is None else f"{job.model}@{job.revision}"
        self.fleet.check(model)
        self.fleet.check_engine(model, job.engine)
        if not 0 < job.timeout < float("inf"):
            raise ProtocolError("the timeout of a job is a positive number of seconds")
        how = {"priority": user.priority, "shares": bool(self.fleet.engine) or can_share(job, len(body))}
        return self.queue.submit(user.name, idempotency, model, body, job.timeout, **how)

    def jobs(self, user: User) -> JobList:
        """The user's own jobs."""
        return JobList(self.queue.all_of(user.name))

    def deploy(self, user: User, model: str) -> None:
        """Serve another model."""
        _check_admin(user)
        self.fleet.deploy(model)

    def evict(self, user: User, model: str) -> None:
        """Serve a model no longer."""
        _check_admin(user)
        self.fleet.evict(model)


def _check_admin(user: User) -> None:
    if not user.admin:
        raise NotAdminError(
            f"{user.name!r} is no administrator: `nnsight keys create NAME --admin` makes a key of one."
        )
