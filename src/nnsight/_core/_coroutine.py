"""Coroutine: a greenlet above a stack root, in which the model or a deferred block runs."""

from __future__ import annotations

import contextvars
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from greenlet import GreenletExit, getcurrent, greenlet

from ._stack import StackRoot

if TYPE_CHECKING:
    from ._pass import Pass


class Coroutine(greenlet):
    """Runs `main` with its own stack and its own context variables.

    `main` must handle every exception, `GreenletExit` included.  `serves` is the pass whose places the
    modules called in this coroutine visit.
    """

    main: Callable[[], None] | None
    serves: Pass | None = None
    reusable: bool = False

    def __init__(self, main: Callable[[], None]) -> None:
        super().__init__()
        self.main = main
        self.thread = threading.get_ident()
        self.gr_context = contextvars.copy_context()

    def run(self) -> None:  # type: ignore[override]
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
        self.reusable = False
        if self and not self.dead and self.is_here() and not sys.is_finalizing():
            here = getcurrent()
            if self.parent is not here:
                self.parent = here
            self.throw(GreenletExit)

    def is_here(self) -> bool:
        """Whether it belongs to this thread; another one unwinds it itself, once nobody holds it."""
        return self.thread == threading.get_ident()


class _Spare(threading.local):
    """One idle coroutine a thread: a new one costs the kernel's page faults for its stack."""

    coroutine: Coroutine | None = None


_spare = _Spare()
_SHALLOW = 150  # Python frames


def borrow(main: Callable[[], None]) -> Coroutine:
    """A coroutine for `main`, an idle one where this thread has it."""
    coroutine, _spare.coroutine = _spare.coroutine, None
    if coroutine is None:
        coroutine = Coroutine(main)
        coroutine.reusable = _is_shallow()
    else:
        coroutine.main = main
        coroutine.gr_context = contextvars.copy_context()
    return coroutine


def _is_shallow() -> bool:
    # A coroutine counts its recursion from where it was first started: one from deep down, or from inside another, is
    # not kept.
    if getcurrent().__class__ is Coroutine:
        return False
    try:
        sys._getframe(_SHALLOW)
    except ValueError:
        return True
    return False


def give_back(coroutine: Coroutine) -> None:
    """Keep a coroutine whose main has ended for the next `borrow`, or unwind it."""
    coroutine.serves = None
    if coroutine.main is None and coroutine.reusable and _spare.coroutine is None and coroutine:
        coroutine.gr_context = None
        _spare.coroutine = coroutine
    else:
        coroutine.kill()


def _run_current() -> None:
    current = cast(Coroutine, getcurrent())
    try:
        while current.main is not None:
            current.main()
            current.main = None  # nothing that ran stays alive with the coroutine
            if current.reusable:
                current.hand_over()
    except GreenletExit:
        pass


if sys.version_info >= (3, 11):
    # CPython keeps Python frames in chunks of 16 KiB, and maps and unmaps one whenever a call crosses the end of the
    # last: in a model's inner loop that costs more than the loop.  A first frame of this size, of which only the pages
    # in use take memory, gets a chunk of 1 MiB with room for 300 levels of modules.
    _run_current.__code__ = _run_current.__code__.replace(co_stacksize=66_000)

_call_above_root = StackRoot(_run_current)


def current_pass() -> Pass | None:
    """The pass in whose coroutine the current code runs, None outside."""
    current = getcurrent()
    return current.serves if current.__class__ is Coroutine else None  # type: ignore[attr-defined]


@contextmanager
def uncounted() -> Iterator[None]:
    """Inside, modules called in a pass's coroutine are none of its calls."""
    current = getcurrent()
    serves = current.serves if current.__class__ is Coroutine else None  # type: ignore[attr-defined]
    if serves is None:
        yield
        return
    current.serves = None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        current.serves = serves  # type: ignore[attr-defined]


OTHER_THREAD = """\
A value was asked for in another thread than the one that opened the trace, and a model cannot go on in two of them. \
Read values in the thread of the `with` block and hand the values to others, or open a trace of its own in each thread."""
