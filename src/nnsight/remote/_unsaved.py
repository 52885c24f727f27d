"""NotSaved: what a name holds that a remote block bound and did not save."""

from __future__ import annotations

from typing import Any

from ..errors import NotSavedError


class NotSaved:
    """Any use of it is an error that says what to write."""

    __slots__ = ("_name", "_place")

    def __init__(self, name: str, place: str) -> None:
        self._name = name
        self._place = place

    def __repr__(self) -> str:
        return f"<{self._name!r} was not saved in the remote block at {self._place}>"

    def _fail(self) -> NotSavedError:
        return NotSavedError(
            f"{self._name!r} was bound in the remote block at {self._place} and not saved, so its value stayed on the "
            f"server. Save it there: {self._name} = ….save(), or nnsight.save(…)."
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        raise self._fail()

    @classmethod
    def __torch_function__(cls, _function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = [*args, *(kwargs or {}).values()]
        flat = [part for value in values for part in (value if isinstance(value, (list, tuple)) else [value])]
        raise next(value for value in flat if isinstance(value, NotSaved))._fail()


def _refuse(self: NotSaved, *_args: Any) -> Any:
    raise self._fail()


_UNARY = "str bool len iter next call int float index complex abs neg pos invert hash format enter exit await"
_BINARY = (
    "getitem setitem contains eq ne lt le gt ge add sub mul matmul truediv floordiv mod pow and or xor lshift rshift"
)
for _name in (*_UNARY.split(), *_BINARY.split(), *(f"r{name}" for name in _BINARY.split()[9:])):
    setattr(NotSaved, f"__{_name}__", _refuse)
