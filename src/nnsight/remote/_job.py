"""From a captured block to the job that a server can run: what the block reads, by value or by source."""

from __future__ import annotations

import builtins
import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch.nn import Module

from .._capture import Block, Scope
from ..envoy import Envoy
from ..errors import TravelError
from ..modeling import NNsight, take_apart
from ..names import Site
from ..protocol import (
    VERSION,
    BlockText,
    BoundBlock,
    Definition,
    DefinitionNode,
    Encoder,
    EnvoyNode,
    ImportNode,
    InstanceNode,
    Job,
    ModelState,
    ModuleNode,
    ModuleText,
    Namespace,
    Node,
    SiteNode,
    StoredIntervention,
    results_of,
    state_of,
    write_frame,
)
from ..trace import Edit
from ._code import free_variables, globals_of, is_installed, registered, source_of
from ._modules import Memory, check_module
from ._unsaved import NotSaved

_ABSENT: Any = object()
_NO_INSTANCES = (Mapping, Sequence, torch.Tensor, BaseException, Enum)
_MADE_IN_PYTHON = 1 << 9  # of a class's flags
_OWN_WAYS = (
    "__reduce__",
    "__reduce_ex__",
    "__getstate__",
    "__setstate__",
    "__getnewargs__",
    "__getnewargs_ex__",
    "__del__",
)


class Written(NamedTuple):
    """A job as bytes, with what its numbers stand for on this side."""

    frame: bytes
    containers: Sequence[Any]
    tensors: Sequence[torch.Tensor]
    definitions: Sequence[Any]


class Order(NamedTuple):
    """What a remote trace asks for."""

    model: NNsight
    key: str
    revision: str | None
    method: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    strict_order: bool
    timeout: float
    solo: bool


class JobWriter:
    """Writes one job."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._encoder = Encoder(self._extend)
        self._models: list[NNsight] = []
        self._states: list[ModelState] = []
        self._spaces: list[dict[str, Any]] = []
        self._namespaces: list[Namespace] = []
        self._definitions: list[Any] = []
        self._texts: list[Definition] = []
        self._modules: dict[str, ModuleText] = {}
        self._memory = Memory()

    def write(self, block: Block, scope: Scope) -> Written:
        """The job for a block of the user's frame.

        Raises:
            TravelError: The block reads something that cannot be sent; the message names it.
        """
        order = self._order
        self._model(order.model)
        main = self._bound(block, scope)
        args = [self._encoder.encode(value, f"input {i}") for i, value in enumerate(order.args)]
        kwargs = {name: self._encoder.encode(value, f"{name}=") for name, value in order.kwargs.items()}
        job = Job(
            version=VERSION,
            model=order.key,
            revision=order.revision,
            method=order.method,
            main=main,
            args=args,
            kwargs=kwargs,
            models=self._states,
            namespaces=self._namespaces,
            definitions=self._texts,
            modules=list(self._modules.values()),
            containers=self._encoder.contents,
            tensors=self._encoder.tensors.infos,
            grad=torch.is_grad_enabled(),
            inference=torch.is_inference_mode_enabled(),
            strict_order=order.strict_order,
            seed=int(torch.randint(2**62, ()).item()),
            timeout=order.timeout,
            solo=order.solo,
            engine=order.model._engine,
        )
        frame = write_frame(job, self._encoder.tensors)
        return Written(frame, self._encoder.containers, self._encoder.tensors.sources, self._definitions)

    # --- names -----------------------------------------------------------------------------------------------

    def _bound(self, block: Block, scope: Scope) -> BoundBlock:
        names, reads = scope.variables(block), block.names_read - block.target_names()
        found = {name: scope.get(name, _ABSENT) for name in sorted(names & reads)}
        variables: dict[str, Any] = {}
        for name, value in found.items():
            if value is not _ABSENT:
                self._send(name, value, variables, block.names_bound)
        namespace = self._namespace(scope.globals, reads - names, block.names_bound)
        return BoundBlock(_text(block), sorted(names), variables, namespace)

    def _send(self, name: str, value: Any, sent: dict[str, Any], bound: frozenset[str]) -> None:
        """Add the value of a name; one that the block binds itself, most likely first, need not go."""
        if isinstance(value, NotSaved):
            sent.pop(name, None)
            return
        try:
            sent[name] = self._encoder.encode(value, name)
        except TravelError:
            sent.pop(name, None)
            if name not in bound:
                raise

    def _namespace(self, values: dict[str, Any], reads: frozenset[str], bound: frozenset[str] = frozenset()) -> int:
        number = next((i for i, known in enumerate(self._spaces) if known is values), None)
        if number is None:
            number = len(self._spaces)
            self._spaces.append(values)
            self._namespaces.append(Namespace(str(values.get("__name__", "__main__"))))
        sent = self._namespaces[number].values
        for name in sorted(reads):
            if name in values and name not in sent and not name.startswith("__"):
                sent[name] = None  # a definition that reads itself finds it there
                self._send(name, values[name], sent, bound)
                if name in sent:
                    sent[name] = sent.pop(name)  # after what it needs, as it is read in this order
        return number

    # --- what is more than data ------------------------------------------------------------------------------

    def _extend(self, encoder: Encoder, value: Any) -> Node | None:
        if isinstance(value, Envoy):
            return self._envoy(value)
        if isinstance(value, Site):
            return self._site(value)
        if isinstance(value, ModuleType):
            return self._module(value)
        if isinstance(value, type) or callable(value):
            found = self._callable(value)
            if found is not None:
                return found
        if type(value) in (torch.Tensor, torch.nn.Parameter):
            return None
        return self._part_of_model(value) or self._instance(encoder, value)

    def _envoy(self, envoy: Envoy) -> EnvoyNode:
        if isinstance(envoy, NNsight):
            return EnvoyNode(self._model(envoy), "")
        if envoy._tree is not self._order.model._tree:
            raise TravelError(f"{envoy.path} cannot travel: it belongs to another model than the one that is traced.")
        return EnvoyNode(0, envoy.path.removeprefix("model").removeprefix("."))

    def _site(self, site: Site) -> SiteNode:
        if site.module._tree is not self._order.model._tree:
            raise TravelError(f"{site} cannot travel: it belongs to another model than the one that is traced.")
        return SiteNode(site.name, site.layer, site.stack)

    def _model(self, model: NNsight) -> int:
        number = next((i for i, known in enumerate(self._models) if known is model), None)
        if number is not None:
            return number
        if model._tree is not self._order.model._tree:
            raise TravelError(
                "A second model cannot travel: a job runs on one served model. Save what you need of the other one."
            )
        number = len(self._models)
        self._models.append(model)
        state = ModelState([], model._rename)
        self._states.append(state)
        for edit in model._edits:
            if isinstance(edit, Edit):
                state.edits.append(self._bound(edit.block, edit.scope))
            else:
                value = self._encoder.encode(edit.intervention, "an intervention")
                state.edits.append(StoredIntervention(value))
        return number

    def _part_of_model(self, value: Any) -> EnvoyNode | None:
        for number, model in enumerate(self._models):
            if value is getattr(model, "_processor", _ABSENT) and value is not None:
                return EnvoyNode(number, "", "tokenizer")
            if value is getattr(model._module, "config", _ABSENT) and value is not None:
                return EnvoyNode(number, "", "config")
        return None

    def _module(self, module: ModuleType) -> Node:
        name = module.__name__
        if registered(module):
            if name not in self._modules:
                self._modules[name] = ModuleText(name, str(module.__file__), inspect.getsource(module))
            return ModuleNode(name)
        if is_installed(name):
            return ImportNode(name, "")
        raise TravelError(
            f"The module {name!r} cannot travel: it is one of your own. nnsight.register({name}) sends its source along."
        )

    def _callable(self, value: Any) -> Node | None:
        if isinstance(value, MethodType) and isinstance(value.__self__, type):
            return None
        if isinstance(value, BuiltinFunctionType) and value.__self__ is builtins:
            return ImportNode("builtins", value.__name__)
        if not isinstance(value, (FunctionType, type)) and not _is_importable(value):
            return None
        module = str(getattr(value, "__module__", None) or "")
        if is_installed(module) and _is_importable(value):
            return ImportNode(module, value.__qualname__)
        if isinstance(value, (FunctionType, type)) and value.__module__ != "builtins":
            return DefinitionNode(self._definition(value))
        return None

    def _definition(self, value: FunctionType | type) -> int:
        number = next((i for i, known in enumerate(self._definitions) if known is value), None)
        if number is not None:
            return number
        source = source_of(value)
        number = len(self._definitions)
        self._definitions.append(value)
        free = free_variables(value, source.reads)
        text = Definition(source.name, 0, source.text, source.filename, source.first_line)
        self._texts.append(text)
        text.free.update({name: self._encoder.encode(item, name) for name, item in free.items() if item is not value})
        text.namespace = self._namespace(globals_of(value), source.reads - free.keys() - {value.__name__})
        return number

    def _instance(self, encoder: Encoder, value: Any) -> Node | None:
        """An object of the user's own class, a module of PyTorch, or plain data of a library: its class and attributes."""
        if not (isinstance(value, Module) or _is_plain(value)) or isinstance(value, _NO_INSTANCES):
            return None
        cls = type(value)
        if not hasattr(value, "__dict__") or any(vars(base).get("__slots__") for base in cls.__mro__[:-1]):
            return None
        if isinstance(value, Module):
            check_module(value, encoder.name())
            self._memory.add(value, encoder.name())
        made = self._class(cls)
        return encoder.hold(value, lambda held: InstanceNode(made, _attributes(encoder, held)))

    def _class(self, cls: type) -> Any:
        found = self._callable(cls)
        if found is None:
            raise TravelError(f"{cls.__qualname__!r} cannot travel: it is no class that can be found by its name.")
        return found


def _attributes(encoder: Encoder, value: Any) -> list[tuple[str, Any]]:
    state = {**state_of(value), **dict.fromkeys(results_of(value))}
    return [(name, encoder.encode(item, f".{name}")) for name, item in state.items()]


def _is_plain(value: Any) -> bool:
    """Whether an object is of the user's own class, or what its attributes say all about."""
    cls = type(value)
    if not is_installed(cls.__module__):
        return True
    if cls.__module__.partition(".")[0] == "nnsight":
        return dataclasses.is_dataclass(cls)
    in_python = all(base.__flags__ & _MADE_IN_PYTHON for base in cls.__mro__[:-1])
    return in_python and not any(_overrides(cls, name) for name in _OWN_WAYS) and take_apart(value) is None


def _overrides(cls: type, name: str) -> bool:
    return getattr(cls, name, None) is not getattr(object, name, None)


def _is_importable(value: Any) -> bool:
    """Whether an object is found again under its module and name."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        return False
    found: Any = inspect.sys.modules.get(module)  # pyright: ignore[reportAttributeAccessIssue]
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is value


def _text(block: Block) -> BlockText:
    return BlockText(
        source=block.source,
        filename=block.filename,
        first_line=block.first_line,
        function=block.function,
        target=block.target,
        line=block.line,
        margins=list(block.margins),
        owner=block.owner,
        first_argument=block.first_argument,
        flags=block.flags,
        names_read=sorted(block.names_read),
        names_bound=sorted(block.names_bound),
        names_global=sorted(block.names_global),
    )
