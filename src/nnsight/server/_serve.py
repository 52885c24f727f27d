"""`nnsight serve`: the service, its replicas, and their end."""

from __future__ import annotations

import fcntl
import importlib.util
import ipaddress
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import IO, Any

import uvicorn
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool

from ..errors import NNsightError
from ..sandbox import missing
from ._app import make_app
from ._budget import Budget
from ._engine import EngineReplica
from ._fleet import DRAIN, Fleet, Member
from ._keys import Keys
from ._limits import Limits
from ._monitor import Monitor, log_to_stderr
from ._news import News
from ._process import ConfinedRunner, TrustedRunner
from ._queue import Queue
from ._ray import Cluster, RayRunner
from ._relay import Relay
from ._replica import Replica, Runner
from ._service import Service
from ._sizes import weight_bytes
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
    ray: str | None = None,
    resources: dict[str, float] | None = None,
    database: str | None = None,
    results: str | None = None,
    budget: Budget | None = None,
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
        ray: The cluster that they are in: `local`, `auto`, or its address; by default they are on this machine.
        resources: What the cluster sets aside for each of them, `{"CPU": 1}` by default.
        database: The URL of the queue's database, which several servers may share.
        results: The URL below which the bytes of jobs and answers are kept, as fsspec has them: `s3://bucket/folder`.

        budget: What the weights of all models may take together; by default all of them are loaded.
        engine: "vllm" has vLLM compute the models, for many jobs at a time and for completions.

    Raises:
        ServeError: The options do not go together.
    """
    here = ray in (None, "local")  # where blocks run: the nodes of a cluster confine them, or say that they cannot
    _check(host, keys, no_auth_on_loopback=no_auth_on_loopback, trusted=trusted, confines=here)
    if engine:
        _check_engine(engine, replicas, options or {}, alone=ray is None and budget is None, trusted=trusted)
    limits = limits or Limits()
    folder = data or _default_folder()
    with _only_server_in(folder), ExitStack() as open_:
        store = Store(folder, database, results)
        open_.callback(store.close)
        news, monitor = News(), Monitor()
        if store.shared:
            open_.callback(Relay(store.engine, news).close)
        queue = Queue(store, limits, news, monitor)
        queue.recover()
        cluster = Cluster(ray, store.server, resources or {"CPU": 1}) if ray is not None else None
        if cluster is not None:
            open_.callback(cluster.close)
        count = max(replicas, 1)
        make_runner = _runners(cluster, limits, trusted=trusted)

        def make(model: str) -> Sequence[Member]:
            if engine:
                return [_engine_replica(model, _own(model, options), queue, news, limits, trusted=trusted)]
            runners = [make_runner(model, number, _own(model, options)) for number in range(count)]
            return [Replica(model, runner, queue, news, limits) for runner in runners]

        def size_of(model: str) -> int:
            return weight_bytes(model.partition("@")[0], _own(model, options)) * count

        def tidy(loaded: Sequence[str]) -> None:
            if cluster is not None:
                cluster.clear([cluster.name(model, number) for model in loaded for number in range(count)])

        def keep(names: Sequence[str]) -> None:
            store.keep_deployed(set(names) - set(models))

        every = list(dict.fromkeys([*models, *store.deployed()]))
        fleet = Fleet(every, make, queue, keep, budget=budget, size_of=size_of, tidy=tidy, engine=engine)
        service = Service(queue, fleet, Keys(keys), limits, news, monitor, trusted=trusted)
        app = make_app(service)
        app.router.lifespan_context = _lifespan(service)
        log_to_stderr()
        sys.setswitchinterval(_SWITCH)
        _Server(app, host, port).run()


def _own(model: str, options: dict[str, Any] | None) -> dict[str, Any]:
    _, _, revision = model.partition("@")
    return {**(options or {}), "revision": revision} if revision else options or {}


def _runners(cluster: Cluster | None, limits: Limits, *, trusted: bool) -> Callable[[str, int, dict[str, Any]], Runner]:
    """What makes the runner of a model's replica of a number."""
    if cluster is None:
        runner = TrustedRunner if trusted else ConfinedRunner
        return lambda model, _, options: runner(model.partition("@")[0], options, limits)
    return lambda model, number, options: RayRunner(cluster, model, number, options, limits, trusted=trusted)


def _engine_replica(
    model: str, options: dict[str, Any], queue: Queue, news: News, limits: Limits, *, trusted: bool
) -> EngineReplica:
    from ..vllm import Host

    confined: dict[str, float] | None = None if trusted else {"memory": limits.memory}
    return EngineReplica(model, Host(model.partition("@")[0], model, options, confined=confined), queue, news, limits)


def _check_engine(engine: str, replicas: int, options: dict[str, Any], *, alone: bool, trusted: bool) -> None:
    if engine != "vllm":
        raise ServeError(f"There is no engine {engine!r}; there is: vllm.")
    if importlib.util.find_spec("vllm") is None:
        raise ServeError('--engine vllm needs vLLM: pip install "nnsight[vllm]" (see docs/vllm.md).')
    if replicas != 1:
        raise ServeError("--replicas is for models in processes of ours: an engine spreads by --tensor-parallel-size.")
    if not alone:
        raise ServeError(
            "--ray and --memory-budget are for models in processes of ours: an engine is a cluster of its own."
        )
    if not trusted and options.get("tensor_parallel_size", 1) != 1:
        raise ServeError(
            "Other people's blocks are confined beside one worker: --tensor-parallel-size needs --trusted."
        )
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a fork would have the sockets and locks of the server


def _check(host: str, keys: Path | None, *, no_auth_on_loopback: bool, trusted: bool, confines: bool) -> None:
    if (keys is None) != no_auth_on_loopback:
        raise ServeError("Give either --api-keys FILE or --no-auth-on-loopback.")
    if (trusted or no_auth_on_loopback) and not _is_loopback(host):
        option = "--trusted" if trusted else "--no-auth-on-loopback"
        raise ServeError(
            f"{option} is for this machine alone: {host} can be reached from others. Use --host 127.0.0.1."
        )
    lacking = [] if trusted or not confines else missing()
    if lacking:
        raise ServeError(
            f"Other people's blocks cannot be confined on this machine, which lacks {'; '.join(lacking)}. With --trusted "
            "blocks run in the process that holds the model, where they can do anything that you can."
        )


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
