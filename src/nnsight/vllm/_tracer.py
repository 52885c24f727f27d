"""LaneTracer: a trace in the engine's worker, of which every input is a request."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .._capture import Block, Scope
from .._core import Call, Coroutine, Run, Worker
from ..envoy import Tree
from ..errors import InputError, NoInputError, NotTracingError
from ..trace import Dataflow, Deferred, Given, Prepared, Tracer
from ._lane import LanePass, hand_over, lane_maker

if TYPE_CHECKING:
    from ._compiled import Compiled


class _Invoke:
    """One invoke: a run of its own, in a coroutine of its own."""

    def __init__(self, run: Run, deferred: Deferred) -> None:
        self.run = run
        self.deferred = deferred
        self.error: BaseException | None = None
        self.driver = Coroutine(self._main)

    def _main(self) -> None:
        try:
            self.run.finish()
        except BaseException as error:
            self.error = error

    def needs(self, others: Sequence[_Invoke]) -> bool:
        """Whether it reads a name that one of `others` binds."""
        return any(self.deferred.reads_from(other.deferred) for other in others)


class LaneTracer(Tracer):
    """A trace whose invokes each have a run of their own, since the engine computes requests at their own pace.

    Those that read what an earlier one binds begin when that is over.
    """

    def __init__(
        self,
        tree: Tree,
        given: Given | None,
        params: dict[str, Any],
        edits: Any,
        strict_order: bool,
        spec: Compiled | None,
    ) -> None:
        super().__init__(
            tree, self._prepare_lane, given, edits=edits if spec is None else (), strict_order=strict_order
        )
        self._spec = spec
        self._held = () if spec is None else edits  # that the spec stands for, as long as no block sees the values
        self._params = params
        self._invokes: list[_Invoke] = []

    def _prepare_lane(self, givens: list[Given]) -> Prepared:
        if not givens:
            raise NoInputError("Cannot run the model: give the trace a prompt, or an invoke: tracer.invoke(prompt).")
        assert self._run is not None
        return Prepared(self._call_of(givens[0], self._run), [1])

    def _call_of(self, given: Given, run: Run) -> Call:
        lane = lane_maker.get()(Given(given.args, {**self._params, **given.kwargs}))
        lane.run, lane.spec, lane.edits = run, self._spec, self._held
        run.lone = run.lone and not self._held
        return Call(lane, (), {}, repeatable=False, passes=LanePass)

    def _add_invoke(
        self, block: Block, scope: Scope, given: Given | None, frame_line: int, *, apart: bool = False
    ) -> None:
        if given is None:
            raise InputError(_NO_WHOLE)
        if self._given:
            raise InputError("This trace has a prompt of its own: give both prompts to invokes.")
        outer, _ = self._active("invoke()")
        run = Run(outer.instruments, outer.stepper, lambda: self._call_of(given, run), strict=outer.strict)
        for edit in self._edits:
            edit.add_to(run)
        worker = Worker(run, f"the invoke at line {frame_line} of {os.path.basename(block.filename)}")
        if self._flow is None:
            self._flow = Dataflow()
        deferred = self._flow.add(block, scope, worker)
        worker.start(deferred.run)
        run.add(worker)
        run.lone = False
        self._invokes.append(_Invoke(run, deferred))

    def _finish(self, run: Run) -> None:
        if self._invokes:
            self._run_invokes()
        else:
            super()._finish(run)

    def _close(self) -> None:
        for invoke in self._invokes:
            invoke.run.close()
            invoke.driver.kill()  # one that waits for the engine would do so for ever
        super()._close()

    def _run_invokes(self) -> None:
        waiting = self._invokes
        while waiting:
            ready = [invoke for i, invoke in enumerate(waiting) if not invoke.needs(waiting[:i])]
            for invoke in ready:
                invoke.driver.resume()
            while any(invoke.driver for invoke in ready):
                hand_over()
            for invoke in ready:
                if invoke.error is not None:
                    raise invoke.error
            waiting = [invoke for invoke in waiting if invoke not in ready]

    def barrier(self, count: int) -> Callable[[], None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Nothing has to wait: a block that reads what another binds begins when that is over."""
        return lambda: None

    def _active(self, name: str) -> tuple[Run, Worker]:
        worker = self._tree.find_worker()
        runs = [self._run, *(invoke.run for invoke in self._invokes)]
        if worker is None or worker.run not in runs:
            raise NotTracingError(f"tracer.{name} works inside the `with` block of its trace only.")
        return worker.run, worker


_NO_WHOLE = """\
On vLLM there is no batch of all invokes: each is a request of its own, computed at its own pace. tracer.invoke() needs a \
prompt here."""
