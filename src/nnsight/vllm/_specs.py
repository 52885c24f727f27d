"""Specs: the interventions of all requests in a worker, at each place as few operations on the rows of the whole batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import Module

from .._core import INPUT
from ..errors import InputError
from ._bridge import Inputs, Output, bridge_of
from ._messages import SPEC

if TYPE_CHECKING:
    from ._compiled import Act
    from ._lane import Lane

Key = tuple[int, str, bytes]  # the rank of a change, what it does, and what of its content all of its rows share


class _Entry:
    """A request with its changes."""

    def __init__(self, lane: Lane, acts: tuple[Act, ...]) -> None:
        self.lane = lane
        self.acts = acts
        self.name = ""  # the engine's
        self.length = 0  # of its prompt
        self.modules = {act.place[0] for act in acts}


class Group(NamedTuple):
    """One operation on rows of the batch, None for all: `value` is `[d]`, or a row for each."""

    operation: str
    rows: torch.Tensor | None
    value: torch.Tensor | None
    factor: float


class Specs:
    """The requests with a spec, and at each step what is done where.

    The table of rows is made anew where other requests, or other tokens of their prompts, are in the batch; while the same
    requests generate, it stays.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._living: dict[Lane, _Entry] = {}
        self._modules: Counter[Module] = Counter()
        self._waiting: dict[str, _Entry] = {}  # by key, until their request comes
        self._known: dict[str, _Entry] = {}  # by the engine's name of the request
        self._names: list[str] = []  # of the requests of the last step
        self._entries: list[_Entry | None] = []
        self._bounds: list[int] = []
        self._lengths: torch.Tensor = torch.zeros(0)
        self._uniform = self._settled = False
        self.plans: dict[Module, dict[str, list[Group]]] = {}  # of the current step

    # --- requests ------------------------------------------------------------------------------------------------

    def add(self, lane: Lane, acts: tuple[Act, ...]) -> None:
        """Expect a request."""
        entry = self._living[lane] = self._waiting[lane.ask.key] = _Entry(lane, acts)
        self._modules.update(entry.modules)

    def forget(self, lane: Lane) -> None:
        """Let go of a request, which the engine does not compute any more."""
        entry = self._living.pop(lane, None)
        if entry is None:
            return
        self._waiting.pop(lane.ask.key, None)
        self._known.pop(entry.name, None)
        self._modules -= Counter(entry.modules)
        self._names, self.plans = [], {}

    def __bool__(self) -> bool:
        return bool(self._living)

    def modules(self) -> set[Module]:
        """Those whose values are changed."""
        return set(self._modules)

    # --- the table -----------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Find out which rows of the batch are to be changed."""
        batch = self._runner.input_batch
        count = len(batch.req_ids)
        bounds = self._runner.query_start_loc.np[: count + 1].tolist()
        if batch.req_ids != self._names:
            self._names = list(batch.req_ids)
            self._entries = [self._known.get(name) or self._arrived(name) for name in self._names]
            self._lengths = torch.tensor([0 if entry is None else entry.length for entry in self._entries])
            self._uniform = all(act.is_uniform for entry in self._entries if entry is not None for act in entry.acts)
            self._settled = False
        computed = batch.num_computed_tokens_cpu_tensor[:count]
        generating = self._uniform and bool((computed >= self._lengths).all())
        if not (generating and self._settled and bounds == self._bounds):
            self.plans = self._plan(bounds, computed.tolist())
        self._settled, self._bounds = generating, bounds

    def _arrived(self, name: str) -> _Entry | None:
        state = self._runner.requests[name]
        extra = getattr(state.sampling_params, "extra_args", None) or {}
        entry = self._waiting.pop(extra.get(SPEC, ""), None)
        if entry is not None:
            self._known[name], entry.name = entry, name
            entry.length = len(state.prompt_token_ids)
            try:
                for act in entry.acts:
                    act.check(entry.length)
            except InputError as error:
                entry.acts = ()
                entry.lane.fail(error)
        return entry

    def _plan(self, bounds: list[int], computed: list[int]) -> dict[Module, dict[str, list[Group]]]:
        wanted: dict[tuple[Module, str], dict[Key, list[tuple[Act, list[int], Any]]]] = {}
        for row, entry in enumerate(self._entries):
            if entry is None:
                continue
            begin, start = computed[row], bounds[row]
            end = begin + bounds[row + 1] - start
            for act in entry.acts:
                positions, numbers = act.chosen(begin, end, entry.length)
                if positions:
                    rows = [start + position - begin for position in positions]
                    shared = act.content if act.operation in ("scale", "project_out") else b""
                    groups = wanted.setdefault(act.place, {})
                    groups.setdefault((act.rank, act.operation, shared), []).append((act, rows, numbers))
        plans: dict[Module, dict[str, list[Group]]] = {}
        for (module, kind), groups in wanted.items():
            ordered = [_group(groups[key], bounds[-1], self._runner.device) for key in sorted(groups)]
            plans.setdefault(module, {})[kind] = ordered
        return plans

    # --- acting --------------------------------------------------------------------------------------------------

    def call(self, plain: Callable[..., Any], module: Module, /, *args: Any, **kwargs: Any) -> Any:
        """Call a module with the rows of what it is given, and of what it returns, changed."""
        plans = self.plans[module]
        bridge = bridge_of(type(module))
        for kind, groups in plans.items():
            if kind == INPUT:
                inputs = bridge.inputs(args, kwargs)
                _apply(inputs, groups)
                args, kwargs = inputs.arguments()
        result = plain(module, *args, **kwargs)
        for kind, groups in plans.items():
            if kind != INPUT:
                output = bridge.output(result)
                _apply(output, groups)
                result = output.result
        return result


def _group(parts: list[tuple[Act, list[int], Any]], total: int, device: Any) -> Group:
    """The same operation of several requests as one."""
    first = parts[0][0]
    rows = [row for _, of_one, _ in parts for row in of_one]
    value = first.value
    if value is not None and first.operation != "project_out":
        if value.dim() > 1 or any(act.content != first.content for act, _, _ in parts):
            value = torch.cat([_value_of_each(*part) for part in parts])
    chosen = None if len(rows) == total and _is_one(first, value) else torch.tensor(rows, device=device)
    return Group(first.operation, chosen, value, first.factor)


def _is_one(act: Act, value: torch.Tensor | None) -> bool:
    return value is act.value and (value is None or value.dim() == 1 or act.operation == "project_out")


def _value_of_each(act: Act, rows: list[int], numbers: Any) -> torch.Tensor:
    assert act.value is not None
    if act.value.dim() > 1:
        return act.value[numbers]
    return act.value.expand(len(rows), -1)


def _apply(value: Inputs | Output, groups: Iterable[Group]) -> None:
    """Change a value, whose residual stream may be in two parts; the tensors that the engine has are left as they are."""
    main, stream = value.parts()
    for group in groups:
        main, stream = _OPERATIONS[group.operation](main, stream, group)
    value.exchange(main, stream)


Parts = tuple[torch.Tensor, "torch.Tensor | None"]


def _add(main: torch.Tensor, stream: torch.Tensor | None, group: Group) -> Parts:
    assert group.value is not None
    if group.rows is None:
        return main + group.value, stream
    return main.index_add(0, group.rows, group.value.expand(len(group.rows), -1)), stream


def _set(main: torch.Tensor, stream: torch.Tensor | None, group: Group) -> Parts:
    assert group.value is not None
    if group.rows is None:
        return group.value.expand_as(main).clone(), None if stream is None else torch.zeros_like(stream)
    main = main.index_copy(0, group.rows, group.value.expand(len(group.rows), -1))
    return main, None if stream is None else stream.index_fill(0, group.rows, 0)


def _scale(main: torch.Tensor, stream: torch.Tensor | None, group: Group) -> Parts:
    rows, factor = group.rows, group.factor

    def scaled(part: torch.Tensor) -> torch.Tensor:
        return part * factor if rows is None else part.index_copy(0, rows, part[rows] * factor)

    return scaled(main), None if stream is None else scaled(stream)


def _project_out(main: torch.Tensor, stream: torch.Tensor | None, group: Group) -> Parts:
    rows, basis = group.rows, group.value
    assert basis is not None
    whole = main if rows is None else main[rows]
    if stream is not None:
        whole = whole + (stream if rows is None else stream[rows])
    part = group.factor * (whole @ basis @ basis.T)
    return main - part if rows is None else main.index_add(0, rows, part, alpha=-1), stream


_OPERATIONS = {"add": _add, "set": _set, "scale": _scale, "project_out": _project_out}
