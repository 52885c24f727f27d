"""Running several jobs in one forward, each as an invoke; where one of them might notice, it is run alone instead."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from contextlib import ExitStack
from typing import Any, NamedTuple

import msgspec
import torch

from .._capture import Block, Scope
from ..modeling import NNsight
from ..protocol import Encoder, Event, Job, Shared, read_job, write_frame
from ..trace import Given as Input
from ..trace import collecting_saves
from ._answer import Given, write_answer
from ._execute import models_for, printer
from ._rebuild import Files, JobReader

_LARGEST = 2**20  # bytes of a job that is small
LONGEST = 1024  # tokens of an input that may share a forward
_frames = msgspec.msgpack.Decoder(list[bytes])
# What a block may change or ask for that is not of its rows alone, or not the same where these were sent to it: gradients of
# weights, weights, random numbers, how a tensor lies in memory, what kind of object something is, and ways round this list.
_ALONE = frozenset(
    "backward grad autograd requires_grad_ retain_grad parameters named_parameters buffers named_buffers state_dict "
    "data weight bias _model _module manual_seed seed dropout rand randn randint randperm normal_ uniform_ bernoulli "
    "multinomial getattr setattr hasattr isinstance issubclass type id vars eval exec globals locals open session "
    "trace generate scan edit apply clear_edits delattr add_module set_submodule set_attn_implementation config "
    "generation_config train grad_fn data_ptr stride is_contiguous as_strided storage untyped_storage storage_offset "
    "set_ resize_".split()
)
_PREFIXES = ("__", "register_")
_STATEMENTS = frozenset("import from global nonlocal with async try while".split())
_WORD = re.compile(r"[A-Za-z_]\w*")


def can_share(job: Job, size: int) -> bool:
    """Whether a job is one that may share a forward: a small trace of one plain input, whose block minds its rows."""
    plain = job.method == "trace" and not job.solo and len(job.args) == 1 and not job.kwargs and size <= _LARGEST
    if not plain or job.definitions or job.modules or len(job.models) != 1:
        return False
    if job.models[0].edits or job.models[0].rename is not None:
        return False
    block = job.main.block
    unused = block.target is None or (block.target.isidentifier() and block.target not in block.names_read)
    return unused and _minds_its_rows(block.source)


def _minds_its_rows(source: str) -> bool:
    """Whether none of the words is on a list; the server does not parse what strangers send."""
    words = set(_WORD.findall(source))
    forbidden = words & (_ALONE | _STATEMENTS) or any(word.startswith(_PREFIXES) for word in words)
    return source.isascii() and not forbidden  # other letters may stand for these


class _Member(NamedTuple):
    """One job of those that share a forward."""

    number: int
    reader: JobReader
    block: Block
    scope: Scope
    input: Input
    given: Given
    shape: tuple[Any, ...]
    events: list[Event]


def unpack(packed: bytes) -> list[bytes]:
    """The frames of several jobs, sent as one message."""
    return _frames.decode(packed)


def execute_together(frames: list[bytes], served: NNsight) -> Shared:
    """Run the jobs in several frames, those whose inputs have one shape in one forward.

    A job that fails there, or that draws random numbers, warns, or changes weights, is not answered, nor are those that
    shared its forward: all of them are to be run alone, where nothing of this run is left.
    """
    shared = Shared([None] * len(frames), [[] for _ in frames])
    groups: dict[tuple[Any, ...], list[_Member]] = defaultdict(list)
    for number, frame in enumerate(frames):
        member = _member(number, frame, served)
        if member is not None:
            groups[member.shape].append(member)
    for members in groups.values():
        for member, answer in zip(members, _run(members, served), strict=False):
            shared.answers[member.number], shared.events[member.number] = answer, member.events
    return shared


def _member(number: int, frame: bytes, served: NNsight) -> _Member | None:
    """A job that is ready to be run, None where it cannot be made ready: alone, it says why."""
    events: list[Event] = []
    try:
        job, payload = read_job(frame)
        reader = JobReader(job, payload, printer(events.append))
        reader.models = models_for(job, served)
        block, scope = reader.bound(job.main)
        given = Input((reader.decode(job.args[0]),), {})
        shape = (_shape(served, given), job.grad, job.inference, job.strict_order)
    except Exception:  # whatever it is, the job meets it again alone
        return None
    return _Member(number, reader, block, scope, given, Given(reader), shape, events)


def _shape(served: Any, given: Input) -> tuple[Any, ...]:
    """What inputs must have in common, so that none is padded for another."""
    batch = served._encode([Input(*given)], {})
    if max(value.shape[1] for value in batch.inputs.values()) > LONGEST:
        raise ValueError("the input is too long to share a forward")
    return tuple((name, tuple(value.shape[1:])) for name, value in sorted(batch.inputs.items()))


def _run(members: list[_Member], served: NNsight) -> list[bytes]:
    """The answers of jobs in one forward; none where one of them must be run alone."""
    before = state_of_model(served)
    first = members[0].reader.job
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("error")
            for member in members:
                stack.enter_context(Files().holding(member.reader.files))
            saved = stack.enter_context(collecting_saves())
            with torch.inference_mode(first.inference), torch.set_grad_enabled(first.grad):
                _trace(members, first, served)
        answers = [_answer(member, saved) for member in members]
    except Exception:  # of one of them; alone, each has its own
        return []
    return answers if before == state_of_model(served) else []


def _trace(members: list[_Member], first: Job, served: Any) -> None:
    with served.trace(strict_order=first.strict_order) as tracer:
        for member in members:
            tracer._add_invoke(member.block, member.scope, member.input, member.block.line, apart=True)


def state_of_model(served: Any) -> Any:
    """What is another one after every change of weights, gradients and attributes of modules, and every random number."""
    weights = [*served._model.parameters(), *served._model.buffers()]
    known = [
        (id(weight), _memory_of(weight), 0 if weight.is_inference() else weight._version, id(weight.grad))
        for weight in weights
    ]
    modules = [id(module) for _, module in served._module.named_modules(remove_duplicate=False)]
    return known, modules, served._tree.changes, torch.get_rng_state().numpy().tobytes()


def _memory_of(weight: torch.Tensor) -> int:
    try:
        return weight.data_ptr()
    except RuntimeError:  # made of other tensors
        return 0


def _answer(member: _Member, saved: list[Any]) -> bytes:
    encoder = Encoder(member.given.extend, data_only=True)
    answer = write_answer(encoder, member.block, member.scope, saved, member.given)
    return write_frame(answer, encoder.tensors)
