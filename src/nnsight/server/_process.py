"""A model in a process of its own, which runs one job at a time."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

import msgspec

from ..protocol import Event
from ._pipe import ANSWER, EVENT, JOB, PROBLEM, READY, STOPPED, Pipe
from ._replica import DiedError, Emit

_GRACE = 1.0  # seconds that a block has to end when it is interrupted
_event = msgspec.json.Decoder(Event)


class ProcessRunner:
    """Starts the process that holds a model, and starts it again when it has died.

    Args:
        name: What `LanguageModel` loads.
        options: Its options.
    """

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self._command = json.dumps({"name": name, "options": options})
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Pipe | None = None
        self._idle = threading.Event()
        self._idle.set()

    def start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "nnsight.server._worker", str(theirs.fileno()), self._command]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._pipe = Pipe(ours)
        kind, data = self._receive()
        if kind != READY:
            self.close()
            raise DiedError(data.decode(errors="replace") if kind == PROBLEM else "the model could not be loaded")

    @property
    def process_id(self) -> int | None:
        """The process that holds the model."""
        return self._process.pid if self._process is not None else None

    def run(self, frame: bytes, emit: Emit) -> bytes:
        assert self._pipe is not None
        self._idle.clear()
        try:
            self._send(frame)
            while True:
                kind, data = self._receive()
                if kind == EVENT:
                    emit(_event.decode(data))
                elif kind == ANSWER:
                    return data
                elif kind == STOPPED:
                    raise DiedError("the job was interrupted")
                else:
                    self._kill()
                    raise DiedError("the process says what it cannot mean")
        except msgspec.MsgspecError as error:
            self._kill()
            raise DiedError("the process says what it cannot mean") from error
        finally:
            self._idle.set()

    def stop(self) -> None:
        if self._process is None or self._idle.is_set():
            return
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)
        if not self._idle.wait(_GRACE):
            self._kill()

    def close(self) -> None:
        self._kill()
        if self._process is not None:
            self._process.wait()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def _kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()

    def _send(self, frame: bytes) -> None:
        assert self._pipe is not None
        try:
            self._pipe.send(JOB, frame)
        except OSError as error:
            raise DiedError(f"the process is gone ({error})") from error

    def _receive(self) -> tuple[bytes, bytes]:
        assert self._pipe is not None
        try:
            return self._pipe.receive()
        except (EOFError, OSError) as error:
            self._kill()
            raise DiedError(f"the process that holds the model has died ({error})") from error
