"""A server as its users meet it: keys, limits, faults, and its end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx
import pytest

import nnsight
from nnsight import CONFIG, LanguageModel
from nnsight.errors import ServerError
from nnsight.server import create_key

from ..endless import catch_everything

NAME = "nnsight/landmarks"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys"
    return {"file": file, "ann": create_key(file, "ann"), "bob": create_key(file, "bob")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def running(keys, folder, start_server):
    return start_server(NAME, "--api-keys", str(keys["file"]), folder=folder)


@pytest.fixture
def server(running, keys, monkeypatch):
    monkeypatch.setattr(CONFIG.API, "HOST", running.host)
    monkeypatch.setattr(CONFIG.API, "APIKEY", keys["ann"])
    running.wait_for(NAME)
    return running


@pytest.fixture
def model(server):
    return LanguageModel(NAME)


def ask(server, key, method, path, **options):
    headers = {"Authorization": f"Bearer {key}"} | options.pop("headers", {})
    return httpx.request(method, server.host + path, headers=headers, **options)


def test_a_key_says_who_one_is(server, keys, monkeypatch):
    assert nnsight.whoami() == "ann"
    CONFIG.set_default_api_key(keys["bob"])
    assert nnsight.whoami() == "bob"
    monkeypatch.setattr(CONFIG.API, "APIKEY", "made up")
    with pytest.raises(ServerError, match="does not know this key"):
        nnsight.whoami()
    assert keys["ann"] not in keys["file"].read_text()


def test_the_status_lists_models_and_versions(server):
    info = nnsight.status()
    assert [(model.name, model.running) for model in info.models] == [(NAME, True)]
    assert not info.trusted
    assert all(here == there for here, there in nnsight.compare().values())
    assert not nnsight.is_model_running("another/model")


def test_jobs_and_answers_are_their_owners(server, model, keys):
    with model.trace("Hello", remote=True, blocking=False) as job:
        hidden = model.transformer.h[0].output[0].save()
    job.result()
    for method, path in (("GET", ""), ("GET", "/result"), ("DELETE", "")):
        path = f"/v1/jobs/{job.id}{path}"
        assert ask(server, keys["bob"], method, path).status_code == 404
        assert ask(server, "made up", method, path).status_code == 401
    assert ask(server, keys["ann"], "GET", f"/v1/jobs/{job.id}/result").status_code == 200


@pytest.mark.parametrize(
    ("headers", "body", "code"),
    [
        ({"Idempotency-Key": "12345678"}, b"no job", 400),
        ({}, b"NNS\x01" + bytes(60), 400),
        ({"Idempotency-Key": "12345678", "Content-Encoding": "gzip"}, b"x", 400),
        ({"Idempotency-Key": "12345678", "Content-Length": str(2**40)}, None, 413),
    ],
)
def test_what_is_no_job_is_refused(server, keys, headers, body, code):
    if body is None:
        host, port = server.host.removeprefix("http://").split(":")
        assert refused_before_the_body(host, int(port), keys["ann"], headers) == code
    else:
        assert ask(server, keys["ann"], "POST", "/v1/jobs", headers=headers, content=body).status_code == code


def refused_before_the_body(host, port, key, headers):
    import socket

    lines = [f"{name}: {value}" for name, value in {**headers, "Authorization": f"Bearer {key}", "Host": host}.items()]
    with socket.create_connection((host, port), timeout=20) as connection:
        connection.sendall("\r\n".join(["POST /v1/jobs HTTP/1.1", *lines, "", ""]).encode())
        return int(connection.recv(1000).split()[1])


def test_an_unknown_model_is_named(server):
    model = LanguageModel("gpt2")
    with pytest.raises(ServerError, match=r"'gpt2' is not served here; served are: nnsight/landmarks"):
        with model.trace("Hello", remote=True):
            logits = model.lm_head.output.save()


def test_confined_blocks_reach_nothing(server, model):
    with pytest.raises(PermissionError) as caught:
        with model.trace("Hello", remote=True):
            text = open("/etc/passwd").read()  # noqa: SIM115
    assert caught.traceback[-1].path.name == "test_service.py"
    with pytest.raises(PermissionError):
        with model.trace("Hello", remote=True):
            import os as system

            system.kill(system.getppid(), 9)


def test_what_a_block_does_to_the_model_stays_with_it(server, model):
    with model.trace("Hello", remote=True):
        before = model.lm_head.output.save()
    with model.trace("Hello", remote=True):
        for parameter in model._model.parameters():
            parameter.data.zero_()
    with model.trace("Hello", remote=True):
        after = model.lm_head.output.save()
    assert (after == before).all()


def test_a_crash_of_a_block_is_tried_again_and_then_reported(server, model):
    with pytest.raises(ServerError, match="died, 2 times over"):
        with model.trace("Hello", remote=True):
            import ctypes

            ctypes.string_at(0)
    with model.trace("Hello", remote=True):
        logits = model.lm_head.output.save()
    assert logits.shape[0] == 1


def test_an_endless_block_is_cancelled(server, model):
    with model.trace("Hello", remote=True, blocking=False) as job:
        catch_everything()
    wait_until(lambda: job.status == "running")
    job.cancel()
    with pytest.raises(nnsight.errors.JobCancelledError):
        job.result(30)
    assert job.status == "cancelled"


def test_a_block_that_takes_too_long_is_ended(server, model):
    with pytest.raises(nnsight.errors.RemoteTimeoutError, match="2 seconds"):
        with model.trace("Hello", remote=True, timeout=2):
            while True:
                pass


def wait_until(condition, seconds=250):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_printing_has_an_end(server, model, capsys):
    with model.trace("Hello", remote=True):
        for _ in range(40):
            print("x" * 100_000)
    out = capsys.readouterr().out
    assert len(out) < 2 * 2**20
    assert out.endswith("the rest is left out]\n")


def children_of(pid):
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def test_the_death_of_the_zygote_loses_no_job(server, model):
    with model.trace("Hello", remote=True, blocking=False, timeout=280) as job:
        import time as clock

        clock.sleep(4.0)
        logits = model.lm_head.output.save()
    wait_until(lambda: job.status == "running")
    for child in children_of(server.process.pid):
        os.kill(child, signal.SIGKILL)
    assert job.result()["logits"].shape[0] == 1


def test_a_server_that_ends_keeps_what_waits(server, keys, folder, model, start_server, monkeypatch):
    with model.trace("Hello", remote=True, blocking=False, timeout=280) as running:
        import time as clock

        clock.sleep(4.0)
        logits = model.lm_head.output.save()
    wait_until(lambda: running.status == "running")
    with model.trace("Hello", remote=True, blocking=False, timeout=280) as waiting:
        logits = model.lm_head.output.save()
    wait_until(lambda: waiting.status == "queued")
    server.process.terminate()
    assert server.process.wait(60) in (0, -signal.SIGTERM)
    again = start_server(NAME, "--api-keys", str(keys["file"]), folder=folder)
    monkeypatch.setattr(CONFIG.API, "HOST", again.host)
    assert ask(again, keys["ann"], "GET", f"/v1/jobs/{running.id}").json()["status"] == "done"
    assert ask(again, keys["ann"], "GET", f"/v1/jobs/{running.id}/result").content.startswith(b"NNS\x01")
    wait_until(lambda: ask(again, keys["ann"], "GET", f"/v1/jobs/{waiting.id}").json()["status"] == "done")
