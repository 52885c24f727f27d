"""A job's values, functions and classes, made again where its block runs."""

from __future__ import annotations

import ast
import builtins
import importlib
import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from threading import RLock
from types import ModuleType
from typing import Any, ClassVar

import torch

from .._capture import Block, Scope, parse
from ..envoy import Envoy
from ..errors import ProtocolError
from ..modeling import NNsight
from ..protocol import (
    BlockText,
    BoundBlock,
    Decoder,
    Definition,
    DefinitionNode,
    EnvoyNode,
    ImportNode,
    InstanceNode,
    Job,
    ModuleNode,
    Node,
    SiteNode,
    read_tensors,
)

_OUTER = ".outer"


class JobReader(Decoder):
    """Makes what one job sent; `models` are made by the caller, `show` is what its `print` writes with."""

    def __init__(self, job: Job, payload: bytes | memoryview, show: Callable[..., None]) -> None:
        super().__init__(read_tensors(job.tensors, payload), job.containers)
        self.job = job
        self.payload = payload
        self.models: list[NNsight] = []
        self.definitions: dict[int, Any] = {}
        self.files: dict[str, list[str]] = {}
        self._builtins = {**vars(builtins), "print": show}
        self._namespaces = [self._fresh(space.name) for space in job.namespaces]
        self._complete: set[int] = set()
        self._modules: dict[str, ModuleType] = {}
        self._making: set[int] = set()

    def _fresh(self, name: str) -> dict[str, Any]:
        return {"__name__": name, "__builtins__": self._builtins}

    def namespace(self, number: int) -> dict[str, Any]:
        """The globals of one of the user's modules, as far as they were sent."""
        if not 0 <= number < len(self._namespaces):
            raise ProtocolError(f"there is no namespace {number}")
        space = self._namespaces[number]
        if number not in self._complete:
            self._complete.add(number)
            for name, node in self.job.namespaces[number].values.items():
                space.setdefault(name, self.decode(node))
        return space

    def bound(self, text: BoundBlock) -> tuple[Block, Scope]:
        """A block with its scope."""
        variables = {name: self.decode(node) for name, node in text.variables.items()}
        return _block(text.block), Scope.of(self.namespace(text.namespace), text.names, variables)

    # --- nodes of a job --------------------------------------------------------------------------------------

    def other(self, node: Node) -> Any:
        match node:
            case EnvoyNode():
                return self._envoy(node)
            case SiteNode():
                return self._model(0).site(node.name, node.layer, stack=node.stack or None)
            case ImportNode():
                return _imported(node)
            case DefinitionNode():
                return self._definition(node.index)
            case ModuleNode():
                return self._module(node.name)
            case _:
                return super().other(node)

    def instance(self, index: int, node: InstanceNode) -> Any:
        cls = self.decode(node.cls)
        if not isinstance(cls, type):
            raise ProtocolError("an instance of something that is no class")
        made = self.containers[index] = object.__new__(cls)
        state = {name: self.decode(value) for name, value in node.state}
        if isinstance(made, torch.nn.Module):
            made.__setstate__(state)
        else:
            vars(made).update(state)
        return made

    def _envoy(self, node: EnvoyNode) -> Envoy | Any:
        model = self._model(node.model)
        if node.attribute:
            if node.attribute not in ("tokenizer", "config"):
                raise ProtocolError(f"a model has no part {node.attribute!r}")
            return getattr(model, node.attribute)
        return model.get(node.path) if node.path else model

    def _model(self, number: int) -> NNsight:
        if not 0 <= number < len(self.models):
            raise ProtocolError(f"there is no model {number}")
        return self.models[number]

    def _definition(self, index: int) -> Any:
        if index in self.definitions:
            return self.definitions[index]
        if not 0 <= index < len(self.job.definitions):
            raise ProtocolError(f"there is no definition {index}")
        text = self.job.definitions[index]
        space = self.namespace(text.namespace)
        if index in self.definitions:  # it is among the names there
            return self.definitions[index]
        if index in self._making:
            raise ProtocolError("a definition needs itself to be made")
        self._making.add(index)
        self._remember(text)
        tree = parse(text.source)
        needed = set(_needed_at_once(tree))
        for name, node in self.job.namespaces[text.namespace].values.items():
            if name in needed and name not in space:
                space[name] = self.decode(node)
        made = _define(text, tree, space, {name: self.decode(node) for name, node in text.free.items()})
        self.definitions[index] = made
        if not text.free:
            space.setdefault(text.name, made)
        return made

    def _remember(self, text: Definition) -> None:
        """Keep the source where tracebacks and captures of nested blocks look for it."""
        lines = self.files.setdefault(text.filename, [])
        own = text.source.splitlines(keepends=True)
        lines.extend(["\n"] * (text.first_line - 1 + len(own) - len(lines)))
        lines[text.first_line - 1 : text.first_line - 1 + len(own)] = own

    def _module(self, name: str) -> ModuleType:
        if name in self._modules:
            return self._modules[name]
        text = next((module for module in self.job.modules if module.name == name), None)
        if text is None:
            raise ProtocolError(f"the job brings no module {name!r}")
        module = self._modules[name] = ModuleType(name)
        vars(module).update(self._fresh(name))
        self.files[text.filename] = text.source.splitlines(keepends=True)
        exec(compile(text.source, text.filename, "exec"), vars(module))
        return module


class Files:
    """The sources of a job in Python's cache of source lines, for as long as it runs.

    Where jobs run by turns, `show` puts back those of the one whose turn it is: files of one name need not be the same.
    """

    _before: ClassVar[dict[str, Any]] = {}  # what the cache had of each file before the first job
    _held: ClassVar[dict[str, list[Files]]] = {}

    def __init__(self) -> None:
        self._entries: dict[str, Any] = {}

    @contextmanager
    def holding(self, files: dict[str, list[str]]) -> Iterator[None]:
        """Keep the lines of these files."""
        for name, lines in files.items():
            self._entries[name] = (sum(map(len, lines)), None, lines, name)
            if not self._held.setdefault(name, []):
                self._before[name] = linecache.cache.get(name)
            self._held[name].append(self)
        self.show()
        try:
            yield
        finally:
            self._let_go()

    def show(self) -> None:
        """Put the lines into the cache again, where another job may have put others."""
        linecache.cache.update(self._entries)

    def _let_go(self) -> None:
        for name in self._entries:
            others = self._held[name]
            others.remove(self)
            before = others[-1]._entries[name] if others else self._before.pop(name)
            if before is None:
                linecache.cache.pop(name, None)
            else:
                linecache.cache[name] = before
        self._entries = {}


def _block(text: BlockText) -> Block:
    return Block(
        source=text.source,
        filename=text.filename,
        first_line=text.first_line,
        function=text.function,
        target=text.target,
        line=text.line,
        margins=tuple(text.margins),
        owner=text.owner,
        first_argument=text.first_argument,
        flags=text.flags,
        names_read=frozenset(text.names_read),
        names_bound=frozenset(text.names_bound),
        names_global=frozenset(text.names_global),
    )


def _needed_at_once(node: ast.AST) -> Iterator[str]:
    """The names that a definition reads when it is made: bases, decorators, defaults, the body of a class."""
    if isinstance(node, ast.Name):
        yield node.id
    parts: list[ast.AST] = list(ast.iter_child_nodes(node))
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        parts = [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]
    elif isinstance(node, ast.Lambda):
        parts = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
    for part in parts:
        yield from _needed_at_once(part)


def _define(text: Definition, tree: ast.Module, space: dict[str, Any], free: dict[str, Any]) -> Any:
    """Run a definition's source as the body of a function whose variables are its free ones."""
    name = text.name if text.name.isidentifier() else "_"
    ast.increment_lineno(tree, text.first_line - 1)
    outer = ast.parse(f"def outer({', '.join(sorted(free))}): return {name}").body[0]
    assert isinstance(outer, ast.FunctionDef)
    outer.name = _OUTER
    outer.body[:0] = tree.body
    local: dict[str, Any] = {}
    exec(compile(ast.Module([outer], []), text.filename, "exec"), space, local)
    first = tree.body[0]
    with _module_of(space) if isinstance(first, ast.ClassDef) and first.decorator_list else nullcontext():
        return local[_OUTER](**free)


_defining = RLock()


@contextmanager
def _module_of(space: dict[str, Any]) -> Iterator[None]:
    """Have a module of the user's found by its name: `dataclass` looks there for what the texts of annotations mean."""
    name, module = space["__name__"], ModuleType(space["__name__"])
    vars(module).update(space)
    with _defining:
        before = sys.modules.get(name)
        sys.modules[name] = module
        try:
            yield
        finally:
            if before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = before


def _imported(node: ImportNode) -> Any:
    try:
        found: Any = sys.modules.get(node.module) or importlib.import_module(node.module)
        for part in node.name.split(".") if node.name else ():
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        what = f"{node.module}.{node.name}" if node.name else node.module
        raise ImportError(f"The server has no {what!r}, which the block uses ({error}).") from error
    return found
