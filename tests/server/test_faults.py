"""Deaths, full disks and cut lines, at every status of a job: it ends exactly once, with its result or a clear error."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import torch

from nnsight import CONFIG, LanguageModel
from nnsight.remote._transport import Connection
from nnsight.server._limits import Limits
from nnsight.server._monitor import Monitor
from nnsight.server._news import News
from nnsight.server._queue import Queue
from nnsight.server._replica import DiedError, Replica
from nnsight.server._store import Store

NAME = "nnsight/landmarks"


def wait_until(condition, seconds=250):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children_of(pid):
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


@pytest.fixture
def server(start_server, monkeypatch):
    server = start_server(NAME)
    monkeypatch.setattr(CONFIG.API, "HOST", server.host)
    server.wait_for(NAME)
    return server


def send(model, seconds):
    with model.trace("Hello", remote=True, blocking=False, timeout=280, solo=True) as job:
        import time as clock

        print("begun")
        clock.sleep(seconds)
        number = [7].save()
    wait_until(lambda: job.id is not None)
    return job


def ends_of(server, model=NAME):
    lines = httpx.get(f"{server.host}/metrics").text.splitlines()
    return {
        line.partition('status="')[2].partition('"')[0]: float(line.split()[-1])
        for line in lines
        if line.startswith("nnsight_jobs_ended_total")
    }


@pytest.mark.parametrize("victim", ["zygote", "runner"])
def test_every_job_ends_once_when_processes_die(server, victim):
    """One job is done, one runs, and one waits at the moment of the death."""
    model = LanguageModel(NAME)
    done = send(model, 0)
    assert done.result()["number"] == [7]
    running, waiting = send(model, 3), send(model, 0)
    wait_until(lambda: running.status == "running")
    zygotes = children_of(server.process.pid)
    assert len(zygotes) == 1
    wait_until(lambda: children_of(zygotes[0]))
    for process in zygotes if victim == "zygote" else children_of(zygotes[0]):
        os.kill(process, signal.SIGKILL)
    assert running.result()["number"] == [7]
    assert waiting.result()["number"] == [7]
    assert done.status == "done"
    assert ends_of(server) == {"done": 3}


def test_every_job_ends_once_when_the_service_dies(start_server, monkeypatch, tmp_path):
    server = start_server(NAME, folder=tmp_path)
    monkeypatch.setattr(CONFIG.API, "HOST", server.host)
    server.wait_for(NAME)
    model = LanguageModel(NAME)
    done = send(model, 0)
    done.result()
    running, waiting = send(model, 3), send(model, 0)
    wait_until(lambda: running.status == "running")
    zygotes = children_of(server.process.pid)
    server.process.kill()
    server.process.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in zygotes))  # nothing of it is left
    port = server.host.rpartition(":")[2]
    again = start_server(NAME, "--port", port, folder=tmp_path)  # the clients wait for it where it was
    assert again.host == server.host
    assert running.result()["number"] == [7]
    assert waiting.result()["number"] == [7]
    assert httpx.get(f"{again.host}/v1/jobs/{done.id}").json()["status"] == "done"
    assert httpx.get(f"{again.host}/v1/jobs/{done.id}/result").content.startswith(b"NNS\x01")
    assert ends_of(again) == {"done": 2}


# --- without processes ----------------------------------------------------------------------------------------


class Runs:
    """A runner that answers, or dies, as told."""

    mixes_owners = True

    def __init__(self, *acts):
        self.acts = list(acts)

    def start(self):
        pass

    def run(self, frame, emit, owner):
        act = self.acts.pop(0) if self.acts else b"answer"
        if isinstance(act, bytes):
            return act
        raise act

    def run_together(self, frames, owners):
        raise DiedError("not here")

    def stop(self):
        pass

    def close(self):
        pass


@pytest.fixture
def serve(tmp_path):
    """A queue and a replica with a runner of one's own."""
    open_ = []

    def make(*acts, **limits):
        store, news, monitor = Store(tmp_path), News(), Monitor()
        queue = Queue(store, Limits(lease=0.5, **limits), news, monitor)
        replica = Replica("m", Runs(*acts), queue, news, Limits(lease=0.5, **limits))
        open_.append((replica, store))
        return queue, replica

    yield make
    for replica, store in open_:
        replica.end(5)
        store.close()


def status_of(queue, job):
    return queue.state("ann", job, 0).status


def test_a_full_disk_at_the_answer_is_an_error_that_says_so(serve, monkeypatch):
    queue, replica = serve()
    write = Store.write

    def full(store, job, kind, data):
        if kind == "answer":
            raise OSError(errno.ENOSPC, "no space")
        write(store, job, kind, data)

    monkeypatch.setattr(Store, "write", full)
    job = queue.submit("ann", "key", "m", b"frame", 10)
    replica.start()
    wait_until(lambda: status_of(queue, job) == "failed", 20)
    assert "no room for the answer" in queue.state("ann", job, 0).error.text
    monkeypatch.setattr(Store, "write", write)
    second = queue.submit("ann", "other", "m", b"frame", 10)
    wait_until(lambda: status_of(queue, second) == "done", 20)


def test_a_locked_database_holds_a_job_up_and_no_more(serve, tmp_path):
    import sqlite3

    queue, replica = serve()
    job = queue.submit("ann", "key", "m", b"frame", 10)
    other = sqlite3.connect(tmp_path / "queue.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    replica.start()
    time.sleep(1.0)
    other.execute("ROLLBACK")
    other.close()
    wait_until(lambda: status_of(queue, job) == "done", 40)
    assert queue.answer("ann", job) == b"answer"


@pytest.mark.parametrize(("deaths", "status"), [(1, "done"), (2, "failed"), (5, "failed")])
def test_a_runner_that_dies_is_tried_twice(serve, deaths, status):
    queue, replica = serve(*[DiedError("killed")] * deaths)
    job = queue.submit("ann", "key", "m", b"frame", 10)
    replica.start()
    wait_until(lambda: status_of(queue, job) in ("done", "failed"), 20)
    assert status_of(queue, job) == status


def test_an_answer_of_more_bytes_than_allowed_is_an_error(serve):
    queue, replica = serve(bytes(101), answer=100)
    job = queue.submit("ann", "key", "m", b"frame", 10)
    replica.start()
    wait_until(lambda: status_of(queue, job) == "failed", 20)
    assert "at most 100" in queue.state("ann", job, 0).error.text


def test_jobs_that_ran_when_the_server_died_wait_again_at_once(tmp_path):
    store = Store(tmp_path)
    queue = Queue(store, Limits(lease=1000), News())
    first, second = (queue.submit("ann", key, "m", b"frame", 10) for key in ("a", "b"))
    queue.claim("m")
    queue.cancel("ann", first)
    queue.claim("m")
    again = Queue(store, Limits(lease=1000), News())
    again.recover()
    assert (status_of(again, first), status_of(again, second)) == ("cancelled", "queued")
    again.claim("m")
    again.recover()
    assert status_of(again, second) == "failed"
    store.close()


# --- the line -------------------------------------------------------------------------------------------------


class Cutter:
    """Between client and server: cuts connections after a number of bytes, for some time."""

    def __init__(self, address, rng):
        host, port = address.removeprefix("http://").split(":")
        self._to, self._rng = (host, int(port)), rng
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.cuts = 0
        self.cutting = True
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client):
        left = [self._rng.randrange(400_000) if self.cutting else 10**12]
        with client, socket.create_connection(self._to) as server:
            back = threading.Thread(target=self._pass_on, args=(server, client, left))
            back.start()
            self._pass_on(client, server, left)
            back.join()

    def _pass_on(self, source, target, left):
        with suppress(OSError):
            while data := source.recv(4096):
                data, whole = data[: max(left[0], 0)], len(data)
                left[0] -= whole
                target.sendall(data)
                if left[0] <= 0:
                    self.cuts += 1
                    break
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self._listener.close()


def test_a_line_that_is_cut_anywhere_loses_no_job(server, monkeypatch):
    monkeypatch.setattr("nnsight.remote._transport._ATTEMPTS", 30)
    monkeypatch.setattr("nnsight.remote._transport._LONGEST_WAIT", 0.3)
    cutter = Cutter(server.host, random.Random(0))
    monkeypatch.setattr(CONFIG.API, "HOST", cutter.address)
    model = LanguageModel(NAME)
    weight = torch.arange(20_000.0)
    for number in range(12):
        if number == 11:
            cutter.cutting = False
        with model.trace("Hello", remote=True, timeout=200):
            echoed = (weight + number).save()
        assert torch.equal(echoed, weight + number)
    cutter.close()
    assert cutter.cuts > 5
    assert ends_of(server) == {"done": 12}  # repeated requests were no second jobs


def test_a_server_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("nnsight.remote._transport._LONGEST_WAIT", 0.01)
    import asyncio

    async def ask():
        connection = Connection("http://127.0.0.1:9", None)
        try:
            await connection.request("GET", "/v1/status")
        finally:
            await connection.close()

    with pytest.raises(Exception, match=r"http://127.0.0.1:9 could not be reached after 6 attempts"):
        asyncio.run(ask())
