"""Values: `model.resid_pre[3]`, `model.heads[3].z`, as a block reads and writes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, overload

import torch

from ..errors import EditError
from ._terms import HEAD

if TYPE_CHECKING:
    from ._access import Access
    from ._stack import Stack


class LayerValues:
    """One value for each layer: `model.resid_pre[3]` is a tensor, `model.resid_pre[3] = v` puts another there.

    Example:
        >>> from nnsight import LanguageModel
        >>> model = LanguageModel("nnsight/landmarks")
        >>> with model.trace("The Eiffel Tower is in"):
        ...     model.resid_pre[2][:, -1] = 0
        ...     model.mlp_out[3] = model.mlp_out[3] * 2
        ...     last = model.resid_post[-1].save()
        >>> last.shape[-1] == model.config.n_embd
        True
    """

    def __init__(self, stack: Stack, access: Access) -> None:
        self._stack = stack
        self._access = access

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | list[torch.Tensor]:
        stack = self._stack
        if isinstance(index, slice):
            return [stack.read(self._access, i) for i in range(len(stack))[index]]
        return stack.read(self._access, stack.number(index))

    def __setitem__(self, index: int, value: Any) -> None:
        if isinstance(index, slice):
            raise EditError(
                f"{self!r} is assigned layer by layer: for i in range(...): model.{self._access.name}[i] = v"
            )
        self._stack.write(self._access, self._stack.number(index), value)

    def __len__(self) -> int:
        return len(self._stack)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self._stack.read(self._access, i) for i in range(len(self)))

    def __repr__(self) -> str:
        return f"model.{self._stack.prefix}{self._access.name}[0 to {len(self) - 1}]"


class Heads:
    """The heads of each layer's attention: `model.heads[3].z`, a `Head`."""

    def __init__(self, stack: Stack, prefix: str) -> None:
        self._stack = stack
        self._prefix = prefix

    @overload
    def __getitem__(self, index: int) -> Head: ...
    @overload
    def __getitem__(self, index: slice) -> list[Head]: ...
    def __getitem__(self, index: int | slice) -> Head | list[Head]:
        if isinstance(index, slice):
            return [Head(self._stack, self._prefix, i) for i in range(len(self))[index]]
        return Head(self._stack, self._prefix, self._stack.number(index))

    def __len__(self) -> int:
        return len(self._stack)

    def __iter__(self) -> Iterator[Head]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"model.{self._stack.prefix}{self._prefix}s[0 to {len(self) - 1}]"


class _HeadValue:
    """An attribute of `Head` that reads and writes."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, head: Any, owner: type | None = None) -> Any:
        if head is None:
            return self
        stack = head._stack
        return stack.read(stack.access(head._prefix + self._name), head._index)

    def __set__(self, head: Any, value: Any) -> None:
        stack = head._stack
        stack.write(stack.access(head._prefix + self._name), head._index, value)


class Head:
    """The heads of one layer: `q`, `k`, `v`, `q_rot`, `k_rot`, `pattern`, `z`, `result`, each a tensor over all heads.

    Example:
        >>> from nnsight import LanguageModel
        >>> model = LanguageModel("nnsight/landmarks")
        >>> with model.trace("The Eiffel Tower is in"):
        ...     model.heads[2].z[:, :, 1] = 0                 # head 1 of layer 2
        ...     pattern = model.heads[3].pattern.save()
        >>> pattern.shape[1] == model.config.n_head
        True
    """

    q = _HeadValue("q")
    k = _HeadValue("k")
    v = _HeadValue("v")
    q_rot = _HeadValue("q_rot")
    k_rot = _HeadValue("k_rot")
    pattern = _HeadValue("pattern")
    z = _HeadValue("z")
    result = _HeadValue("result")

    __slots__ = ("_index", "_prefix", "_stack")

    def __init__(self, stack: Stack, prefix: str, index: int) -> None:
        self._stack = stack
        self._prefix = prefix
        self._index = index

    def __repr__(self) -> str:
        return f"model.{self._stack.prefix}{self._prefix[:-1]}s[{self._index}]: {', '.join(HEAD)}"
