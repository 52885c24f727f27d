"""What a pass cannot see any more: operations whose call had begun before anyone asked, and what was skipped.

The operations of a function are visible from the call of the function that finds its override in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn import Module

from ._visit import INPUT, Place, Request

if TYPE_CHECKING:
    from ._pass import Pass


class Sight:
    """Kept by a pass once operations are asked for, or a call is skipped."""

    __slots__ = ("_blind", "_over", "_pass", "skipped")

    def __init__(self, running: Pass) -> None:
        self._pass = running
        self._blind: dict[Any, int] = {}  # owner -> the last step in which calls of it went by unseen, or -1
        self._over: dict[Place, int] = {}  # operation -> the step in which it does not come by any more
        self.skipped: dict[Module, set[int]] = {}  # module inside a skipped one -> which of its calls went with it

    def open(self, owner: Any) -> None:
        """A call of `owner` begins in which its operations are visible."""
        if owner not in self._blind:
            self._blind[owner] = self._unseen(owner, self._pass.counts[owner] - 1)

    def watch(self, operation: Place) -> None:
        """Get ready to tell that `operation` has passed, or does not come."""
        current, module = self._pass, operation.module
        if not module._modules:
            current.watch(module)
        current.counts.setdefault(operation, 0)
        current.guard(module, operation)
        if module not in current.running:
            self.leave(operation)

    def leave(self, operation: Place) -> bool:
        """A call of the operation's module is over: note where that was the last of this step."""
        current, module = self._pass, operation.module
        profile = current.profile
        if profile is None or current.calls_in_step(module) < max(profile.get(module, 0), 1):
            return False
        self._over[operation] = max(current.step, 0)
        return True

    def is_late(self, request: Request) -> bool:
        """Whether the operation could not be seen when it came by, if it did."""
        owner, step = request.place.owner, request.step
        blind = self._blind.get(owner)
        if blind is None:
            current, here = self._pass, self._pass.here
            calls = current.counts.get(owner, 0)
            if here is not None and here.place is owner and here.kind == INPUT and not here.skipped:
                calls -= 1  # it stands before the function, which will run with the override
            blind = self._unseen(owner, calls)
        return blind >= 0 and (step is None or step <= blind)

    def is_over(self, request: Request) -> bool:
        """Whether it is known that the operation does not come by any more in the step asked for."""
        step = self._over.get(request.place)
        if step is None:
            return False
        return self._pass.single if request.step is None else request.step <= step

    def skip(self, module: Module) -> None:
        """A call of `module` is skipped: count the calls inside, which do not happen."""
        current = self._pass
        shared, profile = current.shared, current.profile
        for inner in module.modules():
            if inner is module or inner in shared:
                continue
            calls = 1 if profile is None else profile.get(inner, 0) // max(profile.get(module, 0), 1)
            count = current.counts.get(inner, 0)
            current.counts[inner] = count + calls
            self.skipped.setdefault(inner, set()).update(range(count, count + calls))

    def was_skipped(self, request: Request) -> bool:
        """Whether the call that `request` asks about was inside a skipped one."""
        calls = self.skipped.get(request.place)
        if calls is None:
            return False
        start = 0 if request.step is None else self._pass.calls_before_step(request.place)
        return start + request.call in calls

    def _unseen(self, owner: Any, calls: int) -> int:
        """The last step in which one of the first `calls` calls of `owner` was."""
        if calls <= 0:
            return -1
        step = max(self._pass.step, 0)
        return step if calls > self._pass.calls_before_step(owner) else step - 1
