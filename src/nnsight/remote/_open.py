"""From `remote=True` to a tracer: which server, which model there, and what cannot go."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from ..config import CONFIG, full_address, stored_login
from ..errors import RemoteError, TravelError
from ..modeling import Elsewhere, LanguageModel, NNsight
from ._job import Order
from ._tracer import RemoteTracer
from ._transport import Connection

_connections: dict[tuple[str, str | None], Connection] = {}
_embedded: weakref.WeakKeyDictionary[Any, Connection] = weakref.WeakKeyDictionary()

NO_HOST = """\
remote=True needs the address of a server:

    CONFIG.API.HOST = "http://127.0.0.1:8000"      # or NDIF_HOST in the environment

`nnsight login` remembers one; `nnsight serve MODEL` starts one; backend="local-process" needs none."""


def connection() -> Connection:
    """The connection to the server that the settings name."""
    login = stored_login()
    given = CONFIG.API.HOST or login.host
    if not given:
        raise RemoteError(NO_HOST)
    host = full_address(given)
    key = CONFIG.API_KEY or (login.key if host == login.host else None)  # a key is for the server it was made on
    if (host, key) not in _connections:
        _connections[host, key] = Connection(host, key)
    return _connections[host, key]


def open_remote(
    model: NNsight,
    elsewhere: Elsewhere,
    method: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    strict_order: bool,
    *,
    embed: Callable[[NNsight], Any],
) -> RemoteTracer:
    """A tracer for a block that runs elsewhere; `embed` makes a server in this process for a model."""
    if kwargs.pop("trace", True) is False:
        raise RemoteError("trace=False runs the model plainly, which a server does not: save model.output in a block.")
    _refuse_own_parts(model)
    if elsewhere.backend is not None:
        found = _embedded.get(model._tree)
        if found is None:
            found = _embedded[model._tree] = Connection("http://embedded", None, embed(model))
        key, revision = "embedded", None
    else:
        found, (key, revision) = connection(), _key(model)
    order = Order(model, key, revision, method, args, kwargs, strict_order, elsewhere.timeout, elsewhere.solo)
    return RemoteTracer(found, order, blocking=elsewhere.blocking)


def _key(model: NNsight) -> tuple[str, str | None]:
    source = model._source if isinstance(model, LanguageModel) else None
    if source is None:
        raise RemoteError(
            "A server knows models by name, and this one was made from a module of yours: load it by its name, "
            'LanguageModel("openai-community/gpt2"), or use backend="local-process".'
        )
    return source.name, source.revision


def _refuse_own_parts(model: NNsight) -> None:
    if model._tree.classes is not None:
        raise TravelError("envoys= are classes of your own, which a server does not have: use the modules' own names.")
    if isinstance(model, LanguageModel) and model._source is not None and model._has_own_processor:
        raise TravelError("A tokenizer of your own does not travel: give the trace token ids.")
