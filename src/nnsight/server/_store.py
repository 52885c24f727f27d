"""Jobs in a database, their bytes in files beside it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    delete,
    event,
    select,
)

metadata = MetaData()
_READS = "nnsight_reads"

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("owner", String(200), nullable=False),
    Column("idempotency", String(200), nullable=False),
    Column("model", String(500), nullable=False),
    Column("status", String(20), nullable=False),
    Column("created", Float, nullable=False),
    Column("started", Float),
    Column("ended", Float),
    Column("lease", Float),
    Column("attempts", Integer, nullable=False, default=0),
    Column("seconds", Float, nullable=False),
    Column("stop", Integer, nullable=False, default=0),
    Column("priority", Integer, nullable=False, default=0),
    Column("shares", Integer, nullable=False, default=0),  # whether it may share a forward
    Column("size", Integer, nullable=False, default=0),  # bytes that are kept of it
    Column("error", Text),
    UniqueConstraint("owner", "idempotency"),
    Index("jobs_by_status", "status", "model"),
)

events = Table(
    "events",
    metadata,
    Column("job", String(32), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("body", Text, nullable=False),
)

models = Table("models", metadata, Column("name", String(500), primary_key=True))  # deployed while the server ran


class Store:
    """A folder with the database and the files of one server."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._writing = Lock()
        self._files = folder / "jobs"
        self._files.mkdir(exist_ok=True, mode=0o700)
        self._engine = create_engine(
            f"sqlite:///{folder / 'queue.sqlite'}", connect_args={"timeout": 30}, hide_parameters=True
        )
        event.listen(self._engine, "connect", _prepare)
        event.listen(self._engine, "begin", _begin)
        metadata.create_all(self._engine)

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """A transaction that nobody else writes beside.

        Threads wait for one another here: SQLite would have them ask again, later and later.
        """
        with self._writing, self._engine.begin() as connection:
            yield connection

    @contextmanager
    def look(self) -> Iterator[Connection]:
        """A transaction that only reads, and waits for nobody."""
        with self._engine.connect().execution_options(**{_READS: True}) as connection:
            yield connection

    def deployed(self) -> list[str]:
        """The models that were deployed while the server ran."""
        with self.look() as db:
            return list(db.execute(select(models.c.name)).scalars())

    def keep_deployed(self, names: Collection[str]) -> None:
        """Remember which models are deployed."""
        with self.begin() as db:
            db.execute(delete(models))
            for name in names:
                db.execute(models.insert().values(name=name))

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    def write(self, job: str, kind: str, data: bytes) -> None:
        """Keep bytes of a job; they are there as a whole or not at all."""
        part = self._path(job, f"{kind}.part")
        part.write_bytes(data)
        part.replace(self._path(job, kind))

    def read(self, job: str, kind: str) -> bytes:
        """Bytes of a job."""
        return self._path(job, kind).read_bytes()

    def remove(self, job: str, *kinds: str) -> None:
        """Forget bytes of a job."""
        for kind in kinds:
            with suppress(FileNotFoundError):
                self._path(job, kind).unlink()

    def _path(self, job: str, kind: str) -> Path:
        return self._files / f"{job}.{kind}"


def _prepare(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy begins transactions itself
    for pragma in ("journal_mode=WAL", "foreign_keys=ON", "synchronous=NORMAL"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    reads = connection.get_execution_options().get(_READS)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
