"""What a confined process can still do: compute; and what it cannot, as a list of attacks."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import warnings
from pathlib import Path

import pytest
import torch

from nnsight.sandbox import Allowance, confine, missing

from ..endless import catch_everything

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"this machine lacks {missing()}")

PARENT = os.getpid()
SECRET = "/etc/passwd"


SMALL = Allowance(memory=2 << 30, seconds=5, threads=8)


def confined(attack, allowance=SMALL):
    """What `attack` returns or raises in a confined process, as text; and how the process ended."""
    ours, theirs = socket.socketpair()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fork beside the threads of other tests; the child is single-threaded
        child = os.fork()
    if child == 0:
        try:
            ours.close()
            confine([theirs.fileno()], allowance)
            theirs.send(b"confined ")
            try:
                said = f"got {attack()!r}"
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            theirs.send(said.encode()[:4000])
        except BaseException as error:
            theirs.send(f"not confined: {error}".encode())
        finally:
            os._exit(0)
    theirs.close()
    with ours:
        ours.settimeout(60)
        said = b""
        while part := ours.recv(8192):
            said += part
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = said.decode()
    assert text.startswith("confined "), text
    return text.removeprefix("confined "), status


def system_call(number, *arguments):
    def attack():
        library = ctypes.CDLL(None, use_errno=True)
        result = library.syscall(number, *arguments)
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    return attack


def compute():
    values, weights = torch.randn(64, 256), torch.randn(256, 256, requires_grad=True)
    (values @ weights).softmax(-1).sum().backward()
    torch.linalg.svd(weights.detach())
    torch.fft.fft(values)
    torch.nn.functional.layer_norm(values, (256,))
    torch.multinomial(values.softmax(-1), 1)
    return tuple(weights.grad.shape)


def test_it_computes():
    assert confined(compute) == ("got (256, 256)", 0)


def start_threads():
    import threading

    found = []
    threads = [threading.Thread(target=found.append, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(found)


def test_it_has_threads():
    assert confined(start_threads) == ("got [0, 1, 2]", 0)


def readable_by_all(path):
    return all(os.stat(part).st_mode & 0o5 == 0o5 for part in (path, *map(str, Path(path).parents)))


@pytest.mark.skipif(not readable_by_all(os.path.dirname(os.__file__)), reason="Python is installed for one user alone")
def test_it_imports_installed_libraries():
    assert confined(lambda: __import__("wave").__name__) == ("got 'wave'", 0)


def write_beside_a_library():
    with open(os.path.join(os.path.dirname(os.__file__), "planted.py"), "w") as file:
        file.write("x")


REFUSED = {
    "open a file": lambda: Path(SECRET).read_text(),
    "open a file by torch": lambda: torch.from_file(SECRET, size=10, dtype=torch.uint8),
    "read this user's home": lambda: os.listdir(os.path.expanduser("~")),
    "list the root": lambda: os.listdir("/"),
    "look into processes": lambda: os.listdir("/proc"),
    "read the memory of the parent": lambda: Path(f"/proc/{PARENT}/mem").read_bytes(),
    "read its own maps": lambda: Path("/proc/self/maps").read_text(),
    "write a file": lambda: Path("/tmp/planted").write_text("x"),
    "write beside a library": write_beside_a_library,
    "torch.save": lambda: torch.save(torch.zeros(1), "/tmp/planted"),
    "network": lambda: socket.socket(),
    "unix socket": lambda: socket.socket(socket.AF_UNIX),
    "fork": os.fork,
    "start a program": lambda: os.execv("/bin/sh", ["sh"]),
    "subprocess": lambda: __import__("subprocess").run(["id"]),
    "kill the parent": lambda: os.kill(PARENT, signal.SIGKILL),
    "signal a thread of the parent": system_call(234, PARENT, PARENT, 9),
    "become root": lambda: os.setuid(0),
    "ptrace": system_call(101, 16, PARENT, 0, 0),
    "process_vm_readv": system_call(310, PARENT, 0, 0, 0, 0, 0),
    "pidfd_open": system_call(434, PARENT, 0),
    "io_uring": system_call(425, 8, 0),
    "memfd_create": system_call(319, b"x", 0),
    "bpf": system_call(321, 0, 0, 0),
    "userfaultfd": system_call(323, 0),
    "perf_event_open": system_call(298, 0, 0, 0, 0, 0),
    "keyctl": system_call(250, 0, 0, 0),
    "unshare": system_call(272, 0x10000000),
    "mount": system_call(165, b"a", b"/", b"tmpfs", 0, 0),
    "clone3": system_call(435, 0, 0),
    "open_by_handle_at": system_call(304, 0, 0, 0),
    "shmget": system_call(29, 1, 4096, 0o1666),
    "prctl": system_call(157, 4, 1, 0, 0, 0),
    "setrlimit": lambda: __import__("resource").setrlimit(7, (1024, 1024)),
    "use much memory": lambda: torch.ones(8 << 30),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_cannot(name):
    said, status = confined(REFUSED[name])
    assert not said.startswith("got"), said
    assert status == 0


def test_no_descriptor_is_left():
    said, _ = confined(lambda: [fd for fd in range(4096) if _is_open(fd)])
    assert re.fullmatch(r"got \[\d+\]", said)  # what it answers through


def _is_open(descriptor):
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_the_environment_is_empty():
    assert confined(lambda: dict(os.environ)) == ("got {}", 0)


def test_it_is_nobody():
    said, _ = confined(lambda: (os.getuid(), os.geteuid(), os.getgid()))
    assert said == "got (65534, 65534, 65534)"


def test_an_endless_loop_ends():
    said, status = confined(lambda: [None for _ in iter(int, 1)], Allowance(memory=2 << 30, seconds=1, threads=8))
    assert status == -signal.SIGKILL
    assert said == ""


def test_catching_everything_does_not_help():
    _, status = confined(catch_everything, Allowance(memory=2 << 30, seconds=1, threads=8))
    assert status == -signal.SIGKILL


def test_a_crash_is_the_process_alone():
    _, status = confined(lambda: ctypes.string_at(0))
    assert status == -signal.SIGSEGV


def test_threads_are_counted():
    def bomb():
        import threading

        stop = threading.Event()
        try:
            for _ in range(1000):
                threading.Thread(target=stop.wait, daemon=True).start()
        finally:
            stop.set()

    said, _ = confined(bomb)
    assert "can't start new thread" in said


def test_a_process_with_threads_is_not_confined():
    import threading

    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        with pytest.raises(OSError, match="several threads"):
            confine([])
    finally:
        stop.set()
        thread.join()
