"""Pass: one execution of the forward in a coroutine, standing still where somebody waits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from greenlet import GreenletExit, getcurrent, greenlet
from torch.nn import Module
from torch.nn.modules.module import _global_forward_hooks

from ..errors import NotTracingError
from ._coroutine import OTHER_THREAD, Coroutine, borrow, give_back
from ._instrument import REPLACEMENT_CODE
from ._modes import Modes, capture_modes, end_loan, is_inference, lend_inference, switch_modes
from ._sight import Sight
from ._visit import INPUT, OUTPUT, RESULT, STEP, OperationPlace, Place, Request, Visit

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from ._instrument import Instruments
    from ._record import Recorder

Override = Callable[[Callable[..., Any]], Callable[..., Any]]


class Pass:
    """One forward (or one generation) of the model.

    Two functions are called in the coroutine: `serve(visit)` whenever a place comes by that somebody wants,
    `missed()` when places that were wanted may have been passed.
    """

    def __init__(
        self,
        call: Callable[[], Any],
        instruments: Instruments,
        stepper: Module,
        modes: Modes,
        overrides: dict[Any, Override],
        serve: Callable[[Visit], None],
        missed: Callable[[], None],
        begin: Callable[[], None] | None = None,
    ) -> None:
        self.here: Visit | None = None
        self.awaited: Module | None = None
        self.attended: set[Any] = {stepper}  # modules whose calls may concern somebody
        self.done = self.closing = self.learning = False
        self.error: BaseException | None = None
        self.step, self.last_step = -1, sys.maxsize
        self.counts: dict[Any, int] = {}
        self.running: list[Any] = []
        self.final: dict[Any, Any] = {}
        self.wanted_inputs: dict[Any, int] = {}
        self.wanted_outputs: dict[Any, int] = {}
        self.guards: dict[Any, set[Any]] = {}
        self.sight: Sight | None = None
        self.single = getattr(call, "function", None) is stepper or getattr(call, "repeatable", False)  # one step
        self.recorders: dict[Any, list[Recorder]] = {}
        self.input_recorders: dict[Any, list[Recorder]] = {}
        self._handles: list[RemovableHandle] = []
        self._step_counts: dict[Any, int] = {}
        self._counted: set[Module] = set()
        self.all_counted = self._lent_inference = False
        self._call = call
        self._instruments = instruments
        self._stepper = stepper
        self._modes = modes
        self.overrides = overrides
        self._serve = serve
        self.hand_on: Callable[[Visit], None] = serve
        self._missed = missed
        self._begin = begin
        self._coroutine: Coroutine | None = None
        self._driver: greenlet | None = None

    # --- driven from outside -------------------------------------------------------------------------

    def advance(self) -> None:
        """Run the model until `pause` is called in it, or it ends."""
        coroutine = self._coroutine
        if coroutine is None:
            coroutine = self._coroutine = borrow(self._main)
            coroutine.serves = self
        here = getcurrent()
        if self._driver is not here:
            if not coroutine.is_here():
                raise NotTracingError(OTHER_THREAD)
            self._driver = coroutine.parent = here
        body, model = capture_modes(), self._modes
        if body is not model:
            switch_modes(body, model)
        coroutine.switch()
        self._modes = model = capture_modes()
        if body is not model:
            self._restore_body(body, model)

    def _restore_body(self, body: Modes, model: Modes) -> None:
        # Inference tensors can be edited only in inference mode: a body that holds them may edit those alone.
        if self._lent_inference:
            body = end_loan(body)
        self._lent_inference = is_inference(model) and not is_inference(body) and not self.done
        switch_modes(model, lend_inference(body) if self._lent_inference else body)

    def close(self) -> None:
        """Unwind the model where it stands."""
        self.closing = True
        coroutine, self._coroutine = self._coroutine, None
        if coroutine is not None:
            if self.done:
                give_back(coroutine)
            else:
                body = capture_modes()
                switch_modes(body, self._modes)  # the model's own `with` blocks end here
                give_back(coroutine)
                switch_modes(capture_modes(), end_loan(body) if self._lent_inference else body)
        while self._handles:
            self._handles.pop().remove()
        self.error = None
        self._call = self._serve = self._missed = self.hand_on = _nothing
        self._begin = None
        self.here = self._driver = self.sight = self.awaited = None
        self.final = {}

    # --- called in the model's coroutine -------------------------------------------------------------

    def pause(self) -> None:
        """Let whoever advanced this pass go on."""
        self._driver.switch()  # type: ignore[union-attr]  # set by `advance`, without which nothing runs

    def call(self, place: Any, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module or an operation that may be wanted."""
        if self.closing:
            return plain(*args, **kwargs)
        if place is self._stepper:
            self._begin_step()  # before it counts as called, so that its input is still to come
        counts = self.counts
        index = counts.get(place, 0)
        counts[place] = index + 1
        self.running.append(place)
        try:
            if place in self.wanted_inputs:
                visit = self._visit(place, INPUT, (args, kwargs), index)
                if visit.skipped is not None:
                    self._pass_by_inside(place)
                    return self.leave(place, visit.skipped[0], index, args, kwargs)
                args, kwargs = visit.value
            if self.overrides and place in self.overrides:
                plain = self.overrides[place](plain)
            if self.input_recorders and place in self.input_recorders:
                for recorder in self.input_recorders[place]:
                    recorder.begin(args, kwargs, index)
            result = plain(*args, **kwargs)
            if place in self.wanted_outputs or place in self.guards or place in self.recorders:
                return self.leave(place, result, index, args, kwargs)
            return result
        finally:
            self.running.pop()

    def deliver(self, module: Module, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module that a run's only worker waits for: `call` without what the others would need."""
        self.awaited = None
        self.counts[module] = 1
        result = plain(*args, **kwargs)
        visit = self.here = Visit(module, OUTPUT, result, 0, 0, 0, (args, kwargs))
        self._driver.switch()  # type: ignore[union-attr]
        if self.awaited is None:
            self._serve(visit)
        elif visit.lent is not None or visit.written or visit.given is not None:
            self.hand_on(visit)
        self.here = None
        if self.guards and module in self.guards:
            self._pass_by_children(module)
        if self.recorders:
            for recorder in self.recorders.get(module, ()):
                recorder.end(visit.value, args, kwargs, 0, self.step)
        return visit.value

    def touch(self, place: Any, value: Any) -> Any:
        """Let a value appear at a place that is not a call; returns it as edited."""
        index = self.counts.get(place, 0)
        self.counts[place] = index + 1
        if place in self.wanted_outputs:
            value = self._visit(place, OUTPUT, value, index).value
        if place.final:
            self.final[place] = value
        return value

    def leave(self, place: Any, result: Any, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """End a call: what the model goes on with."""
        if self.closing:
            return result
        if place._forward_hooks or _global_forward_hooks:
            self._leave_after_hooks(place, index, args, kwargs)
            return result
        if place in self.wanted_outputs:
            visit = self._visit(place, OUTPUT, result, index, (args, kwargs))
            result = visit.value
        if place in self.guards:
            self._pass_by_children(place)
        for recorder in self.recorders.get(place, ()):
            recorder.end(result, args, kwargs, index, self.step)
        return result

    def _leave_after_hooks(self, module: Module, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The user's own hooks may change the output: what the next module gets is what they leave.
        def last(_module: Module, _args: Any, result: Any) -> Any:
            if getcurrent() is not self._coroutine:
                return None
            handle.remove()
            self._handles.remove(handle)
            if module in self.wanted_outputs:
                result = self._visit(module, OUTPUT, result, index, (args, kwargs)).value
            if module in self.guards:
                self._pass_by_children(module)
            for recorder in self.recorders.get(module, ()):
                recorder.end(result, args, kwargs, index, self.step)
            return result

        handle = module.register_forward_hook(last)
        self._handles.append(handle)  # a hook of the user's that raises keeps it from being called

    def _visit(self, place: Any, kind: str, value: Any, index: int, inputs: Any = None) -> Visit:
        step, outer = self.step, self.here
        if step > 0:
            visit = Visit(place, kind, value, index, step, index - self._step_counts.get(place, 0), inputs)
        else:
            visit = Visit(place, kind, value, index, 0, index, inputs)
        self.here = visit
        self._serve(visit)
        self.here = outer
        return visit

    def _begin_step(self) -> None:
        self.step += 1
        if self.step:
            stepper = self._stepper
            if self.learning and stepper.__class__ is not Place:  # else a step is but a part of what there is
                self._learned()
            self._step_counts = dict(self.counts)
            if self.wanted_inputs or self.wanted_outputs:
                self._missed()
        if STEP in self.wanted_outputs:
            self.touch(STEP, self.step)

    def end_steps(self) -> None:
        """No other step comes, though the model goes on."""
        self.last_step = self.step
        self._missed()

    def _main(self) -> None:
        try:
            if self._begin is not None:
                self._begin()
            result = self._call()
            if self.learning:
                self._learned()
            self.touch(RESULT, result)
            del result
        except BaseException as error:
            if self.closing and isinstance(error, GreenletExit):
                return
            self.error = error
            if self._coroutine is not None:
                self._coroutine.reusable = False
        finally:
            self.done = True
            self.here = None

    # --- what is wanted, and what has come by -----------------------------------------------------------

    def want(self, request: Request) -> None:
        """Stand still at the places `request` asks for, until `unwant`."""
        wanted = self.wanted_inputs if request.kind == INPUT else self.wanted_outputs
        place = request.place
        wanted[place] = wanted.get(place, 0) + 1
        self.attended.add(place)

    def unwant(self, request: Request) -> None:
        """Undo one `want`."""
        wanted = self.wanted_inputs if request.kind == INPUT else self.wanted_outputs
        place = request.place
        count = wanted.pop(place)
        if count > 1:
            wanted[place] = count - 1

    def learn(self, *, keep: bool = True) -> None:
        """Count every module in this pass, and keep which leaves are called otherwise than their parents."""
        self.learning, self.all_counted = keep, True
        for module in self._instruments.modules():
            self._instruments.add(module)

    def watch(self, module: Module) -> None:
        """Make a module's calls visible; modules with children are so from the start."""
        if module in self._counted:
            return
        if self.all_counted and "forward" in vars(module) and not self._is_shown(module):
            return
        self._counted.add(module)
        instruments = self._instruments
        if instruments.add(module):
            return  # counted from the start
        parent = instruments.parent(module)
        count = self.counts.get(parent)
        if parent is None or not count:
            return
        # A leaf that is always called once in a call of its parent: the parent's count tells its own.
        running = self.running.count(parent)
        if running and not self._is_past(parent, module):
            count -= running
            self.guard(parent, module)
        if count:
            self.counts[module] = count
            self._step_counts[module] = self._step_counts.get(parent, 0)

    def is_ahead(self, place: Any) -> bool:
        """Whether `place`, of which no call was counted, is a module still to come, and `deliver` can serve it."""
        if place is self._stepper or self.overrides or self.done or place.__class__ is OperationPlace:
            return False
        here = self.here
        if place._forward_hooks or _global_forward_hooks or (here is not None and here.skipped is not None):
            return False
        if isinstance(place, Place):
            return False
        if place._modules or place in self._counted or (self.all_counted and "forward" in vars(place)):
            return True
        parents, counts = self._instruments.parents(), self.counts
        parent = parents.get(place)
        if parent in counts:
            # In the one call of the parent, that runs now: the order of an earlier run tells.
            order = self._instruments.first_calls
            if here is None or counts[parent] > 1 or parents.get(here.place) is not parent:
                return False
            if order.get(here.place, len(order)) >= order.get(place, 0):
                return False
        if not self._instruments.add(place):
            self._counted.add(place)
        return True

    def _is_shown(self, module: Module) -> bool:
        """Whether the module is never called, but shown by the override of the module around it."""
        return bool(self.overrides) and self._instruments.parent(module) in self.overrides

    def _is_past(self, parent: Module, leaf: Module) -> bool:
        # In the running call of `parent`: whether what runs there now used to come after the leaf.
        running, here = self.running, self.here
        if running[-1] is not parent:
            now = running[len(running) - running[::-1].index(parent)]
        elif here is not None:
            now = here.place
        else:
            return False
        first_calls = self._instruments.first_calls
        return first_calls.get(leaf, len(first_calls)) < first_calls.get(now, 0)

    def guard(self, parent: Module, place: Any) -> None:
        """When a call of `parent` is over, see to it that `place`, called in it, counts as passed."""
        self.attended.add(parent)
        guarded = self.guards.get(parent)
        if guarded is None:
            self.guards[parent] = {place}
        else:
            guarded.add(place)

    def _pass_by_children(self, parent: Module) -> None:
        for place in self.guards.pop(parent):
            if place.__class__ is OperationPlace:
                if not self.see().leave(place):
                    self.guard(parent, place)
            else:
                self.counts[place] = max(self.counts.get(place, 0), self.counts[parent])
        self._missed()

    def _pass_by_inside(self, place: Any) -> None:
        # What this pass counts is no profile of the model any more.
        self.learning = False
        if place.__class__ is OperationPlace or place in self.overrides:
            self.see().open(place)
        if isinstance(place, Module) and place._modules:
            self.see().skip(place)
            for module in [m for m in place.modules() if m is not place and m in self.guards]:
                self._pass_by_children(module)
            self._missed()

    def see(self) -> Sight:
        """What this pass knows of operations and of skipped calls."""
        if self.sight is None:
            self.sight = Sight(self, self._instruments)
        return self.sight

    def calls_before_step(self, place: Any) -> int:
        """How many calls of `place` had begun when the current step did."""
        return self._step_counts.get(place, 0) if self.step > 0 else 0

    def ended(self, place: Any) -> int:
        """How many calls of `place` are over."""
        return self.counts.get(place, 0) - self.running.count(place)

    def arguments_of(self, place: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What the call of `place` that runs now was given.

        Asked in the model's own code; it is looked for on the stack, so that calls pay nothing for it.
        """
        frame = sys._getframe(1)
        while frame is not None and frame.f_code is not _MAIN:
            name = _CALLS.get(frame.f_code)
            if name is not None and frame.f_locals[name] is place:
                return frame.f_locals["args"], frame.f_locals["kwargs"]
            frame = frame.f_back
        return None

    def call_in_step(self, place: Any, index: int) -> int:
        """The number within its step of a place's call number `index`."""
        return index - self._step_counts.get(place, 0) if self.step > 0 else index

    def has_passed(self, request: Request) -> bool:
        """Whether the occurrence that `request` asks for is over."""
        place = request.place
        if place.__class__ is OperationPlace and self.see().is_out_of_sight(request):
            return True
        if request.step is None and place not in self.counts:
            return False
        count = self.counts.get(place, 0) if request.kind == INPUT else self.ended(place)
        if request.step is None:
            return count > request.call
        if request.step < self.step or request.step > self.last_step:
            return True
        return request.step == self.step and count - self._step_counts.get(place, 0) > request.call

    def _learned(self) -> None:
        self.learning = False
        self._instruments.keep_profile(dict(self.counts))
        self._instruments.watch_odd(self.counts)


_CALLS = {Pass.call.__code__: "place", REPLACEMENT_CODE: "module"}  # what their variable for the place is called
_MAIN = Pass._main.__code__


def _nothing(*_: Any) -> None:
    return None
