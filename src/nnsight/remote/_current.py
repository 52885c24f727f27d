"""Whether a function or class is still what its source says; another one would run elsewhere than here."""

from __future__ import annotations

import ast
import linecache
import symtable
import sys
from abc import ABCMeta
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache, partial
from inspect import unwrap
from types import CodeType, FunctionType, MemberDescriptorType
from typing import Any, NamedTuple

from .._capture import is_same_code, nested_codes
from ..errors import TravelError

_CHANGED = "{name!r} cannot travel: its file has changed since it was loaded. Load it again."
_METHOD = """\
{name!r} cannot travel: its {part!r} is not the one in its source (or the file has changed since it was loaded). Write it into \
the class, or set it on the instance."""


def check_function(function: FunctionType, statements: Sequence[ast.stmt]) -> None:
    """Refuse a text that is not what the function was compiled from.

    Raises:
        TravelError: It is another one.
    """
    code = function.__code__
    if not _is_rewritten(function.__module__) and not is_compiled_from(code, statements):
        raise TravelError(_CHANGED.format(name=function.__qualname__))


def check_class(cls: type, statements: Sequence[ast.stmt]) -> None:
    """Refuse a class whose methods, or attributes of plain data, were set after it was made; one with decorators is believed.

    Raises:
        TravelError: One was.
    """
    node = statements[0]
    if not isinstance(node, ast.ClassDef) or node.decorator_list or type(cls) not in (type, ABCMeta):
        return
    rewritten = _is_rewritten(cls.__module__)
    compiled = cache(partial(_compiled, statements))
    wrapped = any("__init_subclass__" in vars(base) for base in cls.__mro__[1:-1])  # by a base, and there again
    for name, part in _written(node).items():
        if name.startswith("__") and not name.endswith("__"):
            continue  # known by another name
        value = vars(cls).get(name)
        if isinstance(part, ast.expr):
            stays = _says(part, value)
        else:
            function = getattr(value, "__func__", value)
            function = unwrap(function) if wrapped and callable(function) else function
            is_function = isinstance(function, FunctionType)
            stays = is_function and (rewritten or _is_among(function.__code__, compiled))
        if not stays:
            raise TravelError(_METHOD.format(name=cls.__qualname__, part=name))
    known = {*_bound(node), "_abc_impl"}
    added = [
        name
        for name, value in vars(cls).items()
        if name not in known
        and not name.startswith(("__", f"_{cls.__name__.lstrip('_')}__"))
        and not isinstance(value, MemberDescriptorType)  # of `__slots__`
    ]
    if added and not wrapped:
        raise TravelError(_METHOD.format(name=cls.__qualname__, part=added[0]))


def _written(node: ast.ClassDef) -> dict[str, ast.expr | ast.stmt]:
    """The methods without decorators and the data that a class body binds once, where nothing can have changed them."""
    found: dict[str, ast.expr | ast.stmt] = {}
    for part in node.body:
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)) and not part.decorator_list:
            found[part.name] = part
        elif isinstance(part, ast.Assign) and len(part.targets) == 1 and isinstance(part.targets[0], ast.Name):
            found[part.targets[0].id] = part.value
        elif isinstance(part, ast.AnnAssign) and part.value is not None and isinstance(part.target, ast.Name):
            found[part.target.id] = part.value
    bound = list(_bound(node))
    return {name: part for name, part in found.items() if bound.count(name) == 1}


def _bound(node: ast.ClassDef) -> Iterator[str]:
    """Each name that something in a class body binds, methods' own variables included."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and not isinstance(part.ctx, ast.Load):
            yield part.id
        elif isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and part is not node:
            yield part.name
        elif isinstance(part, ast.alias):
            yield (part.asname or part.name).partition(".")[0]


def _says(written: ast.expr, value: Any) -> bool:
    """Whether an expression that is plain data has this value; of another one nothing is known."""
    try:
        wanted = ast.literal_eval(written)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return True
    return type(wanted) is type(value) and (wanted == value or repr(wanted) == repr(value))  # a set, or nan


def _is_rewritten(module: str) -> bool:
    """Whether pytest compiled a module, whose code is then not that of the source alone."""
    loader = getattr(sys.modules.get(module), "__loader__", None)
    return loader is not None and type(loader).__name__ == "AssertionRewritingHook"


def is_compiled_from(code: CodeType, statements: Sequence[ast.stmt]) -> bool:
    """Whether the compiler makes this code of something in these statements."""
    return _is_among(code, partial(_compiled, statements))


def _is_among(code: CodeType, compiled: Callable[[Around], CodeType]) -> bool:
    return any(
        each.co_name == code.co_name and is_same_code(each, code, placed=False)
        for around in _arounds(code)
        for each in nested_codes(compiled(around))
    )


class Around(NamedTuple):
    """What a compiler is told by all that stands around a statement."""

    flags: int
    free: tuple[str, ...]  # variables of a function around it
    imported: tuple[str, ...]  # by its file, whose functions are called in another way than methods are


def _arounds(code: CodeType) -> Iterator[Around]:
    """What may have stood around a code: its file, or nothing, as for a statement of a notebook's cell."""
    flags = code.co_flags & annotations.compiler_flag  # where annotations are texts
    yield Around(flags, code.co_freevars, ())
    imported = _imported("".join(linecache.getlines(code.co_filename)))
    if imported:
        yield Around(flags, code.co_freevars, imported)


@lru_cache(maxsize=16)
def _imported(text: str) -> tuple[str, ...]:
    """The names that a file's text imports; none where it cannot be read."""
    try:
        table = symtable.symtable(text, "<source>", "exec")
    except (SyntaxError, ValueError):
        return ()
    return tuple(sorted(symbol.get_name() for symbol in table.get_symbols() if symbol.is_imported()))


def _compiled(statements: Sequence[ast.stmt], around: Around) -> CodeType:
    body: list[ast.stmt] = list(statements)
    free = [name for name in around.free if name != "__class__" or not isinstance(body[0], ast.ClassDef)]
    if free:
        outer = ast.parse(f"def outer({', '.join(free)}): pass").body[0]
        assert isinstance(outer, ast.FunctionDef)
        outer.body = body
        body = [outer]
    if around.imported:
        body = [*ast.parse(f"from elsewhere import {', '.join(around.imported)}").body, *body]
    return compile(ast.Module(body, []), "<source>", "exec", around.flags, dont_inherit=True)
