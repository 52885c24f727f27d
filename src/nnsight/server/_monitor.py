"""Monitor: what happens on a server, as metrics and as lines of the log; never what is in a job."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pythonjsonlogger.json import JsonFormatter

log = logging.getLogger("nnsight.server")
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Gauge(Collector):
    """A number by model, asked for when the metrics are."""

    def __init__(self, name: str, text: str, values: Callable[[], dict[str, float]]) -> None:
        self._name = name
        self._text = text
        self._values = values

    def collect(self) -> list[Metric]:
        metric = GaugeMetricFamily(self._name, self._text, labels=["model"])
        for model, value in self._values().items():
            metric.add_metric([model], value)
        return [metric]


class Monitor:
    """Counts and logs; its labels are names of served models, never of users."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._submitted = Counter("nnsight_jobs_submitted", "Jobs taken in.", ["model"], registry=registry)
        self._ended = Counter("nnsight_jobs_ended", "Jobs ended, by how.", ["model", "status"], registry=registry)
        self._waited = self._histogram("nnsight_job_wait_seconds", "From taking a job in to its beginning.")
        self._ran = self._histogram("nnsight_job_run_seconds", "From the beginning of a job to its end.")
        self._bytes = Counter("nnsight_job_bytes", "Bytes of jobs taken in.", ["model"], registry=registry)
        self._refused = Counter("nnsight_requests_refused", "Requests refused, by code.", ["code"], registry=registry)
        self._completions = Counter("nnsight_completions", "Completions taken in.", ["model"], registry=registry)
        self._shared = Counter("nnsight_jobs_shared", "Jobs that shared a forward.", ["model"], registry=registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ["model"], registry=self._registry, buckets=_SECONDS)

    def watch(self, name: str, text: str, values: Callable[[], dict[str, float]]) -> None:
        """Add a gauge."""
        self._registry.register(Gauge(name, text, values))

    def text(self) -> bytes:
        """The metrics in the format of Prometheus."""
        return generate_latest(self._registry)

    # --- what happens ----------------------------------------------------------------------------------------

    def submitted(self, job: str, owner: str, model: str, size: int) -> None:
        self._submitted.labels(model).inc()
        self._bytes.labels(model).inc(size)
        log.info("job submitted", extra={"job": job, "owner": owner, "model": model, "bytes": size})

    def begun(self, job: str, model: str, waited: float, attempt: int) -> None:
        self._waited.labels(model).observe(max(waited, 0.0))
        log.info("job begun", extra={"job": job, "model": model, "waited": round(waited, 3), "attempt": attempt})

    def ended(self, job: str, model: str, status: str, ran: float | None) -> None:
        self._ended.labels(model, status).inc()
        if ran is not None:
            self._ran.labels(model).observe(max(ran, 0.0))
        seconds = None if ran is None else round(ran, 3)
        log.info("job ended", extra={"job": job, "model": model, "status": status, "seconds": seconds})

    def shared(self, model: str, count: int) -> None:
        self._shared.labels(model).inc(count)
        log.info("forward shared", extra={"model": model, "jobs": count})

    def completed(self, model: str, count: int) -> None:
        self._completions.labels(model).inc(count)

    def refused(self, code: int, method: str, path: str, kind: str) -> None:
        self._refused.labels(str(code)).inc()
        log.info("request refused", extra={"code": code, "method": method, "path": path, "error": kind})


def log_to_stderr(level: int = logging.INFO) -> None:
    """Write the log as lines of JSON; uvicorn's own goes there too."""
    handler = logging.StreamHandler(sys.stderr)
    names = {"asctime": "time", "levelname": "level", "name": "logger", "message": "event"}
    handler.setFormatter(JsonFormatter("%(asctime)s %(levelname)s %(name)s %(message)s", rename_fields=names))
    for name, least in (("nnsight.server", level), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers[:], logger.propagate = [handler], False
        logger.setLevel(least)
