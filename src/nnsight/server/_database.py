"""The database of a server: SQLite in its folder, or any that SQLAlchemy has a URL for and that can lock rows."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from ..errors import NNsightError

READS = "nnsight_reads"
_DRIVERS = {"postgresql": "postgresql+psycopg"}


class DatabaseError(NNsightError):
    """A database that cannot be used."""


def open_database(url: str) -> Engine:
    """An engine for a URL.

    Raises:
        DatabaseError: It is none, cannot be reached, or its driver is not installed.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise DatabaseError(f"This is no URL of a database, such as postgresql+psycopg://host/name: {error}") from error
    try:
        parsed = parsed.set(drivername=_DRIVERS.get(parsed.drivername, parsed.drivername))
        kind = parsed.get_backend_name()
        if kind == "sqlite":
            return _sqlite(parsed)
        if kind != "postgresql":
            raise DatabaseError(f"A queue cannot be kept in {kind}: postgresql+psycopg://… and sqlite:///… can.")
        engine = create_engine(parsed, hide_parameters=True, pool_pre_ping=True, pool_size=10, max_overflow=20)
        with engine.connect():
            return engine
    except ImportError as error:
        raise DatabaseError(f'The database needs a driver: pip install "nnsight[postgresql]" ({error})') from error
    except NoSuchModuleError as error:
        raise DatabaseError(f"{error}: postgresql+psycopg://… and sqlite:///… can be used") from error
    except SQLAlchemyError as error:
        where = parsed.render_as_string(hide_password=True)
        raise DatabaseError(f"The database {where} cannot be used: {_cause(error)}") from error


def _cause(error: SQLAlchemyError) -> str:
    return " ".join(str(getattr(error, "orig", None) or error).split())


def _sqlite(url: Any) -> Engine:
    engine = create_engine(url, connect_args={"timeout": 30}, hide_parameters=True)
    event.listen(engine, "connect", _prepare)
    event.listen(engine, "begin", _begin)
    return engine


def _prepare(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy begins transactions itself
    for pragma in ("journal_mode=WAL", "foreign_keys=ON", "synchronous=NORMAL"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    reads = connection.get_execution_options().get(READS)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def make_tables(engine: Engine, metadata: Any) -> None:
    """Make the tables that are not there, and the columns and indexes that an older server's tables lack.

    Several servers may start at once on one database.
    """
    with engine.begin() as db:
        if engine.dialect.name == "postgresql":
            db.execute(text("SELECT pg_advisory_xact_lock(7305806)"))
        metadata.create_all(db)
        for table in metadata.sorted_tables:
            there = {column["name"] for column in inspect(db).get_columns(table.name)}
            for column in table.columns:
                if column.name not in there:
                    kind = column.type.compile(engine.dialect)
                    db.execute(
                        text(f"ALTER TABLE {table.name} ADD COLUMN {column.name} {kind} DEFAULT {_default(column)}")
                    )
            for index in table.indexes:
                index.create(db, checkfirst=True)


def _default(column: Any) -> str:
    return "NULL" if column.nullable else repr(column.default.arg)


def lock_owner(db: Connection, owner: str) -> None:
    """Have one transaction at a time decide about a user's quotas; SQLite has one at a time anyway."""
    if db.dialect.name == "postgresql":
        db.execute(text("SELECT pg_advisory_xact_lock(7305807, hashtext(:owner))"), {"owner": owner})
