"""View: a value of a custom envoy, shown in a form of its own and written back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from nnsight._core import active
from nnsight.errors import EditError

from ._values import Values

Source = Literal["output", "input"] | Callable[[Any], tuple[Any, str]]


class View:
    """An attribute of a custom envoy that shows a value in another form, for reading and writing.

    Reading gives `get(value, envoy)`.  Where that shares memory with the value, as reshaped and sliced tensors
    do, in-place edits of it reach the model; where it is a copy, they would be lost and are an error.  Assigning
    writes `set(value, new, envoy)`.

    Example:
        >>> import torch
        >>> from nnsight import Envoy, NNsight, View
        >>> def split(value, envoy):
        ...     return value.unflatten(-1, (2, -1))      # [batch, 6] -> [batch, head, 3]
        >>> def merge(value, heads, envoy):
        ...     return heads.flatten(-2)
        >>> class Heads(Envoy):
        ...     heads = View("output", get=split, set=merge)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 1))
        >>> model = NNsight(net, envoys={"0": Heads})
        >>> with model.trace(torch.ones(1, 4)):
        ...     model[0].heads[:, 1] = 0                 # in place
        ...     model[0].heads = model[0].heads * 2      # a new value
        ...     hidden = model[1].input.save()
        >>> hidden[0, 3:].tolist()
        [0.0, 0.0, 0.0]

    Args:
        source: `"output"` or `"input"` of the envoy, or a function from the envoy to a pair of an envoy or
            operation and one of these names: `lambda attn: (attn.source.attention_interface_0, "output")`.
        get: Makes what is shown, from the value and the envoy.
        set: Makes the value to put back, from the value as it is, what was assigned, and the envoy. Without it
            the attribute cannot be assigned.
    """

    def __init__(
        self,
        source: Source = "output",
        *,
        get: Callable[[Any, Any], Any],
        set: Callable[[Any, Any, Any], Any] | None = None,
    ) -> None:
        if not (callable(source) or source in ("output", "input")):
            raise EditError(f'View: the source {source!r} is neither "output" nor "input" nor a function.')
        self._source: Source = source
        self._get = get
        self._set = set
        self._name = "the view"
        self.__doc__ = get.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, envoy: Any, owner: type | None = None) -> Any:
        if envoy is None:
            return self
        target, kind = self._target(envoy)
        value = getattr(target, kind)
        shown = self._get(value, envoy)
        worker = active.get()
        if worker is not None:
            worker.run.edits.note_copy(f"{envoy._path}.{self._name}", shown, value)
        return shown

    def __set__(self, envoy: Any, new: Any) -> None:
        if self._set is None:
            raise EditError(_READ_ONLY.format(path=f"{envoy._path}.{self._name}", name=self._name))
        target, kind = self._target(envoy)
        setattr(target, kind, self._set(getattr(target, kind), new, envoy))

    def _target(self, envoy: Any) -> tuple[Values, str]:
        return self._source(envoy) if callable(self._source) else (envoy, self._source)


_READ_ONLY = """\
{path} cannot be assigned: give its View a function that puts a changed value back: \
{name} = View(..., get=..., set=lambda value, new, envoy: ...)."""
