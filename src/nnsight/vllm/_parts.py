"""Parts: values of which every worker of a tensor parallel engine has a part, made whole before a block sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module

from .._core import INPUT, map_tensors
from ..errors import EditError, EngineError


class Parts:
    """What is whole in every worker, and what is not.

    Every worker runs every block, on the same values.  The stream and what goes into and out of layers, attention, MLPs
    and norms is whole.  Behind a projection that is cut by columns, and before one that is cut by rows, the last dimension
    is in parts: they are gathered, and of what a block puts there each worker takes its own.  What a block writes
    is that of the first worker everywhere, so that chance cannot lead them apart.

    Args:
        group: The workers, as vLLM has them.
        places: The path of each module.
    """

    def __init__(self, group: Any, places: dict[Module, str]) -> None:
        from vllm.model_executor.layers import linear  # pyright: ignore[reportMissingImports]

        self._kinds = linear
        self._group = group
        self._places = places

    def show(self, module: Module, kind: str, shown: Any) -> Any:
        """A value of a block's rows, whole.

        Raises:
            EngineError: How it is cut is not known.
        """
        sizes = self._sizes(module, kind)
        return shown if sizes is None else map_tensors(lambda value: self._gather(value, sizes), shown)

    def take(self, module: Module, kind: str, value: Any) -> Any:
        """What this worker is to have of a value that a block has written."""
        sizes = self._sizes(module, kind)
        return map_tensors(lambda one: self._part(self.agree(one), sizes), value)

    def agree(self, value: torch.Tensor) -> torch.Tensor:
        """The first worker's value."""
        with torch.inference_mode(False), torch.no_grad():
            return self._group.broadcast(value.detach().contiguous().clone(), src=0)

    def _gather(self, value: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            whole = self._group.all_gather(value.contiguous(), dim=-1)
            by_worker = [part.split(sizes, -1) for part in whole.split(sum(sizes), -1)]
            return torch.cat([piece for pieces in zip(*by_worker, strict=True) for piece in pieces], -1)

    def _part(self, value: torch.Tensor, sizes: list[int] | None) -> torch.Tensor:
        if sizes is None:
            return value
        count, rank = self._group.world_size, self._group.rank_in_group
        if value.shape[-1] != count * sum(sizes):
            raise EditError(
                f"A tensor with {count * sum(sizes)} numbers at each position is expected, not {value.shape[-1]}."
            )
        wholes = value.split([size * count for size in sizes], -1)
        return torch.cat([whole.split(size, -1)[rank] for whole, size in zip(wholes, sizes, strict=True)], -1)

    def _sizes(self, module: Any, kind: str) -> list[int] | None:
        """How large the pieces are that this worker has of a value's last dimension; None where it has all of it."""
        if isinstance(module, self._kinds.RowParallelLinear):
            if kind == INPUT:
                return [module.input_size_per_partition] if module.input_is_parallel else None
            if module.reduce_results:
                return None
        elif isinstance(module, self._kinds.ColumnParallelLinear):
            if kind == INPUT or module.gather_output:
                return None
            if getattr(module, "num_kv_head_replicas", 1) == 1:
                return list(module.output_partition_sizes)
        elif isinstance(module, self._kinds.ReplicatedLinear) or self._is_outside(module):
            return None
        path = self._places[module]
        raise EngineError(_UNKNOWN.format(path=f"model.{path}.{kind}", count=self._group.world_size))

    def _is_outside(self, module: Module) -> bool:
        """Whether it is a layer, one of its parts, or outside of the layers: between these, values are whole."""
        names = self._places[module].split(".")
        numbers = [i for i, name in enumerate(names) if name.isdigit()]
        return not isinstance(module, self._kinds.LinearBase) and (not numbers or len(names) - numbers[0] <= 2)


def parts_of(places: dict[Module, str]) -> Parts | None:
    """The parts of this worker's model, None where it has all of it."""
    from vllm.distributed import get_tp_group  # pyright: ignore[reportMissingImports]

    group = get_tp_group()
    return Parts(group, places) if group.world_size > 1 else None


_UNKNOWN = """\
{path} is in parts here, one in each of {count} workers, and how they make a whole is not known. Read the projections before \
and behind it, or what goes into and out of the attention and the MLP; or use tensor_parallel_size=1."""
