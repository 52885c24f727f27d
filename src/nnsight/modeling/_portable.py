"""Objects of PyTorch, transformers and traces in plain parts, to be sent to a process with the same libraries."""

from __future__ import annotations

import importlib
import re
from typing import Any, NamedTuple

import torch

from .._core import AssignableTuple, as_native
from ..errors import EditError, RowsError
from ..trace import Cache, cache_of, cache_parts
from ._hidden import BlockOutput, show_block_output
from ._outputs import _AnswersAsLogits, show_causal_output

_TUPLE = "tuple"
_BLOCK = "block output"
_CACHE = "key-value cache"
_RECORD = "nnsight:cache"
_REFUSED = "no part"
_ENCODING = "encoding"
_RETURNED = "torch.return_types."
_LIBRARY = re.compile(r"transformers(\.\w+)*")


class Apart(NamedTuple):
    """The kind of an object and its parts: tensors, numbers, texts, and containers of them."""

    kind: str
    parts: Any


def take_apart(value: Any) -> Apart | None:
    """An object of a library in parts, None where it is nothing known here."""
    cls = type(value)
    if isinstance(value, BlockOutput):
        return Apart(_BLOCK, [value._held, *(value._rest or ())] if value._rest is not None else [value._held, None])
    if isinstance(value, AssignableTuple):
        return Apart(_TUPLE, list(value)) if value.native is tuple else take_apart(as_native(value))
    if isinstance(value, tuple) and cls.__module__ == "torch.return_types":
        return Apart(_RETURNED + cls.__name__, list(value))
    if isinstance(value, Cache):
        return Apart(_RECORD, cache_parts(value))
    if isinstance(value, RowsError):  # what a cache has where an invoke has no part of a value
        return Apart(_REFUSED, [str(value)])
    if cls.__module__.startswith("transformers."):
        return _take_library_apart(value)
    return None


def _take_library_apart(value: Any) -> Apart | None:
    from transformers import BatchEncoding, DynamicCache
    from transformers.cache_utils import DynamicLayer
    from transformers.utils.generic import ModelOutput

    cls = type(value)
    if isinstance(value, ModelOutput):
        shown = isinstance(value, _AnswersAsLogits)
        plain = next(base for base in cls.__mro__ if base is not cls and base is not _AnswersAsLogits) if shown else cls
        return Apart(f"{plain.__module__}:{plain.__qualname__}{'+' if shown else ''}", dict(value))
    if cls is DynamicCache and all(type(layer) is DynamicLayer and layer.is_initialized for layer in value.layers):
        return Apart(_CACHE, [[layer.keys, layer.values] for layer in value.layers])
    if isinstance(value, BatchEncoding):
        return Apart(_ENCODING, dict(value))
    return None


def put_together(kind: str, parts: Any) -> Any:
    """The object that `take_apart` took apart.

    Raises:
        ValueError: There is no such kind, or the parts do not fit.
    """
    if kind == _TUPLE and isinstance(parts, list):
        return tuple(parts)
    if kind == _BLOCK:
        return _block_output(parts)
    if kind.startswith(_RETURNED) and isinstance(parts, list):
        return getattr(torch.return_types, kind.removeprefix(_RETURNED))(parts)
    if kind == _CACHE:
        return _cache(parts)
    if kind == _RECORD and isinstance(parts, dict):
        return cache_of(parts)
    if kind == _REFUSED:
        return RowsError(str(parts[0]))
    if kind == _ENCODING and isinstance(parts, dict):
        from transformers import BatchEncoding

        return BatchEncoding(parts)
    return _model_output(kind, parts)


def _block_output(parts: Any) -> Any:
    if not (isinstance(parts, list) and len(parts) > 0 and isinstance(parts[0], torch.Tensor)):
        raise ValueError("a block output without hidden states")
    return show_block_output(parts[0] if parts[1:] == [None] else tuple(parts), _refuse)


def _refuse(_changed: Any) -> None:
    raise EditError("The trace is over: assigning this output would reach no model.")


def _cache(parts: Any) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(parts):
        if not (isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor)):
            raise ValueError("a key-value cache of something else than tensors")
        cache.update(keys, values, layer)
    return cache


def _model_output(kind: str, parts: Any) -> Any:
    from transformers.utils.generic import ModelOutput

    module, _, name = kind.removesuffix("+").partition(":")
    if not _LIBRARY.fullmatch(module) or not name.isidentifier() or not isinstance(parts, dict):
        raise ValueError(f"{kind!r} is no kind of object")
    cls = getattr(importlib.import_module(module), name, None)
    if not (isinstance(cls, type) and issubclass(cls, ModelOutput)):
        raise ValueError(f"{kind!r} is no output of a model")
    value = cls(**parts)
    return show_causal_output(value) if kind.endswith("+") else value


def is_model_output(kind: str) -> bool:
    """Whether the parts are fields, of which one may be missing."""
    return ":" in kind
