"""A model in a process of its own: one that runs blocks itself, or one that forks a confined process for each."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec

from ..protocol import Event, Shared
from ..sandbox import ANSWER, BEGUN, EVENT, FORK, JOB, JOBS, KILL, PROBLEM, READY, STOPPED, Pipe
from ._limits import Limits
from ._replica import DiedError, Emit, NotBegunError

_GRACE = 1.0  # seconds that a block has to end when it is interrupted
_LARGEST_EVENT = 4 * 2**20
_CONTROL = 120.0  # seconds that a zygote may take to fork
_event = msgspec.json.Decoder(Event)
_packed = msgspec.msgpack.Encoder()
_shared = msgspec.msgpack.Decoder(Shared)
# What a model process is told of the environment: a forked block can read all of it.
_NAMES = {"PATH", "HOME", "LANG", "TMPDIR", "PYTHONPATH", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "NNSIGHT_DEBUG"}
_PREFIXES = ("LC_", "HF_HOME", "HF_HUB_", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_", "OMP_", "MKL_", "CUDA_", "TORCH_")


class ModelProcess:
    """The process that holds a model; started again when it has died."""

    def __init__(self, name: str, options: dict[str, Any], limits: Limits, *, trusted: bool) -> None:
        self._command = json.dumps({"name": name, "options": options, "trusted": trusted})
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    @property
    def process_id(self) -> int | None:
        """The process that holds the model."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "nnsight.server._worker", str(theirs.fileno()), self._command]
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=_environment()
            )
        self._socket = ours
        kind, data = self._receive(Pipe(ours, _LARGEST_EVENT))
        if kind != READY:
            self.close()
            raise DiedError(data.decode(errors="replace") if kind == PROBLEM else "the model could not be loaded")

    def close(self) -> None:
        self._kill()
        if self._process is not None:
            self._process.wait()
        if self._socket is not None:
            self._socket.close()
        self._process = self._socket = None

    def _kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()

    def _receive(self, pipe: Pipe) -> tuple[bytes, bytes]:
        try:
            return pipe.receive()
        except (EOFError, OSError) as error:
            raise DiedError(f"the process has died ({error})") from error

    def _talk(self, pipe: Pipe, frame: bytes, emit: Emit, kind: bytes = JOB) -> bytes:
        """Send a job, and take what comes until its answer."""
        try:
            pipe.send(kind, frame)
            while True:
                kind, data = self._receive(pipe)
                if kind == EVENT and len(data) <= _LARGEST_EVENT:
                    emit(_event.decode(data))
                elif kind == ANSWER:
                    return data
                else:
                    raise DiedError(_SAID.get(kind, "the process says what it cannot mean"))
        except (msgspec.MsgspecError, OSError) as error:
            raise DiedError(f"the process says what it cannot mean ({error})") from error


def _environment() -> dict[str, str]:
    told = {name: value for name, value in os.environ.items() if name in _NAMES or name.startswith(_PREFIXES)}
    return told | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # a bar starts a thread, which a fork would leave behind


def _share(run: Callable[[bytes, Emit, bytes], bytes], frames: list[bytes]) -> Shared:
    """Have jobs run together; what comes back fits them."""
    answer = run(_packed.encode(frames), _ignore, JOBS)
    try:
        shared = _shared.decode(answer)
    except msgspec.MsgspecError as error:
        raise DiedError(f"the process says what it cannot mean ({error})") from error
    if len(shared.answers) != len(frames) or len(shared.events) != len(frames):
        raise DiedError("the process answers other jobs than it was given")
    return shared


def _ignore(event: Event) -> None:
    """What happens comes with the answers."""


_SAID = {STOPPED: "the job was interrupted", PROBLEM: "the process could not be confined"}


class TrustedRunner(ModelProcess):
    """Runs blocks in the process that holds the model."""

    mixes_owners = True

    def __init__(self, name: str, options: dict[str, Any], limits: Limits) -> None:
        super().__init__(name, options, limits, trusted=True)
        self._idle = threading.Event()
        self._idle.set()

    def run(self, frame: bytes, emit: Emit, kind: bytes = JOB) -> bytes:
        assert self._socket is not None
        self._idle.clear()
        try:
            return self._talk(Pipe(self._socket, self._limits.answer), frame, emit, kind)
        except DiedError as error:
            if str(error) != _SAID[STOPPED]:
                self._kill()
            raise
        finally:
            self._idle.set()

    def run_together(self, frames: list[bytes]) -> Shared:
        return _share(self.run, frames)

    def stop(self) -> None:
        if self._process is None or self._idle.is_set():
            return
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)
        if not self._idle.wait(_GRACE):
            self._kill()


class ConfinedRunner(ModelProcess):
    """Has a zygote fork a confined process for each job, or for some of one user's, and talks with that one alone."""

    mixes_owners = False

    def __init__(self, name: str, options: dict[str, Any], limits: Limits) -> None:
        super().__init__(name, options, limits, trusted=False)
        self._control = threading.Lock()
        self._child: int | None = None

    def run(self, frame: bytes, emit: Emit, kind: bytes = JOB) -> bytes:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._child = self._fork(theirs)
            try:
                return self._talk(Pipe(ours, self._limits.answer), frame, emit, kind)
            finally:
                self.stop()

    def run_together(self, frames: list[bytes]) -> Shared:
        return _share(self.run, frames)

    def stop(self) -> None:
        with self._control:
            child, self._child = self._child, None
            if child is not None and self._socket is not None:
                with suppress(OSError):
                    self._socket.send(KILL + str(child).encode())
                    self._socket.recv(64)

    def _fork(self, theirs: socket.socket) -> int:
        assert self._socket is not None
        command = FORK + f"{self._limits.memory} {self._limits.seconds}".encode()
        with self._control:
            try:
                self._socket.settimeout(_CONTROL)
                socket.send_fds(self._socket, [command], [theirs.fileno()])
                answer = self._socket.recv(64)
            except OSError as error:
                answer = str(error).encode()
        if not answer.startswith(BEGUN):
            self.close()
            raise NotBegunError(f"the zygote has died ({answer.decode(errors='replace')})")
        return int(answer[1:])
