"""A service without models, for asking it questions without a network."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
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
