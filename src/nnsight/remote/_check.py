"""Before a block is sent: names that it binds, does not save, and that the code after it uses."""

from __future__ import annotations

import ast
import itertools
import linecache
import os
from collections.abc import Iterator

from .._capture import Block, IdentityCache, parse
from ..errors import NotSavedError

_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
_SAVE = frozenset({"save"})


def check_saved(block: Block) -> None:
    """Refuse a block that binds a name which is used later and will not arrive.

    Raises:
        NotSavedError: With the lines of both places.
    """
    problem = _checked.get(block)
    if problem is None:
        problem = _problem(block)
        _checked.put(block, problem)
    if problem:
        raise NotSavedError(problem)


_checked: IdentityCache[Block, str] = IdentityCache(256)


def _problem(block: Block) -> str:
    """What is wrong with a block, empty where nothing is."""
    around = _statements_after(block)
    bound = _bound_plainly(block) if around is not None else {}
    for name in sorted(bound, key=lambda name: bound[name]):
        line = _used(around or [], name)
        if line is not None:
            return _MESSAGE.format(name=name, line=bound[name], file=os.path.basename(block.filename), later=line)
    return ""


_MESSAGE = """\
{name!r} is bound in a remote block (line {line} of {file}) and used after it (line {later}), but not saved. What a remote \
block computes stays on the server unless it is saved:

    {name} = ….save()          # or, for any value: {name} = nnsight.save(…)
"""


def _bound_plainly(block: Block) -> dict[str, int]:
    """Names that only plain assignments without a save bind, with the line."""
    found: dict[str, int] = {}
    kept: set[str] = set(block.target_names())
    for node in (part for statement in block.tree().body for part in _own_nodes(statement)):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if _may_be_saved(node.value):
                kept.add(name)
            else:
                found.setdefault(name, node.lineno)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            continue
        kept |= _mentioned(node)
    others = _bound_otherwise(block)
    return {name: line for name, line in found.items() if name not in kept | others}


def _may_be_saved(value: ast.expr) -> bool:
    """Whether an expression saves something, or makes a container that saved values may go into."""
    if isinstance(
        value, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp, ast.Name, ast.Constant)
    ):
        return True
    calls = [node for node in ast.walk(value) if isinstance(node, ast.Call)]
    if any(_called(call) in _SAVE or _called(call) == "cache" for call in calls):
        return True
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name)  # a function of the user's may save


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _mentioned(node: ast.AST) -> set[str]:
    """Names that a call may save, or that are handed on: `x.save()`, `save(x)`, `helper(x)`."""
    if not isinstance(node, ast.Call):
        return set()
    if _called(node) in _SAVE:
        return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    if isinstance(node.func, ast.Name):
        return {arg.id for arg in node.args if isinstance(arg, ast.Name)}
    return set()


def _bound_otherwise(block: Block) -> set[str]:
    names: set[str] = set()
    for node in (part for statement in block.tree().body for part in _own_nodes(statement)):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            continue
        targets = getattr(node, "targets", None) or [
            getattr(node, "target", None),
            getattr(node, "optional_vars", None),
        ]
        for target in filter(None, targets):
            names |= {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, _SCOPES):
            yield from _own_nodes(child)


# --- the code after the block ---------------------------------------------------------------------------------


def _statements_after(block: Block) -> list[ast.stmt] | None:
    """What follows the with-statement in its function or module, in the order it runs; None where that is not known."""
    lines = linecache.getlines(block.filename)
    try:
        tree = parse("".join(lines))
    except SyntaxError:
        return None
    path = _path_to(tree, block.line)
    if path is None:
        return None
    after: list[ast.stmt] = []
    for parent, child in reversed(list(itertools.pairwise(path))):
        after += _siblings_after(parent, child)
        if isinstance(parent, _SCOPES):
            break
        if isinstance(parent, (ast.For, ast.While, ast.AsyncFor, ast.Try)):
            return after  # what runs next is not known: only the same suite is looked at
    return after


def _path_to(tree: ast.AST, line: int) -> list[ast.AST] | None:
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, (ast.With, ast.AsyncWith)) and child.lineno == line:
            return [tree, child]
        if isinstance(child, (ast.With, ast.AsyncWith)) and any(
            item.context_expr.lineno == line for item in child.items
        ):
            return [tree, child]
        if getattr(child, "lineno", line) <= line <= (getattr(child, "end_lineno", None) or line):
            found = _path_to(child, line)
            if found is not None:
                return [tree, *found]
    return None


def _siblings_after(parent: ast.AST, child: ast.AST) -> list[ast.stmt]:
    for suite in ("body", "orelse", "finalbody"):
        statements = getattr(parent, suite, None)
        if isinstance(statements, list) and child in statements:
            return statements[statements.index(child) + 1 :]
    return []


def _used(statements: list[ast.stmt], name: str) -> int | None:
    """The line that reads `name` first, None where it is bound again before, or that is not certain."""
    for statement in statements:
        for node in [] if isinstance(statement, _SCOPES) else _in_order(statement):
            if isinstance(node, ast.Name) and node.id == name:
                return node.lineno if isinstance(node.ctx, ast.Load) else None
        if any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(statement)):
            return None  # in a function defined here
    return None


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a statement, values before the targets they go to."""
    yield node
    children = list(ast.iter_child_nodes(node))
    if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        children = [*filter(None, [node.value]), *[child for child in children if child is not node.value]]
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            yield ast.copy_location(ast.Name(node.target.id, ast.Load()), node.target)
    elif isinstance(node, (ast.For, ast.AsyncFor)):
        children = [node.iter, node.target, *node.body, *node.orelse]
    elif isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
        children = [node.generators[0].iter]
    for child in children:
        if not isinstance(child, _SCOPES):
            yield from _in_order(child)
