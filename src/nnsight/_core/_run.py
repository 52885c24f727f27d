"""Run: one use of a model, shared by the workers that read and change its values."""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.nn import Module

from ..config import CONFIG
from ..errors import EditError, NNsightError, OutOfOrderError, StoppedError, WaitError
from ._call import Call
from ._edits import Edits
from ._ending import Ending
from ._fakes import Fakes
from ._frames import user_frame
from ._instrument import Instruments
from ._joins import Joins
from ._layouts import Layouts
from ._leaves import leaves_of
from ._modes import capture_modes
from ._order import explain_late
from ._pass import Override, Pass
from ._record import Recording, Recordings
from ._replay import Replay
from ._rows import BATCH_FIRST, Layout, Rows, cut_lists, take
from ._scoped import Scoped, join_parts, leave_parts, settle_parts
from ._tensors import map_tensors
from ._tuples import as_native
from ._visit import INPUT, OUTPUT, STEP, OperationPlace, Place, Request, Visit
from ._worker import Worker


class Run:
    """The workers, the main pass, and the second pass that serves reads which came too late.

    `prepare` makes the call when the forward is first needed: a batch is complete only then.  An `early` run ends once
    every block is done.
    """

    def __init__(
        self,
        instruments: Instruments,
        stepper: Module,
        prepare: Callable[[], Call],
        *,
        strict: bool = False,
        early: bool = False,
    ) -> None:
        self.instruments = instruments
        self.stepper = stepper
        self.strict = strict or CONFIG.APP.STRICT_ORDER
        self.modes = capture_modes()
        self.workers: list[Worker] = []
        self.main: Pass | None = None
        self.call: Call | None = None
        self.overrides: dict[Any, Override] = {}
        self.edits = Edits()
        self.over = False
        self.lone = True
        self.saved: list[Any] = []
        self.recordings = Recordings()
        self.layouts: Layouts | None = None
        self.joins = Joins()
        self.fakes: Fakes | None = None  # in a scan
        self._prepare: Callable[[], Call] | None = prepare
        self._ending = Ending(early=early)
        self._failure: BaseException | None = None
        self._replay: Replay | None = None

    def add(self, worker: Worker) -> None:
        """Let `worker` take part."""
        self.workers.append(worker)
        self.lone = len(self.workers) == 1

    # --- starting and ending -----------------------------------------------------------------------------

    def start(self) -> Pass:
        """Make everything ready for the forward, which begins when a worker first needs it."""
        if self.main is None:
            call = self._make_call()
            self.edits.begin(call)
            self.instruments.install()
            begin = None if self.lone else self._begin
            self.main = call.passes(
                call, self.instruments, self.stepper, self.modes, self.overrides, self._serve, self._missed, begin
            )
            self.main.hand_on = self.edits.leave
            if call.repeatable and not self.strict:
                self.edits.note_parameters(self.instruments)
            if self.instruments.profile is None or call.fake:
                self.main.learn(keep=not call.fake)
            if self.recordings:
                self._attach_recordings(self.main)
        return self.main

    def finish(self) -> None:
        """Run the model to its end, with every block that still waits for it."""
        if self.main is None:
            if self._is_over():
                return
            if not self.recordings and all(w.coroutine is None for w in self.workers):
                self._make_call()()
                return
        main = self.start()
        while not main.done and not self._is_over():
            main.advance()
            self._raise_failure(main)
        if main.done and not self.lone:
            self._settle(main)
        if self.edits.late_reads:
            self.edits.check_late_reads()
        if self.recordings:
            self.recordings.finish()

    def close(self) -> None:
        """Unwind what still stands, put the modules back, and let go of every value."""
        if self.over:
            return
        self.over = True
        try:
            for running in (*self.workers, self._replay, self.main):
                if running is not None:
                    running.close()
        finally:
            if self.main is not None:
                self.instruments.remove()
            self.main = self._replay = None
        self.recordings.close()
        self.call = self._prepare = self._failure = None
        self.overrides.clear()
        self.edits.clear()
        self.joins.clear()
        self.workers.clear()

    def stop(self, worker: Worker) -> None:
        """End the forward as soon as no other worker needs it."""
        self.lone = False
        worker.stopped = True
        self._ending.allow()
        if worker.coroutine is None and self._is_over() and self.main is not None:
            self.main.close()

    def _is_over(self) -> bool:
        return self._ending.has_come(self.workers)

    def _make_call(self) -> Call:
        if self.call is None:
            assert self._prepare is not None
            self.call = self._prepare()
        return self.call

    # --- what workers ask ----------------------------------------------------------------------------------

    def reach(self, worker: Worker, place: Any, kind: str, path: str, *, write: bool = False) -> Visit:
        """Let the model run until the place that `worker` names, and stand still there."""
        main = self.main or self.start()
        request = worker.request_for(place, kind, path)
        here = main.here
        if here is not None and here.place is place and here.is_occurrence(request):
            if here.kind == kind or (kind == INPUT and not write):
                if here.scoped is not None:
                    join_parts(here, worker)
                return here
        if worker.stopped or self.edits.late_reads:
            self._check_usable(worker)
        if place in main.final and not write:
            return Visit(place, OUTPUT, main.final[place], 0, 0, 0)
        if not place._modules:
            main.watch(place)
        if not (main.done or ((place in main.counts or worker.step is not None) and main.has_passed(request))):
            visit = self._park(worker, request, main)
            if visit is not None:
                if visit.scoped is not None:
                    join_parts(visit, worker)
                return visit
        return self._late(request, worker, write)

    def read(self, worker: Worker, place: Any, kind: str, path: str) -> tuple[Visit, Any]:
        """The value at a place, with the visit it belongs to."""
        if self.lone and kind == OUTPUT:
            main = self.main or self.start()
            if place not in main.counts and main.is_ahead(place):
                visit = self._await(worker, place, path, main)
                value = visit.value
                if visit is main.here:
                    if self.edits.keeping:
                        self.edits.give(visit, value, path)
                    return visit, value
        visit = self.reach(worker, place, kind, path)
        value = visit.value if visit.kind == kind else visit.inputs
        if worker.rows is not None:
            value = self._scoped(visit, kind, value, worker.rows).give(worker, path)
            if self.call is not None and visit.place in self.call.batch_first:
                value = cut_lists(value, worker.rows)
        if self.main is None or (visit is not self.main.here and visit.place not in self.main.final):
            value = map_tensors(torch.Tensor.detach, value)
            self.edits.note_late_read(f"{path}.{kind}", value)
        elif self.edits.keeping and visit is self.main.here:
            self.edits.give(visit, value, path)
        return visit, value

    def change(self, worker: Worker, visit: Visit, value: Any, path: str, frame: FrameType | None = None) -> None:
        """Change the value at a visit where the model still stands."""
        if self.over or self.main is None or self.main.here is not visit:
            raise OutOfOrderError(
                f"Value was missed: {path} can only be assigned while the model stands there; it has gone on since."
            )
        if isinstance(visit.place, Place) and visit.place.read_only:
            raise EditError(f"{path} can be read, not changed: change the values it is made from.")
        value = value if type(value) is torch.Tensor else as_native(value)
        if not visit.written:
            visit.before = visit.value
        visit.written = True
        if worker.rows is not None:
            self._scoped(visit, visit.kind, visit.value, worker.rows).merge(worker, value, path)
        else:
            visit.value = value
            if visit.scoped is not None and visit.kind in visit.scoped:
                visit.scoped[visit.kind].replace(value)
        self.edits.note_write(path, frame or user_frame())

    def skip(self, worker: Worker, place: Any, path: str, value: Any) -> None:
        """Let `value` stand for the call that is about to happen at a place.

        Where it stands for some rows of a batch only, the others need the call: its result is exchanged in those rows.
        """
        visit = self.reach(worker, place, INPUT, path, write=True)
        if worker.rows is not None:
            visit = self.reach(worker, place, OUTPUT, path, write=True)
            self.change(worker, visit, value, f"{path} (skipped)")
            return
        visit.skipped = (as_native(value),)
        visit.written = True
        self.edits.note_write(f"{path} (skipped)", user_frame())

    def wait_for_step(self, worker: Worker, step: int) -> bool:
        """Let the model run until a step begins; False where the generation ends before."""
        self.lone = False
        request = Request(STEP, OUTPUT, "tracer.iter", step, 0)
        return self._park(worker, request, self.start()) is not None

    def wait(self, worker: Worker, condition: Callable[[], bool], what: Callable[[], str]) -> None:
        """Park `worker` until `condition()` holds; other workers bring that about."""
        if condition():
            return
        self._check_usable(worker)
        main = self.start()
        worker.condition = condition
        try:
            self._yield(worker, main)
        finally:
            worker.condition = None
        if not condition():
            raise WaitError(f"{worker.label} waits for what cannot come any more: {what()}")

    def record(self, recording: Recording) -> None:
        """Tell recorders about every call of their places from now on."""
        self.lone = False
        self.recordings.add(recording)
        self._ending.hold_for(recording)
        if self.main is not None:
            self._attach_recordings(self.main)

    def _attach_recordings(self, main: Pass) -> None:
        self.recordings.attach(main)
        self._ending.attach(main, self.instruments.profile, self.recordings, self._is_over)

    def part(self, worker: Worker, place: Any, kind: str, value: Any, index: int, path: str) -> Any:
        """The rows of `worker` in a value of the call number `index` of a place."""
        assert self.main is not None
        visit = Visit(place, kind, value, index, max(self.main.step, 0), self.main.call_in_step(place, index))
        return take(value, self._layout(visit, kind, value, worker.rows), worker.rows, path, self.joins)

    def fail(self, error: BaseException) -> None:
        """Called by a deferred worker whose code raised: the run ends with this error."""
        self._failure = error

    def _check_usable(self, worker: Worker) -> None:
        if worker.stopped:
            raise StoppedError(
                "tracer.stop() has ended this block's part of the forward pass: read what you need before it."
            )
        if self.edits.late_reads:
            self.edits.check_late_reads()

    def _late(self, request: Request, worker: Worker, write: bool) -> Visit:
        problem = explain_late(self, worker, request, write)
        if problem is not None:
            try:
                raise problem
            finally:
                del problem  # its traceback holds this frame
        self.lone = False
        if self._replay is None:
            self._replay = Replay(self)
        return self._replay.reach(request)

    def _await(self, worker: Worker, module: Module, path: str, main: Pass) -> Visit:
        """`reach` for the output of a module that is still to come, where nobody else wants anything."""
        main.awaited = module
        main.advance()
        here = main.here
        if here is not None and here.place is module:
            return here
        main.awaited = None
        self._raise_failure(main)
        return self._late(worker.request_for(module, OUTPUT, path), worker, False)

    # --- the schedule ---------------------------------------------------------------------------------------

    def _park(self, worker: Worker, request: Request, main: Pass) -> Visit | None:
        """Wait until the model stands where `request` says; None where it went past."""
        worker.request = request
        main.want(request)
        try:
            self._yield(worker, main)
        finally:
            worker.request = None
            main.unwant(request)
        served, worker.served = worker.served, None
        return served

    def _yield(self, worker: Worker, main: Pass) -> None:
        if worker.coroutine is not None:
            worker.coroutine.hand_over()
            return
        main.advance()
        if main.done or self._failure is not None:
            self._raise_failure(main)
            self._settle(main)

    def _raise_failure(self, main: Pass) -> None:
        error = self._failure or main.error
        if error is not None:
            self._failure = main.error = None
            if not isinstance(error, NNsightError):
                self.edits.annotate(error)
            try:
                raise error
            finally:
                del error  # its traceback holds this frame

    def _settle(self, main: Pass) -> None:
        """The forward is over: give deferred workers that still wait their answer."""
        while True:
            waiting = [w for w in self.workers if w.coroutine is not None and not w.finished]
            if not waiting:
                return
            able = [w for w in waiting if w.condition is None or w.condition()]
            (able or waiting)[0].resume()
            self._raise_failure(main)

    def _serve(self, visit: Visit) -> None:
        """In the model's coroutine: let everybody run who waits for this visit, in the order written."""
        workers, place = self.workers, visit.place
        if self.joins:
            self.joins.begin()
        going = True
        while going:
            going = False
            for worker in workers:
                while True:
                    request = worker.request
                    if request is None:
                        if not worker.is_ready():
                            break
                    elif request.place is place and visit.answers(request):
                        worker.served = visit
                    else:
                        break
                    going = len(workers) > 1
                    self._let_run(worker)
                    if visit.scoped is not None:
                        self._in_rows(settle_parts, visit, worker)
        if self.joins:
            self._in_rows(self.joins.check)
        if visit.scoped is not None:
            self._in_rows(leave_parts, visit, self.edits)
        if visit.written or visit.lent is not None or visit.given is not None:
            self.edits.leave(visit)

    def _begin(self) -> None:
        """In the model's coroutine, before the forward: let the deferred blocks run to their first request."""
        while ready := [w for w in self.workers if w.request is None and w.is_ready()]:
            for worker in ready:  # one may bring about what another waits for
                while worker.request is None and worker.is_ready():
                    self._let_run(worker)

    def _scoped(self, visit: Visit, kind: str, value: Any, rows: Rows) -> Scoped:
        scoped = visit.scoped
        if scoped is None:
            scoped = visit.scoped = {}
        if kind not in scoped:
            scoped[kind] = Scoped(value, self._layout(visit, kind, value, rows), self.joins)
        return scoped[kind]

    def _layout(self, visit: Visit, kind: str, value: Any, rows: Rows) -> Layout:
        call = self.call
        assert call is not None
        place = visit.place
        known = place.__class__ is OperationPlace and place.shown
        if known or place in call.batch_first or call.probe is None:
            return dict.fromkeys(leaves_of(value), BATCH_FIRST)
        owner = self if call.fake else self.instruments
        if owner.layouts is None:
            owner.layouts = Layouts(self.instruments, self.stepper)
        return owner.layouts.find(visit, kind, value, rows, call.probe, self.overrides)

    def _in_rows(self, step: Callable[..., None], *given: Any) -> None:
        try:
            step(*given)
        except NNsightError as error:
            self._failure = error
            self.main.pause()  # type: ignore[union-attr]  # called in its coroutine

    def _missed(self) -> None:
        """In the model's coroutine: wake whoever waits for something that has passed."""
        main = self.main
        assert main is not None
        for worker in self.workers:
            while worker.request is not None and main.has_passed(worker.request):
                self._let_run(worker)

    def _let_run(self, worker: Worker) -> None:
        if worker.coroutine is None:
            self.main.pause()  # type: ignore[union-attr]  # called in its coroutine
            return
        worker.resume()
        if self._failure is not None or self._is_over():
            self.main.pause()  # type: ignore[union-attr]
