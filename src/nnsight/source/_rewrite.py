"""Calls rewritten so that a dispatch makes them.

``f(a, k=b)`` becomes ``DISPATCH("f_0", f, (a,), {"k": b})``, which evaluates the same expressions in the same
order.
DISPATCH is a free variable of the function: neither its globals nor its local variables gain a name.
"""

from __future__ import annotations

import ast
from collections.abc import Collection

from ._operations import Definition, named_calls, own_calls

DISPATCH = "__nnsight_dispatch__"


def rewrite(definition: Definition, only: Collection[str] | None = None) -> None:
    """Route every operation of a function, or `only` those of these names, through DISPATCH, in place."""
    names = {id(call): name for name, call in named_calls(definition).items() if only is None or name in only}
    readers = {id(call) for call in own_calls(definition) if _reads_locals(call)}
    rewriter = _Rewriter(names, readers)
    definition.body = [rewriter.visit(statement) for statement in definition.body]
    ast.fix_missing_locations(definition)


class _Rewriter(ast.NodeTransformer):
    def __init__(self, names: dict[int, str], readers: set[int]) -> None:
        self.names = names
        self.readers = readers

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if id(node) in self.names:
            return _placed(_dispatched(self.names[id(node)], node), node)
        return _placed(_own_locals(node), node) if id(node) in self.readers else node


def _dispatched(name: str, call: ast.Call) -> ast.Call:
    positional = ast.Tuple(call.args, ast.Load())
    return ast.Call(_load(DISPATCH), [ast.Constant(name), call.func, positional, _keywords(call.keywords)], [])


def _keywords(keywords: list[ast.keyword]) -> ast.expr:
    """An expression for the keyword arguments that refuses a repeated name, as a call does."""
    if len(keywords) > 1 and any(keyword.arg is None for keyword in keywords):
        collected = "keywords"
        parameters = ast.arguments([], [], None, [], [], ast.arg(collected), [])
        return ast.Call(ast.Lambda(parameters, _load(collected)), [], keywords)
    names: list[ast.expr | None] = [ast.Constant(keyword.arg) if keyword.arg else None for keyword in keywords]
    return ast.Dict(names, [keyword.value for keyword in keywords])


def _reads_locals(call: ast.Call) -> bool:
    named = isinstance(call.func, ast.Name) and call.func.id in ("locals", "vars")
    return named and not call.args and not call.keywords


def _own_locals(call: ast.Call) -> ast.expr:
    """``locals()`` without DISPATCH, which as a free variable is listed there."""
    template = f"{{_name: _value for _name, _value in CALL.items() if _name != {DISPATCH!r}}}"
    comprehension = ast.parse(template, mode="eval").body
    assert isinstance(comprehension, ast.DictComp)
    items = comprehension.generators[0].iter
    assert isinstance(items, ast.Call)
    assert isinstance(items.func, ast.Attribute)
    for node in ast.walk(comprehension):
        ast.copy_location(node, call)
    items.func.value = call
    return comprehension


def _load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def _placed(new: ast.expr, old: ast.expr) -> ast.expr:
    """The new expression, and the parts that are new in it, where the old one stands in the file."""
    for node in ast.walk(new):
        if not hasattr(node, "lineno"):
            ast.copy_location(node, old)
    return ast.copy_location(new, old)
