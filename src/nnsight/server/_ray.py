"""Replicas as actors in a Ray cluster, each in a placement group of its own, which outlive the server that dies."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec

from ..errors import NNsightError
from ..protocol import Event, Shared, versions
from ..sandbox import JOB
from ._actor import ANSWERED, DIED, HAPPENED, NOT_BEGUN, TAKEN, Charge, ModelActor, leave_the_cluster
from ._limits import Limits
from ._monitor import log
from ._process import share
from ._replica import DiedError, Emit, NoRoomError, NotBegunError

_FORGOTTEN = 600.0
_REACHING = 10.0  # seconds that a cluster may take to answer at all
_PATIENCE = 1.0  # seconds between two looks whether there is room
_THREADS = 8  # requests to an actor at a time: a job, its end, and questions
_PLACING = 3.0  # seconds to wait for room before saying that there is none


class RayError(NNsightError):
    """A cluster that cannot be used as asked."""


class Cluster:
    """The part of a Ray cluster that belongs to one server.

    Args:
        address: `local` for one on this machine alone, `auto` for the one that runs here, or `host:port`.
        identity: Names the server over its restarts.
        resources: What Ray sets aside for a replica: `{"CPU": 1}`.
        patience: Seconds without a word of the server, after which an actor ends by itself.
    """

    def __init__(
        self, address: str, identity: str, resources: dict[str, float], *, patience: float = _FORGOTTEN
    ) -> None:
        self.ray = _ray()
        _reach(address)
        self.resources = resources
        self.patience = patience
        self._prefix = f"nnsight-{identity}-"
        options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        try:
            self.ray.init(
                address=address, namespace=f"nnsight-{identity}", log_to_driver=False, logging_level="error", **options
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise RayError(f"There is no Ray cluster at {address!r}: {error}") from error

    def name(self, model: str, number: int) -> str:
        """What the actor of a replica is called."""
        return f"{self._prefix}{model}#{number}"

    def clear(self, kept: Sequence[str]) -> None:
        """End the actors that a server of this name has left, but for those that are needed."""
        util = self.ray.util
        for group in util.placement_group_table().values():
            if group["name"].startswith(self._prefix) and group["name"] not in kept and group["state"] != "REMOVED":
                log.info("actor left over", extra={"actor": group["name"]})
                self.end(group["name"])

    def end(self, name: str) -> None:
        """End an actor and give its place back; nothing where there is none."""
        with suppress(ValueError, self.ray.exceptions.RayError):
            self.ray.kill(self.ray.get_actor(name), no_restart=True)
        with suppress(ValueError, self.ray.exceptions.RayError):
            self.ray.util.remove_placement_group(self.ray.util.get_placement_group(name))

    def close(self) -> None:
        """Leave the cluster, which ends one that was for this server alone."""
        self.ray.shutdown()


class RayRunner:
    """A replica's runner whose model process is on whatever node has room: there it is an embedded one's."""

    def __init__(
        self, cluster: Cluster, model: str, number: int, options: dict[str, Any], limits: Limits, *, trusted: bool
    ) -> None:
        self.mixes_owners = trusted
        self._cluster = cluster
        self._ray = cluster.ray
        self._limits = limits
        self._name = cluster.name(model, number)
        charge = Charge(
            model,
            model.partition("@")[0],
            msgspec.json.encode(options).decode(),
            limits,
            trusted,
            versions().nnsight,
            cluster.resources,
            cluster.patience,
        )
        self._charge = msgspec.json.encode(charge).decode()
        self._actor: Any = None
        self._closed = threading.Event()

    def start(self) -> None:
        self._begin(loaded=True)

    def rest(self) -> None:
        self._begin(loaded=False)

    def _begin(self, *, loaded: bool) -> None:
        try:
            if self._actor is None:
                self._actor = self._found() or self._made()
            problem = self._ray.get(self._actor.start.remote(loaded=loaded))
        except self._ray.exceptions.RayError as error:
            self._forget()
            raise DiedError(f"the actor has died ({_first_line(error)})") from error
        if problem is not None:
            raise DiedError(problem)

    def run(self, frame: bytes, emit: Emit, owner: str) -> bytes:
        return self._run(frame, emit, JOB, [owner])

    def _run(self, frame: bytes, emit: Emit, kind: bytes, owners: list[str]) -> bytes:
        begun = False
        try:
            for reference in self._actor.run.options(num_returns="streaming").remote(frame, kind, owners):
                said, data = self._ray.get(reference)
                if said == TAKEN:
                    begun = True
                elif said == HAPPENED:
                    emit(msgspec.json.decode(data, type=Event))
                elif said == ANSWERED:
                    return data
                elif said == NOT_BEGUN:
                    raise NotBegunError(data.decode())
                elif said == DIED:
                    raise DiedError(data.decode())
        except self._ray.exceptions.RayError as error:
            self._forget()
            raise (DiedError if begun else NotBegunError)(f"the actor has died ({_first_line(error)})") from error
        self._forget()
        raise DiedError("the actor has said nothing of the job")

    def run_together(self, frames: list[bytes], owners: list[str]) -> Shared:
        return share(self._run, frames, owners)

    def stop(self) -> None:
        actor = self._actor
        if actor is not None:
            with suppress(self._ray.exceptions.RayError):
                self._ray.get(actor.stop.remote())  # and not later, when the next job runs

    def close(self) -> None:
        self._closed.set()
        self._forget()

    def _forget(self) -> None:
        self._actor = None
        self._cluster.end(self._name)

    def _found(self) -> Any:
        """The actor that another server of this name has left, if it is what is needed."""
        try:
            actor = self._ray.get_actor(self._name)
            if self._ray.get(actor.charge.remote(), timeout=30) == self._charge:
                self._ray.get(actor.adopt.remote(), timeout=30)
                log.info("actor found again", extra={"actor": self._name})
                return actor
        except (ValueError, self._ray.exceptions.RayError):
            pass
        self._cluster.end(self._name)
        return None

    def _made(self) -> Any:
        group = self._place()
        how = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group)
        actor = self._ray.remote(ModelActor).options(
            name=self._name,
            lifetime="detached",
            max_concurrency=_THREADS,
            num_cpus=self._cluster.resources.get("CPU", 0),
            num_gpus=self._cluster.resources.get("GPU", 0),
            scheduling_strategy=how,
        )
        return actor.remote(self._charge, leave_the_cluster)

    def _place(self) -> Any:
        """Room for the actor, when there is some."""
        group = self._ray.util.placement_group([self._cluster.resources], name=self._name, lifetime="detached")
        deadline = time.monotonic() + _PLACING
        while not group.wait(_PATIENCE):
            if self._closed.is_set() or time.monotonic() > deadline:
                self._cluster.end(self._name)
                wanted = ", ".join(f"{count:g} {kind}" for kind, count in self._cluster.resources.items())
                raise NoRoomError(f"the cluster has no room for a replica ({wanted})")
        return group


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise RayError('`--ray` needs Ray: pip install "nnsight[ray]"') from error
    return ray


def _reach(address: str) -> None:
    """Ray itself tries for minutes where there is nothing."""
    if address in ("local", "auto"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise RayError(f"{address!r} is no address of a Ray cluster: local, auto or host:port is one.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACHING).close()
    except OSError as error:
        raise RayError(f"There is no Ray cluster at {address!r}: {error}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
