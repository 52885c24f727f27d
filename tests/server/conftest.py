"""A service without models, for asking it questions without a network."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from nnsight.protocol import BlockText, BoundBlock, Job, ModelState, Namespace, write_frame
from nnsight.server import create_key
from nnsight.server._app import make_app
from nnsight.server._fleet import Fleet
from nnsight.server._keys import Keys
from nnsight.server._limits import Limits
from nnsight.server._monitor import Monitor
from nnsight.server._news import News
from nnsight.server._queue import Queue
from nnsight.server._service import Service
from nnsight.server._store import Store

LIMITS = Limits(body=20_000, queued=3, stored=50_000, lease=1000)


def frame_of(source: str = "pass", model: str = "m", **fields: Any) -> bytes:
    block = BlockText(source, "f", 1, "f", None, 1, [0], None, None, 0, [], [], [])
    main, space = BoundBlock(block, [], {}, 0), Namespace("m")
    return write_frame(Job(1, model, None, "trace", main, [], {}, [ModelState()], [space], [], [], [], [], **fields))


class Site:
    """A service with the keys of ann, bob and an administrator, asked in this process."""

    def __init__(self, folder: Any) -> None:
        file = folder / "keys"
        self.keys = {
            "ann": create_key(file, "ann"),
            "bob": create_key(file, "bob"),
            "root": create_key(file, "root", admin=True),
            "vip": create_key(file, "vip", priority=5),
        }
        self.store, self.monitor, news = Store(folder / "data"), Monitor(), News()
        self.queue = Queue(self.store, LIMITS, news, self.monitor)
        self.fleet = Fleet(["m"], lambda _: [], self.queue, self.store.keep_deployed)
        self.service = Service(self.queue, self.fleet, Keys(file), LIMITS, news, self.monitor, trusted=False)
        self.app = make_app(self.service)
        self._count = 0

    def ask(self, user: str | None, method: str, path: str, **options: Any) -> httpx.Response:
        key = {"Authorization": f"Bearer {self.keys.get(user, user)}"} if user else {}
        headers = key | options.pop("headers", {})

        async def request() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://site") as client:
                return await client.request(method, path, headers=headers, **options)

        return asyncio.run(request())

    def submit(self, user: str | None, frame: bytes | None = None, **headers: str) -> httpx.Response:
        self._count += 1
        headers = {"Idempotency-Key": f"request {self._count}"} | headers
        return self.ask(user, "POST", "/v1/jobs", content=frame_of() if frame is None else frame, headers=headers)


@pytest.fixture
def site(tmp_path: Any) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.store.close()


# --- services that a server may use: real ones, on loopback -----------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def _postgresql() -> Path | None:
    """Where PostgreSQL's programs are."""
    found = shutil.which("postgres")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a PostgreSQL of these tests' own."""
    pytest.importorskip("psycopg", reason="the driver psycopg is not installed")
    programs = _postgresql()
    if programs is None:
        pytest.skip("there is no PostgreSQL on this machine (apt-get install postgresql)")
    user = pwd.getpwnam("nobody").pw_name if os.getuid() == 0 else None  # it does not run as root
    folder = Path(tempfile.mkdtemp(prefix="nnsight-postgresql-"))
    if user is not None:
        shutil.chown(folder, user)
    data, port = folder / "data", free_port()
    how: dict[str, Any] = {"user": user, "cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    make = [programs / "initdb", "-D", data, "-U", "nnsight", "--auth=trust", "--no-sync", "-E", "UTF8", "--no-locale"]
    subprocess.run(make, check=True, **how)
    begin = [programs / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", folder, "-c", "fsync=off"]
    process = subprocess.Popen(begin, **how)
    try:
        for _ in range(200):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None
            time.sleep(0.05)
        yield f"postgresql+psycopg://nnsight@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)  # without waiting for connections
        process.wait(30)
        shutil.rmtree(folder)


@pytest.fixture
def database(postgresql: str) -> str:
    """The URL of an empty schema in it."""
    from sqlalchemy import create_engine, text

    schema = f"test_{uuid.uuid4().hex}"
    engine = create_engine(postgresql)
    for _ in range(100):
        with suppress(Exception), engine.begin() as db:  # it starts up
            db.execute(text(f"CREATE SCHEMA {schema}"))
            break
        time.sleep(0.05)
    engine.dispose()
    return f"{postgresql}?options=-csearch_path%3D{schema}"


@pytest.fixture(scope="session")
def s3() -> Iterator[Callable[[], str]]:
    """Makes buckets in a server of S3's protocol, on loopback, for this process and those that it starts."""
    for library in ("s3fs", "moto", "flask", "flask_cors", "boto3"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **quiet)
    names = {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests"}
    names |= {"AWS_DEFAULT_REGION": "us-east-1"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        for _ in range(400):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None
            time.sleep(0.05)

        def bucket() -> str:
            name = f"bucket-{uuid.uuid4().hex}"
            httpx.put(f"{address}/{name}").raise_for_status()
            return f"s3://{name}/results"

        yield bucket
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        process.kill()
        process.wait()
