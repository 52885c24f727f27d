"""Tracer: what `with model.trace(...) as tracer` gives, and the life of a run around a native body."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from threading import get_ident
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from .._capture import Block, Scope
from .._core import (
    OTHER_THREAD,
    OUTPUT,
    RESULT,
    Call,
    Line,
    Run,
    Worker,
    describe_line,
    split_rows,
    trim,
    user_line,
    worker_of,
)
from ..errors import InputError, NotTracingError
from ._barrier import Barrier
from ._cache import Cache, Modules, record_cache
from ._dataflow import Dataflow, Deferred
from ._given import Given, Prepare
from ._invoke import Invoke
from ._recording import Keep
from ._save import warn_about_changes
from ._steps import Steps, StepSelector

if TYPE_CHECKING:
    from ..envoy import Tree
    from ._edit import Edit, InterventionEdit


class Tracer:
    """One trace: its body runs natively, the model runs when a value is asked for, and to its end at the close.

    Attributes are for use inside the `with` block.

    Example:
        >>> import torch
        >>> from nnsight import NNsight
        >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)))
        >>> with model.trace(torch.ones(1, 3)) as tracer:
        ...     hidden = model[0].output.save()
        ...     result = tracer.result.save()
        >>> hidden.shape, result.shape
        (torch.Size([1, 4]), torch.Size([1, 2]))
    """

    _computes = True

    def __init__(
        self,
        tree: Tree,
        prepare: Prepare,
        given: Given | None = None,
        *,
        edits: Sequence[Edit | InterventionEdit] = (),
        strict_order: bool = False,
        stop_after_last: bool = False,
    ) -> None:
        self._tree = tree
        self._prepare: Prepare | None = prepare
        self._edits = edits
        self._strict = strict_order
        self._early = stop_after_last
        self._run: Run | None = None
        self._worker: Worker | None = None
        self._given = [given] if given is not None else []
        self._owners: list[Worker] = []
        self._unentered: list[tuple[Invoke, Line | None]] = []
        self._flow: Dataflow | None = None
        self._apart: list[Dataflow] = []
        self._thread = 0

    def __enter__(self) -> Tracer:
        if self._prepare is None or self._run is not None:
            raise NotTracingError("A tracer can be entered once: call model.trace(...) again.")
        tree = self._tree
        if tree.due is not None and self._computes:
            tree.due()
        stepper = tree.stepper or tree.root
        run = Run(tree.instruments, stepper, self._make_call, strict=self._strict, early=self._early)
        self._run = run
        for edit in self._edits:
            edit.add_to(run)
        worker = self._worker = Worker(run, "the body of the trace")
        run.add(worker)
        if self._given:
            self._owners.append(worker)
        self._thread = get_ident()
        worker.enter(sys._getframe(1))
        worker.tracer = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        run, worker = self._run, self._worker
        if run is None or worker is None:
            raise NotTracingError("This tracer is not open: enter it with `with model.trace(...) as tracer:`.")
        try:
            worker.finished = True
            if error is None:
                self._check_invokes()
                self._finish(run)
            else:
                error.__traceback__ = trim(error.__traceback__)
        except BaseException as failure:
            failure.__traceback__ = trim(failure.__traceback__)
            raise
        finally:
            worker.leave()
            run.close()
            self._close()
        return False

    def _finish(self, run: Run) -> None:
        """The body is over: run the model, with the blocks that wait for it, to the end."""
        run.finish()
        if run.saved:
            warn_about_changes(run)

    def _close(self) -> None:
        if self._worker is not None:
            self._worker.tracer = None
        self._given.clear()
        self._unentered.clear()
        self._owners.clear()
        self._run = self._worker = self._prepare = None
        for flow in self._flows():
            flow.write_back()
        if self._flow is not None:
            self._flow.close()
            self._flow = None
        self._apart.clear()  # whoever added these reads their scopes

    def _flows(self) -> list[Dataflow]:
        return [*([self._flow] if self._flow is not None else []), *self._apart]

    @staticmethod
    def _current(tree: Tree) -> Tracer | None:
        """The trace of this model, without an input of its own, whose body the current code belongs to."""
        worker = tree.find_worker()
        tracer = worker.tracer if worker is not None else None
        return tracer if tracer is not None and tracer._owners else None

    def _prepare_with(self, prepare: Prepare) -> None:
        """Make another call of the inputs than the trace itself would."""
        self._prepare = prepare

    def _make_call(self) -> Call:
        assert self._prepare is not None
        if self._thread != get_ident():
            raise NotTracingError(OTHER_THREAD)
        call, sizes, attached = self._prepare(self._given)
        if len(self._owners) > 1:
            for worker, rows in zip(self._owners, split_rows(sizes, attached), strict=True):
                worker.rows = rows
        return call

    # --- values of the run -----------------------------------------------------------------------------------

    @property
    def result(self) -> Any:
        """What the traced call returns; waits until it is over.

        Example:
            >>> from nnsight import LanguageModel
            >>> model = LanguageModel("nnsight/landmarks")
            >>> with model.trace("Hello") as tracer:
            ...     result = tracer.result.save()
            >>> result.logits.shape[0]
            1
        """
        run, worker = self._active("result")
        return run.read(worker, RESULT, OUTPUT, "tracer.result")[1]

    def stop(self) -> None:
        """End the forward here: what comes after is not run.

        With several blocks, the forward ends as soon as every other block is done or has stopped too.

        Example:
            >>> from nnsight import LanguageModel
            >>> model = LanguageModel("nnsight/landmarks")
            >>> with model.trace("Hello") as tracer:
            ...     early = model.transformer.h[3].output.save()
            ...     tracer.stop()
        """
        run, worker = self._active("stop()")
        run.stop(worker)

    def cache(
        self,
        modules: Modules | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        detach: bool = True,
        *,
        include_output: bool = True,
        include_inputs: bool = False,
        copy: bool = False,
    ) -> Cache:
        """Keep the values of many modules, from here to the end of the trace.

        A value goes into the cache when its module is done, after all edits; in an invoke, with its rows only.
        Modules that the model has passed before this line are missing.  Tensors are the model's own unless
        `device`, `dtype` or `copy` make copies: if one is changed in place afterwards, a
        `SavedValueChangedWarning` says so at the end.

        Example:
            >>> from nnsight import LanguageModel
            >>> model = LanguageModel("nnsight/landmarks")
            >>> with model.trace("The Eiffel Tower is in the city of") as tracer:
            ...     cache = tracer.cache(modules=[model.transformer.h[0], "lm_head"])
            >>> cache["model.transformer.h.0"].output[0].shape == cache.model.transformer.h[0].output.shape
            True

        Args:
            modules: Envoys, paths or modules to cache, by default all; only these cost anything.
            device: Move the tensors there.
            dtype: Cast floating-point tensors to this.
            detach: Keep no autograd graph.
            include_output: Keep what the modules return.
            include_inputs: Keep what they are called with.
            copy: Keep copies, which nothing can change later.

        Returns:
            The cache, by path of the module; of a module called several times (each step of a generation) it
            holds every call.

        Raises:
            UnknownPathError: One of `modules` is not in the model; the message names the nearest.
        """
        run, worker = self._active("cache()")
        keep = Keep(include_output, include_inputs, device, dtype, detach, copy)
        return record_cache(run, worker, self._tree, modules, keep)

    # --- several blocks --------------------------------------------------------------------------------------

    def invoke(self, *inputs: Any, **kwargs: Any) -> Invoke:
        """One more input for the batch, with a block that sees only its rows.

        The blocks of a trace run in one forward, in the order they are written wherever they wait for the same
        place.  Without input the block sees the whole batch.  A name that one block binds can be read in a later one,
        which then waits for it.

        Example:
            >>> from nnsight import LanguageModel
            >>> model = LanguageModel("nnsight/landmarks")
            >>> with model.trace() as tracer:
            ...     with tracer.invoke("The Eiffel Tower is in"):
            ...         hidden = model.transformer.h[6].output[0]
            ...     with tracer.invoke("The Colosseum is in"):
            ...         model.transformer.h[6].output[0][:] = hidden
            ...         logits = model.output.save()

        Args:
            *inputs: An input as `trace` takes it, or none.
            **kwargs: Keyword arguments that belong to this input.

        Raises:
            CaptureError: The source of the block cannot be had (a plain Python prompt).
            InputError: The forward has started already, so that the batch is complete.
        """
        self._active("invoke()")
        invoke = Invoke(self, inputs, kwargs)
        self._unentered.append((invoke, user_line()))
        return invoke

    def _begin_invoke(self, invoke: Invoke, *, has_input: bool) -> None:
        run, worker = self._active("invoke()")
        self._unentered = [entry for entry in self._unentered if entry[0] is not invoke]
        if worker is not self._worker:
            raise InputError(_NESTED.format(label=worker.label))
        if run.main is not None and has_input:
            raise InputError(_STARTED)

    def _check_invokes(self) -> None:
        for _, line in self._unentered:
            raise InputError(_UNENTERED.format(line=describe_line(line)))

    def _add_invoke(
        self, block: Block, scope: Scope, given: Given | None, frame_line: int, *, apart: bool = False
    ) -> None:
        """Add a block; one that stands `apart` neither gives values to the others nor waits for theirs."""
        run, _ = self._active("invoke()")
        worker = Worker(run, f"the invoke at line {frame_line} of {os.path.basename(block.filename)}")
        if apart:
            self._apart.append(Dataflow())
        elif self._flow is None:
            self._flow = Dataflow()
        deferred = self._flows()[-1 if apart else 0].add(block, scope, worker)
        self._begin_worker(worker, deferred.run, given)

    def _add_worker(self, attend: Callable[[Worker], None], given: Given, label: str) -> None:
        """Add an invoke whose block is a function."""
        run, _ = self._active("invoke()")
        worker = Worker(run, label)
        self._begin_worker(worker, partial(attend, worker), given)

    def _begin_worker(self, worker: Worker, body: Callable[[], None], given: Given | None) -> None:
        worker.start(body)
        worker.run.add(worker)
        if given is not None:
            self._given.append(given)
            self._owners.append(worker)

    def _deferred_of(self, worker: Worker) -> Deferred | None:
        return next(filter(None, (flow.of(worker) for flow in self._flows())), None)

    def barrier(self, count: int) -> Barrier:
        """A point that `count` blocks reach before any of them goes on; each calls it.

        Example:
            >>> from nnsight import LanguageModel
            >>> model = LanguageModel("nnsight/landmarks")
            >>> with model.trace() as tracer:
            ...     meet = tracer.barrier(2)
            ...     with tracer.invoke("The Eiffel Tower is in"):
            ...         embeddings = model.transformer.wte.output
            ...         meet()
            ...     with tracer.invoke("_ _ _ _ _ _"):
            ...         meet()
            ...         model.transformer.wte.output = embeddings

        Raises:
            WaitError: Fewer blocks reach it than it waits for; raised when nothing can come any more.
        """
        run, _ = self._active("barrier()")
        if not isinstance(count, int) or count < 1:
            raise InputError(f"A barrier is for a number of blocks, at least one: tracer.barrier(2), not {count!r}.")
        return Barrier(count, run)

    # --- steps of a generation -------------------------------------------------------------------------------

    @property
    def iter(self) -> StepSelector:
        """Steps of a generation: `for step in tracer.iter[2:5]` or `with tracer.iter[:] as step`.

        Example:
            >>> from nnsight import LanguageModel
            >>> model = LanguageModel("nnsight/landmarks")
            >>> tokens = []
            >>> with model.generate("The Eiffel Tower is in", max_new_tokens=3) as tracer:
            ...     for step in tracer.iter[:]:
            ...         tokens.append(model.lm_head.output[0, -1].argmax())
            >>> len(tokens)
            3
        """
        return StepSelector(self)

    def all(self) -> Steps:
        """Every step of the generation: `tracer.iter[:]`.

        Example:
            >>> from nnsight import LanguageModel
            >>> model = LanguageModel("nnsight/landmarks")
            >>> with model.generate("The Eiffel Tower is in", max_new_tokens=3) as tracer:
            ...     with tracer.all() as step:
            ...         model.transformer.h[0].output[0][:, -1] = 0
        """
        return self.iter[:]

    def next(self, count: int = 1) -> Tracer:
        """Let the block go on to a later step: what it asks for from here on is of that step.

        Example:
            >>> from nnsight import LanguageModel
            >>> model = LanguageModel("nnsight/landmarks")
            >>> with model.generate("The Eiffel Tower is in", max_new_tokens=2) as tracer:
            ...     first = model.lm_head.output.save()
            ...     _ = tracer.next()
            ...     second = model.lm_head.output.save()
        """
        run, worker = self._active("next()")
        if not isinstance(count, int) or count < 1:
            raise InputError(f"tracer.next({count!r}): steps are counted forwards, by at least one.")
        run.lone = False
        worker.step = (worker.step or 0) + count
        worker.calls = None
        return self

    def _active(self, name: str) -> tuple[Run, Worker]:
        run = self._run
        worker = worker_of(run) if run is not None else None
        if run is None or worker is None:
            raise NotTracingError(_CLOSED.format(name=name))
        return run, worker


_UNENTERED = """\
tracer.invoke(...) at {line} does nothing by itself: write `with tracer.invoke(...):`, with the block that sees this input."""

_NESTED = """\
An invoke cannot stand inside another block of the trace ({label}): invokes stand side by side in the body of the trace. \
What one of them binds, a later one can read."""

_STARTED = """\
The forward pass has started, because the trace's own block asked for a value: the batch is complete. Put every \
tracer.invoke(input) before that line."""

_CLOSED = """\
tracer.{name} works inside the `with` block of its trace only, in the thread of that block:

    with model.trace(input) as tracer:
        result = tracer.result.save()
"""
