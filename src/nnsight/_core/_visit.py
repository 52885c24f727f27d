"""Visit: the model standing still at one place, and the value there as edited so far."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from ._scoped import Scoped
    from ._tensors import Snapshot

INPUT = "input"
OUTPUT = "output"


class Place:
    """Somewhere values appear that is not a module: an operation, the result of the run, a step's start.

    A `final` place's value stays readable after the forward; a `read_only` one cannot be changed.
    """

    __slots__ = ("__weakref__", "final", "name", "read_only")

    _forward_hooks = ()
    _modules = (None,)  # nothing to instrument

    def __init__(self, name: str, *, final: bool = False, read_only: bool = False) -> None:
        self.name = name
        self.final = final
        self.read_only = read_only

    def __repr__(self) -> str:
        return self.name


class OperationPlace(Place):
    """An operation inside a forward.

    `owner` is what calls it, the module or an operation of it; `module` the module around both.  One that is `shown` is
    none of the source's: its name is what to call it, and its value follows the batch in the first dimension.
    """

    __slots__ = ("module", "owner", "shown")

    def __init__(self, name: str, owner: Any, module: Any, *, shown: bool = False) -> None:
        super().__init__(name)
        self.owner = owner
        self.module = module
        self.shown = shown


RESULT = Place("tracer.result", final=True)
STEP = Place("the start of a step")


class Request(NamedTuple):
    """What a parked worker waits for.

    `step` None counts the place's visits from the start of the run; else `call` counts within that step.
    """

    place: Any
    kind: str
    path: str
    step: int | None
    call: int


class Visit:
    """One occurrence of a place.

    `index` counts the place's calls in the run, `call` those within `step`.  `inputs` is `(args, kwargs)` at an output,
    `lent` and `given` what blocks were handed, `scoped` what workers with rows of their own see, `skipped` holds at an
    input the value that stands for the call.
    """

    __slots__ = (
        "before",
        "call",
        "given",
        "index",
        "inputs",
        "kind",
        "lent",
        "place",
        "scoped",
        "skipped",
        "step",
        "value",
        "written",
    )

    def __init__(self, place: Any, kind: str, value: Any, index: int, step: int, call: int, inputs: Any = None) -> None:
        self.place = place
        self.kind = kind
        self.value = value
        self.index = index
        self.step = step
        self.call = call
        self.inputs = inputs
        self.lent: tuple[torch.Tensor, int, str] | None = None
        self.given: list[tuple[Any, Snapshot, str]] | None = None
        self.scoped: dict[str, Scoped] | None = None
        self.written = False
        self.before: Any = None
        self.skipped: tuple[Any] | None = None

    def answers(self, request: Request) -> bool:
        """Whether this is what `request` waits for."""
        place, kind, _, step, call = request
        if self.place is not place or self.kind != kind:
            return False
        return self.index == call if step is None else self.step == step and self.call == call

    def is_occurrence(self, request: Request) -> bool:
        """Whether this is the call that `request` asks about, at its input or its output."""
        place, _, _, step, call = request
        if self.place is not place:
            return False
        return self.index == call if step is None else self.step == step and self.call == call
