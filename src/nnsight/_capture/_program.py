"""A block as a function, compiled once and bound to the variables it is to use."""

import ast
import weakref
from collections.abc import Callable
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from ..errors import CaptureError
from ._block import Block, at_line
from ._codes import nested_codes
from ._flow import ANNOUNCE, WAIT, connect
from ._names import function, in_class
from ._scope import SCOPE, Scope
from ._skip import forget_skip

# Names that a user cannot write
VALUE, BIND = ".value", ".bind"
OUTER, INNER = ".outer", ".block"

NO_TARGET: Any = object()
NO_NAMES: frozenset[str] = frozenset()

_blocks: dict[int, tuple["weakref.ref[CodeType]", Block]] = {}


def bind(
    block: Block,
    scope: Scope,
    *,
    waits: frozenset[str] = NO_NAMES,
    announces: frozenset[str] = NO_NAMES,
    wait: Callable[[str], object] | None = None,
    announce: Callable[[str], object] | None = None,
) -> Callable[..., None]:
    """The block as a function that runs it on the variables of a scope.

    Its one argument, `target_value`, is bound to the `as` target first; without it the target is left alone.

    Args:
        waits: Names for which `wait(name)` is called before each load of them.
        announces: Names for which `announce(name)` is called after each statement that bound them.
    """
    code = _compile(block, scope.variables(block), waits & block.names_read, announces & block.names_bound)
    closure = tuple(scope.cell(name) for name in code.co_freevars)
    body = FunctionType(code, scope.globals, None, None, closure)

    def run(target_value: Any = NO_TARGET) -> None:
        try:
            body(scope, wait, announce, target_value, target_value is not NO_TARGET)
        except BaseException as error:
            forget_skip(error)
            raise

    return run


def block_of(code: CodeType) -> Block | None:
    """The block that a code object, or one around it, was compiled from."""
    entry = _blocks.get(id(code))
    return entry[1] if entry is not None and entry[0]() is code else None


@lru_cache(maxsize=512)
def _compile(block: Block, variables: frozenset[str], waits: frozenset[str], announces: frozenset[str]) -> CodeType:
    try:
        tree = _module(block, variables, waits, announces)
        module = compile(tree, block.filename, "exec", flags=block.flags, dont_inherit=True)
    except SyntaxError as error:
        raise CaptureError(f'File "{block.filename}", line {error.lineno}: {error.msg}, in a block') from error
    code = _renamed(next(found for found in nested_codes(module) if found.co_name == INNER), block)
    for found in nested_codes(code):
        _register(found, block)
    return code


def _module(block: Block, variables: frozenset[str], waits: frozenset[str], announces: frozenset[str]) -> ast.Module:
    """`def .outer(variables): class Owner: def .block(…): nonlocal variables; target = .value; body`."""
    shared = sorted(variables - {"__class__"})
    body: list[ast.stmt] = [ast.Nonlocal(shared)] if shared else []
    if names := sorted(block.names_bound - variables - block.names_global):
        body.append(ast.Global(names))
    target = block.target_statement()
    if target is not None:
        bound = connect([target], block.owner, waits, announces)
        target.value = ast.copy_location(ast.Name(VALUE, ast.Load()), target)
        body.append(ast.If(ast.Name(BIND, ast.Load()), bound, []))
    body += connect(block.statements(), block.owner, waits, announces)
    inner = function(INNER, (SCOPE, WAIT, ANNOUNCE, VALUE, BIND), [])
    outer = function(OUTER, shared, [in_class(block.owner, inner)])
    at_line(outer, block.line)
    inner.body = body
    return ast.fix_missing_locations(ast.Module([outer], []))


def _renamed(code: CodeType, block: Block) -> CodeType:
    """The code under the name of the user's function, and with it what is defined in it."""
    owner = f"{block.owner}." if block.owner else ""
    old = f"{OUTER}.<locals>.{owner}{INNER}"
    new = block.function
    return _requalified(code, old, new).replace(co_name=new.rpartition(".")[2])


def _requalified(code: CodeType, old: str, new: str) -> CodeType:
    def name(text: str) -> str:
        if new == "<module>":
            return text.replace(f"{old}.<locals>.", "") if text != old else new
        return text.replace(old, new, 1)

    constants = tuple(
        _requalified(value, old, new)
        if isinstance(value, CodeType)
        else name(value)
        if isinstance(value, str) and value.startswith(old)
        else value
        for value in code.co_consts
    )
    changes: dict[str, Any] = {"co_consts": constants}
    if hasattr(code, "co_qualname"):  # Python 3.11
        changes["co_qualname"] = name(getattr(code, "co_qualname"))  # noqa: B009
    return code.replace(**changes)


def _register(code: CodeType, block: Block) -> None:
    key = id(code)

    def forget(dead: "weakref.ref[CodeType]") -> None:
        if key in _blocks and _blocks[key][0] is dead:
            del _blocks[key]

    _blocks[key] = (weakref.ref(code, forget), block)
