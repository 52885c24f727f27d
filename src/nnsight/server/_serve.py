"""`nnsight serve`: the service, its replicas, and their end."""

from __future__ import annotations

import fcntl
import importlib.util
import ipaddress
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any

import uvicorn
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool

from ..errors import NNsightError
from ..sandbox import missing
from ._app import make_app
from ._engine import EngineReplica
from ._fleet import DRAIN, Fleet, Member
from ._keys import Keys
from ._limits import Limits
from ._monitor import Monitor, log_to_stderr
from ._news import News
from ._process import ConfinedRunner, TrustedRunner
from ._queue import Queue
from ._replica import Replica
from ._service import Service
from ._store import Store

_SWITCH = 0.0005  # seconds; replicas and requests are threads that hand over to each other


class ServeError(NNsightError):
    """A server that cannot be started as asked."""


def serve(
    models: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: Path | None = None,
    no_auth_on_loopback: bool = False,
    trusted: bool = False,
    data: Path | None = None,
    options: dict[str, Any] | None = None,
    limits: Limits | None = None,
    replicas: int = 1,
    engine: str = "",
) -> None:
    """Serve models until the process is told to end.

    Args:
        models: Names as `LanguageModel` takes them, with `@revision` where one is meant.
        host: The address to listen at.
        port: The port; 0 takes a free one.
        keys: A file of keys (`nnsight keys create`).
        no_auth_on_loopback: Let everybody on this machine in, without keys.
        trusted: Run blocks in the process that holds the model, which they can do anything with.
        data: The folder of the queue and of answers.
        options: Options of `LanguageModel`, or of the engine, for every model.
        limits: What one user may take.
        replicas: How many processes hold each model.
        engine: "vllm" has vLLM compute the models, for many jobs at a time and for completions.

    Raises:
        ServeError: The options do not go together.
    """
    _check(host, keys, no_auth_on_loopback=no_auth_on_loopback, trusted=trusted, engine=engine)
    if engine:
        _check_engine(engine, replicas)
    limits = limits or Limits()
    folder = data or _default_folder()
    with _only_server_in(folder):
        store, news, monitor = Store(folder), News(), Monitor()
        queue = Queue(store, limits, news, monitor)
        queue.recover()

        def make(model: str) -> Sequence[Member]:
            if engine:
                return [_engine_replica(model, options or {}, queue, news, limits, trusted=trusted)]
            return [
                _replica(model, options or {}, queue, news, limits, trusted=trusted) for _ in range(max(replicas, 1))
            ]

        every = list(dict.fromkeys([*models, *store.deployed()]))
        fleet = Fleet(every, make, queue, lambda names: store.keep_deployed(set(names) - set(models)), engine)
        service = Service(queue, fleet, Keys(keys), limits, news, monitor, trusted=trusted)
        app = make_app(service)
        app.router.lifespan_context = _lifespan(service)
        log_to_stderr()
        sys.setswitchinterval(_SWITCH)
        try:
            _Server(app, host, port).run()
        finally:
            store.close()


def _replica(
    model: str, options: dict[str, Any], queue: Queue, news: News, limits: Limits, *, trusted: bool
) -> Replica:
    name, _, revision = model.partition("@")
    runner = TrustedRunner if trusted else ConfinedRunner
    own = {**options, "revision": revision} if revision else options
    return Replica(model, runner(name, own, limits), queue, news, limits)


def _engine_replica(
    model: str, options: dict[str, Any], queue: Queue, news: News, limits: Limits, *, trusted: bool
) -> EngineReplica:
    from ..vllm import Host

    name, _, revision = model.partition("@")
    own = {**options, "revision": revision} if revision else options
    return EngineReplica(model, Host(name, model, own, confined=not trusted), queue, news, limits)


def _check_engine(engine: str, replicas: int) -> None:
    if engine != "vllm":
        raise ServeError(f"There is no engine {engine!r}; there is: vllm.")
    if importlib.util.find_spec("vllm") is None:
        raise ServeError('--engine vllm needs vLLM: pip install "nnsight[vllm]" (see docs/vllm.md).')
    if replicas != 1:
        raise ServeError("--replicas is for models in processes of ours: an engine spreads by --tensor-parallel-size.")
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a fork would have the sockets and locks of the server


def _check(host: str, keys: Path | None, *, no_auth_on_loopback: bool, trusted: bool, engine: str) -> None:
    if (keys is None) != no_auth_on_loopback:
        raise ServeError("Give either --api-keys FILE or --no-auth-on-loopback.")
    if (trusted or no_auth_on_loopback) and not _is_loopback(host):
        option = "--trusted" if trusted else "--no-auth-on-loopback"
        raise ServeError(
            f"{option} is for this machine alone: {host} can be reached from others. Use --host 127.0.0.1."
        )
    if engine and not trusted:
        raise ServeError(_NOT_CONFINED)
    lacking = [] if trusted else missing()
    if lacking:
        raise ServeError(
            f"Other people's blocks cannot be confined on this machine, which lacks {'; '.join(lacking)}. With --trusted "
            "blocks run in the process that holds the model, where they can do anything that you can."
        )


_NOT_CONFINED = """\
Blocks in a vLLM engine run in its worker, where other people's cannot be confined yet: serve yourself alone with \
--trusted, on loopback, or other people without --engine."""


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _default_folder() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "nnsight" / "server"


class _only_server_in:
    """Two servers on one queue would each take the other's jobs for lost."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "lock"
        self._file: IO[str] | None = None

    def __enter__(self) -> None:
        self._file = self._path.open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ServeError(f"Another server uses {self._path.parent}: give this one a --data folder.") from None

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()


def _lifespan(service: Service) -> Any:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.fleet.start()
        try:
            yield
        finally:
            await run_in_threadpool(service.fleet.end)

    return lifespan


class _Server(uvicorn.Server):
    """Says where it listens, once it does."""

    def __init__(self, app: FastAPI, host: str, port: int) -> None:
        super().__init__(
            uvicorn.Config(app, host=host, port=port, log_config=None, access_log=False, timeout_graceful_shutdown=2)
        )
        self._app = app
        self._host = host

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            port = self.servers[0].sockets[0].getsockname()[1]
            print(f"nnsight serves at http://{self._host}:{port}", flush=True)

    async def shutdown(self, sockets: Any = None) -> None:
        self._app.state.service.draining = True
        if hasattr(self._app.state, "desk"):
            await self._app.state.desk.wait(DRAIN)
        await super().shutdown(sockets)
