"""Steps: blocks and loops that run at chosen steps of a generation."""

from __future__ import annotations

import operator
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, SupportsIndex

from .._capture import Block, Scope, bind, capture, is_skip, skip_body
from .._core import Run, Worker, user_frame
from ..errors import CaptureError, InputError, IterationWarning, NotTracingError, OrderError

if TYPE_CHECKING:
    from ._tracer import Tracer

Bounds = slice | SupportsIndex | Iterable[SupportsIndex]


class StepSelector:
    """`tracer.iter`: indexing it with a slice, a number or a list chooses steps."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def __getitem__(self, bounds: Bounds) -> Steps:
        return Steps(self._tracer, bounds)

    def __iter__(self) -> NoReturn:
        raise InputError(_BOUNDS.format(given="no steps"))

    def __enter__(self) -> NoReturn:
        raise InputError(_BOUNDS.format(given="no steps"))

    def __exit__(self, *_: object) -> None: ...


class Steps:
    """Chosen steps, as a loop or as a block.

    `for step in tracer.iter[...]` runs natively; `with tracer.iter[...] as step` runs its block once a step.  Both give
    the step's number, end when the generation ends, and the code behind them runs.

    Example:
        >>> from nnsight import LanguageModel
        >>> model = LanguageModel("nnsight/landmarks")
        >>> with model.generate("The Eiffel Tower is in", max_new_tokens=4) as tracer:
        ...     with tracer.iter[1:3] as step:
        ...         model.transformer.h[0].output[0][:, -1] = 0
        ...     ids = model.generator.output.save()
    """

    def __init__(self, tracer: Tracer, bounds: Bounds) -> None:
        self._tracer = tracer
        self._bounds = _checked(bounds)
        self._block: Block | None = None
        self._scope: Scope | None = None

    # --- as a loop -----------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[int]:
        run, worker = self._tracer._active("iter")
        before = worker.step
        try:
            for step in _numbers(self._bounds):
                if run.over:
                    raise NotTracingError("This trace is over: loop over its steps inside its `with` block.")
                worker.step = step
                worker.calls = None
                if not reach_step(run, worker, step):
                    _warn_if_bounded(self._bounds, step)
                    return
                yield step
        finally:
            worker.step = before

    # --- as a block ----------------------------------------------------------------------------------------

    def __enter__(self) -> int:
        self._tracer._active("iter")
        frame = sys._getframe(1)
        self._block = capture(frame)
        self._scope = Scope(frame)
        skip_body(frame)
        return 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not is_skip(kind):
            if error is None:
                raise CaptureError("The body of tracer.iter was run where it stands, not once a step.")
            return False
        block, scope = self._block, self._scope
        assert block is not None
        assert scope is not None
        self._block = self._scope = None
        try:
            body = self._bind(block, scope)
            for step in self:
                body(step)
        finally:
            scope.write_back(block.names_bound)
            scope.close()
        return True

    def _bind(self, block: Block, scope: Scope) -> Callable[..., None]:
        _, worker = self._tracer._active("iter")
        deferred = self._tracer._deferred_of(worker)
        return bind(block, scope) if deferred is None else deferred.bind(block, scope)


def _numbers(bounds: slice | list[int]) -> Iterator[int]:
    if isinstance(bounds, slice):
        step = bounds.start or 0
        while bounds.stop is None or step < bounds.stop:
            yield step
            step += bounds.step or 1
        return
    yield from bounds


def _checked(bounds: Bounds) -> slice | list[int]:
    try:
        if isinstance(bounds, slice):
            ends = [None if end is None else operator.index(end) for end in (bounds.start, bounds.stop, bounds.step)]
            found, numbers = slice(*ends), [end for end in ends if end is not None]
        else:
            numbers = [operator.index(bounds)] if isinstance(bounds, SupportsIndex) else map(operator.index, bounds)
            found = numbers = sorted(set(numbers))
    except TypeError:
        raise InputError(_BOUNDS.format(given=repr(bounds))) from None
    if any(number < 0 for number in numbers) or (isinstance(found, slice) and found.step == 0):
        raise InputError(_UPWARDS)
    return found


_BOUNDS = """\
tracer.iter was given {given}: it takes a step's number, a slice or a list of numbers, `for step in tracer.iter[2:5]`, [3], \
[[0, 2]], or [:] for every step."""
_UPWARDS = """\
tracer.iter counts steps from 0 upwards: how many there will be is not known yet. Write `for step in tracer.iter[:]` and \
keep the values of the last steps, or name steps by their numbers: tracer.iter[2:5]."""


def reach_step(run: Run, worker: Worker, step: int) -> bool:
    """Wait until a step begins, unless it has begun already; whether there is one."""
    main = run.start()
    if main.step >= step:
        return main.step == step or _raise_passed(step, main.step)
    if not main.done and step <= main.last_step:
        if step == 0:  # what runs before it, an encoder for one, belongs to the first step
            run.lone = False
            return True
        if run.wait_for_step(worker, step):
            return True
    if main.step < 0:
        raise OrderError(_UNCOUNTED.format(kind=type(run.stepper).__name__))
    return False


_UNCOUNTED = """\
The steps of this generation cannot be counted: they are the calls of {kind}, and there was none (a part of the model does the \
generating). Wrap that part, or ask for its later calls with envoy.next()."""


def _raise_passed(step: int, now: int) -> bool:
    raise OrderError(
        f"Step {step} of the generation has passed: the model is in step {now}. Ask for steps in ascending order, "
        "or put this block before the one that waits for later steps."
    )


def _warn_if_bounded(bounds: slice | list[int], step: int) -> None:
    if isinstance(bounds, slice) and bounds.stop is None:
        return
    frame = user_frame()
    if frame is not None:
        warnings.warn_explicit(
            f"tracer.iter was to reach step {step}, but the generation ended before it.",
            IterationWarning,
            frame.f_code.co_filename,
            frame.f_lineno,
        )
