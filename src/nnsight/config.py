"""CONFIG: the settings of a process, from defaults, the environment, and assignment."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .errors import RemoteError

_TRUE = frozenset({"1", "true", "yes", "on"})


def _flag(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in _TRUE


@dataclass
class AppConfig:
    """How traces behave.

    Attributes:
        DEBUG: Keep nnsight's own frames in tracebacks (`NNSIGHT_DEBUG`).
        STRICT_ORDER: Make every read out of order an error instead of a second pass (`NNSIGHT_STRICT_ORDER`).
    """

    DEBUG: bool = field(default_factory=lambda: _flag("NNSIGHT_DEBUG"))
    STRICT_ORDER: bool = field(default_factory=lambda: _flag("NNSIGHT_STRICT_ORDER"))


@dataclass
class ApiConfig:
    """Where remote execution goes.

    Attributes:
        HOST: Address of the server (`NDIF_HOST`).
        APIKEY: The key sent with each request (`NDIF_API_KEY`).
    """

    HOST: str | None = field(default_factory=lambda: os.environ.get("NDIF_HOST") or None)
    APIKEY: str | None = field(default_factory=lambda: os.environ.get("NDIF_API_KEY") or None)


@dataclass
class Config:
    """All settings; the one instance is `nnsight.CONFIG`.

    Example:
        >>> from nnsight import CONFIG
        >>> CONFIG.APP.DEBUG = False
        >>> CONFIG.API_KEY = "my-key"
        >>> CONFIG.API_KEY
        'my-key'
    """

    APP: AppConfig = field(default_factory=AppConfig)
    API: ApiConfig = field(default_factory=ApiConfig)

    @property
    def API_KEY(self) -> str | None:
        """The key for remote execution."""
        return self.API.APIKEY

    @API_KEY.setter
    def API_KEY(self, key: str | None) -> None:
        self.API.APIKEY = key

    def set_default_api_key(self, key: str) -> None:
        """Use `key` for remote execution in this process."""
        self.API.APIKEY = key


CONFIG = Config()


class Login(NamedTuple):
    """The server and key that `nnsight login` has stored."""

    host: str | None = None
    key: str | None = None


def login_file() -> Path:
    """Where the login is stored; readable by its owner alone."""
    folder = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(folder) / "nnsight" / "login.json"


def stored_login() -> Login:
    """What `nnsight login` has stored; empty where there is none."""
    try:
        found = json.loads(login_file().read_text("utf-8"))
        return Login(str(found["host"]), found["key"])
    except FileNotFoundError:
        return Login()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RemoteError(f"{login_file()} cannot be read ({error}): run `nnsight login` again.") from error


def store_login(login: Login) -> Path:
    """Remember a server and a key."""
    file = login_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.unlink(missing_ok=True)
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as text:
        json.dump(login._asdict(), text)
    part.replace(file)
    return file


def full_address(host: str) -> str:
    """An address with its scheme, and without a slash at its end."""
    return (host if "://" in host else f"https://{host}").rstrip("/")
