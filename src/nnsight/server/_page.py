"""The status page: what a server serves, for a person with a browser."""

from __future__ import annotations

import time
from functools import cache
from importlib import resources

from jinja2 import Environment, Template

from ..protocol import ServerInfo

# The page runs no script and asks for nothing but itself.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_UNITS = ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


def page(info: ServerInfo, *, draining: bool = False) -> str:
    """The page as HTML."""
    return _template().render(
        info=info,
        draining=draining,
        waiting=sum(model.queued for model in info.models),
        active=sum(model.active for model in info.models),
        now=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        age=since(time.time() - info.started),
        mebibytes=lambda size: f"{size / 2**20:,.0f} MiB" if size < 2**30 else f"{size / 2**30:,.3g} GiB",
        since=since,
    )


def since(seconds: float) -> str:
    """`3 hours`, in the largest unit that fits."""
    size, name = next(((size, name) for size, name in _UNITS if seconds >= size), (1, "second"))
    count = int(seconds // size)
    return f"{count} {name}{'' if count == 1 else 's'}"


@cache
def _template() -> Template:
    text = resources.files(__name__.rpartition(".")[0]).joinpath("status.html").read_text("utf-8")
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
