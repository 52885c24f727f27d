"""Which names statements read and bind in the scope they stand in."""

import ast
import symtable
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import NamedTuple, cast

from ..errors import CaptureError

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


class Names(NamedTuple):
    """Names of one scope, mangled as the compiler mangles them.

    `bound_inside` are those that only a function defined here binds, with `nonlocal` or `global`.
    """

    read: frozenset[str]
    bound: frozenset[str]
    bound_inside: frozenset[str]
    declared_global: frozenset[str]


def names_of(statements: Sequence[ast.stmt], owner: str | None = None) -> Names:
    """The names that statements in (a method of) the class `owner` read and bind."""
    tree = _wrapped(statements, owner)
    try:
        table = symtable.symtable(ast.unparse(_Plain().visit(tree)), "<block>", "exec")
    except SyntaxError as error:
        raise CaptureError(f"line {_line(statements)}: {error.msg}, in a block that runs later") from error
    for _ in range(3 if owner else 2):
        table = table.get_children()[0]
    symbols = table.get_symbols()
    read = {symbol.get_name() for symbol in symbols if symbol.is_referenced()}
    bound = {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}
    globals_ = frozenset(symbol.get_name() for symbol in symbols if symbol.is_declared_global())
    inner = [_outward(child) for child in table.get_children()]
    read.update(*(names for names, _ in inner))
    bound_inside = frozenset[str]().union(*(names for _, names in inner)) - bound
    return Names(frozenset(read), frozenset(bound), bound_inside, globals_)


def mangled(name: str, owner: str | None) -> str:
    """The name under which the compiler stores `__name` in a class."""
    if owner is None or not name.startswith("__") or name.endswith("__") or "." in name or not owner.strip("_"):
        return name
    return f"_{owner.lstrip('_')}{name}"


def function(name: str, parameters: Sequence[str], body: Sequence[ast.stmt]) -> ast.FunctionDef:
    """`def name(parameters): body`, made by the parser so that it has the fields of this Python's version."""
    node = cast(ast.FunctionDef, ast.parse("def name(): pass").body[0])
    node.name = name
    node.args.args = [ast.arg(parameter) for parameter in parameters]
    node.body = list(body)
    return node


def in_class(owner: str | None, statement: ast.stmt) -> ast.stmt:
    """The statement, in the body of a class of that name if there is one."""
    if owner is None:
        return statement
    node = cast(ast.ClassDef, ast.parse(f"class {owner}: pass").body[0])
    node.body = [statement]
    return node


def refuse_leaving(statements: Sequence[ast.stmt]) -> None:
    """Raise where a statement would leave the block, which is a function of its own when it runs."""
    for statement in statements:
        for node, word in _leaving(statement, in_loop=False):
            raise CaptureError(
                f"line {node.lineno}: `{word}` would leave a with-block whose body runs later, or elsewhere. "
                f"Keep the result in a variable and put the `{word}` after the block."
            )


def _line(statements: Sequence[ast.stmt]) -> int:
    return getattr(statements[0], "lineno", 0)


def _wrapped(statements: Sequence[ast.stmt], owner: str | None) -> ast.Module:
    inner = function("block", (), deepcopy(list(statements)))
    outer = function("outer", sorted(_nonlocals(statements, owner)), [in_class(owner, inner)])
    return ast.fix_missing_locations(ast.Module([outer], []))


def _nonlocals(statements: Sequence[ast.stmt], owner: str | None) -> set[str]:
    nodes = [node for statement in statements for node in ast.walk(statement) if isinstance(node, ast.Nonlocal)]
    return {mangled(name, owner) for node in nodes for name in node.names}


def _outward(table: symtable.SymbolTable) -> tuple[set[str], set[str]]:
    """The names of surrounding scopes that a nested scope reads, and those that it binds."""
    read, bound = set[str](), set[str]()
    for child in table.get_children():
        child_read, child_bound = _outward(child)
        read |= child_read
        bound |= child_bound
    symbols = table.get_symbols()
    if table.get_type() != "class":  # what a class binds is not visible in its methods
        own = {symbol.get_name() for symbol in symbols if symbol.is_local()}
        read, bound = read - own, bound - own
    for symbol in symbols:
        if symbol.is_global() or symbol.is_free():
            read |= {symbol.get_name()} if symbol.is_referenced() else set()
            bound |= {symbol.get_name()} if symbol.is_assigned() or symbol.is_imported() else set()
    return read, bound


class _Plain(ast.NodeTransformer):
    """Rewrite what `symtable` reports differently from one Python version to the next, or cannot unparse."""

    def _generator(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> ast.AST:
        self.generic_visit(node)
        return ast.copy_location(ast.GeneratorExp(node.elt, node.generators), node)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = _generator

    def visit_DictComp(self, node: ast.DictComp) -> ast.AST:
        self.generic_visit(node)
        pair = ast.Tuple([node.key, node.value], ast.Load())
        return ast.copy_location(ast.GeneratorExp(pair, node.generators), node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        self.generic_visit(node)
        return ast.copy_location(ast.Tuple(node.values, ast.Load()), node)

    def visit_FormattedValue(self, node: ast.FormattedValue) -> ast.AST:
        self.generic_visit(node)
        parts = [node.value, *([node.format_spec] if node.format_spec else [])]
        return ast.copy_location(ast.Tuple(parts, ast.Load()), node)


def _leaving(node: ast.AST, in_loop: bool) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """The nodes that need the function, or the loop, around the block; and the words for them."""
    if word := _word(node, in_loop):
        yield cast("ast.expr | ast.stmt", node), word
    for child, loops in _same_scope(node):
        yield from _leaving(child, in_loop or loops)


def _word(node: ast.AST, in_loop: bool) -> str | None:
    if isinstance(node, ast.Break | ast.Continue):
        return None if in_loop else type(node).__name__.lower()
    if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp):
        return "async for" if any(part.is_async for part in node.generators) else None
    words = {ast.Return: "return", ast.Yield: "yield", ast.YieldFrom: "yield from", ast.Await: "await"}
    return (words | {ast.AsyncFor: "async for", ast.AsyncWith: "async with"}).get(type(node))


def _same_scope(node: ast.AST) -> Iterator[tuple[ast.AST, bool]]:
    """Children that run in the frame of `node`, and whether they stand in a loop of its own."""
    if isinstance(node, ast.GeneratorExp):
        yield node.generators[0].iter, False
    elif isinstance(node, FUNCTIONS):
        outside = [*getattr(node, "decorator_list", ()), *node.args.defaults, *node.args.kw_defaults]
        yield from ((child, False) for child in outside if child is not None)
    elif isinstance(node, ast.ClassDef):
        yield from ((child, False) for child in [*node.decorator_list, *node.bases, *node.keywords])
    else:
        body = node.body if isinstance(node, ast.For | ast.AsyncFor | ast.While) else []
        yield from ((child, child in body) for child in ast.iter_child_nodes(node))
