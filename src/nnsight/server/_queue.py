"""The queue: durable, fair to its users, and sure to end every job once."""

from __future__ import annotations

import time
import uuid
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import Connection, delete, func, select, tuple_, update

from ..errors import NNsightError
from ..protocol import Event, Failure, JobState, JobSummary
from ._database import lock_owner
from ._limits import Limits
from ._monitor import Monitor
from ._news import News
from ._statements import (
    ADD,
    AHEAD,
    BEGIN,
    BESIDE,
    END,
    END_TURN,
    EVENTS,
    FORGET_EVENTS,
    NEXT,
    OWN,
    OWN_TO_CHANGE,
    REPEATED,
    USE,
    WAITS,
)
from ._store import Store, events, jobs

_GONE = ("job", "answer")
_SMALL = 2**16  # bytes of a job that is written before it is known to have room


class TooManyJobsError(NNsightError):
    """A user has as many jobs as one may."""


class TooMuchStoredError(NNsightError):
    """What the server keeps for a user is as much as it keeps for one."""


class UnknownJobError(NNsightError):
    """There is no such job, or it is somebody else's."""


class Claim(NamedTuple):
    """A job that a replica is to run now; the number of its turn tells it from later ones."""

    id: str
    frame: bytes
    seconds: float
    owner: str = ""
    shares: bool = False
    turn: int | None = None


class Queue:
    """The jobs of one server, or of several that share a database."""

    def __init__(self, store: Store, limits: Limits, news: News, monitor: Monitor | None = None) -> None:
        self._store = store
        self.monitor = monitor or Monitor()
        self._limits = limits
        self._news = news

    # --- users -----------------------------------------------------------------------------------------------

    def submit(
        self,
        owner: str,
        idempotency: str,
        model: str,
        frame: bytes,
        seconds: float,
        *,
        priority: int = 0,
        shares: bool = False,
    ) -> str:
        """Add a job, or find the one that was added with the same idempotency key.

        Raises:
            TooManyJobsError: The user has too many.
            TooMuchStoredError: The user's jobs and answers have too many bytes.
        """
        if len(frame) > _SMALL:  # what has no room is not written first
            with self._store.begin() as db:
                known = self._known(db, owner, idempotency, len(frame))
            if known is not None:
                return known
        job = uuid.uuid4().hex
        self._store.write(job, "job", frame)
        row = {"id": job, "owner": owner, "idempotency": idempotency, "model": model, "status": "queued"}
        row |= {"size": len(frame), "priority": priority, "shares": int(shares)}
        times = {"created": time.time(), "seconds": min(seconds, self._limits.seconds), "attempts": 0, "stop": 0}
        try:
            with self._store.begin() as db:
                known = self._known(db, owner, idempotency, len(frame))
                if known is None:
                    db.execute(ADD, row | times)
        except BaseException:
            self._store.remove(job, *_GONE)
            raise
        if known is not None:  # the same request, at the same time
            self._store.remove(job, *_GONE)
            return known
        self.monitor.submitted(job, owner, model, len(frame))
        self._news.tell_work()
        return job

    def _known(self, db: Connection, owner: str, idempotency: str, size: int) -> str | None:
        """The job of a repeated request; where there is none, there is room for one."""
        lock_owner(db, owner)
        known = db.execute(REPEATED, {"owner_": owner, "idempotency_": idempotency}).scalar()
        if known is not None:
            return known
        count, stored = db.execute(USE, {"owner_": owner}).one()
        if count >= self._limits.queued:
            raise TooManyJobsError(f"You have {count} jobs waiting or running, which is as many as one user may.")
        if stored + size > self._limits.stored:
            raise TooMuchStoredError(
                f"Your waiting jobs and kept answers have {stored} bytes, of at most {self._limits.stored}; answers "
                f"are kept for {self._limits.keep} seconds."
            )
        return None

    def state(self, owner: str, job: str, after: int) -> JobState:
        """Where a job stands, with its events from number `after` on."""
        with self._store.look() as db:
            row = self._own(db, owner, job)
            found = db.execute(EVENTS, {"id_": job, "after_": after}) if row.turn else ()
            bodies = [body for (body,) in found]
            ahead = self._ahead(db, row) if row.status == "queued" else 0
        error = msgspec.json.decode(row.error, type=Failure) if row.error else None
        told = [msgspec.json.decode(body, type=Event) for body in bodies]
        return JobState(job, row.status, ahead, told, after + len(told), error)

    def answer(self, owner: str, job: str) -> bytes:
        """What a job that is done has left."""
        with self._store.look() as db:
            row = self._own(db, owner, job)
        if row.status != "done":
            raise UnknownJobError(f"The job is {row.status}: it has no answer.")
        return self.kept(job)

    def kept(self, job: str) -> bytes:
        """The answer of a job that is known to be done, and whose it is."""
        return self._store.read(job, "answer")

    def cancel(self, owner: str, job: str) -> None:
        """End a job that waits; ask for the end of one that runs."""
        with self._store.begin() as db:
            row = self._own(db, owner, job, lock=True)
            if row.status == "queued":
                self._end(db, job, "cancelled")
            elif row.status == "running":
                db.execute(update(jobs).where(jobs.c.id == job).values(stop=1))
        self._news.tell(job)
        self._news.tell_work()

    def all_of(self, owner: str) -> list[JobSummary]:
        """The jobs of a user, the newest first."""
        mine = select(jobs).where(jobs.c.owner == owner).order_by(jobs.c.created.desc())
        with self._store.look() as db:
            rows = db.execute(mine).all()
            ahead = [self._ahead(db, row) if row.status == "queued" else 0 for row in rows]
        return [
            JobSummary(row.id, row.model, row.status, position, row.created, row.ended)
            for row, position in zip(rows, ahead, strict=True)
        ]

    def counts(self, status: str = "queued") -> dict[str, int]:
        """How many jobs wait for each model, or have another status."""
        waiting = select(jobs.c.model, func.count()).where(jobs.c.status == status).group_by(jobs.c.model)
        with self._store.look() as db:
            return {row[0]: row[1] for row in db.execute(waiting)}

    def waiting(self) -> dict[str, float]:
        """When the oldest job that waits for each model came."""
        oldest = select(jobs.c.model, func.min(jobs.c.created)).where(jobs.c.status == "queued")
        with self._store.look() as db:
            return {row[0]: row[1] for row in db.execute(oldest.group_by(jobs.c.model))}

    def used(self) -> dict[str, float]:
        """When a job of each model came or began last."""
        last = select(jobs.c.model, func.max(func.coalesce(jobs.c.ended, jobs.c.started, jobs.c.created)))
        with self._store.look() as db:
            return {row[0]: row[1] for row in db.execute(last.group_by(jobs.c.model))}

    def _own(self, db: Connection, owner: str, job: str, *, lock: bool = False) -> Any:
        row = db.execute(OWN_TO_CHANGE if lock else OWN, {"id_": job, "owner_": owner}).one_or_none()
        if row is None:
            raise UnknownJobError("There is no such job.")
        return row

    def _ahead(self, db: Connection, row: Any) -> int:
        place = {"model_": row.model, "priority_": row.priority, "created_": row.created}
        return db.execute(AHEAD, place).scalar_one()

    # --- replicas --------------------------------------------------------------------------------------------

    def claim(self, model: str) -> Claim | None:
        """The next job for a model: of the highest priority, then of the user who has fewest running, and then waits
        longest for a turn."""
        while True:
            with self._store.begin() as db:
                row = db.execute(NEXT, {"model_": model}).one_or_none()
                if row is not None:
                    self._begin(db, row)
                    break
                if not self._store.shared or db.execute(WAITS, {"model_": model}).first() is None:
                    return None
        return self._claimed(row)

    def claim_beside(self, first: Claim, model: str, *, same_owner: bool) -> list[Claim]:
        """Jobs that may share a forward with one that was claimed, those who wait longest first."""
        if not first.shares or self._limits.together < 2:
            return []
        with self._store.begin() as db:
            whose = {"owner_": first.owner} if same_owner else {}
            found = {"model_": model, "count_": self._limits.together - 1, **whose}
            rows = db.execute(BESIDE[same_owner], found).all()
            for row in rows:
                self._begin(db, row)
        return [self._claimed(row) for row in rows]

    def _begin(self, db: Connection, row: Any) -> None:
        now = time.time()
        begun = {"now_": now, "lease_": now + self._limits.lease, "server_": self._store.server}
        db.execute(BEGIN, {"id_": row.id, **begun})
        if row.turn:
            db.execute(FORGET_EVENTS, {"id_": row.id})

    def _claimed(self, row: Any) -> Claim:
        self._news.tell(row.id, ended=False)
        self.monitor.begun(row.id, row.model, time.time() - row.created, row.attempts + 1)
        shares = bool(row.shares) and row.attempts == 0
        return Claim(row.id, self._store.read(row.id, "job"), row.seconds, row.owner, shares, row.turn + 1)

    # With `turn`, what follows is of that claim of the job alone: one whose lease ran out says nothing any more.

    def beat(self, job: str, turn: int | None = None) -> bool:
        """Renew the lease of a running job; False where its user wants it to end, or another runs it by now."""
        with self._store.begin() as db:
            mine = _running(job, turn)
            db.execute(update(jobs).where(*mine).values(lease=time.time() + self._limits.lease))
            return db.execute(select(jobs.c.stop).where(*mine)).scalar() == 0

    def beat_all(self, claims: list[Claim]) -> set[str]:
        """Renew the leases of running jobs; those that their users want to end, or that others run by now."""
        with self._store.begin() as db:
            claimed = [(claim.id, claim.turn) for claim in claims]
            mine = (tuple_(jobs.c.id, jobs.c.turn).in_(claimed), jobs.c.status == "running")
            db.execute(update(jobs).where(*mine).values(lease=time.time() + self._limits.lease))
            wanted = set(db.execute(select(jobs.c.id).where(*mine, jobs.c.stop == 0)).scalars())
        return {claim.id for claim in claims} - wanted

    def note(self, job: str, number: int, event: Event, turn: int | None = None) -> None:
        """Keep something that happened while a job ran."""
        with self._store.begin() as db:
            if turn is not None and db.execute(select(jobs.c.id).where(*_running(job, turn))).first() is None:
                return
            db.execute(events.insert().values(job=job, number=number, body=msgspec.json.encode(event).decode()))
        self._news.tell(job, ended=False)

    def finish(self, job: str, answer: bytes, turn: int | None = None) -> None:
        """A job is done."""
        self._store.write(job, "answer", answer)
        with self._store.begin() as db:
            ended = self._end(db, job, "done", size=len(answer), turn=turn)
            status = None if ended else db.execute(select(jobs.c.status).where(jobs.c.id == job)).scalar()
        if not ended and status not in ("running", "done"):
            self._store.remove(job, "answer")
        self._news.tell(job)

    def fail(self, job: str, reason: str, turn: int | None = None) -> None:
        """A job ends without an answer of its own."""
        self._end_now(job, "failed", reason, turn)

    def stopped(self, job: str, turn: int | None = None) -> None:
        """A job that ran has been ended for its user."""
        self._end_now(job, "cancelled", None, turn)

    def fail_waiting(self, model: str, reason: str) -> None:
        """No job that waits for a model will run."""
        with self._store.begin() as db:
            waiting = select(jobs.c.id).where(jobs.c.model == model, jobs.c.status == "queued")
            found = list(db.execute(waiting).scalars())
            for job in found:
                self._end(db, job, "failed", reason)
        for job in found:
            self._news.tell(job)

    def lose(self, job: str, turn: int | None = None) -> None:
        """The replica of a running job died: the job waits again, or fails after the last attempt."""
        with self._store.begin() as db:
            for row in db.execute(select(jobs).where(*_running(job, turn)).with_for_update()).all():
                self._requeue(db, row)
        self._news.tell(job)
        self._news.tell_work()

    def give_back(self, job: str, turn: int | None = None, *, alone: bool = False) -> None:
        """A job was not begun after all: it waits again, and that was no attempt; or it is to be run alone."""
        with self._store.begin() as db:
            running = _running(job, turn)
            if db.execute(select(jobs.c.stop).where(*running)).scalar():
                self._end(db, job, "cancelled", turn=turn)
            again = {"status": "queued", "lease": None, "attempts": jobs.c.attempts - 1}
            db.execute(update(jobs).where(*running).values(**again, **({"shares": 0} if alone else {})))
        self._news.tell(job)
        self._news.tell_work()

    def recover(self) -> None:
        """At the start of a server: jobs that it ran when it died wait again, or fail."""
        mine = (jobs.c.server == self._store.server) | jobs.c.server.is_(None)
        with self._store.begin() as db:
            for row in db.execute(select(jobs).where(jobs.c.status == "running", mine).with_for_update()).all():
                self._requeue(db, row)

    def sweep(self) -> None:
        """Requeue jobs whose replica gave no sign of life, and forget old ones."""
        now = time.time()
        with self._store.begin() as db:
            late = select(jobs).where(jobs.c.status == "running", jobs.c.lease < now)
            dead = db.execute(late.with_for_update(skip_locked=True)).all()
            for row in dead:
                self._requeue(db, row)
            old = [id for (id,) in db.execute(select(jobs.c.id).where(jobs.c.ended < now - self._limits.keep))]
            db.execute(delete(jobs).where(jobs.c.id.in_(old)))
        for row in dead:
            self._news.tell(row.id)
        for job in old:
            self._store.remove(job, *_GONE)
        if dead:
            self._news.tell_work()

    def _requeue(self, db: Connection, row: Any) -> None:
        if row.status != "running":
            return
        if row.stop:
            self._end(db, row.id, "cancelled")
        elif row.attempts >= self._limits.attempts:
            self._end(db, row.id, "failed", f"The process that ran the job died, {row.attempts} times over.")
        else:
            db.execute(update(jobs).where(jobs.c.id == row.id).values(status="queued", lease=None))

    def _end_now(self, job: str, status: str, reason: str | None, turn: int | None) -> None:
        with self._store.begin() as db:
            self._end(db, job, status, reason, turn=turn)
        self._news.tell(job)

    def _end(
        self,
        db: Connection,
        job: str,
        status: str,
        reason: str | None = None,
        *,
        size: int = 0,
        turn: int | None = None,
    ) -> bool:
        """End a job that has not ended; whether it had not."""
        failure = Failure("nnsight.errors", "ServerError", reason) if reason else None
        error = msgspec.json.encode(failure).decode() if failure else None
        now = time.time()
        last = {"id_": job, "status_": status, "now_": now, "error_": error, "size_": size}
        row = db.execute(*((END, last) if turn is None else (END_TURN, last | {"turn_": turn}))).one_or_none()
        if row is None:
            return False
        self._store.remove(job, "job")
        self.monitor.ended(job, row.model, status, None if row.started is None else now - row.started)
        return True


def _running(job: str, turn: int | None) -> tuple[Any, ...]:
    running = (jobs.c.id == job, jobs.c.status == "running")
    return running if turn is None else (*running, jobs.c.turn == turn)
