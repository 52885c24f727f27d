"""Client: a vLLM engine as the user's process sees it, on an event loop of its own: started, asked, watched and ended."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from multiprocessing import connection
from typing import Any, TypeVar

from ..errors import EngineError
from ._messages import Reply, decode_reply
from ._requests import Request

T = TypeVar("T")
RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
"""What vLLM reads in its environment to choose one of its two model runners."""


class Client:
    """The engine of a model, whether it runs or not."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self._name = name
        self._options = options
        self._lock = threading.Lock()
        self._running: Running | None = None
        self._finalizer: Any = None

    def start(self) -> None:
        """Start the engine where it does not run: for the first time, or again after its end."""
        with self._lock:
            if self._running is not None and self._running.death is not None:
                self._let_go()
            if self._running is None:
                self._running = running = Running(self._name, self._options)
                self._finalizer = weakref.finalize(self, running.close)

    def running(self) -> Running:
        """The engine that runs; it is started where it never was.

        Raises:
            EngineError: It has died, or is another process's.
        """
        if self._running is None:
            self.start()
        found = self._running
        assert found is not None
        if found.pid != os.getpid():
            raise EngineError(_FORKED)
        if found.death is not None:
            raise EngineError(found.death)
        return found

    def close(self) -> None:
        """End the engine; what it computes fails."""
        with self._lock:
            self._let_go()

    def _let_go(self) -> None:
        if self._running is not None:
            self._running = None
            self._finalizer()


class Running:
    """An engine from its start to its end; `death` says why it can do nothing more, `how` that in a few words."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self.pid = os.getpid()
        self.death: str | None = None
        self.how: str | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="nnsight-vllm", daemon=True)
        self._thread.start()
        self.llm: Any = None
        try:
            self.call(self._start(name, options)).result()
        except BaseException:  # an interrupted start goes on, and is ended when it is done
            threading.Thread(target=self.close, daemon=True).start()
            raise
        processes = self.llm.engine_core.resources.engine_manager.processes
        threading.Thread(target=self._watch, args=(processes,), name="nnsight-vllm-watch", daemon=True).start()

    async def _start(self, name: str, options: Mapping[str, Any]) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
        from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]

        # Blocks find their rows in the batch of vLLM's first model runner.
        os.environ.setdefault(RUNNER, "0")
        arguments = AsyncEngineArgs(model=name, **{"disable_log_stats": True, **options})
        self.llm = AsyncLLM.from_engine_args(arguments)

    # --- work on the loop ----------------------------------------------------------------------------------------

    def call(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin something on the loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin something that needs the engine, and fails with it."""
        return self.call(self._living(work))

    async def _living(self, work: Coroutine[Any, Any, T]) -> T:
        from vllm.v1.engine.exceptions import EngineDeadError  # pyright: ignore[reportMissingImports]

        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self.death is not None:
                work.close()
                raise EngineError(self.death)
            return await work
        except asyncio.CancelledError:
            if self.death is not None:
                raise EngineError(self.death) from None
            raise
        except EngineDeadError:
            await self._expect_death()
            raise EngineError(self.death) from None
        finally:
            self._tasks.discard(task)

    async def _expect_death(self) -> None:
        """The engine says that it fails: its process ends in a moment, and has more to say."""
        deadline = time.monotonic() + _LAST_WORDS
        while self.death is None and time.monotonic() < deadline:
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                if self.death is None:
                    raise
        self._end_by("it reported an error, which its log has")

    async def tell(self, method: str, *args: Any) -> Reply:
        """Call a method of the worker extension that answers with a reply."""
        return decode_reply(await self.ask(method, *args))

    async def ask(self, method: str, *args: Any) -> Any:
        """Call a method of the worker extension."""
        from vllm.exceptions import VLLMError  # pyright: ignore[reportMissingImports]

        try:
            return (await self.llm.collective_rpc(method, args=args))[0]
        except VLLMError:
            raise
        except Exception as error:  # vLLM has one class for all that goes wrong in a worker
            raise EngineError(f"The worker failed: {error}") from None

    def outputs(self, prompt: Mapping[str, Any], params: Any, name: str) -> AsyncIterator[Any]:
        """vLLM's outputs of one request, as they come."""
        return self.llm.generate(prompt, params, name)

    async def complete(self, requests: Sequence[Request]) -> list[Any]:
        """vLLM's outputs of some requests without blocks."""
        return await asyncio.gather(*(self._last(prompt, params) for prompt, params in requests))

    async def _last(self, prompt: dict[str, Any], params: Any) -> Any:
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        params.output_kind = RequestOutputKind.FINAL_ONLY
        found: Any = None
        async for output in self.outputs(prompt, params, uuid.uuid4().hex):
            found = output
        return found

    @property
    def step_tokens(self) -> int:
        """How many tokens one step takes."""
        return self.llm.vllm_config.scheduler_config.max_num_batched_tokens

    @property
    def most_requests(self) -> int:
        """How many requests are computed at a time."""
        return self.llm.vllm_config.scheduler_config.max_num_seqs

    # --- the end -------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        """End the processes of the engine at once, with its workers, whatever they do."""
        from vllm.utils.system_utils import kill_process_tree  # pyright: ignore[reportMissingImports]

        for process in self.llm.engine_core.resources.engine_manager.processes:
            kill_process_tree(process.pid)

    def _watch(self, processes: list[Any]) -> None:
        connection.wait([process.sentinel for process in processes])
        deadline = time.monotonic() + 1
        while not (codes := _codes(processes)) and time.monotonic() < deadline:
            time.sleep(0.01)  # another thread waits for the process too
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end_by, _how(codes))

    def _end_by(self, how: str) -> None:
        self._die(_DEAD.format(how=how), how)

    def _die(self, death: str, how: str) -> None:
        if self.death is None:
            self.death, self.how = death, how
            for task in self._tasks:
                task.cancel()

    def close(self) -> None:
        """End the engine, and then the loop."""
        if self.pid != os.getpid() or self._loop.is_closed():
            return
        if threading.current_thread() is self._thread:  # the garbage collector runs anywhere
            threading.Thread(target=self.close).start()
            return
        self.call(self._end()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.llm = None

    async def _end(self) -> None:
        self._die(_CLOSED, "it was closed")
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        if self._tasks:
            await asyncio.wait([*self._tasks], timeout=_LAST_WORDS)
        if self.llm is not None:
            self.llm.shutdown()
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


def _codes(processes: list[Any]) -> list[int]:
    return [process.exitcode for process in processes if process.exitcode is not None]


def _how(codes: list[int]) -> str:
    if not codes:
        return "nobody knows how"
    if codes[0] < 0:
        return f"killed by {signal.Signals(-codes[0]).name}"
    return f"exit code {codes[0]}; its log says why"


_LAST_WORDS = 5  # seconds

_DEAD = "The process of the vLLM engine has ended ({how}). Start it again: model.dispatch()."

_CLOSED = "The engine was closed. Start it again: model.dispatch()."

_FORKED = """\
This engine belongs to the process that this one was forked from. Make a VLLM(...) in this process, or use the \
"spawn" start method."""
