"""Keys: who may use a server; the file holds their hashes, never the keys themselves."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path

from ..errors import NNsightError

_ANYBODY = "local"


class UnknownKeyError(NNsightError):
    """No key, or one that the server does not know."""


class Keys:
    """The keys in a file, one `hash name` a line; without a file everybody is one user."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._read: tuple[float, dict[str, str]] = (-1.0, {})
        if file is not None and not self._names():
            raise UnknownKeyError(f"{file} holds no keys: `nnsight keys create NAME --file {file}` makes one.")

    def owner(self, authorization: str) -> str:
        """The name that the key of a request belongs to.

        Raises:
            UnknownKeyError: There is none.
        """
        if self._file is None:
            return _ANYBODY
        given = hash_key(authorization.removeprefix("Bearer ").strip())
        for known, name in self._names().items():
            if hmac.compare_digest(known, given):
                return name
        raise UnknownKeyError('The server does not know this key: CONFIG.set_default_api_key("…"), or NDIF_API_KEY.')

    def _names(self) -> dict[str, str]:
        assert self._file is not None
        changed = self._file.stat().st_mtime
        if changed != self._read[0]:
            pairs = (line.split(maxsplit=1) for line in self._file.read_text("utf-8").splitlines() if line.strip())
            self._read = (changed, {key: name.strip() for key, name in pairs})
        return self._read[1]


def hash_key(key: str) -> str:
    """What the file holds in place of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def create_key(file: Path, name: str) -> str:
    """Add a user to a file of keys, and give the key, which is nowhere else."""
    key = secrets.token_urlsafe(32)
    file.touch(mode=0o600)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(f"{hash_key(key)} {name}\n")
    return key
