"""What a pass cannot see any more: operations whose call had begun before anyone asked, and what was skipped.

The operations of a function are visible from the first call of it that finds its override in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn import Module

from ._visit import INPUT, OperationPlace, Request

if TYPE_CHECKING:
    from ._instrument import Instruments
    from ._pass import Pass


class Sight:
    """Kept by a pass once operations are asked for, or a call is skipped."""

    __slots__ = ("_blind", "_instruments", "_over", "_pass", "_skipped")

    def __init__(self, current: Pass, instruments: Instruments) -> None:
        self._pass = current
        self._instruments = instruments
        self._blind: dict[Any, int] = {}  # owner -> the last step in which calls of it went by unseen, or -1
        self._over: dict[Any, int] = {}  # operation -> the last step in which it is known not to come any more
        self._skipped: dict[Module, set[int]] = {}  # module inside a skipped one -> which of its calls were skipped

    # --- operations ------------------------------------------------------------------------------------------

    def open(self, owner: Any) -> None:
        """A call of `owner` begins whose operations are visible."""
        if owner not in self._blind:
            self._blind[owner] = self._last_step_of(owner, self._pass.counts[owner] - 1)

    def watch(self, operation: OperationPlace) -> None:
        """Get ready to tell that `operation` has passed, or does not come."""
        current, module = self._pass, operation.module
        if not module._modules:
            current.watch(module)
        current.counts.setdefault(operation, 0)
        current.guard(module, operation)
        if module not in current.running:
            self.leave(operation)

    def leave(self, operation: OperationPlace) -> bool:
        """A call of the operation's module is over: whether that was the last one of this step."""
        current, module = self._pass, operation.module
        profile = self._instruments.profile
        if profile is None:
            return False
        calls = current.counts.get(module, 0) - current.calls_before_step(module)
        if calls < max(profile.get(module, 0), 1):
            return False
        self._over[operation] = max(current.step, 0)
        return True

    def is_out_of_sight(self, request: Request) -> bool:
        """Whether the operation came by unseen, if at all, or is known not to come any more."""
        return self.is_late(request) or self._is_over(request)

    def is_late(self, request: Request) -> bool:
        """Whether the operation was asked for when a call of its function had begun without its override."""
        blind = self._blind_until(request.place.owner)
        return blind >= 0 and (request.step is None or request.step <= blind)

    def _is_over(self, request: Request) -> bool:
        step = self._over.get(request.place)
        if step is None:
            return False
        return self._pass.single if request.step is None else request.step <= step

    def never_comes(self, request: Request) -> bool:
        """Whether the operation is not among those that this pass performs."""
        current, place = self._pass, request.place
        if current.counts.get(place) or self.is_late(request):
            return False
        return current.done or self._is_over(request)

    def _blind_until(self, owner: Any) -> int:
        blind = self._blind.get(owner)
        if blind is None:
            here, calls = self._pass.here, self._pass.counts.get(owner, 0)
            if here is not None and here.place is owner and here.kind == INPUT:
                calls -= 1  # the function itself has not been called yet
            blind = self._last_step_of(owner, calls)
        return max(blind, self._blind_until(owner.owner)) if isinstance(owner, OperationPlace) else blind

    def _last_step_of(self, owner: Any, calls: int) -> int:
        if calls <= 0:
            return -1
        step = max(self._pass.step, 0)
        return step if calls > self._pass.calls_before_step(owner) else step - 1

    # --- skipped calls ---------------------------------------------------------------------------------------

    def skip(self, module: Module) -> None:
        """A call of `module` is skipped: count the calls inside it, which do not happen."""
        shared, profile = self._instruments.shared(), self._instruments.profile
        counts = self._pass.counts
        for inner in module.modules():
            if inner is module or inner in shared:
                continue
            calls = 1 if profile is None else profile.get(inner, 0) // max(profile.get(module, 0), 1)
            count = counts.get(inner, 0)
            counts[inner] = count + calls
            self._skipped.setdefault(inner, set()).update(range(count, count + calls))

    def was_skipped(self, request: Request) -> bool:
        """Whether the call that `request` asks about was inside a skipped one."""
        calls = self._skipped.get(request.place)
        if not calls:
            return False
        start = 0 if request.step is None else self._pass.calls_before_step(request.place)
        return start + request.call in calls
