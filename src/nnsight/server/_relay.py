"""Relay: servers that share a PostgreSQL database tell one another of changes, by LISTEN and NOTIFY."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from ._monitor import log
from ._news import News

_CHANNEL = "nnsight_news"
_WORK = "work"
_LOOK = 0.5  # seconds between two looks whether to end
_AGAIN = 1.0  # seconds before a lost connection is made anew


class Relay:
    """Passes on what one server tells, and tells it what others do.

    What is lost while the database cannot be reached, waiters find at their next look, as they would alone.
    """

    def __init__(self, engine: Engine, news: News) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._lost: type[Exception] = engine.dialect.loaded_dbapi.Error  # what the driver says of a line that is cut
        self._news = news
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="relay", daemon=True)
        self._thread.start()
        news.relay = self._tell

    def close(self) -> None:
        """Pass on nothing more."""
        self._news.relay = None
        self._ending.set()
        self._thread.join()

    def _tell(self, job: str | None) -> None:
        with suppress(SQLAlchemyError), self._engine.connect() as db:
            db.execute(text("SELECT pg_notify(:channel, :what)"), {"channel": _CHANNEL, "what": job or _WORK})

    def _listen(self) -> None:
        while not self._ending.is_set():
            try:
                with self._engine.connect() as db:
                    self._hear(db)
            except (SQLAlchemyError, self._lost) as error:
                log.warning("relay lost", extra={"error": type(error).__name__})
                self._ending.wait(_AGAIN)

    def _hear(self, db: Any) -> None:
        driver = db.connection.driver_connection
        db.detach()  # nobody else is to have a connection that listens
        db.execute(text(f"LISTEN {_CHANNEL}"))
        self._news.hear(None)
        while not self._ending.is_set():
            for notice in driver.notifies(timeout=_LOOK, stop_after=64):
                self._news.hear(None if notice.payload == _WORK else notice.payload)
