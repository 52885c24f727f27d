"""The queue: every job ends once, users take turns, and nobody sees what is another's."""

from __future__ import annotations

import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nnsight.protocol import Event
from nnsight.server._limits import Limits
from nnsight.server._news import News
from nnsight.server._queue import Queue, TooManyJobsError, UnknownJobError
from nnsight.server._store import Store

LIMITS = Limits(queued=5, attempts=2, lease=0.2, keep=1000)


@pytest.fixture(params=["sqlite", "postgresql"])
def store(tmp_path, request):
    database = request.getfixturevalue("database") if request.param == "postgresql" else None
    store = Store(tmp_path, database)
    yield store
    store.close()


@pytest.fixture
def queue(store):
    return Queue(store, LIMITS, News())


def submit(queue, owner, key, model="m"):
    return queue.submit(owner, key, model, b"frame", 10)


def test_a_job_goes_through(queue):
    job = submit(queue, "ann", "first")
    assert queue.state("ann", job, 0).status == "queued"
    claim = queue.claim("m")
    assert (claim.id, claim.frame, claim.seconds) == (job, b"frame", 10)
    assert queue.claim("m") is None
    queue.note(job, 0, Event("print", "hello\n"))
    queue.note(job, 1, Event("print", "again\n"))
    state = queue.state("ann", job, 0)
    assert [event.text for event in state.events] == ["hello\n", "again\n"]
    assert state.next_event == 2
    assert queue.state("ann", job, 2).events == []
    queue.finish(job, b"answer")
    assert queue.state("ann", job, 2).status == "done"
    assert queue.answer("ann", job) == b"answer"


def test_a_request_that_is_repeated_is_one_job(queue):
    first = submit(queue, "ann", "key")
    assert submit(queue, "ann", "key") == first
    assert submit(queue, "bob", "key") != first
    assert queue.counts() == {"m": 2}


def test_nobody_sees_the_jobs_of_others(queue):
    job = submit(queue, "ann", "key")
    queue.claim("m")
    queue.finish(job, b"answer")
    for ask in (queue.answer, queue.cancel, lambda owner, id: queue.state(owner, id, 0)):
        with pytest.raises(UnknownJobError):
            ask("bob", job)
    assert queue.answer("ann", job) == b"answer"


def test_users_take_turns(queue):
    for number in range(4):
        submit(queue, "flood", f"key{number}")
    late = submit(queue, "ann", "key")
    first, second = queue.claim("m"), queue.claim("m")
    assert first.id != late
    assert second.id == late


def test_a_user_has_so_many_jobs(queue):
    for number in range(LIMITS.queued):
        submit(queue, "ann", f"key{number}")
    with pytest.raises(TooManyJobsError, match="5 jobs"):
        submit(queue, "ann", "one more")
    submit(queue, "bob", "key")
    claim = queue.claim("m")
    queue.finish(claim.id, b"")
    submit(queue, "ann", "one more")


def test_a_waiting_job_is_cancelled_at_once_and_a_running_one_is_told(queue):
    waiting, running = submit(queue, "ann", "a", "other"), submit(queue, "ann", "b")
    claim = queue.claim("m")
    assert claim.id == running
    assert queue.beat(running)
    queue.cancel("ann", waiting)
    queue.cancel("ann", running)
    assert queue.state("ann", waiting, 0).status == "cancelled"
    assert queue.claim("other") is None
    assert not queue.beat(running)
    queue.stopped(running)
    assert queue.state("ann", running, 0).status == "cancelled"


def test_a_job_whose_replica_dies_is_tried_twice(queue):
    job = submit(queue, "ann", "a")
    queue.claim("m")
    queue.note(job, 0, Event("print", "half"))
    queue.lose(job)
    assert queue.state("ann", job, 0).status == "queued"
    queue.claim("m")
    assert queue.state("ann", job, 0).events == []
    queue.lose(job)
    state = queue.state("ann", job, 0)
    assert state.status == "failed"
    assert "died, 2 times over" in state.error.text
    assert queue.claim("m") is None


def test_a_replica_without_a_sign_of_life_counts_as_dead(queue):
    job = submit(queue, "ann", "a")
    queue.claim("m")
    queue.sweep()
    assert queue.state("ann", job, 0).status == "running"
    time.sleep(LIMITS.lease + 0.1)
    queue.sweep()
    assert queue.state("ann", job, 0).status == "queued"


def test_an_answer_that_comes_too_late_changes_nothing(queue, store):
    job = submit(queue, "ann", "a")
    queue.claim("m")
    queue.cancel("ann", job)
    queue.stopped(job)
    queue.finish(job, b"late")
    assert queue.state("ann", job, 0).status == "cancelled"
    with pytest.raises(FileNotFoundError):
        store.read(job, "answer")


def test_a_drained_job_was_no_attempt(queue):
    job = submit(queue, "ann", "a")
    for _ in range(5):
        assert queue.claim("m").id == job
        queue.give_back(job)
    assert queue.state("ann", job, 0).status == "queued"


def test_what_a_drained_job_printed_is_forgotten_when_it_begins_again(queue):
    job = submit(queue, "ann", "a")
    for text in ("before", "again"):
        queue.claim("m")
        queue.note(job, 0, Event("print", text))
        assert [event.text for event in queue.state("ann", job, 0).events] == [text]
        queue.give_back(job)
        assert [event.text for event in queue.state("ann", job, 0).events] == [text]


def test_jobs_that_may_share_are_claimed_together(queue):
    def send(owner, key, **options):
        return queue.submit(owner, key, "m", b"frame", 10, shares=True, **options)

    mine = [send("ann", f"{number}") for number in range(3)]
    theirs, alone, other = (
        send("bob", "x"),
        submit(queue, "ann", "y"),
        queue.submit("ann", "z", "n", b"", 1, shares=True),
    )
    first = queue.claim("m")
    assert first.id == mine[0]
    assert [claim.id for claim in queue.claim_beside(first, "m", same_owner=True)] == mine[1:]
    assert {queue.state("ann", job, 0).status for job in (alone, other)} == {"queued"}
    for job in mine:
        queue.give_back(job, alone=True)
    second = queue.claim("m")
    assert second.id == theirs
    assert queue.claim_beside(second, "m", same_owner=False) == []  # those that were given back are run alone
    again = queue.claim("m")
    assert again.id == mine[0]
    assert not again.shares


def test_jobs_of_several_owners_are_claimed_together_where_that_is_allowed(queue):
    jobs = [queue.submit(owner, "key", "m", b"", 1, shares=True) for owner in ("ann", "bob", "cid")]
    first = queue.claim("m")
    assert [claim.id for claim in queue.claim_beside(first, "m", same_owner=False)] == jobs[1:]


def test_a_job_that_was_begun_before_shares_with_nobody(queue):
    jobs = [queue.submit("ann", key, "m", b"", 1, shares=True) for key in ("a", "b")]
    queue.claim("m")
    queue.lose(jobs[0])
    first = queue.claim("m")
    assert first.id == jobs[0]
    assert queue.claim_beside(first, "m", same_owner=True) == []


def test_a_job_that_is_cancelled_while_it_shares_ends(queue):
    job = queue.submit("ann", "a", "m", b"", 1, shares=True)
    queue.claim("m")
    queue.cancel("ann", job)
    queue.give_back(job, alone=True)
    assert queue.state("ann", job, 0).status == "cancelled"


def test_jobs_outlive_the_server(tmp_path):
    store = Store(tmp_path)
    job = submit(Queue(store, LIMITS, News()), "ann", "a")
    store.close()
    again = Store(tmp_path)
    queue = Queue(again, LIMITS, News())
    assert queue.claim("m").id == job
    again.close()


def test_old_jobs_are_forgotten(tmp_path):
    store = Store(tmp_path)
    queue = Queue(store, Limits(keep=-1), News())
    job = submit(queue, "ann", "a")
    queue.claim("m")
    queue.finish(job, b"answer")
    queue.sweep()
    with pytest.raises(UnknownJobError):
        queue.state("ann", job, 0)
    assert list((tmp_path / "jobs").iterdir()) == []
    store.close()


class EveryJobEndsOnce(RuleBasedStateMachine):
    """Any order of what users, replicas and the sweeper do, against a model of it in a dictionary."""

    def __init__(self):
        super().__init__()
        import tempfile
        from pathlib import Path

        self.folder = tempfile.TemporaryDirectory()
        self.store = Store(Path(self.folder.name))
        self.queue = Queue(self.store, Limits(queued=1000, lease=1000), News())
        self.expected: dict[str, str] = {}
        self.owners: dict[str, str] = {}
        self.count = 0

    def teardown(self):
        self.store.close()
        self.folder.cleanup()

    @rule(owner=st.sampled_from(["ann", "bob"]))
    def submit(self, owner):
        self.count += 1
        job = submit(self.queue, owner, f"key {self.count}")
        self.expected[job], self.owners[job] = "queued", owner

    @rule()
    def claim(self):
        claim = self.queue.claim("m")
        assert (claim is None) == ("queued" not in self.expected.values())
        if claim is not None:
            assert self.expected[claim.id] == "queued"
            self.expected[claim.id] = "running"

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), action=st.sampled_from(["finish", "stopped", "cancel"]))
    def end(self, data, action):
        job = data.draw(st.sampled_from(sorted(self.expected)))
        before = self.expected[job]
        if action == "cancel":
            self.queue.cancel(self.owners[job], job)
            self.expected[job] = "cancelled" if before == "queued" else before
        elif before == "running" or before in ("done", "cancelled"):
            getattr(self.queue, action)(*((job, b"answer") if action == "finish" else (job,)))
            if before == "running":
                self.expected[job] = "done" if action == "finish" else "cancelled"

    @invariant()
    def states_are_as_expected(self):
        for job, status in self.expected.items():
            assert self.queue.state(self.owners[job], job, 0).status == status


EveryJobEndsOnce.TestCase.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
TestEveryJobEndsOnce = EveryJobEndsOnce.TestCase
