"""Envoy: the proxy of one module, with the module's values as attributes."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any, overload

import torch
from torch.nn import Module

from .._core import INPUT, OUTPUT, active, as_native
from ..errors import UnknownPathError
from ._tree import Tree, first_input, unknown, with_first_input


class Envoy:
    """Stands for one module of a model, and reads and changes its values while the model runs.

    Submodules are attributes and items, as on the module itself: `model.transformer.h[3].attn`.  Any other
    attribute is the module's own (`model.lm_head.weight`).

    Where a submodule has the name of one of these attributes (`output` in BERT's layers), the attribute is
    the value, and the submodule is reached as an item or by its path:

        >>> layer["output"]                          # doctest: +SKIP
        >>> model.get("encoder.layer.0.output")      # doctest: +SKIP
    """

    def __init__(self, module: Module, path: str, tree: Tree) -> None:
        self._module = module
        self._path = path
        self._tree = tree
        self._children: dict[str, Envoy] = {}
        self._indexed: dict[int, tuple[str, Envoy]] = {}

    # --- values ----------------------------------------------------------------------------------------------

    @property
    def output(self) -> Any:
        """What the module returns; waits until it has run.

        Example:
            >>> with model.trace(x):                      # doctest: +SKIP
            ...     hidden = model.layer.output.save()

        Raises:
            NotTracingError: Outside a trace.
            OutOfOrderError: The module has already run, and a second pass cannot serve the read.
            NeverRanError: The module does not run in this forward.
        """
        tree, module = self._tree, self._module
        worker = active.get()
        if worker is None or worker.instruments is not tree.instruments:
            worker = tree.worker(self._path, OUTPUT)
        if tree.before_request is not None:
            tree.before_request(worker, module, self._path)
        visit, value = worker.run.read(worker, module, OUTPUT, self._path)
        if type(value) is torch.Tensor and tree.plain_tensors:
            return value
        return tree.show(worker, visit, module, self._path, value)

    @output.setter
    def output(self, value: Any) -> None:
        self._tree.write(self._module, self._path, OUTPUT, value, sys._getframe(1))

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the module is called with: `(args, kwargs)`; waits until it is called."""
        tree, module = self._tree, self._module
        worker = tree.worker(self._path, INPUT)
        if tree.before_request is not None:
            tree.before_request(worker, module, self._path)
        return worker.run.read(worker, module, INPUT, self._path)[1]

    @inputs.setter
    def inputs(self, value: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        args, kwargs = value
        self._tree.write(self._module, self._path, INPUT, (tuple(args), dict(kwargs)), sys._getframe(1))

    @property
    def input(self) -> Any:
        """The first argument the module is called with; waits until it is called."""
        return first_input(self.inputs, self._path)

    @input.setter
    def input(self, value: Any) -> None:
        worker = self._tree.worker(self._path, INPUT)
        visit = worker.run.reach(worker, self._module, INPUT, self._path, write=True)
        worker.run.change(worker, visit, with_first_input(visit, value), f"{self._path}.input")

    # --- the tree --------------------------------------------------------------------------------------------

    @property
    def path(self) -> str:
        """Where the module is in the model: `model.transformer.h.3`."""
        return self._path

    @property
    def device(self) -> torch.device | None:
        """The device of the module's first parameter or buffer, None where it has neither."""
        tensors = (*self._module.parameters(), *self._module.buffers())
        return tensors[0].device if tensors else None

    def get(self, path: str) -> Envoy:
        """The submodule at a dotted path, with or without the leading `model.`.

        Example:
            >>> model.get("transformer.h.3.attn")      # doctest: +SKIP

        Raises:
            UnknownPathError: There is no such module; the message names the nearest.
        """
        try:
            return self._walk(path)
        except UnknownPathError:
            prefix = self._path + "."
            if path.startswith(prefix):
                return self._walk(path[len(prefix) :])
            raise

    def _walk(self, path: str) -> Envoy:
        envoy = self
        for name in path.split(".") if path else ():
            envoy = envoy[name]
        return envoy

    def named_modules(self) -> Iterator[tuple[str, Envoy]]:
        """Pairs of relative path and envoy, this one first under the empty path."""
        for name, _ in self._module.named_modules():
            yield name, self._walk(name)

    def modules(self) -> Iterator[Envoy]:
        """This envoy and those of all modules inside."""
        for _, envoy in self.named_modules():
            yield envoy

    def children(self) -> Iterator[Envoy]:
        """The envoys of the direct submodules."""
        for name in self._module._modules:
            yield self[name]

    def _child(self, name: str) -> Envoy | None:
        module = self._module._modules.get(name)
        if module is None:
            return None
        known = self._children.get(name)
        if known is None or known._module is not module:
            known = self._children[name] = Envoy(module, f"{self._path}.{name}", self._tree)
        return known

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_module" not in self.__dict__:
            raise AttributeError(name)
        child = self._child(name)
        if child is not None:
            return child
        try:
            value = getattr(self._module, name)
        except AttributeError:
            raise unknown(self, name, (*self._module._modules, *_public_names(type(self)))) from None
        return self._bind(value) if inspect.ismethod(value) and value.__self__ is self._module else value

    def _bind(self, method: Any) -> Any:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            return self if result is self._module else result

        return call

    @overload
    def __getitem__(self, index: int | str) -> Envoy: ...
    @overload
    def __getitem__(self, index: slice) -> list[Envoy]: ...
    def __getitem__(self, index: int | str | slice) -> Envoy | list[Envoy]:
        names = self._module._modules
        if isinstance(index, slice):
            return [self[name] for name in list(names)[index]]
        if isinstance(index, int):
            known = self._indexed.get(index)
            if known is not None and names.get(known[0]) is known[1]._module:
                return known[1]
            position = index + len(names) if index < 0 else index
            child = self._child(str(position))
            if child is None and 0 <= position < len(names):
                child = self._child(list(names)[position])
            if child is None:
                raise IndexError(f"{self._path} has {len(names)} submodules; there is none at index {index}.")
            if index >= 0:
                self._indexed[index] = (child._path.rpartition(".")[2], child)
            return child
        child = self._child(index)
        if child is None:
            raise unknown(self, index, names)
        return child

    def __len__(self) -> int:
        return len(self._module._modules)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Envoy]:
        return self.children()

    def __contains__(self, name: object) -> bool:
        return name in self._module._modules

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._module._modules, *dir(self._module)})

    def __repr__(self) -> str:
        return repr(self._module)

    def _rebind(self, module: Module) -> None:
        """Stand for `module` from now on, and let the envoys below follow."""
        self._module = module
        self._indexed.clear()
        for name, child in self._children.items():
            below = module._modules.get(name)
            if below is not None:
                child._rebind(below)

    # --- calls -----------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the module out of its place in the forward: `model.lm_head(hidden)`."""
        return self._module(*(as_native(arg) for arg in args), **{k: as_native(v) for k, v in kwargs.items()})

    def to(self, *args: Any, **kwargs: Any) -> Envoy:
        """Move or cast the module's parameters, as `torch.nn.Module.to`; returns this envoy."""
        self._module.to(*args, **kwargs)
        return self


@functools.cache
def _public_names(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if not name.startswith("_"))
