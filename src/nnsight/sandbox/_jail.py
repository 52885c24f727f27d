"""Confinement: what a process gives up, for good, before it runs somebody else's code."""

from __future__ import annotations

import os
import platform
import resource
import sys
import sysconfig
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ._kernel import (
    close_all_but,
    filter_calls,
    forbid_privileges,
    landlock_version,
    leave_namespaces,
    restrict_files,
)
from ._syscalls import seccomp_filter

_NOBODY = 65534
_PACKAGE = str(Path(__file__).resolve().parent.parent)


class Allowance(NamedTuple):
    """What a confined process may use.

    Attributes:
        memory: Bytes of address space, beyond what it has already.
        seconds: Time on a processor, all threads together.
        threads: How many threads.
    """

    memory: int = 8 << 30
    seconds: int = 3600
    threads: int = 64


def confine(kept: Sequence[int], allowance: Allowance = Allowance(), *, lasts: bool = False) -> None:  # noqa: B008
    """Give up everything but memory, arithmetic and the descriptors in `kept`; there is no way back.

    The process must be a freshly forked one with a single thread. One that `lasts` runs nobody's code: it may be given
    further descriptors, and all the time it needs.

    Raises:
        OSError: The kernel lacks something; the process must end then, without running what it was to run.
    """
    if threading.active_count() != 1:
        raise OSError("a process with several threads cannot be confined")
    readable = library_folders()
    close_all_but(kept)
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    leave_namespaces()
    forbid_privileges()
    _limit(allowance._replace(seconds=resource.RLIM_INFINITY) if lasts else allowance)
    restrict_files(readable)
    os.environ.clear()
    filter_calls(seccomp_filter(os.getpid(), receives=lasts))


def _limit(allowance: Allowance) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + allowance.memory
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: allowance.seconds,
        resource.RLIMIT_NPROC: allowance.threads,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


def library_folders() -> list[str]:
    """Where the installed libraries are, which hold nothing of anybody's."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    folders = {sysconfig.get_path(name) for name in names} | {_PACKAGE}
    folders |= {path for path in sys.path if path.endswith(("site-packages", "dist-packages", "lib-dynload"))}
    return sorted(folder for folder in folders if Path(folder).is_dir())


def missing() -> list[str]:
    """What this machine lacks to confine other people's code; empty where nothing does."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return [f"Linux on x86-64 (this is {sys.platform} on {platform.machine()})"]
    lacking = [] if landlock_version() else ["Landlock in the kernel (5.13 or newer, and enabled)"]
    status = _try_confining() if not lacking else None
    return lacking if not status else [*lacking, status]


def _try_confining() -> str | None:
    """Confine a process that does nothing else, and say what it could not do."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            confine([writing])
            os._exit(0)
        except BaseException as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        problem = answer.read().decode(errors="replace")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return problem or (None if status == 0 else f"confinement (the attempt ended with {status})")
