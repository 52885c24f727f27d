"""Values that a kind and a text say all about."""

from __future__ import annotations

import json
from typing import Any

import torch

from ..errors import ProtocolError
from ._tensors import DTYPES

_CONSTANTS: dict[str, Any] = {
    "Ellipsis": ...,
    "NotImplemented": NotImplemented,
    "torch.strided": torch.strided,
    "torch.contiguous_format": torch.contiguous_format,
    "torch.preserve_format": torch.preserve_format,
    "torch.channels_last": torch.channels_last,
}
_CONSTANT_NAMES = {id(value): name for name, value in _CONSTANTS.items()}
_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu", "meta"})


def write_atom(value: Any) -> tuple[str, str] | None:
    """The kind and text of a value, None where it is no atom."""
    if id(value) in _CONSTANT_NAMES:
        return "constant", _CONSTANT_NAMES[id(value)]
    kind = type(value)
    if kind is int:
        return "int", hex(value)
    if kind is complex:
        return "complex", json.dumps([value.real, value.imag])
    if kind is range:
        return "range", json.dumps([value.start, value.stop, value.step])
    if kind is torch.Size:
        return "size", json.dumps(list(value))
    if kind is torch.dtype:
        return "dtype", str(value).removeprefix("torch.")
    if kind is torch.device:
        return "device", str(value)
    if kind is bytearray:
        return "bytearray", value.hex()
    return None


def read_atom(kind: str, text: str) -> Any:
    """The value that `write_atom` wrote.

    Raises:
        ProtocolError: There is no such kind, or the text is not one of it.
    """
    reader = _READERS.get(kind)
    if reader is None:
        raise ProtocolError(f"{kind!r} is no kind of value")
    try:
        return reader(text)
    except (ValueError, TypeError, KeyError, RuntimeError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"{text[:40]!r} is no {kind}") from error


def _read_device(text: str) -> torch.device:
    if text.partition(":")[0] not in _DEVICES:
        raise ValueError(text)
    return torch.device(text)


def _integers(text: str, count: int | None = None) -> list[int]:
    numbers = json.loads(text)
    if not isinstance(numbers, list) or (count is not None and len(numbers) != count):
        raise ValueError(text)
    if not all(type(number) is int and abs(number) < 2**63 for number in numbers):
        raise ValueError(text)
    return numbers


def _read_complex(text: str) -> complex:
    real, imaginary = json.loads(text)
    if type(real) is not float or type(imaginary) is not float:
        raise ValueError(text)
    return complex(real, imaginary)


_READERS: dict[str, Any] = {
    "constant": _CONSTANTS.__getitem__,
    "int": lambda text: int(text, 16),
    "complex": _read_complex,
    "range": lambda text: range(*_integers(text, 3)),
    "size": lambda text: torch.Size(_integers(text)),
    "dtype": lambda text: DTYPES[text],
    "device": _read_device,
    "bytearray": bytearray.fromhex,
}
