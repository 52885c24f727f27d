"""Cache: the values of many modules of one trace, by path."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch.nn import Module

from .._core import Run, Worker
from ..envoy import Envoy
from ..errors import InputError, NeverRanError, UnknownPathError
from ._recording import CachedCall, CacheRecording, Keep, Site
from ._save import save

if TYPE_CHECKING:
    from ..envoy import Aliases, Tree

Modules = Iterable[Envoy | Module | str] | Envoy | Module | str

_ROOT = "model"
_LONGEST = 200  # lines of a printed cache


class Names:
    """The paths of a model's modules; a module with several paths goes by the first."""

    def __init__(self, root: Module, aliases: Aliases | None = None) -> None:
        self.aliases = aliases
        self.first: dict[str, str] = {}
        self.children: dict[str, tuple[str, ...]] = {}
        known: dict[Module, str] = {}
        for name, module in root.named_modules(prefix=_ROOT, remove_duplicate=False):
            self.first[name] = known.setdefault(module, name)
            self.children[name] = tuple(module._modules)

    @classmethod
    def of(cls, first: dict[str, str], children: dict[str, tuple[str, ...]], aliases: Aliases | None) -> Names:
        """Those of a model that is not here."""
        names = object.__new__(cls)
        names.first, names.children, names.aliases = first, children, aliases
        return names

    def find(self, path: str) -> str:
        """The path that a module goes by, from any of its paths, with or without the leading `model.`."""
        for spelled in (path, f"{_ROOT}.{path}", self._in_own_names(path)):
            if spelled in self.first:
                return self.first[spelled]
        close = difflib.get_close_matches(path, self.first, n=3) or difflib.get_close_matches(
            f"{_ROOT}.{path}", self.first, n=3
        )
        hint = f" The closest are: {', '.join(close)}." if close else " Print the model to see its modules."
        raise UnknownPathError(f"The model has no module {path!r}.{hint}")

    def _in_own_names(self, path: str) -> str:
        if self.aliases is None:
            return path
        below = path.removeprefix(f"{_ROOT}.")
        found = self.aliases.resolve(below, lambda own: self.children.get(f"{_ROOT}.{own}".rstrip("."), ()))
        return f"{_ROOT}.{found}"


class CacheEntry:
    """One module in a cache.

    `output`, `inputs` and `input` are those of its one call; of a module called several times (each step of
    a generation calls it once) they are lists with one item a call.  `entry[i]` is the call number `i`, with
    its own `.output`, `.inputs`, `.input` and `.step`.  Where the module's children are numbered (a `ModuleList`,
    a `Sequential`), `entry[i]` is the child, as on the model, and `entry.calls[i]` the call.

    Example:
        >>> from nnsight import LanguageModel
        >>> model = LanguageModel("nnsight/landmarks")
        >>> with model.generate("The Eiffel Tower is in", max_new_tokens=3) as tracer:
        ...     cache = tracer.cache(modules=[model.lm_head])
        >>> entry = cache["lm_head"]
        >>> len(entry), entry[2].step, len(entry.output)
        (3, 2, 3)
    """

    def __init__(self, cache: Cache, path: str) -> None:
        self._cache = cache
        self._path = path

    @property
    def calls(self) -> Sequence[CachedCall]:
        """The calls of the module, in order.

        Example:
            >>> import torch
            >>> from nnsight import NNsight
            >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(5, 10)))
            >>> with model.trace(torch.ones(1, 5)) as tracer:
            ...     cache = tracer.cache(include_inputs=True)
            >>> cache["0"].calls
            [model.0, step 0: inputs (([1, 5] float32,), {}), output [1, 10] float32]
        """
        site = self._cache._sites.get(self._path)
        return () if site is None else site.calls

    @property
    def output(self) -> Any:
        """What the module returned, after all edits; a list with an item a call where there were several.

        Example:
            >>> import torch
            >>> from nnsight import NNsight
            >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(5, 10)))
            >>> with model.trace(torch.ones(1, 5)) as tracer:
            ...     cache = tracer.cache(include_inputs=True)
            >>> cache["0"].output.shape
            torch.Size([1, 10])
        """
        return self._one_or_all([call.output for call in self._some_calls()])

    @property
    def inputs(self) -> Any:
        """What the module was called with, `(args, kwargs)`; a list where there were several calls.

        Example:
            >>> import torch
            >>> from nnsight import NNsight
            >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(5, 10)))
            >>> with model.trace(torch.ones(1, 5)) as tracer:
            ...     cache = tracer.cache(include_inputs=True)
            >>> args, kwargs = cache["0"].inputs
            >>> len(args), kwargs
            (1, {})
        """
        return self._one_or_all([call.inputs for call in self._some_calls()])

    @property
    def input(self) -> Any:
        """The first argument the module was called with; a list where there were several calls.

        Example:
            >>> import torch
            >>> from nnsight import NNsight
            >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(5, 10)))
            >>> with model.trace(torch.ones(1, 5)) as tracer:
            ...     cache = tracer.cache(include_inputs=True)
            >>> cache["0"].input
            tensor([[1., 1., 1., 1., 1.]])
        """
        return self._one_or_all([call.input for call in self._some_calls()])

    def _one_or_all(self, values: list[Any]) -> Any:
        return values[0] if len(values) == 1 else values

    def _some_calls(self) -> Sequence[CachedCall]:
        calls = self.calls
        if not calls:
            if self._path not in self._cache._sites:
                reason = (
                    "it is not one of the modules that the cache was made for. Name it in tracer.cache(modules=[...])"
                )
            else:
                reason = "it did not run after tracer.cache(), which belongs before what the model is to run"
            raise NeverRanError(f"The cache has no values of {self._path}: {reason}.")
        return calls

    # --- the tree, spelled as on the model ------------------------------------------------------------------

    def _child(self, name: str) -> CacheEntry:
        return self._cache[f"{self._path}.{name}"]

    def _numbered(self) -> tuple[str, ...]:
        names = self._cache._names.children[self._path]
        return names if names and names[0] == "0" else ()

    def __getattr__(self, name: str) -> CacheEntry:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._child(name)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self._child(key)
        names = self._numbered()
        if not names:
            return self.calls[key]
        return [self._child(name) for name in names[key]] if isinstance(key, slice) else self._child(names[key])

    def __len__(self) -> int:
        return len(self._numbered() or self.calls)

    def __iter__(self) -> Iterator[Any]:
        return iter([self._child(name) for name in self._numbered()] or self.calls)

    def __bool__(self) -> bool:
        return True

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._cache._names.children[self._path]})

    def __repr__(self) -> str:
        return f"{self._path}: {self._describe()}"

    def _describe(self) -> str:
        calls = self.calls
        if not calls:
            return "nothing"
        return calls[0]._describe() if len(calls) == 1 else f"{len(calls)} calls, the first {calls[0]._describe()}"


class Cache:
    """What `tracer.cache()` gives: filled while the model runs, readable from then on and after the trace.

    `cache["model.transformer.h.0"].output`, with or without the leading `model.`, or spelled as on the model:
    `cache.model.transformer.h[0].output`.  Iterating gives the paths of the modules that ran.

    Example:
        >>> import torch
        >>> from nnsight import NNsight
        >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(5, 10), torch.nn.ReLU()))
        >>> with model.trace(torch.ones(1, 5)) as tracer:
        ...     cache = tracer.cache()
        >>> cache["model.0"].output.shape
        torch.Size([1, 10])
        >>> cache
        Cache of 3 modules
          model    output [1, 10] float32
          model.0  output [1, 10] float32
          model.1  output [1, 10] float32
    """

    def __init__(self, names: Names, sites: dict[str, Site]) -> None:
        self._names = names
        self._sites = sites

    def keys(self) -> list[str]:
        """The paths of the modules that ran, in the order of the model's tree.

        Example:
            >>> import torch
            >>> from nnsight import NNsight
            >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(5, 10)))
            >>> with model.trace(torch.ones(1, 5)) as tracer:
            ...     cache = tracer.cache(include_inputs=True)
            >>> cache.keys()
            ['model', 'model.0']
        """
        return [path for path, site in self._sites.items() if site.steps]

    def values(self) -> list[CacheEntry]:
        """Their entries.

        Example:
            >>> import torch
            >>> from nnsight import NNsight
            >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(5, 10)))
            >>> with model.trace(torch.ones(1, 5)) as tracer:
            ...     cache = tracer.cache(include_inputs=True)
            >>> [entry.output.shape for entry in cache.values()]
            [torch.Size([1, 10]), torch.Size([1, 10])]
        """
        return [CacheEntry(self, path) for path in self.keys()]

    def items(self) -> list[tuple[str, CacheEntry]]:
        """Pairs of path and entry.

        Example:
            >>> import torch
            >>> from nnsight import NNsight
            >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(5, 10)))
            >>> with model.trace(torch.ones(1, 5)) as tracer:
            ...     cache = tracer.cache(include_inputs=True)
            >>> {path: entry.output.norm() for path, entry in cache.items()}.keys()
            dict_keys(['model', 'model.0'])
        """
        return [(path, CacheEntry(self, path)) for path in self.keys()]

    def save(self) -> Cache:
        """Mark the cache as one that leaves the trace; locally it is simply itself.

        Example:
            >>> import torch
            >>> from nnsight import NNsight
            >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(5, 10)))
            >>> with model.trace(torch.ones(1, 5)) as tracer:
            ...     cache = tracer.cache(include_inputs=True)
            ...     _ = cache.save()
        """
        return save(self)

    def __getitem__(self, path: str | Envoy) -> CacheEntry:
        return CacheEntry(self, self._names.find(path.path if isinstance(path, Envoy) else path))

    def __getattr__(self, name: str) -> CacheEntry:
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def __contains__(self, path: object) -> bool:
        try:
            return bool(self[path].calls)  # type: ignore[index]
        except UnknownPathError:
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __bool__(self) -> bool:
        return True

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), _ROOT, *self._names.children[_ROOT]})

    def __repr__(self) -> str:
        items = self.items()
        width = max((len(path) for path, _ in items[:_LONGEST]), default=0)
        lines = [f"  {path:<{width}}  {entry._describe()}" for path, entry in items[:_LONGEST]]
        if len(items) > _LONGEST:
            lines.append(f"  … and {len(items) - _LONGEST} more")
        return "\n".join([f"Cache of {len(items)} module{'' if len(items) == 1 else 's'}", *lines])


def record_cache(run: Run, worker: Worker, tree: Tree, modules: Modules | None, keep: Keep) -> Cache:
    """Record calls of modules from now on, and give the cache they go into."""
    if not (keep.output or keep.inputs):
        raise InputError("A cache of nothing: leave include_output=True, or set include_inputs=True.")
    names = Names(tree.root, tree.aliases)
    recording = CacheRecording(run, worker, tree, _choose(tree.root, names, modules), keep)
    cache = Cache(names, {site.path: site for site in recording.recorders.values()})
    run.record(recording)
    return cache


def _choose(root: Module, names: Names, modules: Modules | None) -> dict[str, Module]:
    paths = {module: path for path, module in root.named_modules(prefix=_ROOT)}
    chosen: Iterable[Module] = paths
    if modules is not None:
        given = [modules] if isinstance(modules, (str, Envoy, Module)) else modules
        wanted = {found for module in given for found in _called(_find(root, names, paths, module))}
        chosen = [module for module in paths if module in wanted]
    return {paths[module]: module for module in chosen if _is_called(module)}


def _find(root: Module, names: Names, paths: dict[Module, str], given: Envoy | Module | str) -> Module:
    if isinstance(given, str):
        return root.get_submodule(names.find(given).removeprefix(_ROOT).removeprefix("."))
    module = given._module if isinstance(given, Envoy) else given
    if module not in paths:
        what = given.path if isinstance(given, Envoy) else f"A {type(module).__name__}"
        raise UnknownPathError(f"{what} is not a module of the model that is traced here, so it cannot be cached.")
    return module


def _called(module: Module) -> list[Module]:
    """The module, or what it lists where it only lists others."""
    if _is_called(module):
        return [module]
    return [found for child in module.children() for found in _called(child)]


def _is_called(module: Module) -> bool:
    return type(module).forward is not Module.forward
