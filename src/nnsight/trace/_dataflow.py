"""Dataflow: values that one deferred block binds and a later one reads.

Every block has variables of its own, with the values of the place where it was written, so that blocks that run by
turns do not overwrite each other's.  A name that an earlier block binds is taken from the nearest such block,
and reading it waits until it is bound.
"""

from __future__ import annotations

from collections.abc import Callable

from .._capture import Block, Scope, bind, names_read_first
from .._core import Worker
from ..errors import WaitError


class Deferred:
    """One deferred block with its variables."""

    def __init__(self, block: Block, scope: Scope, worker: Worker, flow: Dataflow) -> None:
        self.block = block
        self.scope = scope.fork(block)
        self.worker = worker
        self.announced: set[str] = set()
        self._origins: dict[str, Deferred] = {}
        self._flow = flow
        for name in block.names_read | block.names_bound:
            origin = flow.origin(name)
            if origin is not None:
                self._origins[name] = origin
                if name not in block.names_bound:
                    self.scope.share(name, origin.scope)

    def bind(self, block: Block, scope: Scope) -> Callable[..., None]:
        """`block`, this one or one nested in it, as a function on these variables."""
        waits = frozenset(self._origins)
        return bind(
            block, scope, waits=waits, announces=self.block.names_bound, wait=self._wait, announce=self._announce
        )

    def reads_from(self, other: Deferred) -> bool:
        """Whether it may take a value from another block: what it binds before it reads it is its own."""
        return any(self._origins.get(name) is other for name in names_read_first(self.block))

    def run(self) -> None:
        """Run the block; a name that it finds unbound is explained by what the other blocks do."""
        try:
            self.bind(self.block, self.scope)()
        except NameError as error:
            problem = self._flow.explain(self, getattr(error, "name", None))
            if problem is None:
                raise
            raise WaitError(problem).with_traceback(error.__traceback__) from None

    def _announce(self, name: str) -> None:
        self.announced.add(name)

    def _wait(self, name: str) -> None:
        if name in self.announced:
            return
        origin = self._origins[name]

        def is_bound() -> bool:
            return name in origin.announced or origin.worker.finished

        if not is_bound():
            self.worker.waited.append(name)
            self.worker.run.wait(
                self.worker, is_bound, lambda: f"the name {name!r}, which {origin.worker.label} binds."
            )
        if name in self.block.names_bound and name in origin.announced:
            self.scope.set(name, origin.scope.get(name))
            self.announced.add(name)


class Dataflow:
    """The deferred blocks of one trace, in the order they were written."""

    def __init__(self) -> None:
        self._blocks: list[Deferred] = []
        self._scopes: list[Scope] = []

    def add(self, block: Block, scope: Scope, worker: Worker) -> Deferred:
        """Register a block; its variables have the values of this moment."""
        deferred = Deferred(block, scope, worker, self)
        self._blocks.append(deferred)
        self._scopes.append(scope)
        return deferred

    def origin(self, name: str) -> Deferred | None:
        """The last block so far that binds `name`."""
        return next((b for b in reversed(self._blocks) if name in b.block.names_bound), None)

    def explain(self, reader: Deferred, name: str | None) -> str | None:
        """Why `name` is not bound in `reader`, where another block binds it."""
        at = self._blocks.index(reader)
        earlier = next((b for b in reversed(self._blocks[:at]) if name in b.block.names_bound), None)
        if earlier is not None:
            return _UNBOUND.format(reader=reader.worker.label, name=name, origin=earlier.worker.label)
        later = next((b for b in self._blocks[at + 1 :] if name in b.block.names_bound), None)
        if later is not None:
            return _LATER.format(reader=reader.worker.label, name=name, origin=later.worker.label)
        return None

    def of(self, worker: Worker) -> Deferred | None:
        """The block that `worker` runs."""
        return next((b for b in self._blocks if b.worker is worker), None)

    def write_back(self) -> None:
        """Bind in the user's frame what the blocks have bound."""
        for deferred in self._blocks:
            deferred.scope.write_back(deferred.announced)

    def close(self) -> None:
        """Let go of the blocks' variables."""
        for deferred in self._blocks:
            deferred.scope.close()
        for scope in self._scopes:
            scope.close()
        self._blocks.clear()
        self._scopes.clear()


_UNBOUND = """\
{reader} reads the name {name!r}, which {origin} was to bind: that block ended, or passed by, without binding it. \
Bind it there in any case ({name} = None before the condition), or read it where it is bound."""

_LATER = """\
{reader} reads the name {name!r}, which only a later block binds, {origin}: values go from a block to those written after \
it. Put that block first."""
