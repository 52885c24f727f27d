"""Progress bars of long calls."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm


def progress_bar(total: int, title: str, shown: bool) -> Any:
    """A bar over `total` steps, to be used in a `with` statement; it goes away when done."""
    return tqdm(total=total, desc=title, disable=not shown, leave=False, unit="run")
