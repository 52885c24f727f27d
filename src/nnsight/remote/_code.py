"""The user's own functions and classes as source text, with the names they read."""

from __future__ import annotations

import dis
import importlib.util
import inspect
import site
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from .._capture import dedent, names_of, nested_codes, parse
from ..errors import TravelError
from ._current import check_class, check_function
from ._find import Found, find_class, find_lambda


class Source(NamedTuple):
    """A definition taken from its file, dedented."""

    text: str
    filename: str
    first_line: int
    name: str
    reads: frozenset[str]


def is_installed(module: str) -> bool:
    """Whether a module comes with Python or was installed, so that the server is expected to have it too."""
    top = module.partition(".")[0]
    return top in sys.stdlib_module_names - {"__main__"} or _is_in_library(top)


@cache
def _is_in_library(top: str) -> bool:
    if top in ("__main__", "__mp_main__", ""):
        return False
    if top in ("nnsight", "torch"):
        return True
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    places = [spec.origin] if spec and spec.origin else list(spec.submodule_search_locations or ()) if spec else []
    roots = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib")}
    roots |= {Path(path) for path in (*site.getsitepackages(), site.getusersitepackages(), *_path_site())}
    return bool(places) and all(any(root in Path(place).parents for root in roots) for place in places)


def _path_site() -> Iterator[str]:
    return (path for path in sys.path if path.endswith("site-packages"))


def source_of(definition: FunctionType | type) -> Source:
    """The text of a function or class, as the user wrote it.

    Raises:
        TravelError: There is no source, or it has changed since.
    """
    name = definition.__qualname__
    try:
        found = _found(definition)
        statements = parse(found.text).body
    except TravelError:  # which is a TypeError too
        raise
    except (OSError, TypeError) as error:
        raise TravelError(f"{name!r} cannot travel: its source is not available ({error}).") from error
    except SyntaxError as error:
        raise TravelError(f"{name!r} cannot travel: its source cannot be read ({error.msg}).") from error
    if isinstance(definition, FunctionType):
        _refuse_outward(definition, name)
        check_function(definition, statements)
    else:
        check_class(definition, statements)
    return Source(*found, definition.__name__, names_of(statements).read)


def _found(definition: FunctionType | type) -> Found:
    if isinstance(definition, type):
        return find_class(definition)
    if definition.__name__ == "<lambda>":
        return find_lambda(definition)
    lines, first = inspect.getsourcelines(definition)
    return Found(dedent("".join(lines)), inspect.getsourcefile(definition) or "<unknown>", first)


def _refuse_outward(function: FunctionType, name: str) -> None:
    code = function.__code__
    for found in nested_codes(code):
        for instruction in dis.get_instructions(found):
            outward = instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") or (
                instruction.opname == "STORE_DEREF" and instruction.argval in code.co_freevars
            )
            if outward:
                raise TravelError(
                    f"{name!r} cannot travel: it assigns {instruction.argval!r}, a variable outside it, which would "
                    "change on the server alone. Return the value instead."
                )


def free_variables(definition: FunctionType | type, reads: frozenset[str]) -> dict[str, Any]:
    """The values of the surrounding functions' variables that a definition reads."""
    functions = [definition] if isinstance(definition, FunctionType) else _methods(definition)
    found: dict[str, Any] = {}
    for function in functions:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__" and name in reads:
                try:
                    found.setdefault(name, cell.cell_contents)
                except ValueError:  # not bound yet
                    continue
    return found


def globals_of(definition: FunctionType | type) -> dict[str, Any]:
    """The namespace that a definition's global names are looked up in."""
    if isinstance(definition, FunctionType):
        return definition.__globals__
    module = sys.modules.get(definition.__module__)
    methods = _methods(definition)
    return methods[0].__globals__ if methods else vars(module) if module is not None else {}


def _methods(cls: type) -> list[FunctionType]:
    own = vars(cls).values()
    plain = [getattr(value, "__func__", getattr(value, "fget", value)) for value in own]
    return [value for value in plain if isinstance(value, FunctionType) and value.__module__ == cls.__module__]


_registered: dict[str, ModuleType] = {}


def register(module: ModuleType) -> None:
    """Send a module of your own along with remote blocks that use it, as source.

    Functions and classes that a block calls travel by themselves; a module that it names (`helpers.f(x)`) must be
    registered, so that what is sent is your choice.

    Example:
        >>> import nnsight, types
        >>> helpers = types.ModuleType("helpers")
        >>> helpers.__file__ = nnsight.__file__          # any module that comes from a file
        >>> nnsight.register(helpers)

    Args:
        module: A module with a source file.

    Raises:
        TravelError: It has none.
    """
    if getattr(module, "__file__", None) is None or not str(module.__file__).endswith(".py"):
        raise TravelError(f"The module {module.__name__!r} has no source file, so it cannot be registered.")
    _registered[module.__name__] = module


def registered(module: ModuleType) -> bool:
    """Whether `register` was called for a module, or for the package it is in."""
    return any(module.__name__ == name or module.__name__.startswith(f"{name}.") for name in _registered)
