"""VLLM, where the documents look for it; it lives in `nnsight.vllm`, above remote execution."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..vllm import VLLM as VLLM

__all__ = ["VLLM"]


def __getattr__(name: str) -> Any:
    if name != "VLLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ..vllm import VLLM

    return VLLM
