"""OpenAI: vLLM's own service of completions on an engine that runs, called from another event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from types import SimpleNamespace
from typing import Any

from ._client import Running

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Completions:
    """The OpenAI-style service of one engine; only its completions are passed on to it."""

    def __init__(self, running: Running, name: str) -> None:
        self._running = running
        self._app = running.call(_make(running.llm, name)).result()

    async def answer(self, path: str, body: bytes, receive: Receive, send: Send) -> None:
        """Answer a request, which is of the loop that runs here, on the loop of the engine.

        Raises:
            EngineError: The engine has died.
        """
        here, given = asyncio.get_running_loop(), [body]

        def crossing(work: Any) -> Awaitable[Any]:
            return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, here))

        async def receive_there() -> Message:
            if given:
                return {"type": "http.request", "body": given.pop(), "more_body": False}
            return await crossing(receive())

        async def send_there(message: Message) -> None:
            await crossing(send(message))

        work = self._app(_scope(path, body), receive_there, send_there)
        await asyncio.wrap_future(self._running.submit(work))


def _scope(path: str, body: bytes) -> dict[str, Any]:
    """A request of which nothing but its path and body is the client's: no key, no name of a request, no origin."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},  # clients that go away are listened for
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "client": None,
        "server": None,
    }


async def _make(llm: Any, name: str) -> Any:
    from vllm.entrypoints.launchers.api_server.app_state import (  # pyright: ignore[reportMissingImports]
        init_app_state,
    )
    from vllm.entrypoints.launchers.app import build_app  # pyright: ignore[reportMissingImports]
    from vllm.entrypoints.launchers.cli_args import make_arg_parser  # pyright: ignore[reportMissingImports]
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # pyright: ignore[reportMissingImports]

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", llm.model_config.model])
    args.served_model_name, args.allowed_origins = [name], []
    args.log_error_stack = False
    tasks = await llm.get_supported_tasks()
    app = build_app(args, tasks, llm.model_config)
    app.state.server = SimpleNamespace(should_exit=False)  # vLLM's service would end with its engine
    await init_app_state(llm, app.state, args, tasks)
    return app
