"""The second pass: the same forward once more, with the edits made so far, for reads that came too late."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import OutOfOrderError
from ._order import never_ran, warn_late
from ._pass import Pass
from ._preserve import preserved_buffers
from ._tensors import map_tensors, tensors_in
from ._visit import OperationPlace, Request, Visit

if TYPE_CHECKING:
    from ._run import Run


class Replay:
    """Runs only as far as a late read needs, and goes on from there for the next one."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._pass: Pass | None = None
        self._request: Request | None = None
        self._random_state = run.edits.random_state
        self._wanted: set[tuple[Any, str]] = set()
        self._warned = False

    def reach(self, request: Request) -> Visit:
        """The visit that `request` asks for, in a repetition of the main pass."""
        current, fresh = self._pass, False
        if current is None or current.done or current.has_passed(request):
            current, fresh = self._restart(), True
        found = self._advance(current, request)
        if found is None and not fresh:
            found = self._advance(self._restart(), request)
        if found is None:
            raise never_ran(self._run, request)
        if not self._warned:
            self._warned = True
            warn_late(self._run, request)
        return found

    def close(self) -> None:
        """Unwind the second pass."""
        if self._pass is not None:
            self._pass.close()
            self._pass = None

    def _restart(self) -> Pass:
        self.close()
        run = self._run
        assert run.call is not None
        self._random_state = run.edits.random_state
        self._pass = Pass(run.call, run.instruments, run.stepper, run.modes, run.overrides, self._serve, self._missed)
        self._wanted.clear()
        return self._pass

    def _want_edited_places(self, current: Pass) -> None:
        for place, kind, _ in self._run.edits.by_visit:
            if (place, kind) not in self._wanted:
                self._wanted.add((place, kind))
                self._watch(current, place)
                current.want(Request(place, kind, "", None, 0))

    def _watch(self, current: Pass, place: Any) -> None:
        if isinstance(place, OperationPlace):
            current.see().watch(place)
        elif not place._modules:
            current.watch(place)

    def _advance(self, current: Pass, request: Request) -> Visit | None:
        here = current.here
        if here is not None and here.kind == request.kind and here.is_occurrence(request):
            return here
        self._want_edited_places(current)
        self._watch(current, request.place)
        self._request = request
        current.want(request)
        try:
            with _RandomState(self), preserved_buffers(self._run.instruments.root) as changed:
                current.advance()
            if changed:
                raise OutOfOrderError(_STATEFUL)
        finally:
            current.unwant(request)
            self._request = None
        error, current.error = current.error, None
        if error is None:
            return current.here
        try:
            raise error
        finally:
            del error  # its traceback holds this frame

    def _serve(self, visit: Visit) -> None:
        edit = self._run.edits.by_visit.get((visit.place, visit.kind, visit.index))
        if edit is not None:
            if edit.changed is not None:
                _change_in_place(visit.value, edit.changed)
            if edit.replaced:
                value = map_tensors(lambda tensor: tensor.detach().clone(), edit.value)
                if edit.skipped:
                    visit.skipped = (value,)
                else:
                    visit.value = value
        request = self._request
        if request is not None and request.kind == visit.kind and visit.is_occurrence(request):
            assert self._pass is not None
            self._pass.pause()

    def _missed(self) -> None:
        current, request = self._pass, self._request
        if current is not None and request is not None and current.has_passed(request):
            current.pause()

    def swap_random_state(self) -> None:
        """Exchange the generator's state with the second pass's own."""
        state = torch.default_generator.get_state()
        if self._random_state is not None:
            torch.default_generator.set_state(self._random_state)
        self._random_state = state


class _RandomState:
    """The second pass draws the numbers the first one drew, and the first goes on with its own."""

    def __init__(self, replay: Replay) -> None:
        self._replay = replay

    def __enter__(self) -> None:
        self._replay.swap_random_state()

    def __exit__(self, *_: object) -> None:
        self._replay.swap_random_state()


def _change_in_place(value: Any, wanted: Any) -> None:
    """Give the tensors of `value` the numbers of `wanted`, so that whatever else holds them has the change too."""
    with torch.no_grad():
        for tensor, numbers in zip(tensors_in(value), tensors_in(wanted), strict=True):
            if not torch.equal(tensor, numbers):
                tensor.copy_(numbers)


_STATEFUL = """\
Value was missed: it was asked for after its place had passed, and a second pass cannot serve it, because this model \
changes its own buffers in the forward (batch norm in training mode, or a cache). Move the line up, or put the model in \
eval mode."""
