"""Classes: which envoy class stands for which module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch.nn import Module

from nnsight.errors import InputError, UnknownPathError

from ._rename import unknown_key

if TYPE_CHECKING:
    from ._envoy import Envoy


class Classes:
    """`envoys={torch.nn.Linear: MyEnvoy, "attn": MyAttention, "transformer.h.0": MyBlock}`, checked.

    A path goes before a name, and a name before a type; of several types the most specific counts.
    """

    def __init__(self, root: Module, envoys: Mapping[type[Module] | str, type[Envoy]], base: type) -> None:
        self._types: dict[type, type[Envoy]] = {}
        self._names: dict[str, type[Envoy]] = {}
        paths = {name for name, _ in root.named_modules() if name}
        names = {path.rpartition(".")[2] for path in paths}
        for key, cls in envoys.items():
            if not (isinstance(cls, type) and issubclass(cls, base)):
                raise InputError(f"envoys: {cls!r}, for {key!r}, is not a subclass of nnsight.Envoy.")
            if isinstance(key, str):
                path = key.removeprefix("model.") if key not in paths else key
                if path not in paths and path not in names:
                    raise UnknownPathError(unknown_key("envoys", key, paths if "." in path else names))
                self._names[path] = cls
            elif isinstance(key, type) and issubclass(key, Module):
                self._types[key] = cls
            else:
                raise InputError(_BAD_KEY.format(key=key))

    def find(self, module: Module, path: str) -> type[Envoy] | None:
        """The class for the module at `path`, from the root and without `model.`."""
        for key in (path, path.rpartition(".")[2]):
            if key in self._names:
                return self._names[key]
        return next((self._types[kind] for kind in type(module).__mro__ if kind in self._types), None)


_BAD_KEY = 'envoys: {key!r} is no key; give a class of modules (torch.nn.Linear), a name ("attn") or a path.'
