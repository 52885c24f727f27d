"""How requests reach a server: over the network, or a server in this process."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx

from ..errors import ServerError

_AGAIN = frozenset({429, 502, 503, 504})
_LONGEST_WAIT = 10.0
_ATTEMPTS = 6
_PATIENCE = 1_000_000


class Connection:
    """Requests to one server, with one key; what fails on the way is tried again.

    Args:
        host: The server's address.
        key: The key of the user.
        app: An ASGI application to call in place of the network.
    """

    def __init__(self, host: str, key: str | None, app: Any = None) -> None:
        self._host = host
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False) if app is not None else None
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(60.0, connect=10.0)
        self._client = httpx.AsyncClient(base_url=host, headers=headers, transport=transport, timeout=timeout)

    async def request(self, method: str, path: str, *, patient: bool = False, **options: Any) -> bytes:
        """The body of a successful answer; every request may be repeated without harm.

        A `patient` one goes on asking: the server has been there before, and its caller sets a time.

        Raises:
            ServerError: The server cannot be reached, or refuses.
        """
        problem, attempts = "", _PATIENCE if patient else _ATTEMPTS
        for attempt in range(attempts):
            wait = min(_LONGEST_WAIT, 0.25 * 2 ** min(attempt, 20)) * (0.5 + random.random() / 2)
            try:
                response = await self._client.request(method, path, **options)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if response.is_success:
                    return response.content
                problem = _reason(response)
                if response.status_code not in _AGAIN:
                    raise ServerError(f"The server {self._host} refused: {problem}")
                wait = max(wait, _retry_after(response))
            if attempt + 1 < attempts:
                await asyncio.sleep(wait)
        raise ServerError(f"The server {self._host} could not be reached after {attempts} attempts ({problem}).")

    async def close(self) -> None:
        """Let go of the connections."""
        await self._client.aclose()


def _reason(response: httpx.Response) -> str:
    try:
        body = response.json()
    except ValueError:
        body = None
    reason = body.get("reason") if isinstance(body, dict) else None
    return str(reason) if reason else f"HTTP {response.status_code} {response.reason_phrase}"


def _retry_after(response: httpx.Response) -> float:
    try:
        return min(float(response.headers.get("Retry-After", "0")), _LONGEST_WAIT)
    except ValueError:
        return 0.0
