"""The process that holds a model: `python -m nnsight.server._worker FD {"name": …, "options": …, "trusted": …}`."""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec
import torch

from ..modeling import LanguageModel
from ..protocol import Event
from ..sandbox import (
    ANSWER,
    EVENT,
    JOB,
    JOBS,
    LOAD,
    PROBLEM,
    READY,
    STOPPED,
    WARM,
    Pipe,
    Zygote,
    die_with_parent,
    execute,
    execute_together,
    rehearse,
    serve_host,
    summary,
    unpack,
    warm,
)


def main(descriptor: str, command: str) -> int:
    """Wait for the word, load the model, and run jobs until the server is gone."""
    end = socket.socket(fileno=int(descriptor))
    pipe = Pipe(end)
    die_with_parent()
    given: dict[str, Any] = json.loads(command)
    pipe.send(WARM)
    try:
        if pipe.receive()[0] != LOAD:
            return 1
    except EOFError:
        return 0
    threads = torch.get_num_threads()
    try:
        if not given["trusted"]:
            torch.set_num_threads(1)  # a pool of threads would be missing after a fork, and be waited for
        model = LanguageModel(given["name"], dispatch=True, **given["options"])
        _ = model.tokenizer
        if not given["trusted"]:
            _prepare_to_fork(model)
        torch.set_num_threads(threads)
    except Exception as error:
        pipe.send(PROBLEM, summary(error).encode())
        return 1
    if given["trusted"]:
        _serve(pipe, model)
    else:
        pipe.send(READY)
        Zygote(end, model, rehearse=partial(rehearse, model), host=serve_host).serve()
    return 0


def _prepare_to_fork(model: LanguageModel) -> None:
    if model.device is not None and model.device.type != "cpu":
        raise RuntimeError(
            f"the model is on {model.device.type}: a process that uses an accelerator cannot be forked, so blocks cannot "
            "be confined there. Serve it on the CPU, or with --trusted for yourself alone."
        )
    warm(model)
    if threading.active_count() > 1:
        raise RuntimeError("loading the model has started threads, which a fork would leave behind")


def _serve(pipe: Pipe, model: LanguageModel) -> None:
    interrupts = _Interrupts()
    pipe.send(READY)
    while True:
        try:
            kind, frame = pipe.receive()
        except EOFError:
            return
        if kind not in (JOB, JOBS):
            return
        answer = _run(kind, frame, model, pipe, interrupts)
        with suppress(BrokenPipeError):
            pipe.send(STOPPED if answer is None else ANSWER, answer or b"")


def _run(kind: bytes, frame: bytes, model: LanguageModel, pipe: Pipe, interrupts: _Interrupts) -> bytes | None:
    sending = threading.Lock()

    def emit(event: Event) -> None:
        with sending:
            interrupts.hold()
            try:
                pipe.send(EVENT, msgspec.json.encode(event))
            finally:
                interrupts.release()

    try:
        interrupts.allow()
        try:
            if kind == JOB:
                return execute(frame, model, emit)
            return msgspec.msgpack.encode(execute_together(unpack(frame), model))
        finally:
            interrupts.forbid()
    except KeyboardInterrupt:
        return None


class _Interrupts:
    """Interrupts reach a block, and nothing else of this process: a message is never cut in two."""

    def __init__(self) -> None:
        self._allowed = False
        self._held = False
        self._came = False
        signal.signal(signal.SIGINT, self._on_interrupt)

    def _on_interrupt(self, *_: object) -> None:
        if self._held:
            self._came = True
        elif self._allowed:
            raise KeyboardInterrupt

    def allow(self) -> None:
        self._allowed = True

    def forbid(self) -> None:
        self._allowed = self._came = False

    def hold(self) -> None:
        self._held = True

    def release(self) -> None:
        self._held = False
        if self._came and self._allowed:
            self._came = False
            raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
