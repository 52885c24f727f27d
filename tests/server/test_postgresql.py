"""Several servers on one PostgreSQL: every job is claimed once, quotas hold, and one takes over what another leaves."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections import Counter

import httpx
import pytest
from sqlalchemy import create_engine, text

from nnsight import CONFIG, LanguageModel
from nnsight.server._database import DatabaseError, open_database
from nnsight.server._limits import Limits
from nnsight.server._news import News
from nnsight.server._queue import Queue
from nnsight.server._relay import Relay
from nnsight.server._store import Store, StoreError

NAME = "nnsight/landmarks"
CLAIM_ALL = """
import sys
from pathlib import Path
from nnsight.server._limits import Limits
from nnsight.server._news import News
from nnsight.server._queue import Queue, TooManyJobsError
from nnsight.server._store import Store
folder, database, results = sys.argv[1:4]
queue = Queue(Store(Path(folder), database, results), Limits(queued=10), News())
print("ready", flush=True)
sys.stdin.readline()
for number in range(12):  # the same twelve from every process: ten may wait
    try:
        print("sent", queue.submit("ann", f"request {number}", "m", b"frame", 10))
    except TooManyJobsError:
        print("refused", number)
print("done", flush=True)
sys.stdin.readline()
while (claim := queue.claim("m")) is not None:
    print("claimed", claim.id)
    queue.finish(claim.id, b"answer", claim.turn)
"""


@pytest.fixture
def servers(tmp_path, database):
    """Queues of servers that share a database."""
    open_ = []

    def make(name, **limits):
        store, news = Store(tmp_path / name, database, f"file://{tmp_path}/results"), News()
        relay = Relay(store.engine, news)
        open_.append((relay, store))
        return Queue(store, Limits(**limits), news), news

    yield make
    for relay, store in open_:
        relay.close()
        store.close()


def test_processes_claim_every_job_once_and_share_the_quotas(tmp_path, database, servers):
    queue, _ = servers("here", queued=1000)
    for number in range(100):
        queue.submit(f"user {number % 7}", f"key {number}", "m", b"frame", 10)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM_ALL, tmp_path / str(number), database, f"file://{tmp_path}/results"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    sent, refused = [], []
    for process in processes:
        while (line := process.stdout.readline()) != "done\n":
            word, what = line.split()
            (sent if word == "sent" else refused).append(what)
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    claimed = [line.split()[1] for process in processes for line in process.communicate(timeout=60)[0].splitlines()]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(set(sent)) == 10  # what is repeated is one job, and ten jobs are what a user may have
    assert refused
    assert len(claimed) == 110
    assert set(Counter(claimed).values()) == {1}
    assert queue.counts() == {}
    assert queue.counts("done") == {"m": 110}


def test_one_server_goes_on_with_what_another_leaves(servers):
    first, _ = servers("first", lease=0.4)
    second, _ = servers("second", lease=0.4)
    job = first.submit("ann", "key", "m", b"frame", 10)
    lost = first.claim("m")
    second.recover()  # it starts: what the other runs is none of its business
    assert second.claim("m") is None
    time.sleep(0.5)
    second.sweep()
    taken = second.claim("m")
    assert (taken.id, taken.frame) == (job, b"frame")
    # The first was not dead but slow: what it says of the job counts no more.
    assert not first.beat(job, lost.turn)
    first.finish(job, b"late", lost.turn)
    first.lose(job, lost.turn)
    first.fail(job, "late", lost.turn)
    assert first.state("ann", job, 0).status == "running"
    second.finish(job, b"answer", taken.turn)
    assert first.answer("ann", job) == b"answer"


def test_a_server_that_starts_again_takes_up_its_own_jobs_alone(servers):
    first, _ = servers("first")
    second, _ = servers("second")
    jobs = [first.submit("ann", str(number), "m", b"frame", 10) for number in range(2)]
    first.claim("m")
    second.claim("m")
    again, _ = servers("first")
    again.recover()
    assert sorted(again.state("ann", job, 0).status for job in jobs) == ["queued", "running"]


def test_changes_are_heard_at_once_on_the_other_server(servers):
    first, _ = servers("first")
    second, heard = servers("second")
    job = first.submit("ann", "key", "m", b"frame", 10)

    async def wait():
        changed = heard.expect(job)
        await asyncio.sleep(1.0)  # both listen by now
        changed.clear()
        changed = heard.expect(job)
        begun = time.monotonic()
        await asyncio.to_thread(first.cancel, "ann", job)
        await asyncio.wait_for(changed.wait(), 10)
        return time.monotonic() - begun

    assert asyncio.run(wait()) < 1.0
    assert second.state("ann", job, 0).status == "cancelled"


def test_servers_with_one_database_need_one_place_for_results(tmp_path, servers, database):
    queue, _ = servers("first")
    queue.submit("ann", "key", "m", b"frame", 10)
    with pytest.raises(StoreError, match="need one --results URL"):
        Store(tmp_path / "second", database)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("postgresql+psycopg://ann:secret@127.0.0.1:1/x", r"ann:\*\*\*@127.0.0.1:1/x cannot be used"),
        ("mysql://x/y", "cannot be kept in mysql|needs a driver"),
        ("nonsense", "no URL of a database"),
        ("nosuch://x/y", "cannot be kept in nosuch"),
    ],
)
def test_databases_that_do_not_do_are_named(url, text):
    if url.startswith("postgresql"):
        pytest.importorskip("psycopg", reason="the driver psycopg is not installed")
    with pytest.raises(DatabaseError, match=text) as caught:
        open_database(url)
    assert "secret" not in str(caught.value)


def test_a_driver_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(DatabaseError, match=r'pip install "nnsight\[postgresql\]"'):
        open_database("postgresql://127.0.0.1:1/x")


def test_two_servers_with_one_database_and_one_bucket(start_server, database, s3, monkeypatch):
    """What one runs the other tells of as it happens, and has the answer of; lines to the database may be cut."""
    options = ("--database", database, "--results", s3())
    runs, tells = start_server(NAME, *options), start_server(*options)
    monkeypatch.setattr(CONFIG.API, "HOST", runs.host)
    runs.wait_for(NAME)
    cut = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND usename = user"
    )
    engine = create_engine(database)
    with engine.connect() as db:
        assert db.execute(text(cut)).scalar() > 2
    engine.dispose()
    time.sleep(4)  # they hear of each other again; a job that was cut would wait for its lease to end
    model = LanguageModel(NAME)
    with model.trace("Hello", remote=True, blocking=False, timeout=200) as job:
        import time as clock

        print("begun")
        clock.sleep(3)
        mine = [7].save()
    while job.status != "running":
        time.sleep(0.02)
    place = f"{tells.host}/v1/jobs/{job.id}"
    state, begun = {"status": "running"}, time.monotonic()
    while state["status"] == "running":
        state = httpx.get(place, params={"wait": 25, "known": "running", "after": 1}, timeout=30).json()
    assert state["status"] == "done"
    assert time.monotonic() - begun < 10  # it was told, and has not waited for the end of its patience
    assert httpx.get(f"{place}/result").content.startswith(b"NNS\x01")
    assert job.result()["mine"] == [7]
    ended = [line for line in httpx.get(f"{runs.host}/metrics").text.splitlines() if "jobs_ended_total{" in line]
    assert [float(line.split()[-1]) for line in ended] == [1]
    for server in (runs, tells):
        server.close()
