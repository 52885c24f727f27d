"""Dataflow between blocks: a call before each use of some names, and one behind each binding of others."""

import ast
from collections.abc import Iterable, Sequence
from typing import TypeVar

from ._names import mangled, names_of

WAIT = ".wait"  # no names that a user can write
ANNOUNCE = ".announce"

Node = TypeVar("Node", bound=ast.AST)

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
SUITES = ("body", "orelse", "finalbody")


def connect(
    statements: Sequence[ast.stmt], owner: str | None, waits: frozenset[str], announces: frozenset[str]
) -> list[ast.stmt]:
    """The statements with `.wait(name)` before each load and `.announce(name)` behind each binding."""
    if not waits and not announces:
        return list(statements)
    return _Flow(owner, waits, announces).suite(statements)


class _Flow:
    def __init__(self, owner: str | None, waits: frozenset[str], announces: frozenset[str]) -> None:
        self._owner = owner
        self._waits = waits
        self._announces = announces
        self._loads = _Loads(owner, waits)

    def suite(self, statements: Iterable[ast.stmt], announced: Iterable[str] = ()) -> list[ast.stmt]:
        statements = list(statements)
        done = _calls(ANNOUNCE, announced, statements[0]) if statements else []
        for statement in statements:
            done += self._statement(statement)
        return done

    def _statement(self, node: ast.stmt) -> list[ast.stmt]:
        before = _calls(WAIT, self._waited_before(node), node)
        if isinstance(node, DEFINITIONS) or not (_suites(node) or isinstance(node, ast.Match)):
            after = self._bound([node])
        else:
            after = self._bound(_headers(node))
            self._compound(node, after)
        if not isinstance(node, DEFINITIONS):
            self._loads.visit_own(node)
        return [*before, node, *_calls(ANNOUNCE, after, node)]

    def _compound(self, node: ast.stmt, announced: set[str]) -> None:
        """Connect the suites of a statement; `announced` are the names that its head binds in any case."""
        for name in _suites(node):
            at_start = announced | (self._bound(_targets(node)) if name == "body" else set())
            setattr(node, name, self.suite(getattr(node, name), at_start))
        for handler in getattr(node, "handlers", ()):
            self._loads.visit_own(handler)
            bound = {mangled(handler.name, self._owner)} if handler.name else set()
            handler.body = self.suite(handler.body, bound & self._announces)
        for case in getattr(node, "cases", ()):
            bound = self._bound(
                [ast.Match(ast.Constant(None), [ast.match_case(case.pattern, case.guard, [ast.Pass()])])]
            )
            self._loads.visit_own(case)
            case.body = self.suite(case.body, announced | bound)

    def _bound(self, statements: Sequence[ast.stmt]) -> set[str]:
        if not self._announces or not any(map(_may_bind, statements)):
            return set()
        return set(names_of(statements, self._owner).bound & self._announces)

    def _waited_before(self, node: ast.stmt) -> frozenset[str]:
        """Names that a statement reads otherwise than by loads in expressions of the block."""
        if not self._waits:
            return self._waits
        if isinstance(node, DEFINITIONS):
            return names_of([node], self._owner).read & self._waits
        if isinstance(node, ast.Match):
            found = [part for case in node.cases for part in ast.walk(case.pattern)]
        else:
            found = [node.target] if isinstance(node, ast.AugAssign) else getattr(node, "targets", ())
            found = found if isinstance(node, ast.AugAssign | ast.Delete) else ()
        return self._waits & {mangled(part.id, self._owner) for part in found if isinstance(part, ast.Name)}


class _Loads(ast.NodeTransformer):
    """Put a call of `.wait` before each load of a name, and before what loads it in a scope of its own."""

    def __init__(self, owner: str | None, waits: frozenset[str]) -> None:
        self._owner = owner
        self._waits = waits

    def visit_own(self, node: ast.AST) -> None:
        """Visit the expressions of a statement, not those of the statements in it."""
        for name, value in ast.iter_fields(node) if self._waits else ():
            if isinstance(value, ast.expr):
                setattr(node, name, self.visit(value))
            elif isinstance(value, list):
                setattr(node, name, [self.visit(part) if isinstance(part, _PARTS) else part for part in value])

    def visit_Name(self, node: ast.Name) -> ast.expr:
        name = mangled(node.id, self._owner)
        return _after_waits(node, [name]) if name in self._waits and isinstance(node.ctx, ast.Load) else node

    def _scoped(self, node: ast.expr) -> ast.expr:
        names = names_of([ast.Expr(node)], self._owner).read & self._waits
        return _after_waits(node, sorted(names)) if names else node

    visit_Lambda = visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _scoped


_PARTS = (ast.expr, ast.withitem)


def _after_waits(node: ast.expr, names: Sequence[str]) -> ast.expr:
    """`(.wait(name), …, node)[-1]`"""
    parts = [*(_call(WAIT, name) for name in names), node]
    index = ast.Constant(len(names))
    return _at(ast.Subscript(ast.Tuple(parts, ast.Load()), index, ast.Load()), node)


def _calls(function: str, names: Iterable[str], place: ast.stmt) -> list[ast.stmt]:
    return [_at(ast.Expr(_call(function, name)), place) for name in sorted(names)]


def _call(function: str, name: str) -> ast.Call:
    return ast.Call(ast.Name(function, ast.Load()), [ast.Constant(name)], [])


def _at(node: Node, place: ast.AST) -> Node:
    return ast.fix_missing_locations(ast.copy_location(node, place))


def _suites(node: ast.stmt) -> list[str]:
    return [name for name in SUITES if isinstance(getattr(node, name, None), list)]


def _headers(node: ast.stmt) -> list[ast.stmt]:
    """What a compound statement evaluates in any case, as statements."""
    fields = [getattr(node, name, None) for name in ("test", "iter", "subject")]
    items = [item.context_expr for item in getattr(node, "items", ())]
    return [ast.Expr(part) for part in [*fields, *items] if isinstance(part, ast.expr)]


def _targets(node: ast.stmt) -> list[ast.stmt]:
    """What a compound statement binds where its body begins, as statements."""
    found = [getattr(node, "target", None), *(item.optional_vars for item in getattr(node, "items", ()))]
    return [ast.Assign([part], ast.Constant(None)) for part in found if part is not None]


def _may_bind(statement: ast.stmt) -> bool:
    if not isinstance(statement, ast.Expr):
        return True
    return any(isinstance(node, ast.NamedExpr) for node in ast.walk(statement))
