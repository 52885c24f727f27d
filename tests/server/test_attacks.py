"""Blocks that mean harm: each ends with a clear error, and the next user's job gives the numbers it always gave."""

from __future__ import annotations

import secrets
import time

import httpx
import pytest
import torch

from nnsight import CONFIG, LanguageModel
from nnsight.errors import RemoteTimeoutError, ServerError
from nnsight.sandbox import missing
from nnsight.server import create_key

from ..endless import catch_everything

NAME = "nnsight/landmarks"
PROMPT = "The Eiffel Tower is in the city of"

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"this machine lacks {missing()}")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys"
    return {"file": str(file), "ann": create_key(file, "ann"), "bob": create_key(file, "bob")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def running(keys, folder, start_server):
    options = ("--job-seconds", "8", "--job-memory", "1024", "--user-jobs", "8")
    return start_server(NAME, "--api-keys", keys["file"], *options, folder=folder)


@pytest.fixture(scope="module")
def expected():
    local = LanguageModel(NAME, dispatch=True)
    with torch.no_grad(), local.trace(PROMPT):
        logits = local.lm_head.output.save()
    return logits


@pytest.fixture
def server(running, keys, expected, monkeypatch):
    """Ann attacks; afterwards bob's job is done as ever."""
    monkeypatch.setattr(CONFIG.API, "HOST", running.host)
    monkeypatch.setattr(CONFIG.API, "APIKEY", keys["ann"])
    running.wait_for(NAME)
    yield running
    CONFIG.API_KEY = keys["bob"]
    model = LanguageModel(NAME)
    with torch.no_grad(), model.trace(PROMPT, remote=True, timeout=100):
        logits = model.lm_head.output.save()
    assert torch.equal(logits, expected)
    assert running.process.poll() is None


@pytest.fixture
def model(server):
    return LanguageModel(NAME)


def test_fork_bomb(model):
    with pytest.raises(PermissionError):
        with model.trace("Hello", remote=True):
            import os

            while True:
                os.fork()


def test_thread_bomb(model):
    with pytest.raises(RuntimeError, match="can't start new thread"):
        with model.trace("Hello", remote=True):
            import threading

            stop = threading.Event()
            while True:
                threading.Thread(target=stop.wait, daemon=True).start()


def test_memory_bomb(model):
    with pytest.raises(MemoryError):
        with model.trace("Hello", remote=True):
            hoard = []
            while True:
                hoard.append(bytearray(50_000_000))


def test_memory_bomb_of_tensors(model):
    with pytest.raises(RuntimeError, match="allocate memory"):
        with model.trace("Hello", remote=True):
            hoard = []
            while True:
                hoard.append(torch.ones(50_000_000))


def test_zip_bomb(model):
    import zlib

    packed = zlib.compress(bytes(1 << 28), 9)
    for _ in range(1):
        packed = zlib.compress(packed, 9)
    with pytest.raises(MemoryError):
        with model.trace("Hello", remote=True):
            data = zlib.decompress(zlib.decompress(packed)) * 8


def test_a_compressed_body_is_not_unpacked(server, keys):
    headers = {"Authorization": f"Bearer {keys['ann']}", "Idempotency-Key": "0123456789", "Content-Encoding": "gzip"}
    assert httpx.post(f"{server.host}/v1/jobs", headers=headers, content=b"\x1f\x8b").status_code == 400


def test_time_bomb_that_catches_everything(model):
    with pytest.raises(ServerError, match="more than 8 seconds"):
        with model.trace("Hello", remote=True):
            catch_everything()


def test_park_bomb(model):
    with pytest.raises(ServerError, match="more than 8 seconds"):
        with model.trace("Hello", remote=True):
            import threading

            threading.Event().wait()


def test_park_bomb_at_a_place_that_never_comes(model):
    from nnsight.errors import NNsightError

    with pytest.raises(NNsightError):
        with model.trace(remote=True) as tracer:
            meet = tracer.barrier(2)
            with tracer.invoke("Hello"):
                meet()


def test_log_bomb(model, capsys):
    with model.trace("Hello", remote=True):
        for _ in range(1_000):
            print("x" * 10_000)
    assert len(capsys.readouterr().out) < 2 * 2**20


def test_recursion_bomb(model):
    def deeper(depth):
        return deeper(depth + 1)

    with pytest.raises(RecursionError):
        with model.trace("Hello", remote=True):
            deeper(0)


def test_crash_by_the_stack(model):
    with pytest.raises(ServerError, match="died, 2 times over"):
        with model.trace("Hello", remote=True):
            import sys

            sys.setrecursionlimit(10**8)

            def down(value):
                return [down, value].__class__(map(down, [value]))

            down(1)


def test_flood_of_jobs(model, server, keys):
    with pytest.raises(ServerError, match="as many as one user may"):
        for _ in range(40):
            with model.trace("Hello", remote=True, blocking=False) as job:
                import time as clock

                clock.sleep(60)
            if job.status == "sending":
                time.sleep(0.02)
        job.result(120)
    jobs = httpx.get(f"{server.host}/v1/jobs", headers={"Authorization": f"Bearer {keys['ann']}"}).json()["jobs"]
    open_ = [found for found in jobs if found["status"] in ("queued", "running")]
    assert len(open_) <= 8
    for found in open_:
        httpx.delete(f"{server.host}/v1/jobs/{found['id']}", headers={"Authorization": f"Bearer {keys['ann']}"})


def test_garbage_into_the_servers_ear(model):
    """A block finds its one descriptor, and writes to the server itself."""
    with pytest.raises(ServerError, match="died, 2 times over"):
        with model.trace("Hello", remote=True):
            import os

            for number in range(64):
                try:
                    os.write(number, b"E" + bytes([255] * 8) + b"garbage")
                except OSError:
                    continue


def test_a_forged_answer_is_its_own_jobs_and_is_checked(model):
    from nnsight.errors import ProtocolError

    with pytest.raises(ProtocolError):
        with model.trace("Hello", remote=True):
            import os
            import struct

            for number in range(64):
                try:
                    os.write(number, struct.pack("<cQ", b"A", 20) + b"this is no answer...")
                except OSError:
                    continue


def test_another_users_prompts_and_files_are_nowhere(server, keys, folder):
    secret = "xyzzy-" + secrets.token_hex(16)
    CONFIG.API_KEY = keys["bob"]
    model = LanguageModel(NAME)
    with model.trace(f"{PROMPT} {secret}", remote=True):
        print(secret)
        kept = [secret, model.lm_head.output[0, -1].argmax().item()].save()
    assert kept[0] == secret
    CONFIG.API_KEY = keys["ann"]
    place, given = str(folder), [f"only to see that the search finds xyzzy-{'0' * 32}"]
    with model.trace("Hello", remote=True):
        import gc
        import linecache
        import os
        import re
        import sys

        hold, seen, opened = given, [].save(), [].save()
        look = re.compile("xyzzy-[0-9a-f]{32}")
        for thing in gc.get_objects():
            values = list(thing.values()) if type(thing) is dict else thing if type(thing) in (list, tuple) else ()
            seen += [found for value in values if type(value) is str for found in look.findall(value)]
            seen += [
                found for value in values if type(value) is bytes for found in look.findall(value.decode("latin1"))
            ]
        for entry in [
            *linecache.cache.values(),
            *os.environ.items(),
            *[f.f_locals for f in sys._current_frames().values()],
        ]:
            seen += look.findall(str(entry))
        for path in (place, f"{place}/jobs", f"{place}/queue.sqlite", "/proc/self/environ", "/proc/1/environ"):
            try:
                opened.append(str(os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(10)))  # noqa: SIM115
            except OSError:
                continue
    assert opened == []
    assert set(seen) == {"xyzzy-" + "0" * 32}


def test_a_timeout_is_the_users_own(model):
    with pytest.raises(RemoteTimeoutError):
        with model.trace("Hello", remote=True, timeout=1):
            import time as clock

            clock.sleep(30)
