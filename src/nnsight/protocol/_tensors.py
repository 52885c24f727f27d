"""Tensors as raw bytes behind a message, described by a table that is checked before anything is made."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import msgspec
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ..errors import ProtocolError, TravelError

ALIGNMENT = 64
_MOST_DIMENSIONS = 64
_PIECE = 2**18  # bytes that are compared at a time
_NAMES = (
    *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
)
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMES if hasattr(torch, name)}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorInfo(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One row of the table: the numbers are in row-major order at `start` of the payload.

    `kind` is `tensor`, `parameter`, or `fake` (a shape without numbers); `grad` is the tensor that is its `.grad`.
    """

    dtype: str
    shape: list[int]
    start: int
    kind: str = "tensor"
    requires_grad: bool = False
    grad: int | None = None


class TensorWriter:
    """Collects the tensors of a message; the same tensor is sent once."""

    def __init__(self) -> None:
        self.infos: list[TensorInfo] = []
        self.sources: list[torch.Tensor] = []
        self._indices: dict[int, int] = {}
        self._flat: list[torch.Tensor] = []
        self.size = 0

    def add(self, tensor: torch.Tensor, *, data_only: bool = False) -> int:
        """The number that `tensor` has in the message; `data_only` leaves out that it requires gradients."""
        known = self._indices.get(id(tensor))
        if known is not None:
            return known
        grad = tensor.grad if tensor.is_leaf or tensor.retains_grad else None
        number = None if grad is None else self.add(grad, data_only=True)
        info, flat = self._describe(tensor, data_only, number)
        self._indices[id(tensor)] = len(self.infos)
        self.infos.append(info)
        self.sources.append(tensor)  # keeps it alive, so that its id is not given out again
        self._flat.append(flat)
        self.size = aligned(self.size + flat.nbytes)
        return len(self.infos) - 1

    def _describe(self, tensor: torch.Tensor, data_only: bool, grad: int | None) -> tuple[TensorInfo, torch.Tensor]:
        name = _DTYPE_NAMES.get(tensor.dtype)
        if name is None or tensor.layout is not torch.strided or tensor.is_quantized:
            raise TravelError(f"a tensor of dtype {tensor.dtype} and layout {tensor.layout}")
        requires_grad = tensor.requires_grad and not data_only
        if isinstance(tensor, FakeTensor):
            return TensorInfo(name, list(tensor.shape), self.size, "fake"), torch.empty(0, dtype=torch.uint8)
        if tensor.device.type == "meta":
            raise TravelError("a tensor on the meta device, which has no numbers")
        kind = "parameter" if isinstance(tensor, torch.nn.Parameter) and not data_only else "tensor"
        flat = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous().reshape(-1)
        return TensorInfo(name, list(tensor.shape), self.size, kind, requires_grad, grad), flat

    def payload(self) -> bytes:
        """The numbers of all tensors."""
        return b"".join(self.parts())

    def parts(self) -> Iterator[bytes | memoryview]:
        """The numbers of all tensors, piece by piece and where they are, so that they are copied once."""
        for flat in self._flat:
            yield _memory(flat)
            yield bytes(aligned(flat.nbytes) - flat.nbytes)


def _memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, for as long as it is there."""
    if not tensor.nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def aligned(size: int) -> int:
    """`size`, or the next number that a tensor may start at."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def read_tensors(infos: Sequence[TensorInfo], payload: bytes | bytearray | memoryview) -> list[torch.Tensor]:
    """The tensors of a message.

    Raises:
        ProtocolError: The table does not describe exactly this payload.
    """
    sizes, at = [], 0
    for number, info in enumerate(infos):
        size = _checked_size(number, info)
        if info.start != at:
            raise ProtocolError(f"tensor {number} starts at {info.start} of the payload, not at {at}")
        sizes.append(size)
        at = aligned(at + size)
    if at != len(payload):
        raise ProtocolError(f"the payload has {len(payload)} bytes; its tensors need {at}")
    view, tensors = memoryview(payload), list[torch.Tensor]()
    for info, size in zip(infos, sizes, strict=True):
        tensors.append(_read(info, view[info.start : info.start + size], tensors))
    return tensors


def is_as_sent(tensor: torch.Tensor, info: TensorInfo, payload: bytes | bytearray | memoryview) -> bool:
    """Whether a tensor that was read still has its numbers: not every change in place counts as one for PyTorch."""
    if info.kind == "fake":
        return True
    flat = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    if list(flat.shape) != info.shape or flat.dtype is not DTYPES[info.dtype]:
        return False
    data, own = memoryview(payload)[info.start : info.start + flat.nbytes], _memory(flat)
    pieces = (slice(at, at + _PIECE) for at in range(0, flat.nbytes, _PIECE))
    return all(bytes(data[piece]) == bytes(own[piece]) for piece in pieces)


def _checked_size(number: int, info: TensorInfo) -> int:
    if info.dtype not in DTYPES:
        raise ProtocolError(f"tensor {number} has the unknown dtype {info.dtype!r}")
    if info.kind not in ("tensor", "parameter", "fake"):
        raise ProtocolError(f"tensor {number} is of the unknown kind {info.kind!r}")
    if len(info.shape) > _MOST_DIMENSIONS or any(not 0 <= length < 2**40 for length in info.shape):
        raise ProtocolError(f"tensor {number} has an impossible shape")
    if info.grad is not None and not 0 <= info.grad < number:
        raise ProtocolError(f"tensor {number} has a gradient that comes after it")
    dtype, size = DTYPES[info.dtype], DTYPES[info.dtype].itemsize
    if info.requires_grad and not (dtype.is_floating_point or dtype.is_complex):
        raise ProtocolError(f"tensor {number} cannot require gradients")
    for length in sorted(info.shape):  # Python's numbers do not overflow; a zero comes first
        size *= length
        if size > 2**62:
            raise ProtocolError(f"tensor {number} has an impossible shape")
    return 0 if info.kind == "fake" else size


def _read(info: TensorInfo, data: memoryview, before: list[torch.Tensor]) -> torch.Tensor:
    dtype = DTYPES[info.dtype]
    try:
        if info.kind == "fake":
            with FakeTensorMode(allow_non_fake_inputs=True):
                return torch.empty(info.shape, dtype=dtype)
        tensor = torch.empty(info.shape, dtype=dtype)
        if len(data):
            _memory(tensor)[:] = data
            if dtype is torch.bool:  # a byte that is neither 0 nor 1 is no bool to the compiler
                tensor = tensor.view(torch.uint8) != 0
        if info.kind == "parameter":
            tensor = torch.nn.Parameter(tensor, requires_grad=info.requires_grad)
        elif info.requires_grad:
            tensor.requires_grad_()
        if info.grad is not None:
            tensor.grad = before[info.grad]
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"a tensor cannot be made: {error}") from error
    return tensor
