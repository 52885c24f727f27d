"""The versions of what both sides must agree on."""

from __future__ import annotations

import platform
from importlib.metadata import version

from ._messages import VERSION, Versions


def versions() -> Versions:
    """Those of this process."""
    return Versions(
        nnsight=version("nnsight"),
        torch=version("torch"),
        transformers=version("transformers"),
        python=platform.python_version(),
        protocol=VERSION,
    )
