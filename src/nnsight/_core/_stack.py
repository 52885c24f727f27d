"""The stack root: machine code below which PyTorch's C++ unwinder does not look.

PyTorch's C++ errors record a C++ backtrace when they are constructed.  In a greenlet the unwinder walks
past the greenlet's first frame into bytes of another stack, and the process dies on an ordinary shape
error.  A frame whose code has no unwind information is, to the unwinder, the end of the stack.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import sys
import warnings
from collections.abc import Callable

_CODE = {
    # push rbp; mov rbp, rsp; call rdi; pop rbp; ret
    "x86_64": "55 4889e5 ffd7 5d c3",
    "amd64": "55 4889e5 ffd7 5d c3",
    # stp x29, x30, [sp, -16]!; mov x29, sp; blr x0; ldp x29, x30, [sp], 16; ret
    "aarch64": "fd7bbfa9 fd030091 00003fd6 fd7bc1a8 c0035fd6",
    "arm64": "fd7bbfa9 fd030091 00003fd6 fd7bc1a8 c0035fd6",
}
_CALLBACK = ctypes.PYFUNCTYPE(None)  # a callback that keeps the interpreter lock

_pages: list[mmap.mmap] = []  # executable for the life of the process


def _map_executable(code: bytes) -> int:
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC):
        raise OSError(ctypes.get_errno(), "mprotect refused executable memory")
    _pages.append(page)
    return address


def _make_thunk() -> Callable[[object], None]:
    machine = platform.machine().lower()
    if sys.platform != "linux" or machine not in _CODE:
        return _call_plainly  # pyright: ignore[reportReturnType]
    try:
        address = _map_executable(bytes.fromhex(_CODE[machine]))
    except (OSError, ValueError) as error:
        warnings.warn(
            f"nnsight could not get executable memory ({error}): an error raised by PyTorch's C++ code inside "
            "a trace may crash this process.",
            RuntimeWarning,
            stacklevel=3,
        )
        return _call_plainly  # pyright: ignore[reportReturnType]
    return ctypes.PYFUNCTYPE(None, _CALLBACK)(address)


def _call_plainly(callback: Callable[[], None]) -> None:
    callback()


class StackRoot:
    """Calls one fixed function above a stack root; making one costs more than using it."""

    def __init__(self, function: Callable[[], None]) -> None:
        """`function` must not raise: nothing above it could pass the error on."""
        self._callback = _CALLBACK(function)
        self._thunk: Callable[[object], None] | None = None

    def __call__(self) -> None:
        if self._thunk is None:
            self._thunk = _make_thunk()
        self._thunk(self._callback)
