"""Calls of the Linux kernel that Python has no function for."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
from collections.abc import Iterable

_SET_DEATH_SIGNAL = 1
_SET_DUMPABLE, _SET_SECCOMP, _SET_NO_NEW_PRIVILEGES = 4, 22, 38
_FILTER = 2
_CLOSE_RANGE, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 436, 444, 445, 446
_LANDLOCK_VERSION = 1
_PATH_BENEATH = 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_NAMESPACES = 0x10000000 | 0x40000000 | 0x08000000 | 0x00020000 | 0x04000000  # user, net, ipc, mount, uts
_LAST_DESCRIPTOR = 0xFFFFFFFF

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def landlock_version() -> int:
    """What the kernel's Landlock can do, 0 where there is none."""
    return max(_libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(_LANDLOCK_VERSION)), 0)


def leave_namespaces() -> None:
    """Go into new user, network, IPC, mount and host-name namespaces."""
    _check(_libc.unshare(_NAMESPACES), "namespaces")


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it is gone, on Linux; a change of user undoes that."""
    if sys.platform == "linux":
        _prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, "pdeathsig")


def forbid_privileges() -> None:
    """No program started from here gains rights, nobody looks into this process, and it dies with its parent."""
    die_with_parent()
    _prctl(_SET_DUMPABLE, 0, "dumpable")
    _prctl(_SET_NO_NEW_PRIVILEGES, 1, "no_new_privs")


def restrict_files(readable: Iterable[str]) -> None:
    """Files below these folders can be read; nothing else can be opened, no port bound or connected to."""
    version = landlock_version()
    rights = (1 << 13) - 1
    for needed, right in ((2, 1 << 13), (3, 1 << 14), (5, 1 << 15)):
        rights |= right if version >= needed else 0
    attributes = struct.pack("QQQ", rights, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _check(_libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), ctypes.c_uint(0)), "landlock")
    try:
        for folder in readable:
            _allow_reading(rules, folder)
        _check(_libc.syscall(_LANDLOCK_RESTRICT, ctypes.c_int(rules), ctypes.c_uint(0)), "landlock")
    finally:
        os.close(rules)


def _allow_reading(rules: int, folder: str) -> None:
    try:
        descriptor = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # a place that a path names and that is not there, or not for us
        return
    try:
        rule = struct.pack("=Qi", _READ_FILE | _READ_DIR, descriptor)
        _check(_libc.syscall(_LANDLOCK_ADD, ctypes.c_int(rules), _PATH_BENEATH, rule, ctypes.c_uint(0)), "landlock")
    finally:
        os.close(descriptor)


def close_all_but(kept: Iterable[int]) -> None:
    """Close every other file descriptor."""
    start = 0
    for descriptor in [*sorted(kept), _LAST_DESCRIPTOR + 1]:
        if descriptor > start:
            arguments = (ctypes.c_uint(start), ctypes.c_uint(descriptor - 1), ctypes.c_uint(0))
            _check(_libc.syscall(_CLOSE_RANGE, *arguments), "close_range")
        start = descriptor + 1


def filter_calls(program: bytes) -> None:
    """Install a seccomp filter, for this thread and those it starts."""
    buffer = ctypes.create_string_buffer(program, len(program))
    held = _Program(len(program) // 8, ctypes.addressof(buffer))
    _check(_libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(held), 0, 0), "seccomp")


def advise(start: int, size: int, advice: int) -> bool:
    """Tell the kernel what a range of memory is for; whether it does what was asked."""
    return _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice) == 0


def _prctl(option: int, value: int, what: str) -> None:
    _check(_libc.prctl(option, value, 0, 0, 0), what)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
