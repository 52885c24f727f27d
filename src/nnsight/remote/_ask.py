"""Questions to a server: what it serves, which versions it runs, and who you are."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from ..errors import ServerError
from ..protocol import Person, ServerInfo, versions
from . import _loop
from ._open import connection

T = TypeVar("T")
_LONGEST = 60


def status() -> ServerInfo:
    """What the server offers: `.models` with `.name`, `.running` and `.queued`, and its `.versions`.

    Example:
        >>> import nnsight
        >>> [model.name for model in nnsight.status().models]      # doctest: +SKIP
        ['openai-community/gpt2']
        >>> callable(nnsight.status)
        True

    Raises:
        RemoteError: No server is set, or it cannot be reached.
    """
    return ask("/v1/status", ServerInfo)


def is_model_running(name: str) -> bool:
    """Whether the server has a replica of a model that takes jobs.

    Example:
        >>> import nnsight
        >>> nnsight.is_model_running("openai-community/gpt2")      # doctest: +SKIP
        True
        >>> callable(nnsight.is_model_running)
        True

    Args:
        name: The name that the server was started with.

    Raises:
        RemoteError: No server is set, or it cannot be reached.
    """
    return any(model.name == name and model.running for model in status().models)


def whoami() -> str:
    """The name that your key belongs to on the server.

    Example:
        >>> import nnsight
        >>> nnsight.whoami()      # doctest: +SKIP
        'alice'
        >>> callable(nnsight.whoami)
        True

    Raises:
        RemoteError: No server is set, it cannot be reached, or it does not know the key.
    """
    return ask("/v1/whoami", Person).name


def compare() -> dict[str, tuple[str, str]]:
    """The versions here and on the server, by library: `{"torch": ("2.9.0", "2.8.0")}`.

    Example:
        >>> import nnsight
        >>> here, there = nnsight.compare()["torch"]      # doctest: +SKIP
        >>> callable(nnsight.compare)
        True

    Raises:
        RemoteError: No server is set, or it cannot be reached.
    """
    here, there = msgspec.to_builtins(versions()), msgspec.to_builtins(status().versions)
    return {name: (str(here[name]), str(there[name])) for name in here}


def ask(path: str, kind: type[T]) -> T:
    """The server's answer to a question.

    Raises:
        ServerError: The server refuses, or its answer cannot be read.
    """
    try:
        return msgspec.json.decode(order("GET", path), type=kind)
    except msgspec.MsgspecError as error:
        raise ServerError(f"The server's answer cannot be read: {error}") from error


def order(method: str, path: str, **options: Any) -> bytes:
    """Have the server do something; what it says to that."""
    found: Any = _loop.start(connection().request(method, path, **options)).result(_LONGEST)
    return found
