"""Messages between a server and the processes that run blocks: a kind, a length, bytes."""

from __future__ import annotations

import select
import socket
import struct
import time

_START = struct.Struct("<cQ")
_LARGEST = 2**40

JOB, READY, EVENT, ANSWER, STOPPED, PROBLEM = b"J", b"R", b"E", b"A", b"S", b"P"
JOBS = b"M"  # several jobs to be run together; the answer is a `Shared`
PLAIN, OTHER = b"p", b"o"  # of a job that was taken: whether it can do nothing but compute
STAYS = b"Y"  # an answer of a process that can run another job of the same user
GUEST, ALONE = b"G", b"N"  # a job whose values come from a host; the answer where it is to be run alone
FORK, HOST, BEGUN, KILL = b"F", b"H", b"B", b"K"  # between a server and a zygote
WARM, LOAD = b"W", b"L"  # a process that could load its model now; that it is to


class Pipe:
    """One end of a socket pair; a message may have `largest` bytes, whatever the other end says.

    With `patience`, it is given up when a message is not there within so many seconds.
    """

    def __init__(self, end: socket.socket, largest: int = _LARGEST, patience: float | None = None) -> None:
        self._end = end
        self._largest = largest
        self._patience = patience
        self._poll = select.poll()  # a confined process may not set a socket's time-out
        self._poll.register(end, select.POLLIN)

    def send(self, kind: bytes, data: bytes = b"") -> None:
        """Send one message."""
        self._end.sendall(_START.pack(kind, len(data)))
        self._end.sendall(data)

    def receive(self) -> tuple[bytes, bytes]:
        """The next message.

        Raises:
            EOFError: The other end is gone, or says what it cannot mean.
        """
        deadline = time.monotonic() + self._patience if self._patience is not None else None
        kind, size = _START.unpack(self._exactly(_START.size, deadline))
        if size > self._largest:
            raise EOFError(f"a message of {size} bytes, of at most {self._largest}")
        return kind, bytes(self._exactly(size, deadline))

    def _exactly(self, size: int, deadline: float | None) -> bytearray:
        data = bytearray(size)
        view, at = memoryview(data), 0
        while at < size:
            if deadline is not None and not self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise EOFError("the other end says nothing")
            try:
                count = self._end.recv_into(view[at:])
            except ConnectionError:
                count = 0
            if not count:
                raise EOFError("the other end is gone")
            at += count
        return data

    def close(self) -> None:
        """Let go of this end."""
        self._end.close()
