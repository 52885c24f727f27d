"""Tracer: what `with model.trace(...) as tracer` gives, and the life of a run around a native body."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .._core import OUTPUT, RESULT, Call, Run, Worker, trim
from ..errors import NotTracingError
from ._save import warn_about_changes

if TYPE_CHECKING:
    from ..envoy import Tree


class Tracer:
    """One trace: its body runs natively, the model runs when a value is asked for, and to its end at the close.

    Attributes are for use inside the `with` block.
    """

    def __init__(self, tree: Tree, prepare: Callable[[], Call], *, strict_order: bool = False) -> None:
        self._tree = tree
        self._prepare: Callable[[], Call] | None = prepare
        self._strict = strict_order
        self._run: Run | None = None
        self._worker: Worker | None = None

    def __enter__(self) -> Tracer:
        if self._prepare is None:
            raise NotTracingError("A tracer can be entered once: call model.trace(...) again.")
        tree = self._tree
        run = self._run = Run(tree.instruments, tree.root, self._prepare, strict=self._strict)
        self._prepare = None
        worker = self._worker = Worker(run, "the body of the trace")
        run.workers.append(worker)
        worker.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        run, worker = self._run, self._worker
        assert run is not None and worker is not None
        try:
            worker.finished = True
            if error is None:
                run.finish()
                if run.saved:
                    warn_about_changes(run)
            else:
                error.__traceback__ = trim(error.__traceback__)
        except BaseException as failure:
            failure.__traceback__ = trim(failure.__traceback__)
            raise
        finally:
            worker.leave()
            run.close()
            self._run = self._worker = None
        return False

    @property
    def result(self) -> Any:
        """What the traced call returns; waits until it is over.

        Example:
            >>> with model.trace(x) as tracer:          # doctest: +SKIP
            ...     out = tracer.result.save()
        """
        run, worker = self._active("result")
        return run.read(worker, RESULT, OUTPUT, "tracer.result")[1]

    def stop(self) -> None:
        """End the forward here: what comes after is not run.

        With several blocks, the forward ends as soon as every other block is done or has stopped too.

        Example:
            >>> with model.trace(x) as tracer:          # doctest: +SKIP
            ...     early = model.layer1.output.save()
            ...     tracer.stop()
        """
        run, worker = self._active("stop()")
        run.stop(worker)

    def _active(self, name: str) -> tuple[Run, Worker]:
        worker = self._tree.find_worker()
        if self._run is None or worker is None:
            raise NotTracingError(
                f"tracer.{name} works inside its `with` block; read the value there and save it: "
                "`result = tracer.result.save()`."
            )
        return self._run, worker
