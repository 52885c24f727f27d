"""The commands around a server, typed as a user would: `python -m nnsight …` in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from nnsight import CONFIG, LanguageModel
from nnsight.errors import JobCancelledError

NAME = "nnsight/landmarks"


def run(*arguments, given=None, code=0, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "nnsight", *arguments],
        capture_output=True,
        text=True,
        input=given,
        env={**os.environ, **environment},
        timeout=200,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys"
    ann = run("keys", "create", "ann", "--file", str(file)).strip()
    root = run("keys", "create", "root", "--admin", "--priority", "3", "--file", str(file)).strip()
    run("keys", "create", "gone", "--file", str(file))
    return {"file": str(file), "ann": ann, "root": root}


@pytest.fixture(scope="module")
def server(keys, start_server):
    return start_server(NAME, "--api-keys", keys["file"])


@pytest.fixture
def at(server, keys, monkeypatch):
    """The environment of ann, in this process and for others."""
    monkeypatch.setattr(CONFIG.API, "HOST", server.host)
    monkeypatch.setattr(CONFIG.API, "APIKEY", keys["ann"])
    server.wait_for(NAME)
    return {"NDIF_HOST": server.host, "NDIF_API_KEY": keys["ann"]}


def test_keys_are_listed_and_revoked(keys):
    assert run("keys", "list", "--file", keys["file"]).splitlines()[:2] == ["ann", "root  administrator, priority 3"]
    assert run("keys", "revoke", "gone", "--file", keys["file"]) == "1 key of gone revoked\n"
    assert "gone" not in run("keys", "list", "--file", keys["file"])
    assert "no key of 'gone'" in run("keys", "revoke", "gone", "--file", keys["file"], code=2)


def test_status_and_whoami(at):
    lines = run("status", **at).splitlines()
    assert lines[0].startswith("nnsight ")
    assert lines[1] == f"{NAME}: running, 0 running, 0 waiting"
    assert run("whoami", **at) == "ann\n"
    assert "does not know this key" in run("whoami", **{**at, "NDIF_API_KEY": "x"}, code=2)


def test_queue_logs_and_cancel(at):
    model = LanguageModel(NAME)
    with model.trace("Hello", remote=True, blocking=False, timeout=250) as slow:
        import time as clock

        print("begun")
        clock.sleep(200)
    with model.trace("Hello", remote=True, blocking=False, timeout=250) as waiting:
        print("hello from the block")
        raise ValueError("of the block")
    while slow.status != "running" or waiting.id is None:
        time.sleep(0.05)
    lines = run("queue", **at).splitlines()
    assert [line.split("  ")[2:] for line in lines] == [[NAME, "queued"], [NAME, "running"]]
    assert lines[1].startswith(slow.id[:12])
    assert run("cancel", slow.id[:8], **at) == f"{slow.id[:12]} is to end\n"
    with pytest.raises(JobCancelledError):
        slow.result(60)
    assert run("logs", waiting.id[:8], **at) == "hello from the block\n"
    assert run("logs", slow.id, **at) == "begun\n"
    assert "no such job" in run("logs", "0" * 32, **at, code=2)
    assert "no such job" in run("cancel", "0" * 32, **at, code=2)


def test_deploy_and_evict(at, keys):
    admin = {**at, "NDIF_API_KEY": keys["root"]}
    assert "no administrator" in run("deploy", "gpt2", **at, code=2)
    assert "is being loaded" in run("deploy", "gpt2", **admin)
    assert "served already" in run("deploy", "gpt2", **admin, code=2)
    assert run("status", **at).splitlines()[2].startswith("gpt2: ")
    assert "no administrator" in run("evict", "gpt2", **at, code=2)
    assert run("evict", "gpt2", **admin) == "gpt2 is served no longer\n"
    assert "not served here" in run("evict", "gpt2", **admin, code=2)
    assert "gpt2" not in run("status", **at)


def test_login_remembers_the_server_and_the_key(at, keys, tmp_path):
    place = {"XDG_CONFIG_HOME": str(tmp_path), "NDIF_HOST": "", "NDIF_API_KEY": ""}
    assert "NDIF_HOST" in run("status", **place, code=2)
    said = run("login", "--host", at["NDIF_HOST"], given=f"{keys['ann']}\n", **place)
    file = tmp_path / "nnsight" / "login.json"
    assert said == f"ann at {at['NDIF_HOST']}, remembered in {file}\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert run("whoami", **place) == "ann\n"
    assert "does not know" in run("login", "--host", at["NDIF_HOST"], "--key", "x", **place, code=2)
    assert run("whoami", **place) == "ann\n"
    # Another server than the one it was made on does not get the key.
    assert "does not know" in run(
        "whoami", "--host", at["NDIF_HOST"].replace("127.0.0.1", "localhost"), **place, code=2
    )
    file.write_text("{")
    assert "nnsight login" in run("whoami", **place, code=2)


def test_doctor(at, tmp_path):
    lines = run("doctor", "--data", str(tmp_path / "data"), **at).splitlines()
    assert all(line.startswith(("ok  ", "-   ")) for line in lines)
    assert lines[-1] == "ok  the key is that of ann"
    assert any("1 of 1 models ready" in line for line in lines)
    for option, extra in (("--ray", "ray"), ("--database", "postgresql"), ("--results", "s3")):
        (line,) = (line for line in lines if option in line)
        assert line.startswith("ok  ") or f'pip install "nnsight[{extra}]"' in line
    refused = run("doctor", **{**at, "NDIF_API_KEY": "x"}, code=2)
    assert refused == "nnsight: 1 of these is not in order\n"


def test_the_log_of_the_server_is_json(server, at, keys, tmp_path):
    folder = tmp_path / "data"
    command = [
        sys.executable,
        "-m",
        "nnsight",
        "serve",
        "--port",
        "0",
        "--data",
        str(folder),
        "--api-keys",
        keys["file"],
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("nnsight serves at http://127.0.0.1:")
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert [json.loads(line)["event"] for line in said.splitlines()] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", NAME], "Give either --api-keys FILE or --no-auth-on-loopback"),
        (["serve", NAME, "--no-auth-on-loopback", "--host", "0.0.0.0"], "can be reached from others"),
        (["serve", NAME, "--api-keys", "/nowhere/keys"], "No such file"),
        (
            ["serve", NAME, "--no-auth-on-loopback", "--memory-budget", "0.001"],
            "the memory budget of the server is 1.0 MiB",
        ),
    ],
)
def test_a_server_that_cannot_be_as_asked(arguments, message, tmp_path):
    assert message in run(*arguments, "--data", str(tmp_path), code=2)
