"""Call: what a run executes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from ._pass import Pass

if TYPE_CHECKING:
    from ._layouts import Probe


class Call:
    """A function and the inputs it gets, to be run in a pass of class `passes`.

    `repeatable` says that calling it again with the same inputs is the same forward.  For a batch, `probe` gives
    forwards on rows of it (see `_layouts`), and `batch_first` names places whose values have the batch in front.
    A `fake` call computes shapes only, and nothing about the model is learnt from it.
    """

    __slots__ = ("args", "batch_first", "fake", "function", "kwargs", "passes", "probe", "repeatable")

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        repeatable: bool,
        probe: Probe | None = None,
        batch_first: Collection[Any] = (),
        fake: bool = False,
        passes: type[Pass] = Pass,
    ) -> None:
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.repeatable = repeatable
        self.probe = probe
        self.batch_first = batch_first
        self.fake = fake
        self.passes = passes

    def __call__(self) -> Any:
        return self.function(*self.args, **self.kwargs)
