"""A callable's operations, and a copy of it that routes each of them through a dispatch."""

from __future__ import annotations

from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any, cast

from ._function import FunctionSource, instrumented_code, source_of
from ._layers import Function, copy_function, layers, same, with_inner
from ._rewrite import DISPATCH

Dispatch = Callable[[str, Function, tuple[Any, ...], dict[str, Any]], Any]


def analyse(function: Any, *, unwrap: bool = True) -> FunctionSource:
    """The source of a function and the operations in it.

    ```python
    source = analyse(model.transformer.h[0].attn)
    list(source.operations)  # ["self_c_attn_0", ..., "attention_interface_0", ..., "self_c_proj_0", ...]
    print(source)
    ```

    Args:
        function: A function, bound method, partial, object with ``__call__``, or module (its ``forward``).
        unwrap: Whether to look through decorators (``__wrapped__``) at the function inside them.

    Returns:
        The same object each time for the same code.

    Raises:
        SourceError: There is no Python source, or it is not what the function runs.
    """
    return source_of(cast("FunctionType", layers(function, unwrap)[-1]))


def instrument(
    function: Any, dispatch: Dispatch, *, unwrap: bool = True, only: frozenset[str] | None = None
) -> Function:
    """A copy of a callable in which ``f(a, k=b)`` is ``dispatch(name, f, (a,), {"k": b})``.

    ```python
    def dispatch(name, f, args, kwargs):
        return f(*args, **kwargs)

    forward = instrument(model.lm_head, dispatch)
    ```

    Decorators around the function are copied, not run again; the function is not changed, and the copy shares
    its globals and closure cells.

    Args:
        function: As for `analyse`; for a module the result is a bound ``forward``.
        dispatch: Called with the operation's name, the callee, its positional and its keyword arguments;
            what it returns is the operation's result.
        unwrap: As for `analyse`.
        only: The names of the operations to route; by default all.

    Returns:
        The copy.

    Raises:
        SourceError: As for `analyse`, or a decorator holds the function where it cannot be replaced.
    """
    found = layers(function, unwrap)
    inner = found.pop()
    new: Function = _bind(cast("FunctionType", inner), dispatch, only)
    while found:
        layer = found.pop()
        new = with_inner(layer, inner, new, _reroute)
        inner = layer
    return new


def _bind(function: FunctionType, dispatch: Dispatch, only: frozenset[str] | None) -> FunctionType:
    code = instrumented_code(function, only)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells[DISPATCH] = CellType(dispatch)
    return copy_function(function, code, tuple([cells[name] for name in code.co_freevars]))


def _reroute(wrapper: Function, inner: Function, new: Function) -> Function:
    """The wrapper, calling ``new`` wherever it calls ``inner``."""

    def dispatch(name: str, f: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (new if same(f, inner) else f)(*args, **kwargs)

    return instrument(wrapper, dispatch, unwrap=False)
