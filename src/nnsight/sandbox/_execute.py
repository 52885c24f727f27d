"""Running a job: its block, on a model that is here, natively in a trace of it."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from .._capture import Block, Scope, bind
from ..errors import NNsightError, ProtocolError
from ..modeling import LanguageModel, NNsight, edit_of
from ..protocol import (
    Answer,
    BoundBlock,
    Encoder,
    Event,
    Failure,
    Job,
    StoredIntervention,
    TensorWriter,
    read_job,
    write_frame,
)
from ..trace import Edit, InterventionEdit, Prepared, Tracer, collecting_saves
from ..trace import Given as Input
from ._answer import Given, write_answer
from ._failure import describe_failure
from ._rebuild import Files, JobReader

Emit = Callable[[Event], None]
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def execute(
    frame: bytes,
    served: NNsight,
    emit: Emit,
    *,
    forward_warnings: bool = True,
    seeded: bool = True,
    files: Files | None = None,
) -> bytes:
    """Run the job in a frame, and give the frame of its answer or failure.

    Args:
        frame: A job.
        served: The model it runs on.
        emit: Called with what the block prints and warns of.
        seeded: Draw its random numbers from the job's own seed; a process that runs several blocks by turns cannot.
        forward_warnings: Send warnings of the block to `emit`; they stay in this process otherwise.
        files: Is given the job's sources while it runs; a process that runs several blocks by turns shows each its own.
    """
    try:
        job, payload = read_job(frame)
    except ProtocolError as error:
        return write_frame(describe_failure(error, lambda _: False))
    reader: JobReader | None = None
    try:
        reader = JobReader(job, payload, printer(emit))
        with _warnings_to(emit) if forward_warnings else nullcontext():
            answer, tensors = run_job(job, reader, served, seeded=seeded, files=files)
        return write_frame(answer, tensors)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return write_frame(_failure(error, job, reader))


def run_job(
    job: Job,
    reader: JobReader,
    served: NNsight,
    *,
    seeded: bool,
    files: Files | None = None,
    prepare: Callable[[Tracer, NNsight, list[Input]], Prepared] | None = None,
) -> tuple[Answer, TensorWriter]:
    """Run a job that was read; what it raises is the block's.

    Args:
        job: The job.
        reader: Makes its values.
        served: The model it runs on.
        seeded: As for `execute`.
        files: As for `execute`.
        prepare: Makes another call of the inputs than the trace itself would.
    """
    models = models_for(job, served)
    reader.models = models
    for model, state in zip(models, job.models, strict=True):
        for edit in state.edits:
            model._edits.append(_edit(edit, model, reader))
    block, scope = reader.bound(job.main)
    args = tuple(reader.decode(value) for value in job.args)
    kwargs = {name: reader.decode(value) for name, value in job.kwargs.items()}
    given = Given(reader)
    random_numbers = _random_numbers(job.seed if seeded else None)
    with (files or Files()).holding(reader.files), random_numbers, collecting_saves() as saved:
        _run_block(models[0], job, block, scope, args, kwargs, prepare)
    encoder = Encoder(given.extend, data_only=True)
    return write_answer(encoder, block, scope, saved, given), encoder.tensors


@contextmanager
def _random_numbers(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        yield


def _edit(edit: BoundBlock | StoredIntervention, model: NNsight, reader: JobReader) -> Edit | InterventionEdit:
    if isinstance(edit, BoundBlock):
        return Edit(*reader.bound(edit))
    intervention = reader.decode(edit.value)
    if not callable(getattr(intervention, "prepare", None)):
        raise ProtocolError(f"a {type(intervention).__name__} is no intervention")
    return edit_of(model, intervention)


def _run_block(
    model: NNsight,
    job: Job,
    block: Block,
    scope: Scope,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    prepare: Callable[[Tracer, NNsight, list[Input]], Prepared] | None,
) -> None:
    with torch.inference_mode(job.inference), torch.set_grad_enabled(job.grad):
        run = bind(block, scope)
        if job.method == "session":
            context: Any = model.session()
        else:
            if not hasattr(model, job.method):
                raise ProtocolError(f"a {type(model).__name__} has no {job.method}()")
            context = getattr(model, job.method)(*args, strict_order=job.strict_order, **kwargs)
        if prepare is not None:
            context._prepare_with(partial(prepare, context, model))
        with context as target:
            if block.target is None:
                run()
            else:
                run(target)


def models_for(job: Job, served: NNsight) -> list[NNsight]:
    """A model object for each that the block names, sharing the served one's modules."""
    if not job.models:
        raise ProtocolError("the job names no model")
    by_names: dict[str, NNsight] = {}
    models = []
    for state in job.models:
        key = repr(state.rename)
        if key not in by_names:
            by_names[key] = served._copy() if state.rename is None else _renamed(served, state.rename)
        model = by_names[key]._copy()
        model._is_served = True
        models.append(model)
    return models


def _renamed(served: NNsight, rename: dict[str, str]) -> NNsight:
    if isinstance(served, LanguageModel):
        return LanguageModel(served._model, tokenizer=served.tokenizer, rename=rename)
    return NNsight(served._model, rename=rename)


def printer(emit: Emit) -> Callable[..., None]:
    def show(
        *values: Any, sep: str | None = " ", end: str | None = "\n", file: Any = None, flush: bool = False
    ) -> None:
        if file is not None and file is not sys.stdout:
            print(*values, sep=sep, end=end, file=file, flush=flush)
            return
        text = io.StringIO()
        print(*values, sep=sep, end=end, file=text)
        emit(Event("print", text.getvalue()))

    show.__name__ = show.__qualname__ = "print"
    return show


@contextmanager
def _warnings_to(emit: Emit) -> Iterator[None]:
    def show(message: Any, category: type[Warning], filename: str, line: int, *_: Any) -> None:
        name = f"{category.__module__}:{category.__qualname__}"
        emit(Event("warning", str(message), name, filename, line))

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = show
        yield


def _failure(error: BaseException, job: Job, reader: JobReader | None) -> Failure:
    edits = [edit for state in job.models for edit in state.edits if isinstance(edit, BoundBlock)]
    blocks = [job.main, *edits]
    files = {bound.block.filename for bound in blocks} | {text.filename for text in job.definitions}
    files |= {module.filename for module in job.modules}

    def is_users(filename: str) -> bool:
        return filename in files and not filename.startswith(_PACKAGE)

    if isinstance(error, NNsightError):
        error.__cause__, error.__suppress_context__ = None, True
    return describe_failure(error, is_users, reader.definitions if reader is not None else {})
