"""Which names a block may read before it has bound them itself."""

import ast
from collections.abc import Iterable, Sequence

from ._block import Block
from ._names import mangled


def names_read_first(block: Block) -> frozenset[str]:
    """The names that may be read with a value from outside the block: on some way, before it binds them.

    A name counts as bound only where every way has bound it, so that no such name is missed.
    """
    reader = _Reader()
    reader.follow(block.all_statements(), frozenset())
    first = frozenset(mangled(name, block.owner) for name in reader.first) | block.names_global
    return (first & block.names_bound) | (block.names_read - block.names_bound)


class _Reader:
    def __init__(self) -> None:
        self.first: set[str] = set()

    def follow(self, statements: Sequence[ast.stmt], bound: frozenset[str]) -> frozenset[str]:
        """What is bound behind the statements, where `bound` is before them."""
        for statement in statements:
            bound = self._after(statement, bound)
        return bound

    def _after(self, statement: ast.stmt, bound: frozenset[str]) -> frozenset[str]:
        match statement:
            case ast.If(test, body, otherwise):
                self._read([test], bound)
                return self.follow(body, bound) & self.follow(otherwise, bound)
            case ast.For(target, iterable, body, otherwise) | ast.AsyncFor(target, iterable, body, otherwise):
                self._read([iterable, target], bound)
                self.follow(body, bound | _targets([target]))
                self.follow(otherwise, bound)
                return bound
            case ast.With(items, body) | ast.AsyncWith(items, body):
                for item in items:
                    self._read([item], bound)
                    bound |= _targets([item.optional_vars] if item.optional_vars else [])
                self.follow(body, bound)
                return bound  # a block of a trace, an iteration or `suppress` may pass its body by
            case ast.Assign(targets, value):
                self._read([value, *targets], bound)
                return bound | _targets(targets)
            case ast.AnnAssign(target, _, value) if value is not None:
                self._read([value, target], bound)
                return bound | _targets([target])
            case ast.Delete(targets):
                self._read(targets, bound)
                return bound - _targets(targets)
            case ast.Import(names) | ast.ImportFrom(names=names):
                return bound | {alias.asname or alias.name.partition(".")[0] for alias in names}
            case _:
                self._read([statement], bound)
                return bound

    def _read(self, nodes: Iterable[ast.AST], bound: frozenset[str]) -> None:
        """Note every name that is loaded in here, by a function too, and every target of `x += 1` and `del x`."""
        for node in nodes:
            for part in ast.walk(node):
                match part:
                    case ast.Name(name, ast.Load() | ast.Del()) | ast.AugAssign(ast.Name(name)):
                        self.first |= {name} - bound
                    case _:
                        pass


def _targets(targets: Iterable[ast.expr]) -> frozenset[str]:
    """The plain names that an assignment binds."""
    found: set[str] = set()
    for target in targets:
        match target:
            case ast.Name(name):
                found.add(name)
            case ast.Tuple(items) | ast.List(items):
                found |= _targets(items)
            case ast.Starred(value):
                found |= _targets([value])
            case _:
                pass
    return frozenset(found)
