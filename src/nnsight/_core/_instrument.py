"""What stands in place of modules' `forward` while a run needs it, and nothing outside a run.

`torch.nn.Module._call_impl` reads `self.forward` when a call starts, so modules that contain others are
instrumented before the model starts; a leaf is instrumented when it is asked for.  The replacement asks
"whose run is this?": called from anywhere but a run's own coroutine it is the plain forward.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from greenlet import getcurrent
from torch.jit import ScriptModule
from torch.nn import Module

from ._coroutine import Coroutine

if TYPE_CHECKING:
    from ._layouts import Layouts

Forward = Callable[..., Any]

_COMPILER = "torch._dynamo.eval_frame"
_COMPILED = "_compiled_call_impl"

_lock = threading.Lock()
_registry: weakref.WeakValueDictionary[int, Instruments] = weakref.WeakValueDictionary()
_live: list[Instruments] = []  # the trees with a run


def make_replacement(module: Module, previous: Forward | None) -> Forward:
    """The function that stands for `module.forward`; `previous` is an instance's own forward, if it had one."""
    if previous is None and isinstance(module, ScriptModule):
        previous = _scripted_forward(module)
    elif _COMPILER in sys.modules and isinstance(module, sys.modules[_COMPILER].OptimizedModule):
        previous = module._orig_mod.__call__  # what it compiles: see `Instruments._stop_compiled_calls`  # pyright: ignore[reportAttributeAccessIssue]

    def forward(module: Module, /, *args: Any, **kwargs: Any) -> Any:
        current = getcurrent()
        plain = previous or type(module).forward.__get__(module)
        if current.__class__ is not Coroutine:
            return plain(*args, **kwargs)
        serves = current.serves  # pyright: ignore[reportAttributeAccessIssue]
        if serves is None:
            return plain(*args, **kwargs)
        if serves.awaited is module:
            return serves.deliver(module, plain, args, kwargs)
        if module in serves.attended or module in serves.overrides:
            return serves.call(module, plain, args, kwargs)
        # `Pass.call` for a module that nobody wants: this is where most calls go.
        counts, running = serves.counts, serves.running
        index = counts[module] = counts.get(module, 0) + 1
        running.append(module)
        try:
            result = plain(*args, **kwargs)
            if module in serves.attended:
                return serves.leave(module, result, index - 1, args, kwargs)
            return result
        finally:
            running.pop()

    # Models look at the signature of `self.forward` to decide what to pass (`generate` of transformers does).
    plain = type(module).forward if previous is None else _with_self(previous)
    functools.update_wrapper(forward, plain, updated=())
    forward.__name__ = "forward"
    return MethodType(forward, module)  # so that a copy of the module made meanwhile has its own


def _with_self(forward: Forward) -> Forward:
    """Something with the signature of a function in a class."""

    @functools.wraps(forward, updated=())
    def unbound(_module: Module, /, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    del unbound.__wrapped__
    with contextlib.suppress(ValueError, TypeError):  # of a function in C
        own = inspect.signature(forward)
        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        unbound.__signature__ = own.replace(parameters=[first, *own.parameters.values()])  # pyright: ignore[reportAttributeAccessIssue]
    return unbound


def _scripted_forward(module: Module) -> Forward:
    kept = vars(module).get("forward")
    forward = module.__getattr__("forward")  # leaves itself with the instance
    if kept is None:
        vars(module).pop("forward", None)
    return forward  # type: ignore[return-value]


REPLACEMENT_CODE = make_replacement(Module(), None).__code__


def _is_ours(forward: object) -> bool:
    return getattr(forward, "__code__", None) is REPLACEMENT_CODE


def plain_forward(module: Module) -> Forward:
    """The module's forward as it is outside a run, bound to the module."""
    own = vars(module).get("forward")
    while _is_ours(own):
        cells = dict(zip(REPLACEMENT_CODE.co_freevars, getattr(own, "__closure__", ()), strict=True))
        own = cells["previous"].cell_contents
    if own is None and isinstance(module, ScriptModule):
        return _scripted_forward(module)
    return type(module).forward.__get__(module) if own is None else own


class Container:
    """A module that is instrumented from the start of every run, and what is needed to do so quickly."""

    __slots__ = ("module", "replacement", "slots")

    def __init__(self, module: Module) -> None:
        self.module = module
        self.slots = vars(module)
        self.replacement = None if _never_called(module) else make_replacement(module, None)


def _never_called(module: Module) -> bool:
    forward = getattr(type(module), "forward", None)  # a scripted module has none at its class
    return forward is Module.forward and "forward" not in vars(module)


class Instruments:
    """The replacements for one tree of modules, shared by every run of it, in every thread."""

    def __init__(self, root: Module) -> None:
        self.root = root
        self._users = 0
        self._containers: list[Container] = []
        self._always: list[Container] = []
        self._members_of: list[dict[str, Module | None]] = []  # of each container, and as they were
        self._children: list[tuple[Module | None, ...]] = []
        self._replaced: dict[Module, tuple[Forward, Forward | None]] = {}
        self._leaves: dict[Module, Forward] = {}
        self._compiled: dict[Module, Any] = {}
        self._parents: dict[Module, Module | None] = {}
        self._members: frozenset[Module] = frozenset()
        self._eager: set[Module] = set()
        self._shared: frozenset[Module] | None = None
        self._parameters: list[weakref.ref[torch.Tensor]] = []
        self.profile: dict[Module, int] | None = None
        self.first_calls: dict[Module, int] = {}
        self.layouts: Layouts | None = None
        self.structure = object()  # another one once a module is exchanged
        self._tree: list[tuple[Module, tuple[Module | None, ...]]] = []

    @classmethod
    def of(cls, root: Module) -> Instruments:
        """The one object for `root`, made at need; it lives as long as somebody holds it."""
        with _lock:
            found = _registry.get(id(root))
            if found is None or found.root is not root:
                found = _registry[id(root)] = cls(root)
            return found

    def install(self) -> None:
        """Replace the forward of every module that contains others; pair with `remove`."""
        with _lock:
            self._users += 1
            if self._users > 1:
                return
            _live.append(self)
            if self._stale():
                self._learn()
            for container in self._always:
                slots = container.slots
                if "forward" in slots:
                    self._replace_own(container.module)
                else:
                    slots["forward"] = container.replacement
            if _COMPILER in sys.modules:
                for container in self._always:
                    if _COMPILED in container.slots:
                        self._stop_compiled_calls(container.module)

    def remove(self) -> None:
        """Put everything back once the last concurrent run of this tree is over."""
        with _lock:
            self._users -= 1
            if self._users:
                return
            _live.remove(self)
            if _live:
                self._hand_over()
            for module, compiled in self._compiled.items():
                vars(module)[_COMPILED] = vars(module).get(_COMPILED) or compiled
            self._compiled = {}
            for module, (replacement, previous) in self._replaced.items():
                slots = vars(module)
                if slots.get("forward") is not replacement:
                    continue  # the block put another one in its place
                if previous is None:
                    del slots["forward"]
                else:
                    slots["forward"] = previous
            self._replaced = {}
            if _live:
                return  # the containers were among these
            for container in self._always:
                if container.slots.get("forward") is container.replacement:
                    del container.slots["forward"]

    def add(self, module: Module) -> bool:
        """Instrument one more module until the run is over; whether it is so from the start of every run."""
        if module in self._eager:
            return True
        slots = vars(module)
        if _COMPILED in slots:
            self._stop_compiled_calls(module)
        if "forward" not in slots:
            known = self._leaves.get(module)
            if known is None:
                known = self._leaves[module] = make_replacement(module, None)
            if slots.setdefault("forward", known) is known:  # else another thread was faster
                self._replaced[module] = (known, None)
                return False
        if not _is_ours(slots.get("forward")):
            with _lock:
                self._replace_own(module)
        return False

    def watch_always(self, modules: Iterable[Module]) -> None:
        """From the next run on, instrument these leaves from the start."""
        with _lock:
            self._eager.update(modules)
            self._containers = []

    def watch_odd(self, counts: dict[Any, int]) -> None:
        """Instrument from the start the leaves that are called otherwise than their parents, as `counts` tells."""
        leaves = [module for module in self.modules() if not module._modules and counts.get(module)]
        odd = [leaf for leaf in leaves if counts[leaf] != counts.get(self.parent(leaf), 0)]
        if odd:
            self.watch_always(odd)

    def parent(self, module: Module) -> Module | None:
        """The nearest module above `module` whose forward is called, None for the root."""
        return self.parents().get(module)

    def parents(self) -> dict[Module, Module | None]:
        """`parent` of every module."""
        if not self._parents:
            self._parents = _find_parents(self.root)
        return self._parents

    def shared(self) -> frozenset[Module]:
        """The modules that stand at more than one place of the tree, with all inside them."""
        if self._shared is None:
            seen: set[Module] = set()
            children = [c for m in self.root.modules() for c in m._modules.values() if c is not None]
            twice = [c for c in children if c in seen or seen.add(c)]
            self._shared = frozenset(inner for module in twice for inner in module.modules())
        return self._shared

    def parameter_versions(self) -> int:
        """A number that another one follows once a parameter is changed in place."""
        try:
            return sum([parameter()._version for parameter in self._parameters])  # type: ignore[union-attr]
        except AttributeError:  # one was exchanged, and is gone
            self._parameters = _find_parameters(self.root)
        return sum([found._version for known in self._parameters if (found := known()) is not None])

    def keep_profile(self, counts: dict[Any, int]) -> None:
        """`counts` tells how often each module is called in a forward, in the order of first calls."""
        self.profile = counts
        self.first_calls = {place: i for i, place in enumerate(counts)}

    def modules(self) -> Iterable[Module]:
        """Every module of the tree once."""
        return self.root.modules()

    def _stop_compiled_calls(self, module: Module) -> None:
        # The compiler would take a replacement apart, and could not pause: during a run compiled modules run eagerly.
        compiled = vars(module).get(_COMPILED)
        if compiled is not None:
            self._compiled[module] = compiled
            vars(module)[_COMPILED] = None

    def _stale(self) -> bool:
        return not self._containers or self._children != [tuple(members.values()) for members in self._members_of]

    def _learn(self) -> None:
        self._containers = [Container(m) for m in self.root.modules() if m._modules or m is self.root]
        self._always = [c for c in self._containers if c.replacement is not None]
        here = {c.module for c in self._containers}
        self._always += [Container(m) for m in self._eager - here]
        self._members_of = [c.module._modules for c in self._containers]
        self._children = [tuple(members.values()) for members in self._members_of]
        tree = [(c.module, below) for c, below in zip(self._containers, self._children, strict=True)]
        if tree != self._tree:
            self._tree, self.structure = tree, object()
        self._parents = {}
        self._members = frozenset()
        self._shared = None
        self._parameters = _find_parameters(self.root)

    def _replace_own(self, module: Module) -> None:
        current = vars(module).get("forward")
        if _is_ours(current):
            return  # another tree's, which hands it over when its run ends
        replacement = make_replacement(module, current)
        self._replaced[module] = (replacement, current)
        vars(module)["forward"] = replacement

    def _all_modules(self) -> frozenset[Module]:
        if not self._members:
            self._members = frozenset(self.root.modules())
        return self._members

    def _hand_over(self) -> None:
        # What stands in modules that other trees with a run have too is theirs from now on.
        for container in self._always:
            replacement = container.replacement
            if replacement is not None and container.slots.get("forward") is replacement:
                self._replaced[container.module] = (replacement, None)
        for other in _live:
            shared = other._all_modules()
            for module in shared & self._replaced.keys():
                entry = self._replaced.pop(module)
                if vars(module).get("forward") is entry[0]:
                    other._replaced[module] = entry
            for module in shared & self._compiled.keys():
                other._compiled[module] = self._compiled.pop(module)


class StillInstruments(Instruments):
    """Those of a tree whose modules are not called here: nothing is replaced."""

    def __init__(self, root: Module) -> None:
        super().__init__(root)
        self.profile = {}

    def install(self) -> None:
        """Nothing to do."""

    def remove(self) -> None:
        """Nothing to do."""

    def add(self, module: Module) -> bool:
        """Every module is visible from the start."""
        return True


def _find_parameters(root: Module) -> list[weakref.ref[torch.Tensor]]:
    # Those on the meta device have no numbers; where weights are fetched for each call, they stand there in between.
    found = {id(parameter): parameter for parameter in root.parameters() if not parameter.is_meta}
    return [weakref.ref(parameter) for parameter in found.values() if not parameter.is_inference()]


def _find_parents(root: Module) -> dict[Module, Module | None]:
    parents: dict[Module, Module | None] = {root: None}
    stack = [(root, root)]
    while stack:
        module, caller = stack.pop()
        for child in reversed(module._modules.values()):
            if child is not None and child not in parents:
                parents[child] = caller
                stack.append((child, caller if _never_called(child) else child))
    return parents
