"""The model's side: a process that runs forwards which jobs of several users share, and none of their code.

Each block is in a process of its own, and asks from there for values of its rows; here its place is taken by a worker
of a trace like any other, which asks the run for what the block wants and does with it what the block has done. So a
block sees and changes what an invoke does, and what it says is checked as what an invoke does is.
"""

from __future__ import annotations

import gc
import os
import socket
import warnings
from collections import defaultdict
from contextlib import suppress
from typing import Any

import msgspec
import torch
from torch._subclasses.fake_tensor import FakeTensor

from .._core import INPUT, OUTPUT, Visit, Worker, tensors_in
from ..errors import ProtocolError
from ..modeling import NNsight
from ..protocol import TensorInfo, is_as_sent, read_frame, read_tensors, write_frame
from ..trace import Given
from ._beside import (
    INPUTS,
    LARGEST,
    AloneError,
    Begin,
    PlainDecoder,
    Said,
    ShowingEncoder,
    Shown,
    check_like,
    leaves_of,
    read_told,
)
from ._failure import summary
from ._jail import Allowance
from ._pipe import ANSWER, PROBLEM, Pipe
from ._together import LONGEST
from ._zygote import give_up

_SECONDS = 3.0  # that a block may take from one question to the next
_MOST = 64  # blocks at a time


def serve_host(descriptors: list[int], served: NNsight, allowance: Allowance) -> None:
    """In a process of its own: give everything up, then run forwards for those whose sockets come.

    The answer to each batch says of each block whether its values were those that it would have got alone.
    """
    control = socket.socket(fileno=descriptors[0])
    give_up(control, allowance, lasts=True)
    pipe = Pipe(control)
    try:
        host = Host(served)
        while True:
            _, ends, _, _ = socket.recv_fds(control, 1, _MOST)
            if not ends:
                os._exit(0)
            found = host.run([socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, end) for end in ends])
            if host.is_spoilt():
                raise RuntimeError("a weight was changed")
            pipe.send(ANSWER, msgspec.msgpack.encode(found))
            gc.collect()
    except BaseException as error:
        pipe.send(PROBLEM, summary(error).encode())
        os._exit(1)


class Host:
    """Runs forwards of one model."""

    def __init__(self, served: Any) -> None:
        self._served = served
        self._modules = list(served._module.modules())
        embeddings = served._module.get_input_embeddings()
        self._tokens = embeddings.weight.shape[0]
        self._weights = [*served._module.parameters(), *served._module.buffers()]
        self._versions = self._versions_now()
        self._memory = {weight.untyped_storage().data_ptr() for weight in self._weights}

    def run(self, ends: list[socket.socket]) -> list[bool]:
        """Serve the blocks at the other ends, those with inputs of one shape in one forward; whether each was served well."""
        guests = [GuestBlock(end, self._modules, self._memory) for end in ends]
        groups: dict[tuple[Any, ...], list[GuestBlock]] = defaultdict(list)
        for guest in guests:
            key = guest.begin(self._tokens)
            if key is not None:
                groups[key].append(guest)
        for members in groups.values():
            self._run(members)
        for guest in guests:
            guest.close()
        return [guest.well for guest in guests]

    def _run(self, guests: list[GuestBlock]) -> None:
        begin = guests[0].begun
        random_numbers = torch.get_rng_state()
        try:
            with (
                warnings.catch_warnings(),
                torch.inference_mode(begin.inference),
                torch.set_grad_enabled(begin.grad),
            ):
                warnings.simplefilter("error")
                with self._served.trace(strict_order=True) as tracer:
                    for guest in guests:
                        tracer._add_worker(guest.attend, Given((), guest.inputs), "a block elsewhere")
        except Exception:  # whatever it is, the jobs meet it again alone
            return
        if torch.equal(random_numbers, torch.get_rng_state()):
            for guest in guests:
                guest.settle()

    def _versions_now(self) -> list[int]:
        return [weight._version for weight in self._weights if not weight.is_inference()]

    def is_spoilt(self) -> bool:
        """Whether a weight was changed, which is not to happen."""
        return self._versions != self._versions_now()


Known = tuple[torch.Tensor, TensorInfo, memoryview]  # a tensor, and what it is to be


class GuestBlock:
    """One block that is elsewhere; `well` once all that it was shown was right to the end."""

    def __init__(self, end: socket.socket, modules: list[Any], memory: set[int]) -> None:
        self.well = False
        self.inputs: dict[str, torch.Tensor] = {}
        self.begun = Begin([], grad=False, inference=False, tensors=[])
        self._end = end
        self._pipe = Pipe(end, LARGEST, _SECONDS)
        self._modules = modules
        self._memory = memory
        self._leaves: list[Any] = []
        self._form: list[tuple[Any, ...]] = []  # of the value at the visit, less what else was shown there
        self._shown: dict[int, list[Known]] = defaultdict(list)  # each time, by the tensor's id
        self._ended = False

    def begin(self, tokens: int) -> tuple[Any, ...] | None:
        """What a group of blocks has in common; None where this one cannot take part."""
        try:
            told, payload = read_frame(self._pipe.receive()[1], read_told)
            if not isinstance(told, Begin) or len(told.tensors) != len(told.names):
                raise ProtocolError("a block begins with its inputs")
            self.begun = told
            self.inputs = dict(zip(told.names, _read_plain(told.tensors, payload), strict=True))
            _check_inputs(self.inputs, tokens)
        except Exception:  # whatever it is, the job meets it again alone
            return None
        shapes = tuple((name, tuple(value.shape[1:])) for name, value in sorted(self.inputs.items()))
        return (shapes, told.grad, told.inference)

    def attend(self, worker: Worker) -> None:
        """In the worker's coroutine: do what the block does, until it ends or cannot be served."""
        try:
            self._attend(worker)
        except Exception:  # whatever it is, the job meets it again alone
            self.close()

    def _attend(self, worker: Worker) -> None:
        run, visit, path = worker.run, None, ""
        while True:
            said, payload = self._receive()
            if visit is not None:
                self._apply(worker, visit, path, said, payload)
            elif said.done or said.changed:
                raise ProtocolError("a value is changed that was not shown")
            if said.place is None:
                self._ended = True
                return
            if not 0 <= said.place < len(self._modules):
                raise ProtocolError("there is no such module")
            place, path = self._modules[said.place], f"module {said.place}"
            before = visit
            visit, value = run.read(worker, place, INPUT if said.is_input else OUTPUT, path)
            if run.main is None or run.main.here is not visit:
                raise AloneError("the value has passed")
            if visit is not before:
                self._leaves = []
            self._show(value, _common(visit, worker, said.is_input))

    def _receive(self) -> tuple[Said, memoryview]:
        said, payload = read_frame(self._pipe.receive()[1], read_told)
        if not isinstance(said, Said):
            raise ProtocolError("a block begins once")
        return said, payload

    def _show(self, value: Any, withheld: set[int]) -> None:
        if sum(tensor.nbytes for tensor in tensors_in(value)) > LARGEST // 4:
            raise AloneError("the value is too large to be sent about")
        encoder = ShowingEncoder(withheld)
        shown = Shown(encoder.encode(value), encoder.contents, encoder.tensors.infos)
        frame = write_frame(shown, encoder.tensors)
        payload = memoryview(frame)[len(frame) - encoder.tensors.size :]
        leaves = leaves_of(value)
        if not self._leaves:
            self._form = list(map(_form_of, leaves))
        self._leaves += leaves
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and id(leaf) not in withheld]
        if not all(leaf.is_contiguous() and not isinstance(leaf, FakeTensor) for leaf in tensors):
            raise AloneError("a tensor does not lie in memory as its copy would")
        self._watch(encoder.tensors.sources, encoder.tensors.infos, payload)
        self._pipe.send(ANSWER, frame)

    def _watch(self, tensors: list[torch.Tensor], infos: list[TensorInfo], payload: memoryview) -> None:
        for tensor, info in zip(tensors, infos, strict=True):
            self._shown[id(tensor)].append((tensor, info, payload))

    def _apply(self, worker: Worker, visit: Visit, path: str, said: Said, payload: memoryview) -> None:
        tensors = _read_plain(said.tensors, payload)
        for number, index in said.changed.items():
            if not (0 <= number < len(self._leaves) and 0 <= index < len(tensors)):
                raise ProtocolError("there is no such value")
            self._change(self._leaves[number], tensors[index], said.tensors[index], payload)
        if not said.done:
            return
        value = PlainDecoder(tensors, said.contents, (self._leaves, self._leaves)).decode(said.value)
        self._check_put(value, skipped=said.done == "skipped")
        self._watch(tensors, said.tensors, payload)
        if said.done == "skipped":
            worker.run.skip(worker, visit.place, path, value)
        else:
            worker.run.change(worker, visit, value, path)

    def _change(self, leaf: Any, tensor: torch.Tensor, info: TensorInfo, payload: memoryview) -> None:
        check_like(tensor, leaf)
        if len(self._shown.get(id(leaf), ())) != 1:
            raise AloneError("a value is changed that was not shown, or stands at two places")
        if leaf.untyped_storage().data_ptr() in self._memory:
            raise AloneError("a weight would be changed")
        leaf.copy_(tensor)
        self._shown[id(leaf)] = [(leaf, info, payload)]

    def _check_put(self, value: Any, *, skipped: bool) -> None:
        """What is put somewhere is of the form that was there; of a call that is skipped, the type of numbers is known."""
        ours = [leaf for leaf in self._leaves if isinstance(leaf, torch.Tensor)]
        put = leaves_of(value)
        if skipped:
            fits = (
                all(isinstance(leaf, torch.Tensor) and leaf.dtype is ours[0].dtype for leaf in put) if ours else False
            )
        else:
            fits = list(map(_form_of, put)) == self._form
        if not fits:
            raise AloneError("a value of another form is put in place of one")

    def settle(self) -> None:
        """The forward is over: whether the tensors that were shown have stayed as the block has them."""
        self.well = self._ended and all(is_as_sent(*known) for shown in self._shown.values() for known in shown)

    def close(self) -> None:
        """Have no more to do with it; one that was not served well is told, whoever else holds this end."""
        if not self.well:
            with suppress(OSError):
                self._end.shutdown(socket.SHUT_RDWR)
        self._end.close()


def _common(visit: Visit, worker: Worker, is_input: bool) -> set[int]:
    """The tensors of a value that all rows have in common, by their id: they may say something of the others' rows."""
    if worker.rows is None:
        return set()
    return set(map(id, tensors_in(visit.inputs if is_input and visit.kind != INPUT else visit.value)))


def _form_of(leaf: Any) -> tuple[Any, ...]:
    if isinstance(leaf, torch.Tensor):
        return (leaf.shape, leaf.dtype)
    return (type(leaf), leaf) if isinstance(leaf, (type(None), bool, int, float, str)) else (id(leaf),)


def _read_plain(infos: list[TensorInfo], payload: memoryview) -> list[torch.Tensor]:
    """The tensors of a message, which are numbers and nothing else."""
    if any(info.kind != "tensor" or info.requires_grad or info.grad is not None for info in infos):
        raise ProtocolError("a block sends tensors that are more than their numbers")
    return read_tensors(infos, payload)


def _check_inputs(inputs: dict[str, torch.Tensor], tokens: int) -> None:
    """Refuse what would end the model: whole numbers are looked up with."""
    if "input_ids" not in inputs or not set(inputs) <= set(INPUTS):
        raise ProtocolError("the model is called with tokens")
    for name, value in inputs.items():
        most = tokens if name == "input_ids" else 2
        if value.dtype is not torch.int64 or value.dim() != 2 or not value.numel():
            raise ProtocolError("tokens are whole numbers, rows of them")
        if value.shape != inputs["input_ids"].shape or value.shape[0] > _MOST or value.shape[1] > LONGEST:
            raise ProtocolError("the input is too long to share a forward")
        if not 0 <= int(value.min()) <= int(value.max()) < most:
            raise ProtocolError("there is no such token")
