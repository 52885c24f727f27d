"""CONFIG: the settings of a process, from defaults, the environment, and assignment."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

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
