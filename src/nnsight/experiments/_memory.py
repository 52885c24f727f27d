"""Memory: how much a run needs, and work done in batches that stay within a budget."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnsight import errors

Item = TypeVar("Item")
Found = TypeVar("Found")

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors made while it is on; `peak` is the most that was alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, torch.Tensor):
                self._note(given, 0)  # a weight, or an input
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor):
                self._note(made, made.untyped_storage().nbytes())
        self.peak = max(self.peak, self._now)
        return result

    def _note(self, tensor: torch.Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = size
            self._now += size
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._known.pop(key, 0)


class Budget:
    """So many bytes for what an experiment makes, beside the model.

    Args:
        memory: Bytes, or text: `"500MB"`, `"2GiB"`.

    Raises:
        InputError: `memory` is no amount.
    """

    def __init__(self, memory: int | str) -> None:
        self.bytes = self.left = _bytes_of(memory)
        self.each = 0

    def hold(self, tensors: Sequence[torch.Tensor]) -> None:
        """Take what stays from the budget.

        Raises:
            InputError: That leaves nothing.
        """
        self.left -= sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if self.left <= 0:
            raise errors.InputError(_TOO_SMALL.format(what="What is kept of the prompts", memory=_show(self.bytes)))

    def release(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give back what `hold` took."""
        self.left += sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def measure(self, work: Sequence[Item], run: Callable[[Sequence[Item]], Found], unit: int = 1) -> list[Found]:
        """As `run`, of plain runs; the first unit is run alone, and tells how much memory a row of later runs needs.

        Raises:
            InputError: Not even one unit fits.
        """
        with PeakMemory() as memory:
            found = [run(work[:unit])]
        self.each = max(self.each, memory.peak // unit)
        return found + self.run(work[unit:], run, unit)

    def run(
        self,
        work: Sequence[Item],
        run: Callable[[Sequence[Item]], Found],
        unit: int = 1,
        each: int | None = None,
    ) -> list[Found]:
        """What `run` makes of `work`, batch by batch.

        Args:
            work: What there is to do.
            run: Does a batch of it.
            unit: A batch is a multiple of this.
            each: How many bytes one item needs; by default as many as was measured.

        Raises:
            InputError: Not even one unit fits.
        """
        return [run(batch) for batch in self.split(work, unit, each)]

    def split(
        self, work: Sequence[Item], unit: int = 1, each: int | None = None, *, spare: int = 0
    ) -> list[Sequence[Item]]:
        """`work` in batches of about the same size, none too large; with room for `spare` items more beside each.

        Raises:
            InputError: Not even one unit fits.
        """
        each = max(self.each if each is None else each, 1)
        if each * unit > self.left:
            need = f"One run of {unit} rows needs {_show(each * unit)}, which"
            raise errors.InputError(_TOO_SMALL.format(what=need, memory=_show(self.bytes)))
        units = -(-len(work) // unit)
        batches = -(-units // max((self.left - spare * each) // (each * unit), 1))
        size = -(-units // max(batches, 1)) * unit
        return [work[start : start + size] for start in range(0, len(work), max(size, 1))]


def _bytes_of(memory: int | str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?)?B?\s*", str(memory))
    if match is None or float(match[1]) <= 0:
        raise errors.InputError(f"{memory!r} is no amount of memory: give bytes, or text like '500MB' or '2GiB'.")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _show(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


_TOO_SMALL = "{what} does not fit into the budget of {memory}: give memory='...' more, or fewer or shorter prompts."
