"""Coroutine: a greenlet above a stack root, in which the model or a deferred block runs."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from greenlet import GreenletExit, getcurrent, greenlet

from ._stack import StackRoot

if TYPE_CHECKING:
    from ._pass import Pass


class Coroutine(greenlet):
    """Runs `main` with its own stack and its own context variables.

    `main` must handle every exception, `GreenletExit` included.  `serves` is the pass whose sites
    the modules called in this coroutine visit.
    """

    main: Callable[[], None]
    serves: Pass | None = None

    def __init__(self, main: Callable[[], None], serves: Pass | None = None) -> None:
        super().__init__()
        self.main = main
        self.serves = serves
        self.gr_context = contextvars.copy_context()

    def run(self) -> None:
        _call_above_root()

    def resume(self) -> None:
        """Run until the coroutine hands over to the greenlet that resumes it now, or ends."""
        here = getcurrent()
        if self.parent is not here:
            self.parent = here
        self.switch()

    def hand_over(self) -> None:
        """Called inside: pause, and go on where this coroutine was resumed."""
        cast(greenlet, self.parent).switch()

    def kill(self) -> None:
        """Unwind what runs inside, so that its `finally` blocks run."""
        if self and not self.dead:
            here = getcurrent()
            if self.parent is not here:
                self.parent = here
            self.throw(GreenletExit)


def _run_current() -> None:
    current = cast(Coroutine, getcurrent())
    main = current.main
    del current.main  # nothing the coroutine ran stays alive with it
    main()


_call_above_root = StackRoot(_run_current)
