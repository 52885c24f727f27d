"""Applied: an intervention as data, in force inside a `with` statement."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Protocol

from ..errors import InputError
from ..trace import Begin, Edit, InterventionEdit


class Intervention(Protocol):
    """What a model can apply."""

    def prepare(self, model: Any) -> Iterable[tuple[str, Begin]]:
        """What to do in each run: a name for messages, and a function that begins a run.

        It returns what to do at each step, given its number.  A function with an attribute `change` says with it what it
        does as data: its `key`, `target`, `kind`, `operation`, `value` and `factor`, and `positions`, `rows`, `heads` and
        `steps` where it has them.  An engine may do that in its own way, without the function.
        """
        ...


def edit_of(model: Any, intervention: Intervention) -> InterventionEdit:
    """The edit that an intervention is for `model`, with the edits that the model has now.

    It is prepared at once where the weights are there, so that what does not fit is refused here.

    Raises:
        InputError: A trace of the model is open.
    """
    if model._tree.find_worker() is not None:  # preparing may run the model
        raise InputError(_INSIDE)
    twin = model._copy()
    edit = InterventionEdit(intervention, lambda: intervention.prepare(twin))
    if model.dispatched:
        edit.prepare()
    return edit


class Applied:
    """The context that `model.apply(intervention)` gives; it can be entered again."""

    def __init__(
        self, model: Any, edits: Sequence[Edit | InterventionEdit], stored: list[Edit | InterventionEdit]
    ) -> None:
        self._model = model
        self._edits = edits
        self._stored = stored

    def __enter__(self) -> Any:
        if self._model._tree.find_worker() is not None:
            raise InputError(_INSIDE)
        self._stored += self._edits
        return self._model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for edit in self._edits:
            index = max((i for i, stored in enumerate(self._stored) if stored is edit), default=None)
            if index is not None:
                del self._stored[index]


_INSIDE = """\
model.apply(...) and model.steer(...) are for the traces inside them, and here a trace is open already. Put them outside:

    with model.apply(spec):
        with model.trace(prompt):
            ...
"""
