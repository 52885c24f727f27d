"""How much memory a model's weights take, known before they are loaded."""

from __future__ import annotations

from itertools import chain
from typing import Any

from ..modeling import LanguageModel


def weight_bytes(name: str, options: dict[str, Any]) -> int:
    """Bytes of the parameters and buffers of a model, from its configuration alone.

    Raises:
        LoadError: There is no such model.
    """
    model = LanguageModel(name, **options)
    module: Any = model._model
    tensors = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
