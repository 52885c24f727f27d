"""A causal model's output that also answers as the logits it carries: `output[0, -1]`, `output.shape`."""

from __future__ import annotations

from typing import Any

import torch

from ..trace import save

_classes: dict[type, type] = {}


class _AnswersAsLogits:
    """Mixed into a `ModelOutput` class; adds only what would otherwise be an error."""

    logits: torch.Tensor

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (int, str)) or (isinstance(key, slice) and _is_plain(key)):
            return super().__getitem__(key)  # type: ignore[misc]
        return self.logits[key]

    def save(self) -> Any:
        return save(self)

    @property
    def value(self) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.logits, name)


def _is_plain(key: slice) -> bool:
    return not (key.start is None and key.stop is None and key.step is None)


def show_causal_output(value: Any) -> Any:
    """Let `value`, a `ModelOutput` with logits, answer as its logits too; anything else is left alone."""
    kind = type(value)
    if isinstance(value, _AnswersAsLogits) or getattr(value, "logits", None) is None or not isinstance(value, dict):
        return value
    cls = _classes.get(kind)
    if cls is None:
        cls = _classes[kind] = type(kind.__name__, (_AnswersAsLogits, kind), {"__module__": kind.__module__})
    value.__class__ = cls  # pyright: ignore[reportAttributeAccessIssue]
    return value
