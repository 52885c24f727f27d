"""Everything nnsight assigns to classes that are not its own, and how to undo it.

`.save()` and `.value` are mounted on `torch.Tensor` and on the built-in types that traces hand out.  On a
subclass (an `Enum` that is also a `str`, a dictionary with attribute access) a mounted name stands behind
everything the subclass itself, or another base of it, defines.

What is needed only now and then is a `Replacement`: it stands while somebody holds it.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

_TYPES: tuple[type, ...] = (list, dict, tuple, set, frozenset, int, float, complex, str, bytes)
_mounted: list[tuple[type, str]] = []
_held: list[Replacement] = []


class _Mounted:
    """A name on a foreign class that gives way to whatever a subclass defines."""

    def __init__(self, owner: type, name: str, get: Callable[[Any], Any]) -> None:
        self._owner = owner
        self._name = name
        self._get = get

    def __get__(self, instance: Any, cls: type | None = None) -> Any:
        if instance is None:
            raise AttributeError(f"type object {cls} has no attribute {self._name!r}")
        kind = type(instance)
        if kind is not self._owner:
            order = kind.__mro__
            for base in order[order.index(self._owner) + 1 :]:
                found = vars(base).get(self._name)
                if found is not None:
                    return found.__get__(instance, kind) if hasattr(found, "__get__") else found
            if hasattr(kind, "__getattr__"):
                raise AttributeError(self._name)
        return self._get(instance)


def _namespace(cls: type) -> dict[str, Any]:
    return next(found for found in gc.get_referents(cls.__dict__) if type(found) is dict)


def _assign(cls: type, name: str, value: Any) -> None:
    _namespace(cls)[name] = value
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(cls))


def mount(save: Callable[[Any], Any], replacements: Sequence[Replacement] = ()) -> None:
    """Give `.save()` and `.value` to tensors and built-in values, and put `replacements` in place, once."""
    if _mounted:
        return
    for replacement in replacements:
        replacement.hold()
        _held.append(replacement)

    def bind(instance: Any) -> Callable[[], Any]:
        return lambda: save(instance)

    # PyTorch looks up every name of its tensors at their class.
    _mount(torch.Tensor, "save", save)
    _mount(torch.Tensor, "value", property(_itself))
    for cls in _TYPES:
        _mount(cls, "save", _Mounted(cls, "save", bind))
        _mount(cls, "value", _Mounted(cls, "value", _itself))


def _mount(cls: type, name: str, value: Any) -> None:
    if name not in vars(cls):
        _assign(cls, name, value)
        _mounted.append((cls, name))


def unmount() -> None:
    """Take from `torch.Tensor` and the built-in types again what nnsight put there.

    Wrapping a model mounts `.save()` and `.value`, and lets `with loss.backward():` open a block in a trace; wrapping
    another one mounts them again.

    Example:
        >>> import torch, nnsight
        >>> model = nnsight.NNsight(torch.nn.Linear(2, 2))
        >>> hasattr(torch.ones(1), "save")
        True
        >>> nnsight.unmount()
        >>> hasattr(torch.ones(1), "save")
        False
    """
    while _held:
        _held.pop().release()
    while _mounted:
        cls, name = _mounted.pop()
        del _namespace(cls)[name]
        ctypes.pythonapi.PyType_Modified(ctypes.py_object(cls))


def _itself(instance: Any) -> Any:
    return instance


class Replacement:
    """A name on a foreign class that stands for something else while anybody holds it.

    `make` is given what the class has under that name, and returns what stands there instead.
    """

    def __init__(self, cls: type, name: str, make: Callable[[Any], Any]) -> None:
        self._cls = cls
        self._name = name
        self._make = make
        self._plain: Any = None
        self._value: Any = None
        self._inherited = False
        self._holders = 0
        self._lock = threading.Lock()

    def hold(self) -> None:
        """Put it in place; pair with `release`."""
        with self._lock:
            self._holders += 1
            if self._holders > 1:
                return
            plain = getattr(self._cls, self._name)
            if plain is not self._plain:
                self._plain, self._value = plain, self._make(plain)
                self._inherited = self._name not in vars(self._cls)
            setattr(self._cls, self._name, self._value)

    def release(self) -> None:
        """Put back what was there, once nobody holds it any more."""
        with self._lock:
            self._holders -= 1
            if self._holders or vars(self._cls).get(self._name) is not self._value:
                return
            if self._inherited:
                delattr(self._cls, self._name)
            else:
                setattr(self._cls, self._name, self._plain)
