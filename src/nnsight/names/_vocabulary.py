"""Vocabulary: the standard names of one model, found by its family and checked before they are served."""

from __future__ import annotations

import difflib
import weakref
from typing import Any

from torch.nn import Module

from .._core import Run, Worker, active
from ..envoy import Envoy, Tree
from ..errors import NamesError, NotTracingError
from ._access import Access
from ._check import check_stack
from ._registry import find_rows
from ._stack import Stack
from ._terms import HEADS, MODULES, VALUES

_KNOWN = (*MODULES, *VALUES, *HEADS, "logits")


class Vocabulary:
    """What `model.names` is: every name of the vocabulary, also where the model's own attribute of that name wins.

    Example:
        >>> from nnsight import LanguageModel
        >>> model = LanguageModel("nnsight/landmarks")
        >>> model.names.layers is model.transformer.h
        True
    """

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.failures: dict[tuple[str, str], str] = {}
        self._top: weakref.ref[Envoy] | None = None
        self._checked: dict[str, object] = {}  # stack -> the structure of the model when its numbers were checked
        self._scanned: dict[str, object] = {}  # the same for shapes
        self.trial_inputs: dict[str, Any] | None = None
        self._promised: dict[str, str] = {}  # stack -> a name by which a module was given away unchecked
        self._read()

    def _read(self) -> None:
        self._root = self.tree.root
        self.model, self._above = _find_model(self.tree.root)
        self.config = getattr(self.model, "config", None)
        self.kind = _describe(self.model, self.config)
        prefix = getattr(type(self.model), "base_model_prefix", "")
        self.base = self.below_model(prefix if prefix in self.model._modules else "")
        rows = find_rows(self.config, self.kind)
        self.stacks = {name: Stack(self, name, row) for name, row in rows.items()}

    def of(self, top: Envoy) -> Vocabulary:
        """This vocabulary, with the modules as envoys of `top`."""
        if self._top is None or self._top() is not top:
            self._top = weakref.ref(top)
        return self.of_root()

    def of_root(self) -> Vocabulary:
        """This vocabulary, for the module that is at the root now."""
        if self._root is not self.tree.root:
            self._read()
        return self

    # --- names -----------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "stacks" not in self.__dict__:
            raise AttributeError(name)
        if name in self.stacks:
            return self.stacks[name]
        return getattr(self.stack_for(name), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "logits":
            self.stack_for(name).logits = value
        else:
            super().__setattr__(name, value)

    def stack_for(self, name: str, stack: str | None = None) -> Stack:
        """The stack that a name belongs to where none, or `stack`, is mentioned."""
        if stack is not None:
            if stack not in self.stacks:
                raise NamesError(f"{self.kind} has no stack {stack!r}; it has: {', '.join(filter(None, self.stacks))}.")
            return self.stacks[stack]
        if "" in self.stacks:
            return self.stacks[""]
        able = [found for found in self.stacks.values() if found.row.unembed is not None]
        if name in ("logits", "unembed") and len(able) == 1:
            return able[0]
        if name not in _KNOWN and not name.startswith(("head_", "cross_head_")):
            raise self.unknown(name)
        spelled = " or ".join(f"model.names.{found}.{name}" for found in self.stacks)
        raise NamesError(f"{self.kind} has more than one stack of layers: write {spelled}.")

    def unknown(self, name: str) -> NamesError:
        """The error for a name that the vocabulary does not have."""
        close = difflib.get_close_matches(name, _KNOWN, n=3) or _KNOWN
        return NamesError(f"The vocabulary has no {name!r}. It has: {', '.join(close)}.")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_KNOWN, *filter(None, self.stacks)})

    def __repr__(self) -> str:
        return "\n".join(repr(stack) for stack in self.stacks.values())

    # --- modules ---------------------------------------------------------------------------------------------

    def has(self, path: str) -> bool:
        """Whether there is a module at a path from the root."""
        module: Any = self.tree.root
        for step in path.split("."):
            module = module._modules.get(step)
            if module is None:
                return False
        return True

    def below_model(self, path: str) -> str:
        """A path from the model that the config describes, from the root."""
        return ".".join(filter(None, (self._above, path)))

    def envoy(self, path: str) -> Envoy:
        """The envoy at a path from the root."""
        top = self._top() if self._top is not None else None
        return (top or Envoy(self.tree.root, "model", self.tree))._walk(path)

    def find(self, envoy: Envoy, name: str) -> Envoy | None:
        """What `name` (`attn`, `router`, …) stands for below `envoy`, None where it is none of our names."""
        for stack in self.stacks.values():
            start = f"{stack.path}."
            if not envoy._path.startswith(start):
                continue
            _, _, below = envoy._path.removeprefix(start).partition(".")
            for spelled, path in stack.paths_in_layers():
                if spelled == f"{below}.{name}".strip(".") and _has(envoy._module, path.removeprefix(below).strip(".")):
                    return envoy._walk(path.removeprefix(below).strip("."))
        return None

    # --- checking --------------------------------------------------------------------------------------------

    def worker(self, access: Access, index: int) -> Worker:
        """The block that asks for a value, once the stack is checked."""
        tree, stack = self.tree, access.stack
        worker = active.get()
        if worker is None or worker.instruments is not tree.instruments:
            worker = tree.find_worker()
            if worker is None:
                raise NotTracingError(_NOT_TRACING.format(name=f"{stack.prefix}{access.name}"))
        run = worker.run
        if run.main is None:
            run.start()
        self.ensure(stack, access.name, run)
        return worker

    def vouch(self, stack: Stack, name: str) -> None:
        """A module is given away by its name here: check the stack now in a trace, else when the next one begins."""
        worker = self.tree.find_worker()
        if worker is None:
            self._promised[stack.name] = name
            self.tree.due = self.keep_promises
        else:
            self.ensure(stack, name, worker.run)

    def keep_promises(self) -> None:
        """Check the stacks whose modules were given away before the weights may have been there."""
        self.tree.due = None
        promised, self._promised = self._promised, {}
        for stack, name in promised.items():
            self.ensure(self.of_root().stacks[stack], name, None)

    def check(self, **inputs: Any) -> None:
        """Check all names now, on an input of yours: for a model that the trial forward's own input does not suit.

        Raises:
            NamesError: Some do not hold; the message has them all.
        """
        if any(parameter.is_meta for parameter in self.model.parameters()) and not hasattr(self.model, "_hf_hook"):
            raise NamesError(f"The weights of {self.kind} are not loaded yet, so its names cannot be checked.")
        self.trial_inputs = inputs or None
        for stack in self.stacks.values():
            self._check(stack, None)
            self._checked[stack.name] = self.tree.instruments.structure
        if self.failures:
            found = "\n".join(f"  {'.'.join(filter(None, name))}: {text}" for name, text in self.failures.items())
            raise NamesError(f"The vocabulary does not hold for {self.kind}. On the input given,\n{found}")

    def ensure(self, stack: Stack, name: str, run: Run | None) -> None:
        """Refuse a name that does not hold on a trial forward, which is made once a model.

        Raises:
            NamesError: It does not hold.
        """
        scans = run is not None and run.fakes is not None
        checked = self._scanned if scans else self._checked
        if checked.get(stack.name) is not self.tree.instruments.structure:
            self._check(stack, run)
            checked[stack.name] = self.tree.instruments.structure
        if self.failures:
            reason = self.failures.get((stack.name, name))
            if reason is not None:
                raise NamesError(_REFUSED.format(kind=stack.kind, name=f"{stack.prefix}{name}", reason=reason))

    def _check(self, stack: Stack, run: Run | None) -> None:
        failures = check_stack(self, stack, run.fakes if run is not None else None, self.trial_inputs)
        self.failures = {key: text for key, text in self.failures.items() if key[0] != stack.name}
        self.failures.update({(stack.name, name): text for name, text in failures.items()})


def knows_family(tree: Tree) -> bool:
    """Whether the model says by a config what family it is of."""
    return tree.vocabulary is not None or isinstance(getattr(_config(tree.root), "model_type", None), str)


def _config(root: Module) -> Any:
    return getattr(_find_model(root)[0], "config", None)


def _has(module: Module, path: str) -> bool:
    for step in path.split("."):
        found = module._modules.get(step)
        if found is None:
            return False
        module = found
    return True


def _find_model(root: Module) -> tuple[Module, str]:
    """The model that a config describes, and its path: inside `root` where that is an adapter around it."""
    adapter = root._modules.get("base_model")
    inner = adapter._modules.get("model") if adapter is not None else None
    if inner is not None and hasattr(root, "peft_config"):
        return inner, "base_model.model"
    return root, ""


def _describe(model: Module, config: Any) -> str:
    kind = getattr(config, "model_type", None)
    return type(model).__name__ if kind is None else f"{type(model).__name__} ({kind})"


_NOT_TRACING = """\
model.{name} has a value only while the model runs:

    with model.trace(input):
        value = model.{name}....save()
"""
_REFUSED = """\
model.{name} is not served for {kind}: on a trial input {reason}. The model differs from its family's row of the \
vocabulary; use its modules by their own names, or register a row for it with nnsight.names.register(...)."""
