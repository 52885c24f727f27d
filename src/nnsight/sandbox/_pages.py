"""Memory of a process that forks: in large pages, which fork quickly; and copied where a job will write, before it comes."""

from __future__ import annotations

import os
import re
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import torch

from ._kernel import advise, die_with_parent

_PAGE = os.sysconf("SC_PAGE_SIZE")
_LARGE = 2 * 2**20
_HUGE, _COPY, _COLLAPSE = 14, 23, 25  # the kernel's MADV_HUGEPAGE, MADV_POPULATE_WRITE, MADV_COLLAPSE
_PRESENT, _EXCLUSIVE, _OF_FILE = -(1 << 63), 1 << 56, 1 << 61  # bits of an entry in /proc/self/pagemap
_ENTRIES = 2**17  # that are read at a time
_PATIENCE = 30.0  # seconds that work may take whose pages are looked for
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \S+ *(.*)")

Range = tuple[int, int]  # where it starts, and its bytes


def enlarge_pages() -> None:
    """Have this process's private memory lie in large pages, where the kernel does that.

    A fork copies a table of all pages, and the end of the forked process goes through it again: of a model's process
    that takes longer than a small job.
    """
    for start, end, file in _writable():
        first, last = -(-start // _LARGE) * _LARGE, end // _LARGE * _LARGE
        if not file and last > first and advise(first, last - first, _HUGE):
            advise(first, last - first, _COLLAPSE)


def pages_written_by(work: Callable[[], object]) -> list[Range]:
    """The pages of this process that `work` writes, found by doing it in a forked one; none where that fails."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            die_with_parent()
            work()
            ranges = list(_own_pages())
            with os.fdopen(writing, "w") as found:
                found.writelines(f"{start} {size}\n" for start, size in ranges)
        finally:
            os._exit(0)
    os.close(writing)
    try:
        lines = _read(reading).splitlines()
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return [(int(start), int(size)) for start, size in map(str.split, lines)]


def _read(reading: int) -> str:
    """All that comes within `_PATIENCE` seconds; nothing where it has not ended by then."""
    deadline, parts = time.monotonic() + _PATIENCE, list[bytes]()
    while select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
        parts.append(os.read(reading, 2**16))
        if not parts[-1]:
            return b"".join(parts).decode()
    return ""


def copy_pages(ranges: list[Range]) -> None:
    """In a forked process: have pages of its own there now, rather than one by one when they are written."""
    for start, size in ranges:
        advise(start, size, _COPY)


def _writable() -> Iterator[tuple[int, int, str]]:
    with open("/proc/self/maps") as lines:
        found = [_LINE.fullmatch(line.rstrip("\n")) for line in lines]
    for mapping in found:
        if mapping is not None and mapping[3].startswith("rw-p") and not mapping[4].startswith("[v"):
            yield int(mapping[1], 16), int(mapping[2], 16), "" if mapping[4] in ("", "[heap]") else mapping[4]


def _own_pages() -> Iterator[Range]:
    """The pages that this process shares with no other, as ranges."""
    with open("/proc/self/pagemap", "rb", buffering=0) as table, suppress(OSError):
        for start, end, _ in _writable():
            for first in range(start // _PAGE, end // _PAGE, _ENTRIES):
                count = min(_ENTRIES, end // _PAGE - first)
                table.seek(first * 8)
                entries = torch.frombuffer(bytearray(table.read(count * 8)), dtype=torch.int64)
                own = entries & (_PRESENT | _EXCLUSIVE | _OF_FILE) == _PRESENT | _EXCLUSIVE
                yield from _ranges(own.nonzero()[:, 0].tolist(), first)


def _ranges(pages: list[int], first: int) -> Iterator[Range]:
    """Neighbouring pages as one range."""
    at = 0
    for i in range(1, len(pages) + 1):
        if i == len(pages) or pages[i] != pages[i - 1] + 1:
            yield (first + pages[at]) * _PAGE, (i - at) * _PAGE
            at = i
