"""A line on the terminal that says where a job stands; silent anywhere else."""

from __future__ import annotations

import sys

from ..protocol import ENDED, JobState


class Progress:
    """Rewrites one line of the standard error, if that is a terminal."""

    def __init__(self) -> None:
        self._shown = ""

    def show(self, state: JobState) -> None:
        """Say where the job stands."""
        if not sys.stderr.isatty() or state.status in ENDED:
            return
        ahead = f", {state.position} ahead" if state.status == "queued" and state.position else ""
        self._write(f"[{state.id[:8]}] {state.status}{ahead}")

    def close(self) -> None:
        """Wipe the line."""
        if self._shown:
            self._write("")

    def _write(self, text: str) -> None:
        sys.stderr.write(f"\r{text.ljust(len(self._shown))}" + ("\r" if not text else ""))
        sys.stderr.flush()
        self._shown = text
