"""Source: the operations inside a module's forward, as envoys."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch.nn import Module

from nnsight._core import INPUT, OperationPlace, Worker, plain_forward
from nnsight.errors import SourceError, UnknownPathError
from nnsight.source import FunctionSource, Interception, analyse, callee_of, intercept

from ._tree import Tree
from ._values import Values

if TYPE_CHECKING:
    from ._envoy import Envoy


class Source:
    """The source of a module's forward, or of a function called in it, with its operations as attributes.

    Printing it shows the code with the operations' names; an operation has `.output`, `.input`, `.inputs`,
    `.skip()` and, for what happens inside the function that it calls, a `.source` of its own.

    Example:
        >>> import torch
        >>> from nnsight import NNsight
        >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(3, 2)))
        >>> list(model[0].source)
        ['F_linear_0']
        >>> with model.trace(torch.ones(1, 3)):
        ...     product = model[0].source.F_linear_0.output.save()
        ...     output = model.output.save()
        >>> torch.equal(product, output)
        True
    """

    def __init__(self, function: FunctionSource, owner: Envoy | Operation, callee: Any) -> None:
        self._function = function
        self._owner = owner
        self._callee = callee
        self._path = f"{owner._path}.source"

    def __getattr__(self, name: str) -> Operation:
        if "_function" not in self.__dict__ or name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, name: str) -> Operation:
        if name not in self._function.operations:
            raise UnknownPathError(_no_operation(self._path, self._function, name))
        return Operation(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._function.operations)

    def __len__(self) -> int:
        return len(self._function.operations)

    def __contains__(self, name: object) -> bool:
        return name in self._function.operations

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._function.operations]

    def __repr__(self) -> str:
        return self._function.render()


class Operation(Values):
    """One call in the forward of a module, or in a function called there.

    Printing it shows the lines around it.

    Example:
        >>> import torch
        >>> from nnsight import NNsight
        >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(3, 2)))
        >>> operation = model[0].source.F_linear_0
        >>> with model.trace(torch.ones(1, 3)):
        ...     operation.output = operation.output * 2
        ...     output = model.output.save()
        >>> torch.equal(output, 2 * model(torch.ones(1, 3)))
        True
    """

    def __init__(self, source: Source, name: str) -> None:
        self._source = source
        self._name = name
        self._path = f"{source._path}.{name}"

    @property
    def _tree(self) -> Operations:  # pyright: ignore[reportIncompatibleVariableOverride]
        return operations_of(self._source._owner._tree)

    @property
    def _place(self) -> OperationPlace:
        return self._tree.places.of(self._source._owner._place, self._name)

    @property
    def source(self) -> Source:
        """The operations inside the function that is called here.

        Where only a run can tell which function that is, this waits, in a trace, until it is called.

        Example:
            >>> from nnsight import LanguageModel
            >>> model = LanguageModel("nnsight/landmarks", attn_implementation="eager")
            >>> attention = model.transformer.h[0].attn.source.attention_interface_0
            >>> with model.trace("Hello"):
            ...     mixed = attention.source.attn_output_transpose_0.input.save()

        Raises:
            SourceError: The function has no Python source, or, outside a trace, is not known.
        """
        tree = self._tree
        worker = tree.find_worker()
        callee = callee_of(self._source._callee, self._name)
        if callee is None and worker is not None:
            callee = self._meet(worker, tree.places)
        if callee is None:
            raise SourceError(_UNKNOWN_CALLEE.format(path=self._path))
        if isinstance(callee, Module):
            raise SourceError(_CALLS_MODULE.format(path=self._path, module=_path_of(tree.root, callee)))
        source = Source(analyse(callee), self, callee)
        if worker is not None:
            tree.places.open(worker, self._place)
        return source

    def _meet(self, worker: Worker, places: Places) -> Any:
        """Wait until the function is about to be called."""
        place = self._place
        places(worker, place, self._path)
        worker.run.reach(worker, place, INPUT, self._path)
        return places.open(worker, place.owner).callees.get(place)

    def __repr__(self) -> str:
        return self._source._function.render(self._name)


class Places:
    """The places of one tree's operations; called before each request, it makes them visible in the run."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, str], OperationPlace] = {}

    def __call__(self, worker: Worker, place: Any, _path: str) -> None:
        self.open(worker, place.owner)
        worker.run.start().see().watch(place)

    def of(self, owner: Module | OperationPlace, name: str) -> OperationPlace:
        """The place of operation `name` in the function of `owner`, the same every time."""
        known = self._known.get((owner, name))
        if known is None:
            module = owner if isinstance(owner, Module) else owner.module
            known = self._known[owner, name] = OperationPlace(name, owner, module)
        return known

    def open(self, worker: Worker, owner: Module | OperationPlace) -> Interception:
        """Make the operations in the function of `owner` visible, from its next call in this run on."""
        if isinstance(owner, Module):
            interception = intercept(worker.run.overrides, owner)
        else:
            interception = self.open(worker, owner.owner).inside(owner.name)
        if interception.place_of is None:
            interception.owner = owner
            interception.place_of = partial(self.of, owner)
        return interception


class Operations(Tree):
    """The operations of a tree's modules: their values are shown as they are."""

    def __init__(self, root: Module) -> None:
        super().__init__(root)
        self.places = self.before_request = Places()


def operations_of(tree: Tree) -> Operations:
    """The operations of the modules of `tree`."""
    if isinstance(tree, Operations):
        return tree
    found = tree.operations
    if not isinstance(found, Operations) or found.root is not tree.root:
        found = tree.operations = Operations(tree.root)
    return found


def source_of(envoy: Envoy) -> Source:
    """The source of a module's forward; in a trace, its operations are visible from its next call on."""
    module = envoy._module
    forward = plain_forward(module)
    if isinstance(forward, MethodType) and forward.__func__ is Module.forward:
        raise SourceError(_NO_FORWARD.format(path=envoy._path, kind=type(module).__name__))
    source = Source(analyse(forward), envoy, forward)
    tree = operations_of(envoy._tree)
    worker = tree.find_worker()
    if worker is not None:
        if envoy._tree.hides_operations:
            raise SourceError(envoy._tree.hides_operations)
        tree.places.open(worker, module)
    return source


def _no_operation(path: str, function: FunctionSource, name: str) -> str:
    close = difflib.get_close_matches(name, function.operations, n=3, cutoff=0.6)
    some = list(function.operations)[:12]
    if close:
        hint = f" The closest are: {', '.join(close)}."
    elif some:
        hint = f" Its operations are: {', '.join(some)}{', …' if len(function.operations) > 12 else ''}."
    else:
        hint = " It makes no calls."
    return f"{path} ({function.name}) has no operation {name!r}.{hint} Print it to see them where they stand."


def _path_of(root: Module, module: Module) -> str:
    names = [name for name, found in root.named_modules() if found is module]
    return f"model.{names[0]}" if names else f"the {type(module).__name__}"


_UNKNOWN_CALLEE = """\
Which function {path} calls is known only while the model runs. Ask for its source inside a trace:

    with model.trace(input):
        print(model....source)"""

_CALLS_MODULE = "{path} calls a module: its operations are at {module}.source."

_NO_FORWARD = """\
{path} is a {kind}, which is never called and has no forward: ask for the .source of a module in it, or \
around it."""
