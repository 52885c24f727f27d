"""Jobs in a database, their bytes in files beside it or wherever they are to be."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    delete,
    select,
)

from ..errors import NNsightError
from ._database import READS, make_tables, open_database
from ._files import open_files

metadata = MetaData()

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("owner", String(200), nullable=False),
    Column("idempotency", String(200), nullable=False),
    Column("model", String(500), nullable=False),
    Column("status", String(20), nullable=False),
    Column("created", Float(53), nullable=False),
    Column("started", Float(53)),
    Column("ended", Float(53)),
    Column("lease", Float(53)),
    Column("attempts", Integer, nullable=False, default=0),
    Column("seconds", Float(53), nullable=False),
    Column("stop", Integer, nullable=False, default=0),
    Column("priority", Integer, nullable=False, default=0),
    Column("shares", Integer, nullable=False, default=0),  # whether it may share a forward
    Column("size", Integer, nullable=False, default=0),  # bytes that are kept of it
    Column("error", Text),
    Column("server", String(32)),  # whose replica runs it
    Column("turn", Integer, nullable=False, default=0),  # how often it was claimed
    UniqueConstraint("owner", "idempotency"),
    Index("jobs_by_status", "status", "model"),
    Index("jobs_by_use", "owner", "status", "size"),
    Index("jobs_by_turn", "owner", "started"),
)

events = Table(
    "events",
    metadata,
    Column("job", String(32), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("body", Text, nullable=False),
)

deployed = Table(  # models that were deployed while a server ran
    "deployed",
    metadata,
    Column("server", String(32), primary_key=True),
    Column("name", String(500), primary_key=True),
)

settings = Table("settings", metadata, Column("name", String(100), primary_key=True), Column("value", Text))


class StoreError(NNsightError):
    """Servers that do not fit to one database."""


class Store:
    """What one server keeps.

    Args:
        folder: Its own.
        database: The URL of one that several servers may share; by default it is in the folder.
        results: The URL below which the bytes of jobs and answers are; by default they are in the folder.
    """

    def __init__(self, folder: Path, database: str | None = None, results: str | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._writing = Lock()
        self.server = _identity(folder / "server")
        self._files = open_files(results, folder / "jobs")
        self.engine: Engine = open_database(database or f"sqlite:///{folder / 'queue.sqlite'}")
        self.shared = self.engine.dialect.name != "sqlite"
        try:
            make_tables(self.engine, metadata)
            if self.shared:
                self._agree_on_files()
        except BaseException:
            self.engine.dispose()
            raise

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """A transaction that writes.

        In SQLite threads wait for one another here: it would have them ask again, later and later.
        """
        if self.shared:
            with self.engine.begin() as connection:
                yield connection
        else:
            with self._writing, self.engine.begin() as connection:
                yield connection

    @contextmanager
    def look(self) -> Iterator[Connection]:
        """A transaction that only reads, and waits for nobody."""
        with self.engine.connect().execution_options(**{READS: True}) as connection:
            yield connection

    def _agree_on_files(self) -> None:
        """Servers that share a queue must have its bytes in one place."""
        with self.begin() as db:
            place = db.execute(select(settings.c.value).where(settings.c.name == "results").with_for_update()).scalar()
            if place is not None and place != self._files.place and db.execute(select(jobs.c.id).limit(1)).first():
                raise StoreError(
                    f"The jobs of this database are kept at {place}, not at {self._files.place}: servers with one "
                    "database need one --results URL (or --data folder)."
                )
            db.execute(delete(settings).where(settings.c.name == "results"))
            db.execute(settings.insert().values(name="results", value=self._files.place))

    def deployed(self) -> list[str]:
        """The models that were deployed while the server ran."""
        with self.look() as db:
            return list(db.execute(select(deployed.c.name).where(deployed.c.server == self.server)).scalars())

    def keep_deployed(self, names: Collection[str]) -> None:
        """Remember which models are deployed."""
        with self.begin() as db:
            db.execute(delete(deployed).where(deployed.c.server == self.server))
            for name in names:
                db.execute(deployed.insert().values(server=self.server, name=name))

    def close(self) -> None:
        """Let go of the database."""
        self.engine.dispose()

    def write(self, job: str, kind: str, data: bytes) -> None:
        """Keep bytes of a job; they are there as a whole or not at all."""
        self._files.write(f"{job}.{kind}", data)

    def read(self, job: str, kind: str) -> bytes:
        """Bytes of a job."""
        return self._files.read(f"{job}.{kind}")

    def remove(self, job: str, *kinds: str) -> None:
        """Forget bytes of a job."""
        for kind in kinds:
            self._files.remove(f"{job}.{kind}")


def _identity(file: Path) -> str:
    """What a server is called, over its restarts."""
    if not file.exists():
        file.write_text(uuid.uuid4().hex)
    return file.read_text().strip()
