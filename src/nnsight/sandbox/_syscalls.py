"""The system calls that a confined process may make, as a seccomp filter for x86-64."""

from __future__ import annotations

import errno
import struct

# Memory, threads, clocks, and reading and writing what is open already.
_ALLOWED = {
    "read": 0,
    "write": 1,
    "close": 3,
    "fstat": 5,
    "poll": 7,
    "lseek": 8,
    "mmap": 9,
    "mprotect": 10,
    "munmap": 11,
    "brk": 12,
    "rt_sigaction": 13,
    "rt_sigprocmask": 14,
    "rt_sigreturn": 15,
    "pread64": 17,
    "readv": 19,
    "writev": 20,
    "sched_yield": 24,
    "mremap": 25,
    "madvise": 28,
    "dup": 32,
    "nanosleep": 35,
    "getpid": 39,
    "sendto": 44,
    "recvfrom": 45,
    "exit": 60,
    "uname": 63,
    "fcntl": 72,
    "getrusage": 98,
    "sysinfo": 99,
    "times": 100,
    "getuid": 102,
    "getgid": 104,
    "geteuid": 107,
    "getegid": 108,
    "getppid": 110,
    "sigaltstack": 131,
    "arch_prctl": 158,
    "gettid": 186,
    "futex": 202,
    "sched_getaffinity": 204,
    "set_tid_address": 218,
    "restart_syscall": 219,
    "clock_gettime": 228,
    "clock_getres": 229,
    "clock_nanosleep": 230,
    "exit_group": 231,
    "ppoll": 271,
    "set_robust_list": 273,
    "getcpu": 309,
    "getrandom": 318,
    "membarrier": 324,
    "rseq": 334,
}
# By path: Landlock lets these reach the files of installed libraries, to be read, and nothing else.
_BY_PATH = {
    "stat": 4,
    "lstat": 6,
    "access": 21,
    "getcwd": 79,
    "readlink": 89,
    "getdents64": 217,
    "openat": 257,
    "newfstatat": 262,
    "readlinkat": 267,
    "faccessat": 269,
    "statx": 332,
    "faccessat2": 439,
}
_RECEIVING = (47, 48)  # recvmsg, shutdown
_CLONE, _CLONE3, _TGKILL = 56, 435, 234
_CLONE_THREAD = 0x10000

_LOAD, _EQUAL, _AT_LEAST, _BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST, _FIRST_HIGH = 0, 4, 16, 20
_X86_64, _X32 = 0xC000003E, 0x40000000
_KILL, _ALLOW, _ERROR = 0x80000000, 0x7FFF0000, 0x00050000


def seccomp_filter(pid: int, *, receives: bool = False) -> bytes:
    """The filter's program for the process `pid`: what is not named here is refused with EPERM.

    One that `receives` may be given descriptors over a socket.
    """
    program: list[bytes] = []

    def add(code: int, value: int, then: int = 0, otherwise: int = 0) -> None:
        program.append(struct.pack("HBBI", code, then, otherwise, value))

    add(_LOAD, _ARCHITECTURE)
    add(_EQUAL, _X86_64, 1)
    add(_RETURN, _KILL)
    add(_LOAD, _NUMBER)
    add(_AT_LEAST, _X32, 0, 1)
    add(_RETURN, _KILL)
    for number in (*_ALLOWED.values(), *_BY_PATH.values(), *(_RECEIVING if receives else ())):
        add(_EQUAL, number, 0, 1)
        add(_RETURN, _ALLOW)
    add(_EQUAL, _CLONE3, 0, 1)  # its flags are behind a pointer; the C library falls back to `clone`
    add(_RETURN, _ERROR | errno.ENOSYS)
    add(_EQUAL, _CLONE, 0, 4)  # threads, no processes
    add(_LOAD, _FIRST)
    add(_BIT, _CLONE_THREAD, 0, 1)
    add(_RETURN, _ALLOW)
    add(_RETURN, _ERROR | errno.EPERM)
    add(_EQUAL, _TGKILL, 0, 4)  # signals to itself: `abort` and the like
    add(_LOAD, _FIRST)
    add(_EQUAL, pid, 0, 1)
    add(_RETURN, _ALLOW)
    add(_RETURN, _ERROR | errno.EPERM)
    add(_RETURN, _ERROR | errno.EPERM)
    return b"".join(program)
