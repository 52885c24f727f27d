"""What every job asks of the database, written once: SQLAlchemy takes longer to build a statement than to run it."""

from __future__ import annotations

from sqlalchemy import and_, bindparam, case, delete, func, or_, select, update

from ..protocol import ENDED
from ._store import events, jobs

_owner, _model = bindparam("owner_"), bindparam("model_")
_id, _turn = bindparam("id_"), bindparam("turn_")

REPEATED = select(jobs.c.id).where(jobs.c.owner == _owner, jobs.c.idempotency == bindparam("idempotency_"))
USE = select(  # how many jobs of a user wait or run, and the bytes that are kept of all
    func.coalesce(func.sum(case((jobs.c.status.in_(("queued", "running")), 1), else_=0)), 0),
    func.coalesce(func.sum(jobs.c.size), 0),
).where(jobs.c.owner == _owner)
ADD = jobs.insert()

OWN = select(jobs).where(jobs.c.id == _id, jobs.c.owner == _owner)
OWN_TO_CHANGE = OWN.with_for_update()
EVENTS = (
    select(events.c.body).where(events.c.job == _id, events.c.number >= bindparam("after_")).order_by(events.c.number)
)
_SOONER = and_(jobs.c.priority == bindparam("priority_"), jobs.c.created < bindparam("created_"))
AHEAD = select(func.count()).where(
    jobs.c.model == _model, jobs.c.status == "queued", or_(jobs.c.priority > bindparam("priority_"), _SOONER)
)

# The next job of a model: of the highest priority, then of the user who has fewest running, then of the one whose last
# job began longest ago, then the oldest.
_waiting = and_(jobs.c.model == _model, jobs.c.status == "queued")
_highest = select(func.max(jobs.c.priority)).where(_waiting).scalar_subquery()
_users = select(jobs.c.owner, func.min(jobs.c.created).label("first")).where(_waiting, jobs.c.priority == _highest)
_users_waiting = _users.group_by(jobs.c.owner).subquery()
_theirs = jobs.alias()
_of_user = _theirs.c.owner == _users_waiting.c.owner
_running_now = select(func.count()).select_from(_theirs).where(_of_user, _theirs.c.status == "running")
_last = select(func.coalesce(func.max(_theirs.c.started), 0.0)).where(_of_user)
_next_user = (
    select(_users_waiting.c.owner)
    .order_by(_running_now.scalar_subquery(), _last.scalar_subquery(), _users_waiting.c.first)
    .limit(1)
    .scalar_subquery()
)
NEXT = (
    select(jobs)
    .where(_waiting, jobs.c.priority == _highest, jobs.c.owner == _next_user)
    .order_by(jobs.c.created)
    .limit(1)
    .with_for_update(skip_locked=True)
)
_beside = (
    select(jobs)
    .where(_waiting, jobs.c.shares == 1, jobs.c.attempts == 0)
    .order_by(jobs.c.priority.desc(), jobs.c.created)
    .limit(bindparam("count_"))
    .with_for_update(skip_locked=True)
)
BESIDE = {False: _beside, True: _beside.where(jobs.c.owner == _owner)}  # by whether they are of one user
WAITS = select(jobs.c.id).where(_waiting).limit(1)

BEGIN = (
    update(jobs)
    .where(jobs.c.id == _id)
    .values(
        status="running",
        started=bindparam("now_"),
        lease=bindparam("lease_"),
        server=bindparam("server_"),
        attempts=jobs.c.attempts + 1,
        turn=jobs.c.turn + 1,
    )
)
FORGET_EVENTS = delete(events).where(events.c.job == _id)

# The end of a job: whatever it does, or of one claim of it.
_END = (
    update(jobs)
    .values(
        status=bindparam("status_"),
        ended=bindparam("now_"),
        lease=None,
        error=bindparam("error_"),
        size=bindparam("size_"),
    )
    .returning(jobs.c.model, jobs.c.started)
)
END = _END.where(jobs.c.id == _id, jobs.c.status.not_in(ENDED))
END_TURN = _END.where(jobs.c.id == _id, jobs.c.status == "running", jobs.c.turn == _turn)
