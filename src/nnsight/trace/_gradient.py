"""Gradients: `with loss.backward():`, a block in which `.grad` of the forward's tensors is read and written.

While a trace is open `Tensor.backward` looks at what the caller does with its result: entered with `with`,
it gives a block, otherwise it is plain autograd; and `tensor.requires_grad = True` is no error where it holds
already.  While such a block is open `Tensor.grad` is the gradient of that backward.  For code that belongs to
no trace all of them are what they always are.
"""

from __future__ import annotations

import dis
import functools
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.autograd import Variable

from .._core import (
    Alias,
    Worker,
    active,
    check_gradient,
    current_pass,
    describe_line,
    own_part,
    source_of_gradient,
    user_line,
)
from .._patches import Replacement
from ..errors import GradientError
from ._graph import Edge, Graph, edge_of
from ._halting import HaltingBackward

_open: dict[Worker, Backward] = {}  # each worker's innermost block


class Backward:
    """What `with loss.backward(...):` gives.

    Asking for `tensor.grad` lets backward run until the gradient of `tensor` is complete, and stand still
    there: changed or replaced, it flows on to earlier layers as changed.  So gradients are asked for in the
    reverse order of the forward.  The gradient is that of this backward alone, with respect to the value the
    tensor has now, as `retain_grad()` would give it.  Leaving the block lets backward run to its end.

    Example:
        >>> import torch, nnsight
        >>> model = nnsight.NNsight(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)))
        >>> with model.trace(torch.ones(1, 3)):
        ...     hidden = model[0].output
        ...     loss = model.output.sum()
        ...     with loss.backward():
        ...         grad = hidden.grad.save()
        >>> grad.shape
        torch.Size([1, 4])

    Raises:
        GradientError: The loss or a tensor has no gradient, or its gradient has already been passed.
    """

    def __init__(self, worker: Worker, loss: torch.Tensor, backward: Callable[[], None]) -> None:
        self._worker = worker
        self._loss: torch.Tensor | None = loss
        self._backward = backward
        self._flow = HaltingBackward(backward)
        self._entered = False
        self._outer: Backward | None = None
        self._graph: Graph | None = None
        self._os_thread = threading.get_ident()
        self._seen: dict[Edge, tuple[torch.Tensor | None, str]] = {}
        self._read_late: list[tuple[torch.Tensor, int, str]] = []
        self._last_line = ""

    def __enter__(self) -> Backward:
        if self._entered:
            raise GradientError("A backward block can be entered once: call loss.backward() again.")
        self._entered = True
        self._outer = _open.get(self._worker)
        _open[self._worker] = self
        for replacement in _in_a_block:
            replacement.hold()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        try:
            if error is None:
                self._check_late_reads()
                self._finish()
        finally:
            try:
                self._flow.cancel()
            finally:
                self._close()
        return False

    def read(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The gradient of `tensor`."""
        edge = self._edge(tensor)
        if self._stands_at(edge):
            return self._take(edge, tensor)
        if edge in self._seen:
            return self._take_again(edge)
        self._reach(edge, tensor)
        return self._take(edge, tensor)

    def write(self, tensor: torch.Tensor, value: Any) -> None:
        """Let `value` be the gradient of `tensor` that flows on."""
        edge = self._edge(tensor)
        check_gradient(tensor, value)
        if not self._stands_at(edge):
            self._reach(edge, tensor)
        here = self._flow.here
        assert here is not None
        here.write(edge.output, tensor, value)
        self._seen[edge] = value, self._last_line

    def standing(self) -> HaltingBackward | None:
        """The backward of this block, or the nearest around it, that stands still."""
        block: Backward | None = self
        while block is not None:
            if block._flow.here is not None:
                return block._flow
            block = block._outer
        return None

    def _edge(self, tensor: torch.Tensor) -> Edge:
        if not tensor.requires_grad:
            raise GradientError(_NO_GRAD.format(shape=list(tensor.shape)))
        if self._graph is None:
            assert self._loss is not None
            self._graph = Graph(edge_of(self._loss))
        edge = edge_of(tensor)
        if edge not in self._graph:
            raise GradientError(_NOT_IN_GRAPH.format(shape=list(tensor.shape)))
        return edge

    def _stands_at(self, edge: Edge) -> bool:
        return self._flow.here is not None and self._flow.here.node is edge.node

    def _take(self, edge: Edge, tensor: torch.Tensor) -> torch.Tensor | None:
        here = self._flow.here
        assert here is not None
        gradient = here.read(edge.output, tensor)
        self._seen[edge] = gradient, self._last_line
        return gradient

    def _take_again(self, edge: Edge) -> torch.Tensor | None:
        gradient, _ = self._seen[edge]
        if gradient is not None and not gradient.is_inference():
            self._read_late.append((gradient, gradient._version, describe_line(user_line())))
        return gradient

    def _reach(self, edge: Edge, tensor: torch.Tensor) -> None:
        flow, graph = self._flow, self._graph
        assert graph is not None
        self._check_late_reads()
        here = flow.here
        passed = edge in self._seen or flow.ended
        if passed or (here is not None and graph.runs_before(edge.node, here.node)):
            raise self._passed(tensor)
        if not flow.started:
            self._check_alone(tensor)
        if not flow.run_to(edge.node, self._outer.standing() if self._outer is not None else None):
            raise self._passed(tensor)
        self._last_line = describe_line(user_line())

    def _finish(self) -> None:
        if self._flow.started:
            self._flow.finish()
        else:
            self._leave()
            self._backward()

    def _leave(self) -> None:
        if _open.get(self._worker) is self:
            del _open[self._worker]
            if self._outer is not None:
                _open[self._worker] = self._outer

    def _close(self) -> None:
        self._leave()
        for replacement in _in_a_block:
            replacement.release()
        self._flow.close()
        self._graph = self._loss = self._outer = None
        self._backward = _entered_already
        self._seen.clear()
        self._read_late.clear()

    # --- what cannot be had --------------------------------------------------------------------------------

    def _passed(self, tensor: torch.Tensor) -> GradientError:
        shape = list(tensor.shape)
        if not self._last_line:
            return GradientError(_NEVER_CAME.format(shape=shape))
        return GradientError(_PASSED.format(shape=shape, line=self._last_line))

    def _check_late_reads(self) -> None:
        for gradient, version, line in self._read_late:
            if gradient._version != version:
                self._read_late.clear()
                raise GradientError(_LATE_EDIT.format(line=line))

    def _check_alone(self, tensor: torch.Tensor) -> None:
        # On a GPU backward stands still in the device's only thread: that of another block could never go on.
        if tensor.device.type == "cpu":
            return
        for block in list(_open.values()):
            if block._worker is not self._worker and block._os_thread == self._os_thread and block.standing():
                raise GradientError(_INTERLEAVED.format(label=block._worker.label))


def _entered_already() -> None:
    raise GradientError("A backward block can be entered once: call loss.backward() again.")


# --- what stands for PyTorch's own in a trace and in a block ----------------------------------------


def is_entered(frame: FrameType) -> bool:
    """Whether a `with` statement enters what the call that `frame` is making returns."""
    code = frame.f_code.co_code
    at = frame.f_lasti + 2
    while at < len(code):
        name = dis.opname[code[at]]
        if name not in _BEFORE_ENTERING:
            return name in _ENTERING
        at += 2
    return False


_ENTERING = {"SETUP_WITH", "BEFORE_WITH", "LOAD_SPECIAL"}
_BEFORE_ENTERING = {"CACHE", "NOP", "EXTENDED_ARG", "COPY"}


def _current() -> Backward | None:
    worker = active.get() if _open else None
    return _open.get(worker) if worker is not None and current_pass() is None else None


def _make_backward(plain: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        worker = active.get()
        if worker is None or current_pass() is not None:
            return plain(self, *args, **kwargs)
        if not self.requires_grad:
            raise GradientError(_NO_GRAPH)
        if not is_entered(sys._getframe(1)):
            return plain(self, *args, **kwargs)
        if self.numel() != 1 and not args and kwargs.get("gradient") is None:
            raise GradientError(_NOT_A_NUMBER.format(shape=list(self.shape)))
        return Backward(worker, self, lambda: plain(self, *args, **kwargs))

    return backward


def _make_requires_grad(plain: Any) -> property:
    def set_(self: torch.Tensor, value: bool) -> None:
        if not value or active.get() is None or not plain.__get__(self):
            plain.__set__(self, value)

    return property(plain.__get__, set_)


def _make_grad(plain: Any) -> property:
    def get(self: torch.Tensor) -> torch.Tensor | None:
        block = _current()
        if block is None or _is_torch(sys._getframe(1)):
            return plain.__get__(self)
        return block.read(self)

    def set_(self: torch.Tensor, value: Any) -> None:
        block = _current()
        if block is None or _is_torch(sys._getframe(1)):
            plain.__set__(self, value)
        else:
            block.write(self, value)

    return property(get, set_, lambda self: plain.__delete__(self))


def _is_torch(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] == "torch"


class _Engine:
    """Autograd's engine, which is asked for gradients of aliases as well.

    What a block calls it for runs in the thread where its backward stands still.
    """

    def __init__(self, plain: Any) -> None:
        self._plain = plain

    def run_backward(self, *args: Any, **kwargs: Any) -> Any:
        # (tensors, gradients, retain_graph, create_graph, inputs, ...)
        inputs = args[_INPUTS] if len(args) > _INPUTS else ()
        if not any(isinstance(tensor, Alias) for tensor in inputs):
            return self._run(*args, **kwargs)
        sources = tuple(source_of_gradient(tensor) for tensor in inputs)
        found = self._run(*args[:_INPUTS], sources, *args[_INPUTS + 1 :], **kwargs)
        if not isinstance(found, tuple) or not found:
            return found
        return tuple(own_part(tensor, gradient) for tensor, gradient in zip(inputs, found, strict=True))

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        block = _current()
        standing = block.standing() if block is not None else None
        if standing is None:
            return self._plain.run_backward(*args, **kwargs)
        return standing.call(lambda: self._plain.run_backward(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)


_INPUTS = 4

# In place once a model is wrapped, and plain PyTorch outside a trace: to exchange them for each trace would cost PyTorch
# its cache of a tensor's attributes each time.
IN_A_TRACE = (
    Replacement(torch.Tensor, "backward", _make_backward),
    Replacement(torch.Tensor, "requires_grad", _make_requires_grad),
    Replacement(Variable, "_execution_engine", _Engine),
)
_in_a_block = (Replacement(torch.Tensor, "grad", _make_grad),)

_NO_GRAPH = """\
There is nothing to go back through: the loss does not require grad. Either the trace, or the lines that \
compute the loss, run under torch.no_grad() or inference mode: open the trace with gradients on. Or the \
model's own code switches them off, as `generate` of transformers does: use trace(). Or every parameter is \
frozen: call hidden.requires_grad_(True) on a value as soon as you have read it."""
_NOT_A_NUMBER = """\
backward() starts from one number, and this tensor has the shape {shape}: write `with \
tensor.sum().backward():`, or give the gradient to start from, `with tensor.backward(gradient=g):`."""
_NO_GRAD = """\
This tensor of shape {shape} has no gradient, because it does not require grad: it was computed from frozen \
values or under torch.no_grad(), is a detached copy, or was read after its place in the forward had passed. \
Read it in the order of the forward, before the loss is computed, and call tensor.requires_grad_(True) on \
it there."""
_NOT_IN_GRAPH = """\
This tensor of shape {shape} has no gradient in this backward, because the loss was not computed from it: \
it is a copy, a slice, or a result that went nowhere. Ask for the gradient of the tensor that the model \
itself goes on with, as module.output gives it, or put yours in its place: `module.output = tensor`."""
_PASSED = """\
The gradient of this tensor of shape {shape} cannot be had any more: backward had passed it on its way to \
the gradient asked for at {line}. Gradients come in the reverse order of the forward: ask for this one \
before that."""
_NEVER_CAME = """\
The gradient of this tensor of shape {shape} did not come: backward ran to its end without computing it, \
because `inputs=` leaves it out. Name the tensor there too, or leave out `inputs=`."""
_LATE_EDIT = """\
A gradient asked for again at {line} was changed there, but backward had gone past it: the change reaches \
nothing. Change it before you ask for the gradient of an earlier layer."""
_INTERLEAVED = """\
{label} stands in the middle of its own backward, which keeps the GPU's: close its `with loss.backward():` \
before it asks for the next value of the model."""
