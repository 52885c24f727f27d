"""A model in a process of its own: one that runs blocks itself, or one that forks a confined process for each."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import msgspec

from ..errors import ProtocolError
from ..protocol import Event, Shared, decode_message
from ..sandbox import (
    ALONE,
    ANSWER,
    BEGUN,
    EVENT,
    FORK,
    GUEST,
    HOST,
    JOB,
    JOBS,
    KILL,
    LOAD,
    PLAIN,
    PROBLEM,
    READY,
    STAYS,
    STOPPED,
    WARM,
    Pipe,
    environment,
    unpack,
)
from ._kept import Forked, Kept
from ._limits import Limits
from ._replica import DiedError, Emit, NotBegunError

_GRACE = 1.0  # seconds that a block has to end when it is interrupted
_LARGEST_EVENT = 4 * 2**20
_READY_RUNNERS = 2  # processes that wait for jobs: one can run while another is made
_CONTROL = 120.0  # seconds that a zygote may take to fork
_LARGEST_VERDICT = 4096
_event = msgspec.json.Decoder(Event)
_verdict = msgspec.msgpack.Decoder(list[bool])
_packed = msgspec.msgpack.Encoder()
_shared = msgspec.msgpack.Decoder(Shared)


class ModelProcess:
    """The process that holds a model; started again when it has died."""

    def __init__(self, name: str, options: dict[str, Any], limits: Limits, *, trusted: bool) -> None:
        self._command = json.dumps({"name": name, "options": options, "trusted": trusted})
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._loaded = False

    @property
    def process_id(self) -> int | None:
        """The process that holds the model."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        if self._loaded and self._alive():
            return
        if self._loaded or not self._alive():
            self._begin()
        assert self._socket is not None
        with suppress(OSError):
            Pipe(self._socket).send(LOAD)
        self._expect(WARM)
        self._expect(READY)
        self._loaded = True

    def rest(self) -> None:
        if self._loaded or not self._alive():
            self._begin()

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _begin(self) -> None:
        """A process with everything but the weights."""
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "nnsight.server._worker", str(theirs.fileno()), self._command]
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment()
            )
        self._socket = ours

    def _expect(self, wanted: bytes) -> None:
        assert self._socket is not None
        kind, data = self._receive(Pipe(self._socket, _LARGEST_EVENT))
        if kind != wanted:
            self.close()
            raise DiedError(data.decode(errors="replace") if kind == PROBLEM else "the model could not be loaded")

    def close(self) -> None:
        self._kill()
        if self._process is not None:
            self._process.wait()
        if self._socket is not None:
            self._socket.close()
        self._process = self._socket = None
        self._loaded = False

    def _kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()

    def _receive(self, pipe: Pipe) -> tuple[bytes, bytes]:
        try:
            return pipe.receive()
        except (EOFError, OSError) as error:
            raise DiedError(f"the process has died ({error})") from error

    def _talk(self, pipe: Pipe, frame: bytes, emit: Emit, kind: bytes = JOB) -> tuple[bytes, bytes]:
        """Send a job, and take what comes until its answer: that, after its kind."""
        self._send(pipe, kind, frame)
        return self._take_answer(pipe, emit)

    def _send(self, pipe: Pipe, kind: bytes, frame: bytes) -> None:
        try:
            pipe.send(kind, frame)
        except OSError as error:
            raise NotBegunError(f"the process has died ({error})") from error

    def _take_answer(self, pipe: Pipe, emit: Emit) -> tuple[bytes, bytes]:
        try:
            while True:
                kind, data = self._receive(pipe)
                if kind == EVENT and len(data) <= _LARGEST_EVENT:
                    emit(_event.decode(data))
                elif kind in (ANSWER, STAYS):
                    return kind, data
                else:
                    raise DiedError(_SAID.get(kind, "the process says what it cannot mean"))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OSError) as error:
            raise DiedError(f"the process says what it cannot mean ({error})") from error


def share(run: Callable[[bytes, Emit, bytes, list[str]], bytes], frames: list[bytes], owners: list[str]) -> Shared:
    """Have jobs run together; what comes back fits them."""
    answer = run(_packed.encode(frames), _ignore, JOBS, owners)
    try:
        shared = decode_message(answer, _shared)
    except ProtocolError as error:
        raise DiedError(f"the process says what it cannot mean ({error})") from error
    if len(shared.answers) != len(frames) or len(shared.events) != len(frames):
        raise DiedError("the process answers other jobs than it was given")
    return shared


def _ignore(event: Event) -> None:
    """What happens comes with the answers."""


_SAID = {
    STOPPED: "the job was interrupted",
    PROBLEM: "the process could not be confined",
    ALONE: "the job needs the model in its own process",
}


class TrustedRunner(ModelProcess):
    """Runs blocks in the process that holds the model."""

    mixes_owners = True

    def __init__(self, name: str, options: dict[str, Any], limits: Limits) -> None:
        super().__init__(name, options, limits, trusted=True)
        self._idle = threading.Event()
        self._idle.set()

    def run(self, frame: bytes, emit: Emit, owner: str) -> bytes:
        return self.run_kind(frame, emit, JOB, [owner])

    def run_kind(self, frame: bytes, emit: Emit, kind: bytes, owners: list[str]) -> bytes:
        """Run one job, or several."""
        assert self._socket is not None
        self._idle.clear()
        try:
            return self._talk(Pipe(self._socket, self._limits.answer), frame, emit, kind)[1]
        except DiedError as error:
            if str(error) != _SAID[STOPPED]:
                self._kill()
            raise
        finally:
            self._idle.set()

    def run_together(self, frames: list[bytes], owners: list[str]) -> Shared:
        return share(self.run_kind, frames, owners)

    def stop(self) -> None:
        if self._process is None or self._idle.is_set():
            return
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)
        if not self._idle.wait(_GRACE):
            self._kill()


class ConfinedRunner(ModelProcess):
    """Has a zygote fork a confined process for each job, or for some of one user's, and talks with that one alone.

    The next ones are forked meanwhile, so that a job need not wait for them. One that says that its job has left nothing
    behind is kept for a while, for another job of the same user. Jobs of several users that share a forward are each in
    such a process; one more, the host, runs the model for all of them, and nobody's code.
    """

    mixes_owners = False

    def __init__(self, name: str, options: dict[str, Any], limits: Limits) -> None:
        super().__init__(name, options, limits, trusted=False)
        self._control = threading.Lock()
        self._current: list[Forked] = []
        self._host: Forked | None = None
        self._stops = 0
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="runners")
        self._waiting: deque[Future[Forked]] = deque()
        self._kept = Kept(self._end_soon)

    def start(self) -> None:
        super().start()
        failed = [each for each in self._waiting if each.done() and each.exception() is not None]
        for each in failed:
            self._waiting.remove(each)
        self._make_some(_READY_RUNNERS)
        self._kept.look()

    def _make_some(self, count: int) -> None:
        while len(self._waiting) < count:
            self._waiting.append(self._helper.submit(self._fork, self._socket))

    # --- jobs ------------------------------------------------------------------------------------------------------

    def run(self, frame: bytes, emit: Emit, owner: str) -> bytes:
        return self.run_kind(frame, emit, JOB, [owner])

    def run_together(self, frames: list[bytes], owners: list[str]) -> Shared:
        return share(self.run_kind, frames, owners)

    def run_kind(self, frame: bytes, emit: Emit, kind: bytes, owners: list[str]) -> bytes:
        """Run one job, or several, which stay apart where their users are several."""
        if len(set(owners)) > 1:
            return _packed.encode(self._run_apart(unpack(frame), owners))
        with self._using(owners[:1]) as (forked,):
            return self._ask(forked, frame, emit, kind)

    @contextmanager
    def _using(self, owners: list[str]) -> Iterator[list[Forked]]:
        """A process for each of these users, which ends with this, or is kept where it `stays`."""
        taken = self._current = list[Forked]()
        self._stops = 0
        try:
            kept = [self._kept.take(owner) for owner in owners]
            taken += filter(None, kept)
            self._make_some(kept.count(None))
            used = [each or self._fresh(taken) for each in kept]
            yield used
        except BaseException:
            self._current = []
            ended = [self._end(forked) for forked in taken]
            if not all(ended):  # the zygote has died, and with it those that wait
                self.close()
            raise
        self._current = []
        for forked, owner in zip(used, owners, strict=True):
            self._kept.keep(forked, owner)
        self._make_some(_READY_RUNNERS)

    def _fresh(self, taken: list[Forked]) -> Forked:
        if not self._waiting:
            raise NotBegunError("the runner is closed")
        taken.append(self._waiting.popleft().result())
        return taken[-1]

    def _end_soon(self, forked: Forked) -> None:
        self._helper.submit(self._end, forked)

    def _run_apart(self, frames: list[bytes], owners: list[str]) -> Shared:
        """Run jobs that share a forward in processes of their own; what one of them says counts where the host agrees."""
        host = self._host_of_blocks()
        with self._using(owners) as taken, ThreadPoolExecutor(len(frames), "guests") as pool:
            try:
                socket.send_fds(host.end, [HOST], [forked.model_end.fileno() for forked in taken])
                found = pool.map(self._guest, taken, frames)
                kind, data = self._receive(Pipe(host.end, _LARGEST_VERDICT))
                if kind != ANSWER:
                    raise DiedError(data.decode(errors="replace"))
                well = _verdict.decode(data)
                if len(well) != len(frames):
                    raise DiedError("it answers for other blocks")
            except (DiedError, OSError, msgspec.MsgspecError) as error:
                self._end_host()
                for forked in taken:
                    self._kill_child(forked.child)
                raise DiedError(f"the host of blocks has died ({error})") from error
            outcomes = list(found)
            for forked, good in zip(taken, well, strict=True):
                forked.stays = forked.stays and good
        answers = [answer if good else None for (answer, _), good in zip(outcomes, well, strict=True)]
        return Shared(answers, [events for _, events in outcomes])

    def _guest(self, forked: Forked, frame: bytes) -> tuple[bytes | None, list[Event]]:
        """The answer of one of them, None where it has none, and what happened meanwhile."""
        events: list[Event] = []
        size = 0

        def emit(event: Event) -> None:
            nonlocal size
            size += len(event.text)
            if size > self._limits.output:
                raise DiedError("the job has printed as much as one may")
            events.append(event)

        with suppress(DiedError):
            return self._ask(forked, frame, emit, GUEST), events
        self._kill_child(forked.child)
        return None, []

    def _ask(self, forked: Forked, frame: bytes, emit: Emit, kind: bytes) -> bytes:
        """Have a process run what is in a frame; its first word, before that, is whether it is plain."""
        pipe = Pipe(forked.end, self._limits.answer)
        self._send(pipe, kind, frame)
        word, _ = self._receive(pipe)
        said, answer = self._take_answer(pipe, emit)
        forked.stays = word == PLAIN and said == STAYS
        return answer

    def _host_of_blocks(self) -> Forked:
        if self._host is None:
            self._host = self._helper.submit(self._fork, self._socket, HOST).result()
        return self._host

    def _end_host(self) -> None:
        host, self._host = self._host, None
        if host is not None:
            self._end(host)

    def stop(self) -> None:
        for forked in self._current:
            self._kill_child(forked.child)
        self._stops += 1
        if self._stops > 1:  # without its blocks, a host has little left to do
            self._end_host()

    def close(self) -> None:
        waiting, self._waiting = self._waiting, deque()
        super().close()  # those that it has forked die with it
        host, self._host = self._host, None
        if host is not None:
            host.close()
        self._kept.close()
        for each in waiting:
            if not each.cancel() and each.done() and each.exception() is None:
                each.result().close()

    def _end(self, forked: Forked) -> bool:
        """Whether there is a zygote that has seen to it."""
        lives = self._kill_child(forked.child)
        forked.close()
        return lives

    def _kill_child(self, child: int) -> bool:
        zygote = self._socket
        with self._control:
            if zygote is not None:
                with suppress(OSError):
                    zygote.send(KILL + str(child).encode())
                    return zygote.recv(64) == KILL
        return False

    def _fork(self, zygote: socket.socket | None, what: bytes = FORK) -> Forked:
        ours, theirs = socket.socketpair()
        model_end, its_end = socket.socketpair()
        forked = Forked(0, ours, model_end)
        try:
            with theirs, its_end:
                forked.child = self._ask_for_child(zygote, what, [theirs, its_end])
            kind, data = self._receive(Pipe(ours, _LARGEST_EVENT))
        except DiedError as error:
            forked.close()
            raise NotBegunError(str(error)) from error
        if kind != READY:
            forked.close()
            raise DiedError(data.decode(errors="replace") if kind == PROBLEM else _SAID[PROBLEM])
        return forked

    def _ask_for_child(self, zygote: socket.socket | None, what: bytes, theirs: list[socket.socket]) -> int:
        processor = self._limits.seconds * (os.cpu_count() or 1) + 10  # in case: the server ends a job at its time
        command = what + f"{self._limits.memory} {processor}".encode()
        with self._control:
            try:
                if zygote is None:
                    raise OSError("it was ended")
                zygote.settimeout(_CONTROL)
                socket.send_fds(zygote, [command], [each.fileno() for each in theirs])
                answer = zygote.recv(64)
            except OSError as error:
                answer = str(error).encode()
        if not answer.startswith(BEGUN):
            if self._socket is zygote:
                self._kill()  # it is started again when the next job comes
            raise NotBegunError(f"the zygote has died ({answer.decode(errors='replace')})")
        return int(answer[1:])
