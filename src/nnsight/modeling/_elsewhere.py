"""`remote=True` and `backend="local-process"`: handing a trace to the part of the package that sends it away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import InputError

_NAMES = ("remote", "backend", "blocking", "timeout", "solo")
BACKENDS = ("local-process",)
DEFAULT_TIMEOUT = 120.0


class Elsewhere(NamedTuple):
    """Where and how a trace is to run away from here."""

    backend: str | None
    blocking: bool
    timeout: float
    solo: bool = False  # in no forward that others share


Open = Callable[[Any, Elsewhere, str, tuple[Any, ...], dict[str, Any], bool], Any]
_openers: list[Open] = []


def set_opener(opener: Open) -> None:
    """Say what opens a remote trace; the layers above do."""
    _openers[:] = [opener]


def open_elsewhere(
    model: Any,
    method: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    strict_order: bool = False,
    stop_after_last: bool = False,
) -> Any:
    """A tracer that sends its block away, None where the options in `kwargs`, which are taken out, do not ask for that."""
    if not any(name in kwargs for name in _NAMES[:2]):
        return None
    options = {name: kwargs.pop(name) for name in _NAMES if name in kwargs}
    backend = options.get("backend")
    if backend not in (None, *BACKENDS):
        raise InputError(f"There is no backend {backend!r}; there is: {', '.join(BACKENDS)}.")
    if not (options.get("remote") or backend) or model._is_served:
        return None
    if stop_after_last:
        kwargs["stop_after_last"] = True
    elsewhere = Elsewhere(backend, options.get("blocking", True), float(options.get("timeout") or DEFAULT_TIMEOUT))
    elsewhere = elsewhere._replace(solo=bool(options.get("solo")))
    return _openers[0](model, elsewhere, method, args, kwargs, strict_order)
