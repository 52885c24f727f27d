"""Aliases: other names for modules, beside their own."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from torch.nn import Module

from nnsight.errors import InputError, UnknownPathError


class Aliases:
    """`rename={"transformer.h": "layers", "attn": "attention"}`, checked against a model's modules.

    A dotted key is a path from the root, and its new name is found at the root; a single name is renamed
    wherever it stands.
    """

    def __init__(self, root: Module, rename: Mapping[str, str], taken: Collection[str]) -> None:
        self._mounted: dict[str, str] = {}  # new name -> path
        self._names: dict[str, list[str]] = {}  # new name -> the modules' own
        paths = {name for name, _ in root.named_modules() if name}
        for key, new in rename.items():
            _check_name(key, new, taken)
            old = key.removeprefix("model.") if key not in paths else key
            _check_key(old, key, paths)
            if "." in old:
                if self._mounted.setdefault(new, old) != old:
                    raise InputError(_TWICE.format(new=new, first=self._mounted[new], second=old))
            else:
                self._names.setdefault(new, []).append(old)
        self._check_collisions(root)

    @classmethod
    def of(cls, mounted: Mapping[str, str], names: Mapping[str, Sequence[str]]) -> Aliases:
        """The names of a model that is not here, where they were checked."""
        aliases = object.__new__(cls)
        aliases._mounted, aliases._names = dict(mounted), {new: list(olds) for new, olds in names.items()}
        return aliases

    def parts(self) -> tuple[dict[str, str], dict[str, list[str]]]:
        """What `of` makes the same names of."""
        return self._mounted, self._names

    def __bool__(self) -> bool:
        return bool(self._mounted or self._names)

    def find(self, children: Collection[str], name: str, is_root: bool) -> str | None:
        """The path that `name` stands for below a module with these children."""
        for old in self._names.get(name, ()):
            if old in children:
                return old
        return self._mounted.get(name) if is_root else None

    def names_in(self, children: Collection[str], is_root: bool) -> list[str]:
        """The new names that a module with these children has."""
        known = [new for new, olds in self._names.items() if any(old in children for old in olds)]
        return [*known, *self._mounted] if is_root else known

    def resolve(self, path: str, children_of: Callable[[str], Collection[str]]) -> str:
        """`path`, from the root, in the model's own names; unknown names stay.

        `children_of` gives the names of a module's children, from its path (the root's is empty).
        """
        own = ""
        for name in path.split("."):
            children = children_of(own)
            found = name if name in children else self.find(children, name, not own) or name
            own = f"{own}.{found}" if own else found
        return own

    def describe(self) -> str:
        """`layers = transformer.h, attention = attn`."""
        pairs = [*self._mounted.items(), *((new, " or ".join(old)) for new, old in self._names.items())]
        return ", ".join(f"{new} = {old}" for new, old in pairs)

    def _check_collisions(self, root: Module) -> None:
        for path, module in root.named_modules():
            where = f"model.{path}".rstrip(".")
            here: dict[str, str] = {}
            names = [(old, new) for new, olds in self._names.items() for old in olds if old in module._modules]
            if module is root:
                names += [(old, new) for new, old in self._mounted.items()]
            for old, new in names:
                if hasattr(module, new):
                    raise InputError(_COLLIDES.format(old=old, new=new, what=f"{where}.{new}, which exists already"))
                if here.setdefault(new, old) != old:
                    raise InputError(_TWICE.format(new=f"{where}.{new}", first=here[new], second=old))


def _check_name(key: str, new: str, taken: Collection[str]) -> None:
    if not isinstance(new, str) or not new.isidentifier():
        raise InputError(f"rename: {new!r}, for {key!r}, cannot be written after a dot: give one plain name.")
    if new in taken:
        raise InputError(_COLLIDES.format(old=key, new=new, what=f"the attribute .{new} that every envoy has"))


def _check_key(key: str, given: str, paths: Iterable[str]) -> None:
    paths = set(paths)
    names = {path.rpartition(".")[2] for path in paths}
    known = paths if "." in key else names
    if key not in known:
        raise UnknownPathError(unknown_key("rename", given, known))


def unknown_key(option: str, key: str, known: Iterable[str]) -> str:
    """The message for a key that is no path and no name of a module."""
    known = sorted(known)
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or [k for k in known if not k.isdigit()][:8]
    return f"{option}: the model has no module {key!r}. The closest are: {', '.join(close)}."


_COLLIDES = "rename: {old!r} cannot be called {new!r}, because that is {what}. Choose another name."
_TWICE = "rename: {new!r} would stand for {first!r} and for {second!r}. Choose another name for one of them."
