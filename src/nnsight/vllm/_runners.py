"""Runners: the confined processes in which a worker has blocks run, each for one job."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from ..errors import EngineError, InputError, ProtocolError
from ..sandbox import BEGUN, FORK, JOB, KILL, PROBLEM, READY, Pipe, environment
from ._talk import Begin, Fail, GoOn, Sent, Show, Step, Told, receive_told, write

_START = 120.0  # seconds that a zygote has to import PyTorch
_CONTROL = 30.0  # seconds that it has to fork, and a process to be confined
_HEADER = 2**22  # bytes of a reply beside values and answers: what it prints and asks for


class Limits(NamedTuple):
    """What the confined block of one job may take.

    Attributes:
        reply: Seconds for each thing that it is asked, in which the whole engine waits.
        total: Seconds for all of them together.
        memory: Bytes beyond what a process without a block has.
        threads: How many threads.
        answer: Bytes of what it saves.
        value: Bytes of a value that it puts in place of a skipped module's.
        printed: Characters that it prints; the rest is left out.
        requests: How many it may ask the engine for.
    """

    reply: float = 5.0
    total: float = 60.0
    memory: int = 4 << 30
    threads: int = 64
    answer: int = 1 << 30
    value: int = 1 << 30
    printed: int = 1 << 19
    requests: int = 1024


def limits_of(confined: bool | Mapping[str, float]) -> dict[str, float]:
    """Limits by name, as `VLLM(confined=...)` takes them.

    Raises:
        InputError: There is none of that name.
    """
    given = {} if isinstance(confined, bool) else dict(confined)
    wrong = sorted(set(given) - set(Limits._fields))
    if wrong:
        raise InputError(f"confined= has no limit {', '.join(wrong)}; there are {', '.join(Limits._fields)}.")
    return given


class DiedError(EngineError):
    """A confined block's process has ended, was ended, or said what it cannot mean."""


class Runner:
    """One process, until its job is over."""

    def __init__(self, child: int, end: socket.socket, limits: Limits) -> None:
        self.child = child
        self._end = end
        self._limits = limits
        self._turn = 0
        self._taken = 0.0

    def ask(
        self, what: Begin | GoOn | Step | Show | Fail, tensors: Sequence[torch.Tensor] = (), most: int = 0
    ) -> tuple[Told, Any]:
        """Send a message and wait for the reply, whose value may have `most` bytes.

        Raises:
            DiedError: There is none, or none in time, or none that means anything.
        """
        self._turn += 1
        begun, limits = time.monotonic(), self._limits
        deadline = begun + min(limits.reply, limits.total - self._taken)
        most = limits.answer if isinstance(what, (Begin, GoOn)) else most
        try:
            data = write(Sent(self._turn, what, []), tensors)
            self._end.settimeout(max(deadline - time.monotonic(), 0.001))
            self._end.sendall(data)
            return receive_told(self._end, self._turn, (_HEADER, most), deadline)
        except TimeoutError:
            raise DiedError(self._too_slow()) from None
        except ProtocolError as error:
            raise DiedError(LIED.format(what=error)) from None
        except (EOFError, OSError):
            raise DiedError(_ENDED) from None
        finally:
            self._taken += time.monotonic() - begun

    def _too_slow(self) -> str:
        limits = self._limits
        if limits.total - self._taken < limits.reply:
            return _SLOW.format(what=f"more than {limits.total:g} seconds in all")
        return _SLOW.format(what=f"more than {limits.reply:g} seconds, in which the engine waited for it")

    def await_ready(self) -> None:
        """The process says when it is confined; before that it has nothing of a job's."""
        self._end.settimeout(_CONTROL)
        try:
            kind, data = Pipe(self._end, _HEADER).receive()
            self._check_alive()
        except (EOFError, OSError) as error:
            raise DiedError(f"A process for a confined block could not be made: {error}.") from None
        if kind != READY:
            raise DiedError(f"A process for a confined block could not be made: {data.decode(errors='replace')}")

    def _check_alive(self) -> None:
        """It may have died since it said that it was ready."""
        self._end.setblocking(False)
        try:
            gone = not self._end.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        raise EOFError("it has ended" if gone else "it says more than that it is ready")

    def close(self) -> None:
        """Let go of this end."""
        self._end.close()


class Runners:
    """The zygote of a worker, and the process that it has forked for the next job."""

    def __init__(self, setup: bytes, limits: Limits) -> None:
        self.limits = limits
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._next: Runner | None = None

    def start(self) -> None:
        """Start the zygote, where it does not live.

        Raises:
            EngineError: Blocks cannot be confined here.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "nnsight.vllm._zygote", str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment()
            )
        self._control = ours
        ours.settimeout(_START)
        pipe = Pipe(ours, _HEADER)
        try:
            pipe.send(JOB, self._setup)
            kind, data = pipe.receive()
        except (EOFError, OSError) as error:
            kind, data = PROBLEM, f"its process has ended ({error})".encode()
        if kind != READY:
            self.close()
            raise EngineError(f"Confined blocks cannot be run: {data.decode(errors='replace')}.")
        ours.settimeout(_CONTROL)
        self.prepare()

    def prepare(self) -> None:
        """Fork the next job's process, so that it need not wait for it."""
        if self._next is None:
            self._next = self._fork()

    def take(self) -> Runner:
        """A process for a job.

        Raises:
            EngineError: There can be none.
        """
        try:
            return self._take()
        except DiedError:  # while nobody needed it
            self.close()
            return self._take()

    def _take(self) -> Runner:
        self.start()
        self.prepare()
        runner, self._next = self._next, None
        assert runner is not None
        runner.await_ready()
        return runner

    def end(self, runner: Runner) -> None:
        """End a process, whatever it does."""
        runner.close()
        with suppress(OSError):
            self._tell(KILL + str(runner.child).encode())

    def close(self) -> None:
        """End the zygote, and with it all that it has forked."""
        if self._next is not None:
            self._next.close()
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._next = self._control = self._process = None

    def _fork(self) -> Runner:
        limits = self.limits
        processor = int(limits.total * (os.cpu_count() or 1)) + 10  # in case; the worker ends it at its time
        ours, theirs = socket.socketpair()
        with theirs:
            command = FORK + f"{limits.memory} {processor} {limits.threads}".encode()
            try:
                answer = self._tell(command, theirs.fileno())
            except OSError as error:
                answer = str(error).encode()
        if not answer.startswith(BEGUN):
            ours.close()
            self.close()  # it is started again for the next job
            raise DiedError(f"The process that makes those of confined blocks has ended ({answer.decode()}).")
        return Runner(int(answer[1:]), ours, limits)

    def _tell(self, command: bytes, *descriptors: int) -> bytes:
        if self._control is None:
            raise OSError("it was ended")
        socket.send_fds(self._control, [command], list(descriptors))
        return self._control.recv(64)


_SLOW = """\
A confined block took {what}, and was ended. What a block does with a value holds up all requests of the engine: keep what \
it needs (`save()`), and do the rest with it afterwards."""

_ENDED = "The process of a confined block has ended: killed, crashed, or out of memory or processor time."
LIED = "The process of a confined block said what it cannot mean ({what}), and was ended."
