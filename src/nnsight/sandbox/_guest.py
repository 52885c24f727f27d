"""The block's side: a job whose model is run by a host, for several users at once, while its block is run here."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from .._core import INPUT, OUTPUT, Call, Pass, Run, StillInstruments, Visit
from ..modeling import NNsight
from ..protocol import (
    Encoder,
    Event,
    GivenNode,
    Node,
    TensorInfo,
    TensorWriter,
    is_as_sent,
    read_frame,
    read_job,
    read_tensors,
    write_frame,
)
from ..trace import Given, Prepared, Tracer
from ._beside import INPUTS, AloneError, Begin, Said, Shown, ShownDecoder, leaves_of, read_shown
from ._execute import printer, run_job
from ._pipe import ANSWER, Pipe
from ._rebuild import JobReader


def execute_as_guest(frame: bytes, served: Any, emit: Callable[[Event], None], host: Pipe) -> bytes | None:
    """The answer to a job whose values come from a host; None where it is to be run alone.

    Whoever calls this looks whether the model here is as it was: what has changed in it, the host's has not.

    Args:
        frame: A job.
        served: The model, of which nothing is run here but what the block calls itself.
        emit: Called with what the block prints.
        host: The way to the process that runs the model.
    """
    instruments = served._tree.instruments
    served._tree.instruments = StillInstruments(served._module)
    guest = Guest(host, served)
    try:
        job, payload = read_job(frame)
        reader = JobReader(job, payload, printer(emit))
        with warnings.catch_warnings(), _no_tensors_as_text(job.grad):
            warnings.simplefilter("error")
            answer, tensors = run_job(job, reader, served, seeded=False, prepare=guest.prepare)
    except Exception:  # whatever it is, the job meets it again alone
        return None
    finally:
        served._tree.instruments = instruments
    return write_frame(answer, tensors)


@contextmanager
def _no_tensors_as_text(grad: bool) -> Iterator[None]:
    """A tensor's text says how it was computed, which was not here."""
    kind: Any = torch.Tensor
    plain = kind.__repr__

    def show(tensor: torch.Tensor, **options: Any) -> str:
        if grad and (tensor.is_floating_point() or tensor.is_complex()):
            raise AloneError("a tensor is shown as a text")
        return plain(tensor, **options)

    kind.__repr__ = show
    try:
        yield
    finally:
        kind.__repr__ = plain


class _Received:
    """The values that a block was shown at one place, and how they were."""

    def __init__(self) -> None:
        self.leaves: list[Any] = []
        self._values: list[tuple[Any, list[Any]]] = []
        self._tensors: dict[int, tuple[torch.Tensor, TensorInfo, memoryview]] = {}  # by their id, as the host has them

    def add(self, value: Any, shown: Shown, tensors: list[torch.Tensor], payload: memoryview) -> None:
        """Keep one more."""
        leaves = leaves_of(value)
        self._values.append((value, leaves))
        self.leaves += leaves
        self.watch(tensors, shown.tensors, payload)

    def watch(self, tensors: list[torch.Tensor], infos: list[TensorInfo], payload: memoryview) -> None:
        """Notice where one of these is changed."""
        for tensor, info in zip(tensors, infos, strict=True):
            self._tensors[id(tensor)] = (tensor, info, payload)

    def changed(self) -> list[int]:
        """The leaves that were changed in place since.

        Raises:
            AloneError: Something else was changed.
        """
        changed = {known for known, sent in self._tensors.items() if not is_as_sent(*sent)}
        exchanged = any(not _are_same(leaves, leaves_of(value)) for value, leaves in self._values)
        if exchanged or not changed <= set(map(id, self.leaves)):
            raise AloneError("an object was changed")
        return [number for number, leaf in enumerate(self.leaves) if id(leaf) in changed]

    def told(self, changed: dict[int, int], infos: list[TensorInfo], payload: memoryview) -> None:
        """The host knows of these changes."""
        self.watch([self.leaves[number] for number in changed], [infos[index] for index in changed.values()], payload)


def _are_same(ones: list[Any], others: list[Any]) -> bool:
    return len(ones) == len(others) and all(one is other for one, other in zip(ones, others, strict=True))


class Guest:
    """What stands for the model."""

    def __init__(self, host: Pipe, served: Any) -> None:
        self._host = host
        self._served = served
        self._numbers: dict[Any, int] = {module: number for number, module in enumerate(served._module.modules())}
        self._past: list[_Received] = []
        self._now = _Received()
        self._inference = self._has_put = False
        self.run: Run | None = None

    def prepare(self, tracer: Tracer, model: NNsight, givens: list[Given]) -> Prepared:
        """Tell the host of the inputs; the call that stands for the model's."""
        batch = model._encode(givens, {})
        if not set(batch.inputs) <= set(INPUTS):
            raise AloneError("the model is called with more than tokens")
        self.run = tracer._run
        tensors = TensorWriter()
        for value in batch.inputs.values():
            tensors.add(value, data_only=True)
        self._inference = torch.is_inference_mode_enabled()
        begin = Begin(list(batch.inputs), torch.is_grad_enabled(), self._inference, tensors.infos)
        self._host.send(ANSWER, write_frame(begin, tensors))
        return Prepared(Call(self, (), {}, repeatable=False, passes=GuestPass), [1])

    def __call__(self) -> None:
        """The block has asked for nothing."""
        self.end(None)

    # --- what the pass asks --------------------------------------------------------------------------------------

    def ask(self, place: Any, kind: str, left: Visit | None) -> Any:
        """The value at a place, once the host has what was made of the last one."""
        if place not in self._numbers:
            raise AloneError("it is no module")
        self._say(self._numbers[place], kind, left)
        self._past.append(self._now)
        self._now = _Received()
        return self._receive()

    def look(self, place: Any) -> Any:
        """The input of the call whose output was shown last."""
        self._send(Said(self._numbers[place], True, {}, "", None, [], []), TensorWriter())
        return self._receive()

    def end(self, left: Visit | None) -> None:
        """The block is over, and so is what it makes of values."""
        self._say(None, "", left)

    def _say(self, number: int | None, kind: str, left: Visit | None) -> None:
        if any(received.changed() for received in self._past):
            raise AloneError("a value was changed after the model has gone on")
        encoder = Encoder(self._given, data_only=True)
        changed = {leaf: encoder.tensors.add(self._now.leaves[leaf], data_only=True) for leaf in self._now.changed()}
        if changed and self._has_put:
            raise AloneError("a value is changed that may be one that the block has put there")
        done, value = "", None
        if left is not None and left.skipped is not None:
            done, value = "skipped", encoder.encode(left.skipped[0])
        elif left is not None and left.written:
            done, value = "written", encoder.encode(left.value)
        said = Said(number, kind == INPUT, changed, done, value, encoder.contents, encoder.tensors.infos)
        if not all(tensor.is_contiguous() for tensor in encoder.tensors.sources):
            raise AloneError("a tensor does not lie in memory as its copy would")
        payload = self._send(said, encoder.tensors)
        self._now.told(changed, said.tensors, payload)
        if done:
            self._has_put = True
            put = _Received()
            put.watch(encoder.tensors.sources, said.tensors, payload)
            self._past.append(put)

    def _given(self, _encoder: Encoder, value: Any) -> Node | None:
        if isinstance(value, (list, dict)):
            return None
        number = next((number for number, leaf in enumerate(self._now.leaves) if leaf is value), None)
        return None if number is None else GivenNode(number, isinstance(value, torch.Tensor))

    def _send(self, said: Said, tensors: TensorWriter) -> memoryview:
        """Tell the host, and give what it has as tensors now."""
        frame = write_frame(said, tensors)
        self._host.send(ANSWER, frame)
        return memoryview(frame)[len(frame) - tensors.size :]

    def _receive(self) -> Any:
        shown, payload = read_frame(self._host.receive()[1], read_shown)
        with torch.inference_mode(self._inference):
            tensors = [_as_computed(tensor) for tensor in read_tensors(shown.tensors, payload)]
        value = ShownDecoder(tensors, shown.contents).decode(shown.value)
        self._now.add(value, shown, tensors, payload)
        return value


def _as_computed(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as the model would have it: one that needs gradients is no leaf."""
    return tensor.clone() if tensor.requires_grad else tensor


class GuestPass(Pass):
    """A pass whose model is run elsewhere: every place that the block waits for is asked for."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._left: set[Any] = set()  # the places whose output was shown

    def advance(self) -> None:
        """Go on to the place that the block waits for, or to the end."""
        guest: Guest = self._call.function  # pyright: ignore[reportFunctionMemberAccess]
        assert guest.run is not None
        if self.overrides or len(guest.run.workers) != 1:
            raise AloneError("more than a block's reads and writes is asked for")
        left, self.here = self.here, None
        worker = guest.run.workers[0]
        request = worker.request
        if request is None:
            guest.end(left)
            self.done = True
            return
        self._check_plain(request.step, request.call)
        value = guest.ask(request.place, request.kind, left)
        self.counts[request.place] = 1
        if request.kind == OUTPUT:
            self._left.add(request.place)
        self.here = worker.served = GuestVisit(request.place, request.kind, value, partial(guest.look, request.place))

    def has_passed(self, request: Any) -> bool:
        """Never: what has come by is not asked for again here."""
        self._check_plain(request.step, request.call)
        if request.place in (self.counts if request.kind == INPUT else self._left):
            raise AloneError("a place that has passed is asked for")
        return False

    def _check_plain(self, step: int | None, call: int) -> None:
        if step is not None or call:
            raise AloneError("a later call of a place is asked for")

    def watch(self, module: Any) -> None:
        """The host counts calls."""

    def is_ahead(self, place: Any) -> bool:
        """Never served by the shorter way."""
        return False

    def close(self) -> None:
        """Take no part any more."""
        self.done = True
        super().close()


class GuestVisit(Visit):
    """A visit of which the input is asked for at need."""

    __slots__ = ("_look", "_seen")

    def __init__(self, place: Any, kind: str, value: Any, look: Callable[[], Any]) -> None:
        self._look = look
        self._seen: list[Any] = []
        super().__init__(place, kind, value, 0, 0, 0)

    @property
    def inputs(self) -> Any:
        """The arguments of the call."""
        if not self._seen:
            self._seen.append(self._look())
        return self._seen[0]

    @inputs.setter
    def inputs(self, value: Any) -> None:
        """Nothing is known of them at first."""
