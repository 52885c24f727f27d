"""Tree: what all envoys of one model share."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch.nn import Module

from .._core import OUTPUT, Instruments, Visit, Worker, active, as_assignable, find_worker
from ..errors import EditError, NotTracingError, UnknownPathError
from ._classes import Classes
from ._rename import Aliases

if TYPE_CHECKING:
    from ._envoy import Envoy

Present = Callable[[Module, Any, Callable[[Any], None]], Any]


class Tree:
    """The module at the root, its instruments, and how values of its modules are shown.

    `present(module, value, write)` makes what `.output` gives out of what the module returned; `write` puts
    a new value in its place.
    """

    def __init__(self, root: Module) -> None:
        self.root = root
        self.instruments = Instruments.of(root)
        self.stepper: Any = None  # the place whose calls begin the steps, the root's where there is none
        self.present: Present = present_plainly
        self.plain_tensors = True
        self.accept: Callable[[Module, Any, Any], Any] | None = None
        self.stand_in: Callable[[Module, Any], Any] | None = None
        self.before_request: Callable[[Worker, Module, str], None] | None = None
        self.aliases: Aliases | None = None
        self.classes: Classes | None = None
        self.operations: Tree | None = None
        self.vocabulary: Any = None
        self.hides_operations: str | None = None  # why the operations inside forwards cannot be had
        self.due: Callable[[], None] | None = None  # to be done when the next trace begins
        self.changes = 0  # how often an attribute of a module was set through an envoy
        self.find_named: Callable[[Envoy, str], Envoy | None] | None = None  # names beside the modules' own

    def rebind(self, root: Module) -> None:
        """Use another module from now on (the loaded one in place of its empty shape)."""
        self.root = root
        self.instruments = Instruments.of(root)
        self.operations = None

    def envoy_class(self, module: Module, path: str, default: type[Envoy]) -> type[Envoy]:
        """The class of the envoy for the module at `path`."""
        found = self.classes.find(module, path.removeprefix("model.")) if self.classes else None
        return found or default

    def find_worker(self) -> Worker | None:
        """The block of a trace of this model that the current code belongs to."""
        worker = active.get()
        if worker is None or worker.instruments is self.instruments:
            return worker
        return find_worker(self.instruments)

    def worker(self, path: str, kind: str) -> Worker:
        """As `find_worker`, or an error that says what to write."""
        worker = self.find_worker()
        if worker is None:
            raise NotTracingError(_NOT_TRACING.format(path=path, kind=kind))
        return worker

    # --- values ------------------------------------------------------------------------------------------

    def show(self, worker: Worker, visit: Visit, module: Module, path: str, value: Any) -> Any:
        """A module's output as the block sees it."""
        run = worker.run

        def write(changed: Any) -> None:
            run.change(worker, visit, changed, f"{path}.{OUTPUT}")

        return self.present(module, value, write)

    def write(self, module: Module, path: str, kind: str, value: Any, frame: FrameType) -> None:
        """Put `value` at a module."""
        worker = active.get()
        if worker is None or worker.instruments is not self.instruments:
            worker = self.worker(path, kind)
        if self.before_request is not None:
            self.before_request(worker, module, path)
        visit = worker.run.reach(worker, module, kind, path, write=True)
        if self.accept is not None and kind == OUTPUT:
            value = self.accept(module, visit.value, value)
        worker.run.change(worker, visit, value, f"{path}.{kind}", frame)


def present_plainly(_module: Module, value: Any, write: Callable[[Any], None]) -> Any:
    """A value as it is, with assignable items where it is a tuple."""
    return as_assignable(value, write) if isinstance(value, tuple) else value


def first_input(inputs: tuple[tuple[Any, ...], dict[str, Any]], path: str) -> Any:
    """The first positional argument, or the first keyword argument where there is none."""
    args, kwargs = inputs
    if args:
        return args[0]
    if kwargs:
        return next(iter(kwargs.values()))
    raise EditError(f"{path} was called without any argument, so it has no .input; .inputs gives ((), {{}}).")


def as_inputs(value: Any, path: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What is assigned to `.inputs`, if it has the form of `.inputs`."""
    if isinstance(value, (tuple, list)) and len(value) == 2:
        args, kwargs = value
        if isinstance(args, (tuple, list)) and isinstance(kwargs, Mapping):
            return tuple(args), dict(kwargs)
    raise EditError(
        f"{path}.inputs is (args, kwargs), all that it is called with: assign a pair like ((hidden,), {{'mask': mask}}). The "
        f"first argument alone is {path}.input."
    )


def with_first_input(visit: Visit, value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs of a call with the first argument exchanged."""
    args, kwargs = visit.value
    if args or not kwargs:
        return (value, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): value}


def unknown(envoy: Envoy, name: str, names: Iterable[str]) -> UnknownPathError:
    """The error for a name that a module does not have, with the nearest ones it has."""
    children = envoy._names()
    close = difflib.get_close_matches(name, sorted({*children, *names}), n=3, cutoff=0.6)
    if close:
        hint = f" The closest are: {', '.join(close)}."
    elif children:
        hint = f" Its submodules are: {', '.join(children[:12])}{', …' if len(children) > 12 else ''}."
    else:
        hint = " It has no submodules."
    return UnknownPathError(f"{envoy.path} ({type(envoy._module).__name__}) has no {name!r}.{hint}")


_NOT_TRACING = """\
Cannot return {kind} of Envoy {path}: no trace of this model is running here. Values exist only while the model runs:

    with model.trace(input):          # or: with model.trace() as tracer:
        value = model....{kind}.save()    #         with tracer.invoke(input): ...
"""
