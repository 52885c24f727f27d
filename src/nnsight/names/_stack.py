"""Stack: the vocabulary of one stack of layers of a model."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module

from .._core import OperationPlace
from ..envoy import Envoy
from ..errors import InputError, NamesError, NoLayerError
from ._access import Access
from ._accesses import make_access, names_of
from ._family import Family
from ._terms import HEADS, IN_LAYERS, IN_MLP, MODULES, VALUES
from ._values import Heads, LayerValues

if TYPE_CHECKING:
    from ._vocabulary import Vocabulary


class Stack:
    """The names of one stack of layers.

    Its attributes are those of the model: `stack.resid_pre[3]`, `stack.heads[3].z`, `stack.layers`, ….  Most models have
    one stack; an encoder and a decoder are two: `model.names.encoder`, `model.names.decoder`.
    """

    def __init__(self, vocabulary: Vocabulary, name: str, row: Family) -> None:
        self.name = name
        self.row = row
        self.prefix = f"names.{name}." if name else ""
        self._vocabulary = vocabulary
        self._base = ".".join(filter(None, (vocabulary.base, row.base)))
        self._steps = tuple(".".join(filter(None, (self._base, row.layers))).split("."))
        self.path = f"model.{'.'.join(self._steps)}"
        self._places: dict[tuple[Module, str], OperationPlace] = {}
        self._accesses: dict[tuple[str, str], Access] = {}
        self._fronts: dict[str, Any] = {}

    # --- names -----------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        front = self._fronts.get(name)
        if front is None:
            if name in MODULES:
                return self.envoy(name)
            if name == "logits":
                return self.read(self.access(name), 0)
            front = self._fronts[name] = self._make_front(name)
        return front

    def _make_front(self, name: str) -> Any:
        if name in VALUES:
            return LayerValues(self, self.access(name))
        if name in HEADS:
            self.access(f"{HEADS[name]}_z")
            return Heads(self, f"{HEADS[name]}_")
        raise self._vocabulary.unknown(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "logits":
            self.write(self.access(name), 0, value)
        else:
            super().__setattr__(name, value)

    def names(self) -> list[str]:
        """The names of values that this stack has."""
        return names_of(self)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *MODULES, *self.names(), *HEADS, "logits"})

    def __repr__(self) -> str:
        return f"{self.kind}, layers at {self.path}: {', '.join(self.names())}"

    @property
    def kind(self) -> str:
        """What to call it in messages."""
        kind = self._vocabulary.kind
        return f"The {self.name} of {kind}" if self.name else kind

    # --- values ----------------------------------------------------------------------------------------------

    def access(self, name: str) -> Access:
        """How the value called `name` is read and written."""
        key = (name, self.implementation() if name.endswith("pattern") else "")
        found = self._accesses.get(key)
        if found is None:
            found = self._accesses[key] = make_access(self, name)
        return found

    def read(self, access: Access, index: int) -> torch.Tensor:
        """The value at layer `index`."""
        return access.read(self._vocabulary.worker(access, index), index)

    def write(self, access: Access, index: int, value: Any) -> None:
        """Put `value` at layer `index`."""
        access.write(self._vocabulary.worker(access, index), index, value)

    def place(self, owner: Module, name: str, index: int) -> OperationPlace:
        """The place where a value of `owner` appears that is none of its own, the same every time."""
        found = self._places.get((owner, name))
        if found is None:
            label = self.spelled(name, index)
            found = self._places[owner, name] = OperationPlace(label, owner, owner, shown=True)
        return found

    def spelled(self, name: str, index: int) -> str:
        """How a block writes a value: `model.heads[3].z`."""
        prefix, head, what = name.rpartition("head_")
        at = f"{prefix}heads[{index}].{what}" if head else f"{name}[{index}]"
        return f"model.{self.prefix}{at}"

    # --- modules ---------------------------------------------------------------------------------------------

    def module(self, index: int, steps: Sequence[str], name: str) -> Module:
        """The module at a path below layer `index`."""
        module = self.layer(index)
        for step in steps:
            found = module._modules.get(step)
            if found is None:
                raise NamesError(_ABSENT.format(kind=self.kind, index=index, name=name, path=".".join(steps)))
            module = found
        return module

    def layer(self, index: int) -> Module:
        """The block number `index`."""
        return self._blocks()[str(index)]

    def _blocks(self) -> dict[str, Any]:
        module: Any = self._vocabulary.tree.root
        for step in self._steps:
            module = module._modules[step]
        return module._modules

    def number(self, index: int) -> int:
        """The number of the layer that `index` names, counted from the last one where it is negative."""
        count = len(self)
        try:
            number = operator.index(index)
        except TypeError:
            raise InputError(f"A layer is named by its number, 0 to {count - 1}, not by {index!r}.") from None
        if not -count <= number < count:
            raise NoLayerError(
                f"{self.path} has {count} layers; there is none at index {number}: they are 0 to {count - 1}, or -1 to "
                f"-{count} from the last one."
            )
        return number % count

    def __len__(self) -> int:
        return len(self._blocks())

    def root_module(self, steps: Sequence[str]) -> Module:
        """The module at a path from the root."""
        module: Any = self._vocabulary.tree.root
        for step in steps:
            module = module._modules[step]
        return module

    def path_of(self, name: str) -> str:
        """Where the module called `name` (`layers`, `embed`, `unembed`, `final_norm`) is, from the root."""
        if name == "layers":
            return ".".join(self._steps)
        path = getattr(self.row, name)
        if name in self.row.refused:
            raise NamesError(f"{self.kind} has no {name}: {self.row.refused[name]}")
        if path is not None:
            path = self._vocabulary.below_model(path) if name == "unembed" else self.below_base(path)
        if path is None or not self._vocabulary.has(path):
            raise NamesError(f"{self.kind} has no {name}.")
        return path

    def has(self, name: str) -> bool:
        """Whether the model has the module that the row calls by this name."""
        try:
            self.path_of(name)
        except NamesError:
            return False
        return True

    def below_base(self, path: str) -> str:
        """A path from the base model, from the root."""
        return ".".join(filter(None, (self._base, path)))

    def envoy(self, name: str) -> Envoy:
        """The envoy of the module called `name`."""
        path = self.path_of(name)
        self._vocabulary.vouch(self, name)
        return self._vocabulary.envoy(path)

    def paths_in_layers(self) -> Iterator[tuple[str, str]]:
        """Pairs of a name in a layer (`attn`, `mlp.router`) and the module's path below the layer."""
        for name in IN_LAYERS:
            path = getattr(self.row, name)
            if path is not None:
                yield name, path
        for name in IN_MLP:
            path = getattr(self.row, name)
            if path is not None and self.row.mlp is not None:
                yield f"{self.row.mlp}.{name}", f"{self.row.mlp}.{path}"

    def envoy_of(self, module: Module) -> Envoy:
        """The envoy of a module of the model."""
        root = self._vocabulary.tree.root
        return self._vocabulary.envoy(next(path for path, found in root.named_modules() if found is module))

    # --- the config ------------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        """The part of the model's config that describes this stack."""
        config = self._vocabulary.config
        return getattr(config, self.row.config) if self.row.config else config

    def count(self, name: str | int, default: int | None = None) -> int:
        """A number of the config."""
        if isinstance(name, int):
            return name
        found = getattr(self.config, name, None)
        if found is None and default is None:
            raise NamesError(f"The config of {self.kind} has no {name}.")
        return default if found is None else found  # pyright: ignore[reportReturnType]

    def head_value(self) -> Any:
        """What the row's `head` is about: a number of the config, a buffer of the model; None where it is not set."""
        name = self.row.head_value
        found = getattr(self.config, name, None) if name else None
        return getattr(self._vocabulary.model, name, None) if name and found is None else found

    def implementation(self) -> str:
        """How the model computes attention: `sdpa`, `eager`, …."""
        return str(getattr(self.config, "_attn_implementation", None))


_ABSENT = """\
{kind} has no {name} at layer {index}: that layer has no {path}, it is of another kind than those that have one."""
