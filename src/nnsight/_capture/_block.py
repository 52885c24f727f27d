"""A with-block as text and data."""

import ast
from dataclasses import dataclass, field, replace

from ._names import Names
from ._text import Text


@dataclass(frozen=True)
class Block:
    """The body of a with-statement, with what is needed to compile it far from its file.

    Attributes:
        source: The text of the body, dedented; under `with <the items after ours>:` where there are any.
        filename: The file it stands in, as tracebacks name it.
        first_line: The line of that file that `source` starts at.
        function: The qualified name of the function it stands in, or `<module>`.
        target: The text of the `as` target, or None.
        names_read: Names of the surrounding scope that the body reads. A name that it binds first and then
            reads is among them; so are globals and built-ins.
        names_bound: Names of the surrounding scope that the body, or its `as` target, binds.
        names_global: Those of these names that the body declares `global`.
        line: The line of the with-statement.
        margins: How many bytes each line of `source` had before it in the file.
        owner: The class around the with-statement, after which `__names` are mangled.
        first_argument: The parameter that a bare `super()` takes for `self`.
        flags: The compiler flags of the file's `from __future__` imports.
    """

    source: str
    filename: str
    first_line: int
    function: str
    target: str | None
    line: int
    margins: tuple[int, ...] = field(repr=False)
    owner: str | None = None
    first_argument: str | None = None
    flags: int = 0
    names_read: frozenset[str] = frozenset()
    names_bound: frozenset[str] = frozenset()
    names_global: frozenset[str] = frozenset()

    @property
    def text(self) -> Text:
        """The source with the way back to its place in the file."""
        return Text(self.source, self.first_line, self.margins)

    def tree(self) -> ast.Module:
        """A fresh syntax tree of the body, with the lines and columns of the user's file."""
        return self.text.parse_placed()

    def all_statements(self) -> list[ast.stmt]:
        """The statements, after the one that binds the `as` target."""
        target = self.target_statement()
        return [*([target] if target else []), *self.statements()]

    def statements(self) -> list[ast.stmt]:
        """The body as statements of a function of its own, with the same meaning there."""
        return [_AtHome(self.first_argument).visit(statement) for statement in self.tree().body]

    def target_statement(self) -> ast.Assign | None:
        """`target = None`, on the line of the with-statement, or None where there is no target."""
        if self.target is None:
            return None
        statement = ast.parse(f"{self.target} = None").body[0]
        assert isinstance(statement, ast.Assign)
        at_line(statement, self.line)
        return statement

    def target_names(self) -> frozenset[str]:
        """The plain names that the `as` target binds."""
        found = ast.walk(ast.parse(self.target or "()"))
        return frozenset(node.id for node in found if isinstance(node, ast.Name)) & self.names_bound

    def only_target(self) -> "Block":
        """A block that binds the `as` target and does nothing else."""
        return replace(self, source="pass", first_line=self.line, margins=(0,))

    def with_names(self, names: Names) -> "Block":
        """The same block, with the names found in it."""
        bound = names.bound | names.bound_inside
        return replace(self, names_read=names.read, names_bound=bound, names_global=names.declared_global)


def at_line(statement: ast.stmt, line: int) -> None:
    """Place a statement at the start of a line of the file."""
    for node in ast.walk(statement):
        if isinstance(node, ast.stmt | ast.expr | ast.keyword):
            node.lineno = node.end_lineno = line
            node.col_offset = node.end_col_offset = 0


class _AtHome(ast.NodeTransformer):
    """Spell out what depends on the function the code stands in."""

    def __init__(self, first_argument: str | None) -> None:
        self._first_argument = first_argument

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        bare = isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args and not node.keywords
        if bare and self._first_argument:
            node.args = [_name("__class__", node), _name(self._first_argument, node)]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """A variable that is shared with the frame cannot be annotated."""
        self.generic_visit(node)
        if not isinstance(node.target, ast.Name):
            return node
        plain = ast.Assign([node.target], node.value) if node.value else ast.Pass()
        return ast.copy_location(plain, node)

    def _leave(self, node: ast.AST) -> ast.AST:
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = visit_ClassDef = _leave


def _name(name: str, place: ast.expr) -> ast.Name:
    return ast.copy_location(ast.Name(name, ast.Load()), place)
