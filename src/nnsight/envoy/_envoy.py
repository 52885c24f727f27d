"""Envoy: the proxy of one module, with the module's values as attributes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from itertools import chain
from typing import Any, overload

import torch
from torch.nn import Module

from .._core import as_native
from ..errors import EditError, UnknownPathError
from ._source import Source, source_of
from ._tree import Tree, unknown
from ._values import Values


class Envoy(Values):
    """Stands for one module of a model, and reads and changes its values while the model runs.

    Submodules are attributes and items, as on the module itself: `model.transformer.h[3].attn`.  Any other
    attribute is the module's own (`model.lm_head.weight`).

    Where a submodule has the name of one of these attributes (`output` in BERT's layers), the attribute is
    the value, and the submodule is reached as an item or by its path:

        >>> import torch
        >>> from nnsight import NNsight
        >>> layer = torch.nn.ModuleDict({"dense": torch.nn.Linear(3, 4), "output": torch.nn.Linear(4, 2)})
        >>> model = NNsight(torch.nn.ModuleDict({"layer": layer}))
        >>> model.layer["output"]
        Linear(in_features=4, out_features=2, bias=True)
        >>> model.get("layer.output").path
        'model.layer.output'
    """

    def __init__(self, module: Module, path: str, tree: Tree) -> None:
        self._module = self._place = module
        self._path = path
        self._tree = tree
        self._children: dict[str, Envoy] = {}
        self._indexed: dict[int, tuple[str, Envoy]] = {}

    # --- the tree --------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device | None:
        """The device of the module's first parameter or buffer, None where it has neither.

        Example:
            >>> import torch
            >>> from nnsight import NNsight
            >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()))
            >>> model[0].device
            device(type='cpu')
        """
        tensor = next(chain(self._module.parameters(), self._module.buffers()), None)
        return None if tensor is None else tensor.device

    def get(self, path: str) -> Envoy:
        """The submodule at a dotted path, with or without the leading `model.`.

        Example:
            >>> from nnsight import LanguageModel
            >>> model = LanguageModel("nnsight/landmarks")
            >>> model.get("transformer.h.3.attn").path
            'model.transformer.h.3.attn'

        Raises:
            UnknownPathError: There is no such module; the message names the nearest.
        """
        try:
            return self._walk(path)
        except UnknownPathError:
            prefix = self._path + "."
            if path == self._path:
                return self
            if path.startswith(prefix):
                return self._walk(path[len(prefix) :])
            raise

    def _walk(self, path: str) -> Envoy:
        envoy = self
        for name in path.split(".") if path else ():
            envoy = envoy[name]
        return envoy

    def named_modules(self) -> Iterator[tuple[str, Envoy]]:
        """Pairs of relative path and envoy, this one first under the empty path.

        Example:
            >>> import torch
            >>> from nnsight import NNsight
            >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()))
            >>> [name for name, envoy in model.named_modules()]
            ['', '0', '1']
        """
        for name, _ in self._module.named_modules():
            yield name, self._walk(name)

    def modules(self) -> Iterator[Envoy]:
        """This envoy and those of all modules inside.

        Example:
            >>> import torch
            >>> from nnsight import NNsight
            >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()))
            >>> [envoy.path for envoy in model.modules()]
            ['model', 'model.0', 'model.1']
        """
        for _, envoy in self.named_modules():
            yield envoy

    def children(self) -> Iterator[Envoy]:
        """The envoys of the direct submodules.

        Example:
            >>> import torch
            >>> from nnsight import NNsight
            >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()))
            >>> [envoy.path for envoy in model.children()]
            ['model.0', 'model.1']
        """
        for name in self._names():
            yield self[name]

    def _names(self) -> list[str]:
        return [name for name, module in self._module._modules.items() if module is not None]

    def _child(self, name: str) -> Envoy | None:
        try:
            module = self._module._modules[name]
        except KeyError:
            return None
        if module is None:
            return None
        known = self._children.get(name)
        if known is None or known._module is not module:
            path = f"{self._path}.{name}"
            cls = self._tree.envoy_class(module, path, Envoy)
            known = self._children[name] = cls(module, path, self._tree)
        return known

    def _renamed(self, name: str) -> Envoy | None:
        path = self._alias_of(name)
        return self._walk(path) if path else None

    def _alias_of(self, name: str) -> str | None:
        """The path of what a renamed module is here, None where `name` is no new name."""
        aliases = self._tree.aliases
        if aliases is None or name in self._module._modules:
            return None
        return aliases.find(self._module._modules, name, self._module is self._tree.root)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_module" not in self.__dict__:
            raise AttributeError(name)
        child = self._children.get(name)
        if child is not None and self._module._modules.get(name) is child._module:
            return child
        child = self._child(name) or self._renamed(name)
        if child is not None:
            return child
        own = next((vars(cls)[name] for cls in type(self).__mro__ if name in vars(cls)), None)
        if own is not None and hasattr(own, "__get__"):
            return own.__get__(self, type(self))  # it raised an AttributeError, and does so again
        return self._of_module(name)

    def _of_module(self, name: str) -> Any:
        try:
            value = getattr(self._module, name)
        except AttributeError:
            named = self._named(name)
            if named is None:
                raise unknown(self, name, (*self._aliases(), *_public_names(type(self)))) from None
            return named
        return self._bind(value) if inspect.ismethod(value) and value.__self__ is self._module else value

    def _named(self, name: str) -> Envoy | None:
        find = self._tree.find_named
        return None if find is None else find(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or hasattr(type(self), name) or "_module" not in self.__dict__:
            object.__setattr__(self, name, value)
        else:
            self._set_other(name, value)

    def _set_other(self, name: str, value: Any) -> None:
        child = self._child(name) or self._renamed(name)
        value = value._module if isinstance(value, Envoy) else value
        if child is not None and not isinstance(value, Module):
            raise EditError(
                f"{child.path} is a module, and a {type(value).__name__} cannot stand for it. Assign to what it gives, "
                f"{child.path}.output = ..., or to its .input."
            )
        if child is not None:
            owner, _, own_name = (self._alias_of(name) or name).rpartition(".")
            self._tree.changes += 1
            setattr(self._walk(owner)._module, own_name, value)
        elif isinstance(value, Module) or hasattr(self._module, name):
            self._tree.changes += 1
            setattr(self._module, name, value)
        elif self._tree.find_worker() is not None and type(self).__module__.startswith(
            __name__.partition(".")[0] + "."
        ):
            raise unknown(self, name, (*self._aliases(), *_public_names(type(self))))
        else:
            object.__setattr__(self, name, value)

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
        if isinstance(index, slice):
            return [self[name] for name in self._names()[index]]
        if isinstance(index, int):
            modules, known = self._module._modules, self._indexed.get(index)
            if known is not None and known[0] in modules and modules[known[0]] is known[1]._module:
                return known[1]
            names = self._names()
            position = index + len(names) if index < 0 else index
            child = self._child(str(position))
            if child is None and 0 <= position < len(names):
                child = self._child(names[position])
            if child is None:
                raise IndexError(f"{self._path} has {len(names)} submodules; there is none at index {index}.")
            if index >= 0:
                self._indexed[index] = (child._path.rpartition(".")[2], child)
            return child
        child = self._child(index) or self._renamed(index) or self._named(index)
        if child is None:
            raise unknown(self, index, self._aliases())
        return child

    def __len__(self) -> int:
        return len(self._names())

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Envoy]:
        return self.children()

    def __contains__(self, name: object) -> bool:
        return name in self._module._modules or name in self._aliases()

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._module._modules, *self._aliases(), *dir(self._module)})

    def _aliases(self) -> list[str]:
        aliases = self._tree.aliases
        return aliases.names_in(self._module._modules, self._module is self._tree.root) if aliases else []

    def __repr__(self) -> str:
        aliases = self._tree.aliases
        if aliases and self._module is self._tree.root:
            return f"{self._module!r}\nRenamed: {aliases.describe()}"
        return repr(self._module)

    def _rebind(self, module: Module) -> None:
        """Stand for `module` from now on, and let the envoys below follow."""
        self._module = self._place = module
        self._indexed.clear()
        below = dict(module._modules.items())
        for name, child in self._children.items():
            if below.get(name) is not None:
                child._rebind(below[name])  # pyright: ignore[reportArgumentType]

    @property
    def source(self) -> Source:
        """The operations inside the module's forward; printing it shows the code with their names.

        In a trace, asking for it makes the module's operations visible from its next call on, in this trace
        only.  The module itself is not changed.

        Example:
            >>> import torch
            >>> from nnsight import NNsight
            >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(3, 2)))
            >>> "F_linear_0" in model[0].source
            True
            >>> with model.trace(torch.ones(1, 3)):
            ...     weight = model[0].source.F_linear_0.inputs[0][1].save()
            >>> weight.shape
            torch.Size([2, 3])

        Raises:
            SourceError: The forward has no Python source.
        """
        return source_of(self)

    # --- calls -----------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the module out of its place in the forward: `model.lm_head(hidden)`."""
        return self._module(*(as_native(arg) for arg in args), **{k: as_native(v) for k, v in kwargs.items()})

    def to(self, *args: Any, **kwargs: Any) -> Envoy:
        """Move or cast the module's parameters, as `torch.nn.Module.to`; returns this envoy.

        Example:
            >>> import torch
            >>> from nnsight import NNsight
            >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()))
            >>> model.to(torch.float64)[0].weight.dtype
            torch.float64
        """
        self._module.to(*args, **kwargs)
        return self


@functools.cache
def _public_names(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if not name.startswith("_"))
