"""HaltingBackward: a backward on a thread of its own, that can be made to stand still before any node.

PyTorch calls hooks on threads of its own where the graph is on a GPU, and a greenlet cannot be resumed from
another thread: so backward gets an OS thread, and stands still by waiting in a hook.  Whoever makes it go on
waits meanwhile: of the two, one runs at a time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from contextvars import Context, copy_context
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .._core import active, capture_modes, switch_modes

Gradients = tuple["torch.Tensor | None", ...]


class Cancelled(Exception):
    """Raised in backward's thread to end it."""


class Given(NamedTuple):
    """A gradient as the block has it, and what tells that it was changed."""

    tensor: torch.Tensor | None
    version: int | None  # None: to be taken as changed


class Halt:
    """Backward standing still before one node, with the gradients that have arrived there."""

    def __init__(self, node: Any, gradients: Gradients) -> None:
        self.node = node
        self.orders: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._gradients = gradients
        self._given: dict[int, Given] = {}
        self._tensors: dict[int, torch.Tensor] = {}
        self._marks = _mark_streams(gradients)

    def read(self, output: int, tensor: torch.Tensor) -> torch.Tensor | None:
        """The gradient of `tensor`: a copy, for autograd lets one tensor stand on several paths."""
        if output not in self._given:
            _await_streams(self._marks)
            gradient = self._gradients[output]
            if gradient is None:
                return None
            with torch.set_grad_enabled(gradient.requires_grad):
                copy = gradient.clone()
            self._given[output] = Given(copy, None if copy.is_inference() else copy._version)
            self._tensors[output] = tensor
        return self._given[output].tensor

    def write(self, output: int, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Let `value` be the gradient of `tensor`."""
        if output in self._given and value is self._given[output].tensor:
            return  # t.grad += x
        self._given[output] = Given(value, None)
        self._tensors[output] = tensor

    def go_on(self) -> None:
        """Let backward run again."""
        self._marks = _mark_streams([given.tensor for given in self._given.values()])
        self.orders.put(None)

    def wait(self) -> None:
        """In backward's thread: do what is ordered until `go_on`."""
        while (order := self.orders.get()) is not None:
            order()

    def result(self) -> Gradients | None:
        """In backward's thread: the gradients as changed, None where they were not."""
        _await_streams(self._marks)
        changed = {n: given.tensor for n, given in self._given.items() if _has_changed(given)}
        if not changed:
            return None
        # Copies: what the block holds may still change, and is no part of backward any more.
        copies = {n: tensor.clone() for n, tensor in changed.items() if tensor is not None}
        for n, value in copies.items():
            _correct_retained(self._tensors[n], self._gradients[n], value)
        return tuple(copies.get(n, gradient) for n, gradient in enumerate(self._gradients))


class HaltingBackward:
    """Runs `backward`, a plain call, as far as it is told.

    `here` is where it stands still; `inside` is another one that stands still, in whose thread this one runs.
    """

    def __init__(self, backward: Callable[[], None]) -> None:
        self.here: Halt | None = None
        self.started = self.ended = False
        self._error: BaseException | None = None
        self._backward = backward
        self._cancelled = False
        self._unclaimed = [True]
        self._last: Halt | None = None
        self._woken: SimpleQueue[None] = SimpleQueue()
        self._handles: list[Any] = []
        self._thread: threading.Thread | None = None

    def run_to(self, node: Any, inside: HaltingBackward | None = None) -> bool:
        """Run until just before `node`; False where backward ended without coming by."""
        halted = False

        def halt(gradients: Gradients) -> Gradients | None:
            nonlocal halted
            if halted:
                return None
            halted = True
            self._check_cancelled()
            here = self.here = self._last = Halt(node, gradients)
            self._woken.put(None)
            here.wait()
            self._check_cancelled()
            return here.result()

        self._handles.append(node.register_prehook(halt))
        self._go_on(inside)
        self._await()
        return self.here is not None

    def finish(self) -> None:
        """Run to the end."""
        while not self.ended:
            self._go_on(None)
            self._await()

    def cancel(self) -> None:
        """End it where it stands."""
        self._cancelled = True
        if not self._claim():
            while not self.ended:  # an interrupt may have come at any point before
                if self._last is not None:
                    self._last.go_on()
                self._woken.get()
        self.here = self._error = None

    def close(self) -> None:
        """Take the hooks away, and let go of everything."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._last = None
        self._backward = _nothing
        thread, self._thread = self._thread, None
        if thread is not None and self.ended:
            thread.join()

    def call(self, function: Callable[[], Any]) -> Any:
        """Call a function in the thread that stands still, without which a GPU serves no other backward."""
        here = self.here
        assert here is not None
        outcome: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        in_modes = _with_modes(function)

        def order() -> None:
            try:
                outcome.put((in_modes(), None))
            except BaseException as error:
                outcome.put((None, error))

        here.orders.put(order)
        result, error = outcome.get()
        if error is not None:
            raise error
        return result

    def _go_on(self, inside: HaltingBackward | None) -> None:
        if not self.started:
            self.started = True
            self._start(inside)
        elif self.here is not None:
            here, self.here = self.here, None
            here.go_on()

    def _start(self, inside: HaltingBackward | None) -> None:
        main = _with_modes(self._main)
        if inside is not None and inside.here is not None:
            inside.here.orders.put(main)
            return
        context = copy_context()
        context.run(active.set, None)
        self._thread = threading.Thread(
            target=_run_thread, args=(context, main, _cuda_stream()), name="nnsight-backward", daemon=True
        )
        self._thread.start()

    def _main(self) -> None:
        if not self._claim():
            return
        try:
            self._backward()
        except BaseException as error:
            self._error = error
        finally:
            self.ended = True
            self._woken.put(None)

    def _claim(self) -> bool:
        # Whether it is the caller, and nobody before, who decides if backward runs.
        try:
            self._unclaimed.pop()
        except IndexError:
            return False
        return True

    def _await(self) -> None:
        while self.here is None and not self.ended:
            self._woken.get()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _check_cancelled(self) -> None:
        if self._cancelled:
            raise Cancelled


def _run_thread(context: Context, main: Callable[[], None], stream: Any) -> None:
    if stream is not None:
        torch.cuda.set_stream(stream)
    context.run(main)


def _with_modes(function: Callable[[], Any]) -> Callable[[], Any]:
    """`function` under the thread-local modes that hold here, wherever it is called."""
    modes, dispatch = capture_modes(), tuple(_get_current_dispatch_mode_stack())

    def call() -> Any:
        before, present = capture_modes(), len(_get_current_dispatch_mode_stack())
        switch_modes(before, modes)
        try:
            with contextlib.ExitStack() as stack:
                for mode in dispatch[present:]:
                    stack.enter_context(mode)
                return function()
        finally:
            switch_modes(capture_modes(), before)

    return call


def _has_changed(given: Given) -> bool:
    tensor, version = given
    return version is None or (tensor is not None and tensor._version != version)


def _correct_retained(tensor: torch.Tensor, arrived: torch.Tensor | None, value: torch.Tensor) -> None:
    # `retain_grad()` has stored what arrived, before the block could change it.
    retained = tensor.grad if tensor.retains_grad else None
    if retained is None or arrived is None:
        return
    with torch.no_grad():
        accumulated = not torch.equal(retained, arrived)
        tensor.grad = retained + (value - arrived) if accumulated else value.detach().clone()


# --- streams: what one thread computes on a GPU, the other waits for there ------------------------------


def _cuda_stream() -> Any:
    return torch.cuda.current_stream() if torch.cuda.is_initialized() else None


def _mark_streams(tensors: Sequence[torch.Tensor | None]) -> list[tuple[torch.device, Any]]:
    devices = {tensor.device for tensor in tensors if tensor is not None and tensor.is_cuda}
    return [(device, torch.cuda.current_stream(device).record_event()) for device in devices]


def _await_streams(marks: list[tuple[torch.device, Any]]) -> None:
    for device, event in marks:
        torch.cuda.current_stream(device).wait_event(event)


def _nothing() -> None:
    return None
