"""The processes of an engine end with the one that started them, however that ends."""

from __future__ import annotations

import ctypes
import signal
import sys

_DIE_WITH_PARENT = 1


def end_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it is gone; on Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
