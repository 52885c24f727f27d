"""Keys: who may use a server; the file holds their hashes, never the keys themselves.

A line is `hash name`, then `admin` and `priority=N` where they are meant.  Only this file says who somebody is: nothing
that a request claims changes it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..errors import NNsightError

_NAME = re.compile(r"[\w.@+-]{1,100}")


class UnknownKeyError(NNsightError):
    """No key, or one that the server does not know."""


class NotAdminError(NNsightError):
    """What only administrators may do."""


class KeyFileError(NNsightError):
    """A file of keys that cannot be used, or a name that cannot be in it."""


class User(NamedTuple):
    """Whose key it is; who has the higher `priority` goes first."""

    name: str
    admin: bool = False
    priority: int = 0


_ANYBODY = User("local", admin=True)


class Keys:
    """The keys in a file, which is read again when it has changed; without a file everybody is one user."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._read: tuple[tuple[float, int], dict[str, User]] = ((-1.0, 0), {})
        if file is not None and not self._users():
            raise UnknownKeyError(f"{file} holds no keys: `nnsight keys create NAME --file {file}` makes one.")

    def user(self, authorization: str) -> User:
        """The user whom the key of a request belongs to.

        Raises:
            UnknownKeyError: There is none.
        """
        if self._file is None:
            return _ANYBODY
        given = hash_key(authorization.removeprefix("Bearer ").strip())
        for known, user in self._users().items():
            if hmac.compare_digest(known, given):
                return user
        raise UnknownKeyError('The server does not know this key: CONFIG.set_default_api_key("…"), or NDIF_API_KEY.')

    def _users(self) -> dict[str, User]:
        assert self._file is not None
        found = self._file.stat()
        changed = (found.st_mtime, found.st_size)
        if changed != self._read[0]:
            self._read = (changed, dict(_read(self._file)))
        return self._read[1]


def hash_key(key: str) -> str:
    """What the file holds in place of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def create_key(file: Path, name: str, *, admin: bool = False, priority: int = 0) -> str:
    """Add a key of a user to a file, and give the key, which is nowhere else.

    Raises:
        KeyFileError: The name is none.
    """
    if not _NAME.fullmatch(name):
        raise KeyFileError(f"{name!r} is no name of a user: letters, digits and . _ @ + - make one.")
    key = secrets.token_urlsafe(32)
    rights = (["admin"] if admin else []) + ([f"priority={priority}"] if priority else [])
    file.touch(mode=0o600)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(" ".join([hash_key(key), name, *rights]) + "\n")
    return key


def revoke_keys(file: Path, name: str) -> int:
    """Take all keys of a user out of a file; how many there were.

    Raises:
        KeyFileError: There are none.
    """
    lines = file.read_text("utf-8").splitlines()
    kept = [line for line in lines if line.split()[1:2] != [name]]
    if len(kept) == len(lines):
        raise KeyFileError(f"{file} holds no key of {name!r}.")
    part = file.with_name(file.name + ".part")
    part.touch(mode=0o600)
    part.write_text("".join(f"{line}\n" for line in kept), "utf-8")
    os.replace(part, file)
    return len(lines) - len(kept)


def list_users(file: Path) -> list[User]:
    """The users that a file holds keys of, one for each key."""
    return [user for _, user in _read(file)]


def _read(file: Path) -> Iterable[tuple[str, User]]:
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        found = re.fullmatch(r"([0-9a-f]{64}) (\S+)( admin)?(?: priority=(-?\d+))?\s*", line)
        if found is None:
            raise KeyFileError(f"Line {number} of {file} is not `hash name [admin] [priority=N]`.")
        yield found[1], User(found[2], bool(found[3]), int(found[4] or 0))
