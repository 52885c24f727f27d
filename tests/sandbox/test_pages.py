"""Memory of a process that forks: large pages, and pages that are copied before they are written."""

import ctypes
import os
import re
import resource
from pathlib import Path

import pytest
import torch

from nnsight.sandbox._pages import copy_pages, enlarge_pages, pages_written_by

PAGE = os.sysconf("SC_PAGE_SIZE")
COUNT = 512


@pytest.fixture
def memory():
    """`COUNT` pages that this process has written."""
    return torch.ones(COUNT * PAGE, dtype=torch.uint8)


def write(memory, pages):
    for page in pages:
        ctypes.memset(memory.data_ptr() + page * PAGE, 2, 1)


def page_of(memory, number):
    return (memory.data_ptr() + number * PAGE) // PAGE


def in_a_fork(work):
    """What `work` returns, a number, in a forked process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, str(work()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        told = answer.read()
    os.waitpid(child, 0)
    return int(told)


def faults_of(work):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_the_pages_that_work_writes_are_found(memory):
    written = range(0, COUNT, 4)
    found = {
        page
        for start, size in pages_written_by(lambda: write(memory, written))
        for page in range(start // PAGE, (start + size) // PAGE)
    }
    assert {page_of(memory, number) for number in written} <= found
    others = {page_of(memory, number) for number in range(2, COUNT - 2) if number % 4}
    assert not others & found
    assert memory[0] == 1  # it was done elsewhere


def test_work_that_fails_has_no_pages():
    assert pages_written_by(lambda: 1 / 0) == []


def test_copied_pages_are_written_without_faults(memory):
    pages = range(COUNT)
    ranges = pages_written_by(lambda: write(memory, pages))

    def copied():
        copy_pages(ranges)
        return faults_of(lambda: write(memory, pages))

    plain = in_a_fork(lambda: faults_of(lambda: write(memory, pages)))
    assert plain >= COUNT // 2
    assert in_a_fork(copied) < plain // 4


def test_ranges_that_are_gone_are_passed_by():
    copy_pages([(PAGE, PAGE), (2**46, PAGE)])


def huge():
    return sum(map(int, re.findall(r"AnonHugePages: +(\d+)", Path("/proc/self/smaps").read_text())))


def test_memory_lies_in_large_pages_and_is_what_it_was():
    held = torch.arange(2 * 2**20)

    def enlarged():
        before = huge()
        enlarge_pages()
        assert torch.equal(held, torch.arange(2 * 2**20))
        return huge() - before

    gained = in_a_fork(enlarged)
    if not gained:
        pytest.skip("the kernel has no large pages to give")
    assert gained >= 2 * 2**10  # KiB
