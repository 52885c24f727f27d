"""Session: several traces as one unit."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from .._core import trim
from ..errors import NotTracingError

if TYPE_CHECKING:
    from ..envoy import Tree


class Session:
    """Groups traces that belong together: values of one are ordinary variables in the next.

    Locally each trace runs when its block ends, and an error ends the session there.

    Example:
        >>> import torch
        >>> from nnsight import NNsight
        >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)))
        >>> with model.session() as session:
        ...     with model.trace(torch.ones(1, 3)):
        ...         hidden = model[0].output.save()
        ...     with model.trace(torch.zeros(1, 3)):
        ...         model[0].output = hidden
        ...         output = model.output.save()
        >>> torch.equal(output, model._model(torch.ones(1, 3)))
        True
    """

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._used = False

    def __enter__(self) -> Session:
        if self._used:
            raise NotTracingError("A session can be entered once: call model.session() again.")
        self._used = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            error.__traceback__ = trim(error.__traceback__)
