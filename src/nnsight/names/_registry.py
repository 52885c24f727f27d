"""Registry: the rows of all families, by the model type of a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError, NamesError
from ._families import TABLE, Rows
from ._family import Family

_own: dict[str, Rows] = {}


def register(model_type: str, rows: Rows) -> None:
    """Make the vocabulary known for a family of models, or another row of it known for one.

    The row is checked on each model when it is first used, as every row is.

    Example:
        >>> from dataclasses import replace
        >>> from nnsight.names import family, register
        >>> register("my_llama", replace(family("llama"), mlp="feed_forward", mlp_out="feed_forward.output"))
        >>> family("my_llama").mlp
        'feed_forward'

    Args:
        model_type: As in the model's config.
        rows: A `Family`; for a model of several stacks (encoder and decoder) a mapping from their names; or a function
            that makes either from the config.
    """
    if not isinstance(rows, (Family, Mapping)) and not callable(rows):
        raise InputError(f"register: {rows!r} is no Family, no mapping of them, and no function that makes one.")
    _own[model_type] = rows


def family(model_type: str) -> Family:
    """The row of a family that is the same for all its configs.

    Raises:
        NamesError: There is none, or several.
    """
    found = _own.get(model_type, TABLE.get(model_type))
    if not isinstance(found, Family):
        raise NamesError(f"{model_type!r} has no single row. Those that have: {', '.join(_simple())}.")
    return found


def find_rows(config: Any, kind: str) -> Mapping[str, Family]:
    """The rows for a model with this config, by the name of the stack; the only one's is empty.

    Raises:
        NamesError: The family is unknown.
    """
    model_type = getattr(config, "model_type", None)
    found = _own.get(model_type, TABLE.get(model_type)) if isinstance(model_type, str) else None
    if found is None:
        raise NamesError(_UNKNOWN.format(kind=kind, known=", ".join(sorted({*TABLE, *_own}))))
    if not isinstance(found, (Family, Mapping)):
        found = found(config)
    return {"": found} if isinstance(found, Family) else found


def _simple() -> list[str]:
    return sorted(name for name, rows in {**TABLE, **_own}.items() if isinstance(rows, Family))


_UNKNOWN = """\
The vocabulary does not know {kind}. It knows the model types {known}. Use the modules by their own names, or register \
a row, which says where its values are: nnsight.names.register(model_type, nnsight.names.Family(...))."""
