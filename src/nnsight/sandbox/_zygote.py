"""The zygote: holds a model that has run nobody's code, and forks a confined process for each job.

It never sees a job: each one has a socket of its own between the server and the forked process, so that nothing of one
user's is left in the memory that the next user's process begins with.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress

import msgspec

from ..modeling import NNsight
from ..protocol import Event
from ._beside import LARGEST
from ._execute import execute
from ._guest import execute_as_guest
from ._jail import Allowance, confine
from ._kernel import die_with_parent
from ._pages import Range, copy_pages, enlarge_pages, pages_written_by
from ._pipe import ALONE, ANSWER, BEGUN, EVENT, FORK, GUEST, HOST, JOBS, KILL, OTHER, PLAIN, PROBLEM, READY, STAYS, Pipe
from ._plain import is_plain
from ._slate import Slate
from ._together import execute_together, unpack

# What a zygote is told of the environment: a forked block can read all of it.
_NAMES = {"PATH", "HOME", "LANG", "TMPDIR", "PYTHONPATH", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "NNSIGHT_DEBUG"}
Process = Callable[[list[int], NNsight, Allowance], None]  # what a forked process does with its descriptors
_PREFIXES = ("LC_", "HF_HOME", "HF_HUB_", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_", "OMP_", "MKL_", "CUDA_", "TORCH_")


class Zygote:
    """Forks on demand.

    Args:
        control: The server's end says when.
        model: What the jobs run on; each has a copy of it, which takes memory only where it is changed.
        run: What a forked process does with its descriptors; by default it runs one job.
        host: What a process does that runs the model for blocks in others.
        rehearse: Does what a job does, so that the memory which that takes is known and can be had ready.
    """

    def __init__(
        self,
        control: socket.socket,
        model: NNsight,
        run: Process | None = None,
        rehearse: Callable[[], object] | None = None,
        host: Process | None = None,
    ) -> None:
        self._control = control
        self._model = model
        self._does = {FORK: run or run_confined, HOST: host}
        self._rehearse = rehearse
        self._pages: list[Range] = []
        self._children: set[int] = set()

    def serve(self) -> None:
        """Fork and end processes until the server is gone."""
        gc.collect()
        gc.freeze()
        enlarge_pages()
        if self._rehearse is not None:
            self._pages = pages_written_by(self._rehearse)
        while True:
            command, descriptors = _receive_command(self._control)
            kind, numbers = command[:1], [int(number) for number in command[1:].split()]
            does = self._does.get(kind)
            if does is not None and descriptors:
                child = self._fork(does, descriptors, Allowance(*numbers))
                for descriptor in descriptors:
                    os.close(descriptor)
                self._control.send(BEGUN + str(child).encode())
            elif kind == KILL:
                self._kill(*numbers)
                self._control.send(KILL)
            else:
                for child in list(self._children):
                    self._kill(child)
                return

    def _fork(self, does: Process, descriptors: list[int], allowance: Allowance) -> int:
        child = os.fork()
        if child:
            self._children.add(child)
            return child
        try:
            self._control.close()
            die_with_parent()
            copy_pages(self._pages)
            does(descriptors, self._model, allowance)
        finally:
            os._exit(1)

    def _kill(self, child: int) -> None:
        if child in self._children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            self._children.discard(child)


def run_confined(descriptors: list[int], model: NNsight, allowance: Allowance) -> None:
    """In the forked process: give everything up, then read a job, run it, and answer; and again after plain jobs.

    The first descriptor is a socket to the server; the second, to a host, which some jobs need. The first word about a job is
    whether it is plain: it is said before the job's own code has run.
    """
    end, line = (socket.socket(fileno=descriptor) for descriptor in descriptors)
    give_up(end, allowance, [line])
    pipe, host, slate = Pipe(end), Pipe(line, LARGEST), Slate(model)
    while True:
        kind, frame = pipe.receive()
        frames = unpack(frame) if kind == JOBS else [frame]
        plain = all(is_plain(each, model) for each in frames)
        pipe.send(PLAIN if plain else OTHER)
        emit = _sender(pipe, slate)
        if kind == JOBS:
            shared = execute_together(frames, model)
            answer, slate.is_soiled = msgspec.msgpack.encode(shared), None in shared.answers
        elif kind == GUEST:
            answer = execute_as_guest(frame, model, emit, host) if plain else None
        else:
            answer = execute(frame, model, emit)
        clean = plain and slate.is_clean()
        if answer is None or (kind == GUEST and not clean):
            pipe.send(ALONE)
        elif clean:
            pipe.send(STAYS, answer)
            del frame, frames, answer
            gc.collect()  # what holds itself, of blocks
            continue
        else:
            pipe.send(ANSWER, answer)
        os._exit(0)


def give_up(
    end: socket.socket, allowance: Allowance, others: Iterable[socket.socket] = (), *, lasts: bool = False
) -> None:
    """Confine this forked process, and say so at its `end` of a socket; it ends where that cannot be done.

    Args:
        end: The socket that it keeps.
        allowance: What it may use.
        others: Sockets that it keeps besides.
        lasts: It serves as long as its server, and may be given further sockets.
    """
    pipe = Pipe(end)
    _draw_anew()
    try:
        confine([each.fileno() for each in (end, *others)], allowance, lasts=lasts)
    except BaseException:
        pipe.send(PROBLEM, f"a process could not be confined: {traceback.format_exc()}".encode())
        os._exit(1)
    pipe.send(READY)


def _draw_anew() -> None:
    """Random numbers that no other job has; those of torch follow the job's own seed."""
    random.seed()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()


def _sender(pipe: Pipe, slate: Slate) -> Callable[[Event], None]:
    lock = threading.Lock()

    def emit(event: Event) -> None:
        slate.is_soiled |= event.kind == "warning"  # some come once in the life of a process
        with lock:
            pipe.send(EVENT, msgspec.json.encode(event))

    return emit


def _receive_command(control: socket.socket) -> tuple[bytes, list[int]]:
    try:
        data, descriptors, _, _ = socket.recv_fds(control, 64, 2)
    except (ConnectionError, OSError):
        return b"", []
    return data, descriptors


def environment() -> dict[str, str]:
    """What a zygote is told of this process's environment, without its tokens and keys."""
    told = {name: value for name, value in os.environ.items() if name in _NAMES or name.startswith(_PREFIXES)}
    return told | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # a bar starts a thread, which a fork would leave behind
