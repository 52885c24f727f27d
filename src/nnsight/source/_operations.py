"""The calls of a function's own body, in the order it evaluates them, and their names.

A name is the callee's dotted path joined by ``_``, then how many calls of that path came before:

    self.c_proj(x)               self_c_proj_0
    x.view(a).transpose(1, 2)    x_view_0, x_view_transpose_0
    self.layers[i](x)            self_layers_0
    f(x)(y)                      f_0, f_call_0
    super().forward(x)           super_forward_0
    ", ".join(a)                 str_join_0
    (a + b).sum()                value_sum_0

Every name ends in ``_<number>``, so none can be an attribute of `FunctionSource`.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

# They read the frame or the class cell of the function that calls them.
LEFT_OUT = frozenset({"super", "locals", "globals", "vars", "dir", "eval", "exec", "breakpoint"})
LEFT_OUT_ATTRIBUTES = frozenset({"_getframe", "currentframe"})

Definition = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Operation:
    """One call in a function's body.

    ``line`` (the function's first is 1) and ``column`` say where its argument list opens; ``end`` is its
    last line.
    """

    name: str
    line: int
    column: int
    end: int
    text: str


def named_calls(definition: Definition) -> dict[str, ast.Call]:
    """The operations of a function, by name, in the order of evaluation."""
    counts: Counter[str] = Counter()
    named: dict[str, ast.Call] = {}
    for call in own_calls(definition):
        if is_operation(call):
            path = callee_path(call)
            named[f"{path}_{counts[path]}"] = call
            counts[path] += 1
    return named


def describe(name: str, call: ast.Call, first_line: int) -> Operation:
    line = (call.func.end_lineno or call.lineno) - first_line + 1
    end = (call.end_lineno or call.lineno) - first_line + 1
    return Operation(name, line, call.func.end_col_offset or 0, end, ast.unparse(call))


def own_calls(definition: Definition) -> Iterator[ast.Call]:
    """Every call that runs in the function's own frame or in a comprehension of it."""
    for statement in definition.body:
        yield from _calls(statement)


def _calls(node: ast.AST) -> Iterator[ast.Call]:
    for child in _evaluated(node):
        yield from _calls(child)
    if isinstance(node, ast.Call):
        yield node


def is_operation(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Name):
        return call.func.id not in LEFT_OUT
    return not (isinstance(call.func, ast.Attribute) and call.func.attr in LEFT_OUT_ATTRIBUTES)


def callee_path(call: ast.Call) -> str:
    callee = call.func
    while isinstance(callee, ast.Subscript | ast.Await):
        callee = callee.value
    return f"{_path(callee)}_call" if isinstance(callee, ast.Call) else _path(callee)


def _path(node: ast.expr) -> str:
    match node:
        case ast.Name():
            return node.id
        case ast.Attribute():
            return f"{_path(node.value)}_{node.attr}"
        case ast.Subscript() | ast.Await():
            return _path(node.value)
        case ast.Call():
            return _path(node.func)
        case ast.NamedExpr():
            return _path(node.target)
        case ast.JoinedStr():
            return "str"
        case ast.Constant():
            return type(node.value).__name__
        case _:
            return "value"


def _evaluated(node: ast.AST) -> Iterator[ast.AST]:
    """The children that run where the node does, in the order they run; annotations never do."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return chain(node.decorator_list, _defaults(node.args))
        case ast.Lambda():
            return _defaults(node.args)
        case ast.ClassDef():
            return chain(node.decorator_list, node.bases, node.keywords)
        case ast.Assign():
            return chain([node.value], node.targets)
        case ast.AnnAssign():
            return chain([node.value] if node.value else [], [node.target])
        case ast.For() | ast.AsyncFor():
            return chain([node.iter, node.target], node.body, node.orelse)
        case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
            return chain(node.generators, [node.elt])
        case ast.DictComp():
            return chain(node.generators, [node.key, node.value])
        case ast.comprehension():
            return chain([node.iter, node.target], node.ifs)
        case ast.Dict():
            pairs = zip(node.keys, node.values, strict=True)
            return (part for pair in pairs for part in pair if part is not None)
        case ast.AST() if type(node).__name__ == "TypeAlias":  # from Python 3.12 on, evaluated lazily
            return iter(())
        case _:
            return ast.iter_child_nodes(node)


def _defaults(arguments: ast.arguments) -> Iterator[ast.expr]:
    return chain(arguments.defaults, filter(None, arguments.kw_defaults))
