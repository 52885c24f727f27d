"""Confined processes, and those that wait for another job of the same user."""

from __future__ import annotations

import math
import os
import select
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MOST = 64  # processes that wait, each with some 20 MiB of its own
MOST_JOBS = 200  # that one of them runs, one after the other
_MOST_WORK = (
    5.0  # seconds of work that it has behind it: the next job has a limit of its own, and a process has one alone
)
_LONGEST = 30.0  # seconds that it waits
_REST = 0.1  # seconds of work that it may do meanwhile


@dataclass(eq=False)
class Forked:
    """A confined process: its number, our end of its socket, and the end that is for a host."""

    child: int
    end: socket.socket
    model_end: socket.socket
    jobs: int = 0
    stays: bool = False  # for another job of the same user
    since: float = 0.0
    worked: float = 0.0

    def is_quiet(self) -> bool:
        """Whether no message waits, and the process is there."""
        poll = select.poll()
        poll.register(self.end, select.POLLIN)
        return not poll.poll(0)

    def seconds_of_work(self) -> float:
        """What it has had of the processors so far; endless where it is gone."""
        try:
            fields = Path(f"/proc/{self.child}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return math.inf
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Let go of it."""
        self.end.close()
        self.model_end.close()


class Kept:
    """One process for each of the users who were here last; `end` is called with those that are not to wait."""

    def __init__(self, end: Callable[[Forked], object]) -> None:
        self._end = end
        self._by_owner: OrderedDict[str, Forked] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_owner)

    def children(self) -> dict[str, int]:
        """The processes' numbers, by whose they are."""
        return {owner: forked.child for owner, forked in self._by_owner.items()}

    def take(self, owner: str) -> Forked | None:
        """The one of this user, if it is alive and has said nothing since."""
        forked = self._by_owner.pop(owner, None)
        if forked is None or forked.is_quiet():
            return forked
        self._end(forked)
        return None

    def keep(self, forked: Forked, owner: str) -> None:
        """Have a process wait that has run a job of this user, if it `stays`."""
        forked.jobs += 1
        forked.since, forked.worked = time.monotonic(), forked.seconds_of_work()
        tired = forked.jobs >= MOST_JOBS or forked.worked > _MOST_WORK
        if tired or not forked.stays or owner in self._by_owner:
            self._end(forked)
            return
        forked.stays = False
        self._by_owner[owner] = forked
        if len(self._by_owner) > MOST:
            self._end(self._by_owner.popitem(last=False)[1])

    def look(self) -> None:
        """End those that have waited for long, or do not rest."""
        for owner, forked in list(self._by_owner.items()):
            late = time.monotonic() - forked.since > _LONGEST
            if late or forked.seconds_of_work() - forked.worked > _REST:
                self._end(self._by_owner.pop(owner))

    def close(self) -> None:
        """Let go of all of them, who have ended with what made them."""
        while self._by_owner:
            self._by_owner.popitem()[1].close()
