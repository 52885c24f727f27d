"""Batches of a plain module's inputs: tensors, nested or not, joined along dimension 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .._core import tensors_in
from ..errors import InputError
from ..trace import Given


def join_inputs(givens: Sequence[Given]) -> tuple[tuple[Any, ...], dict[str, Any], list[int]]:
    """Positional and keyword arguments for all inputs together, and the rows of each.

    Raises:
        InputError: The inputs do not have one form, or have no rows.
    """
    if len(givens) == 1:
        return (*givens[0], [1])  # alone, an input is never told from others  # pyright: ignore[reportReturnType]
    sizes = [_rows_of(given) for given in givens]
    args, kwargs = _join([tuple(given) for given in givens])
    return args, kwargs, sizes


def _rows_of(given: Given) -> int:
    sizes = {tensor.shape[0] for tensor in tensors_in(tuple(given)) if tensor.dim()}
    if len(sizes) != 1:
        raise InputError(
            f"The tensors of one invoke must have the same first dimension, the rows of its part of the batch; here they "
            f"have {sorted(sizes) or 'none'}."
        )
    return sizes.pop()


def _join(values: list[Any]) -> Any:
    first = values[0]
    if all(isinstance(value, torch.Tensor) and value.dim() for value in values):
        try:
            return torch.cat(values, 0)
        except RuntimeError as error:
            shapes = ", ".join(str(list(value.shape)) for value in values)
            raise InputError(
                f"The inputs of the invokes, of shapes {shapes}, do not make one batch along dimension 0."
            ) from error
    if any(type(value) is not type(first) for value in values):
        raise InputError("The invokes of one trace must give their inputs in the same form.")
    if isinstance(first, dict) and all(value.keys() == first.keys() for value in values):
        return {key: _join([value[key] for value in values]) for key in first}
    if isinstance(first, (tuple, list)) and all(len(value) == len(first) for value in values):
        return type(first)(_join(list(items)) for items in zip(*values, strict=True))
    if all(value == first for value in values):
        return first
    shown = ", ".join(sorted({_describe(value) for value in values}))
    raise InputError(
        f"The invokes of one trace give different values ({shown}) where one value serves the whole batch: pass it to "
        "trace() instead, or trace the inputs one by one."
    )


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"keys {[*value]}" if isinstance(value, dict) else repr(value)
