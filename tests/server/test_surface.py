"""What a server says of itself, and to whom: metrics, logs, its description, refusals, and nobody else's jobs."""

from __future__ import annotations

import errno
import io
import json
import logging
import sqlite3
import time

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import event, select
from sqlalchemy.exc import OperationalError

from nnsight.protocol import Event, Failure
from nnsight.server import _monitor
from nnsight.server._app import _CODES
from nnsight.server._keys import KeyFileError, Keys, create_key, list_users, revoke_keys
from nnsight.server._limits import Limits
from nnsight.server._monitor import log_to_stderr
from nnsight.server._store import jobs

from .conftest import LIMITS, frame_of

CANARY = "the-prompt-that-nobody-else-may-see"


# --- metrics --------------------------------------------------------------------------------------------------


def metrics(site):
    text = site.ask(None, "GET", "/metrics").text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_what_happens(site):
    first, second = (site.submit("ann").json()["id"] for _ in range(2))
    site.submit("bob")
    assert site.queue.claim("m").id == first
    site.queue.finish(first, b"answer")
    site.ask("ann", "DELETE", f"/v1/jobs/{second}")
    site.queue.claim("m")
    site.ask("nobody", "GET", "/v1/whoami")
    found = metrics(site)
    assert found["nnsight_jobs_submitted_total", "m"] == 3
    assert found["nnsight_jobs_ended_total", "m", "done"] == 1
    assert found["nnsight_jobs_ended_total", "m", "cancelled"] == 1
    assert found["nnsight_jobs_waiting", "m"] == 0
    assert found["nnsight_jobs_running", "m"] == 1
    assert found["nnsight_job_run_seconds_count", "m"] == 1
    assert found["nnsight_job_bytes_total", "m"] == 3 * len(frame_of())
    assert found["nnsight_requests_refused_total", "401"] == 1
    assert found["process_resident_memory_bytes",] > 0


def test_metrics_name_no_users_and_no_jobs(site):
    job = site.submit("ann").json()["id"]
    text = site.ask(None, "GET", "/metrics").text
    assert 'model="m"' in text
    assert "ann" not in text.replace("scanned", "")
    assert job not in text


# --- logs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(_monitor.sys, "stderr", stream)
    loggers = [logging.getLogger(name) for name in ("nnsight.server", "uvicorn")]
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    log_to_stderr()
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_logs_are_lines_of_json_without_what_is_in_jobs(site, lines, monkeypatch):
    job = site.submit("ann", frame_of(f"print({CANARY!r})")).json()["id"]
    site.queue.claim("m")
    site.queue.note(job, 0, Event("print", CANARY))
    site.queue.fail(job, f"because of {CANARY}")
    site.submit("ann", CANARY.encode())
    site.submit("ann", frame_of(model=CANARY))

    def locked(*_args, **_options):
        raise OperationalError("INSERT INTO events", {"body": CANARY}, sqlite3.OperationalError("database is locked"))

    monkeypatch.setattr(site.queue, "submit", locked)
    assert site.submit("ann").status_code == 503
    found = lines()
    events = [line["event"] for line in found]
    assert events[:3] == ["job submitted", "job begun", "job ended"]
    assert events.count("request refused") == 3
    assert {line["job"] for line in found[:3]} == {job}
    assert found[2]["status"] == "failed"
    assert all({"time", "level", "logger"} <= line.keys() for line in found)
    assert CANARY not in json.dumps(found)


def test_errors_of_the_database_have_no_values_in_them(site):
    with pytest.raises(OperationalError) as caught, site.store.begin() as db:
        db.exec_driver_sql("INSERT INTO nowhere VALUES (?)", (CANARY,))
    assert CANARY not in str(caught.value)


# --- the description ------------------------------------------------------------------------------------------


def test_the_description_is_whole(site):
    found = site.ask(None, "GET", "/openapi.json").json()
    schemas = found["components"]["schemas"]
    text = json.dumps(found)
    for name in {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in schemas, name
    routes = {(method.upper(), path) for path, methods in found["paths"].items() for method in methods}
    assert {("POST", "/v1/jobs"), ("GET", "/v1/jobs/{job}"), ("DELETE", "/v1/models/{model}"), ("GET", "/metrics")} <= {
        (method, path.replace(":path", "")) for method, path in routes
    }
    for methods in found["paths"].values():
        for method in methods.values():
            assert method["summary"]
            assert all(answer["description"] for answer in method["responses"].values())
    documented = {code for methods in found["paths"].values() for m in methods.values() for code in m["responses"]}
    assert {str(code) for code, _ in _CODES.values()} <= documented
    assert schemas["JobState"]["properties"].keys() >= {"id", "status", "position", "events"}


def test_answers_are_as_described(site):
    description = site.ask(None, "GET", "/openapi.json").json()
    job = site.submit("ann").json()["id"]
    for path, url in (
        ("/v1/status", "/v1/status"),
        ("/v1/whoami", "/v1/whoami"),
        ("/v1/jobs", "/v1/jobs"),
        ("/v1/jobs/{job}", f"/v1/jobs/{job}"),
    ):
        answer = site.ask("ann", "GET", url)
        schema = description["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        described = description["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        assert answer.json().keys() == described["properties"].keys()
        assert set(described["required"]) <= answer.json().keys()


# --- refusals -------------------------------------------------------------------------------------------------


def retry_after(answer):
    return int(answer.headers["Retry-After"]) if "Retry-After" in answer.headers else None


def test_too_many_jobs(site):
    for _ in range(LIMITS.queued):
        assert site.submit("ann").status_code == 202
    answer = site.submit("ann")
    assert (answer.status_code, retry_after(answer)) == (429, 2)
    assert site.submit("bob").status_code == 202


def test_too_many_bytes(site):
    large = frame_of("x" * (LIMITS.body - 1000))
    answer = site.submit("ann", bytes(LIMITS.body + 1))
    assert (answer.status_code, retry_after(answer)) == (413, None)  # it will never fit
    for _ in range(2):
        job = site.submit("ann", large).json()["id"]
        site.queue.claim("m")
        site.queue.finish(job, bytes(LIMITS.body))
    answer = site.submit("ann", large)
    assert (answer.status_code, retry_after(answer)) == (413, 30)  # answers are forgotten in time
    assert "of at most 50000" in answer.json()["reason"]
    assert site.submit("bob", large).status_code == 202


def test_a_server_that_ends_takes_no_jobs(site):
    site.service.draining = True
    answer = site.submit("ann")
    assert (answer.status_code, retry_after(answer)) == (503, 5)
    assert "finishes what runs" in site.ask(None, "GET", "/").text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_said_and_leaves_nothing(site, monkeypatch, number):
    def full(*_args):
        raise OSError(number, "no room")

    with monkeypatch.context() as patch:
        patch.setattr(type(site.store), "write", full)
        answer = site.submit("ann")
        assert (answer.status_code, retry_after(answer)) == (503, 5)
    assert site.queue.counts() == {}
    assert site.submit("ann").status_code == 202


def test_a_locked_database_is_said_and_leaves_nothing(site, tmp_path):
    site.store.engine.dispose()
    other = sqlite3.connect(tmp_path / "data" / "queue.sqlite", isolation_level=None)
    event.listen(site.store.engine, "connect", lambda connection, _: connection.execute("PRAGMA busy_timeout=50"))
    other.execute("BEGIN EXCLUSIVE")
    answer = site.submit("ann")
    assert (answer.status_code, retry_after(answer)) == (503, 5)
    other.execute("ROLLBACK")
    other.close()
    assert list((tmp_path / "data" / "jobs").iterdir()) == []
    assert site.submit("ann").status_code == 202


# --- owners ---------------------------------------------------------------------------------------------------


def test_forged_ids_and_keys_find_nothing(site):
    job = site.submit("ann").json()["id"]
    site.queue.claim("m")
    site.queue.note(job, 0, Event("print", CANARY))
    site.queue.finish(job, CANARY.encode())
    forged = [job, job.upper(), f"{job}.answer", f"../{job}", "0" * 32, f"{job}%00", "%25", "' OR 1=1 --"]
    for name in forged:
        for method, path in (("GET", ""), ("GET", "/result"), ("DELETE", "")):
            answer = site.ask("bob", method, f"/v1/jobs/{name}{path}")
            assert answer.status_code in (404, 405), (name, method, path)
            assert CANARY not in answer.text
    for key in (None, "", "x", "Bearer", site.keys["ann"][:-1], f"{site.keys['ann']} "[::-1]):
        assert site.ask(key, "GET", f"/v1/jobs/{job}/result").status_code == 401
    assert site.ask("bob", "GET", "/v1/jobs").json() == {"jobs": []}
    assert [found["id"] for found in site.ask("ann", "GET", "/v1/jobs").json()["jobs"]] == [job]
    assert site.ask("ann", "GET", f"/v1/jobs/{job}/result").content == CANARY.encode()


def test_the_hash_of_a_key_is_no_key(site, tmp_path):
    digest = (tmp_path / "keys").read_text().split()[0]
    assert site.ask(digest, "GET", "/v1/whoami").status_code == 401


@pytest.mark.parametrize("header", ["X-Owner", "X-User", "Owner", "X-Forwarded-User", "X-Priority", "Priority"])
def test_headers_say_nothing_of_owner_and_priority(site, header):
    slow = site.submit("bob").json()["id"]
    job = site.submit("ann", **{header: "bob" if "r" in header[-1] else "9"}).json()["id"]
    assert site.ask("bob", "GET", f"/v1/jobs/{job}").status_code == 404
    assert site.queue.claim("m").id == slow


@pytest.mark.parametrize("field", ["owner", "priority", "status", "attempts"])
def test_a_job_cannot_say_whose_it_is_or_how_urgent(site, field):
    frame = frame_of()
    plain = msgspec.msgpack.decode(frame[16 : 16 + int.from_bytes(frame[4:8], "little")])
    header = msgspec.msgpack.encode(plain | {field: 9})
    padding = bytes(-(16 + len(header)) % 64)
    forged = frame[:4] + len(header).to_bytes(4, "little") + frame[8:16] + header + padding
    answer = site.submit("ann", forged)
    assert answer.status_code == 400
    assert field in answer.json()["reason"]


def test_priorities_come_from_the_file_of_keys(site):
    slow, fast = site.submit("ann").json()["id"], site.submit("vip").json()["id"]
    assert site.ask("ann", "GET", f"/v1/jobs/{slow}").json()["position"] == 1
    assert site.queue.claim("m").id == fast
    assert site.queue.claim("m").id == slow


def test_an_idempotency_key_is_its_users_own(site):
    first = site.submit("ann", **{"Idempotency-Key": "the same key"}).json()["id"]
    assert site.submit("ann", **{"Idempotency-Key": "the same key"}).json()["id"] == first
    assert site.submit("bob", **{"Idempotency-Key": "the same key"}).json()["id"] != first


# --- keys -----------------------------------------------------------------------------------------------------


def test_keys_are_made_listed_and_revoked(tmp_path):
    file = tmp_path / "keys"
    first, second = create_key(file, "ann"), create_key(file, "bob", admin=True, priority=-2)
    keys = Keys(file)
    assert keys.user(f"Bearer {first}") == ("ann", False, 0)
    assert keys.user(f"Bearer {second}") == ("bob", True, -2)
    assert [user.name for user in list_users(file)] == ["ann", "bob"]
    assert file.stat().st_mode & 0o777 == 0o600
    assert revoke_keys(file, "ann") == 1
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(Exception, match="does not know this key"):
        keys.user(f"Bearer {first}")
    assert keys.user(f"Bearer {second}").name == "bob"
    with pytest.raises(KeyFileError, match="no key of 'ann'"):
        revoke_keys(file, "ann")


@pytest.mark.parametrize("name", ["", "two words", "a\nb", "x admin", "a/b"])
def test_names_that_would_say_more_are_refused(tmp_path, name):
    with pytest.raises(KeyFileError, match="no name of a user"):
        create_key(tmp_path / "keys", name)


def test_a_line_that_is_no_key_is_named(tmp_path):
    (tmp_path / "keys").write_text("hello\n")
    with pytest.raises(KeyFileError, match="Line 1"):
        list_users(tmp_path / "keys")


# --- models ---------------------------------------------------------------------------------------------------


def test_only_administrators_deploy_and_evict(site):
    assert site.ask("ann", "POST", "/v1/models", json={"model": "n"}).status_code == 403
    assert site.ask("ann", "DELETE", "/v1/models/m").status_code == 403
    assert site.ask("x", "POST", "/v1/models", json={"model": "n"}).status_code == 401
    assert site.fleet.names() == ["m"]


def test_models_come_and_go(site):
    deployed = site.ask("root", "POST", "/v1/models", json={"model": "org/n@main"})
    assert deployed.status_code == 202
    assert [(model["name"], model["revision"]) for model in deployed.json()["models"]] == [
        ("m", None),
        ("org/n", "main"),
    ]
    assert site.store.deployed() == ["m", "org/n@main"]
    assert site.ask("root", "POST", "/v1/models", json={"model": "org/n@main"}).status_code == 409
    assert site.ask("root", "POST", "/v1/models", json={"name": "n"}).status_code == 400
    job = site.submit("ann").json()["id"]
    assert site.ask("root", "DELETE", "/v1/models/m").status_code == 204
    assert site.ask("root", "DELETE", "/v1/models/m").status_code == 404
    state = site.ask("ann", "GET", f"/v1/jobs/{job}").json()
    assert state["status"] == "failed"
    assert "taken out of service" in msgspec.convert(state["error"], Failure).text
    assert site.submit("ann").status_code == 404
    assert site.store.deployed() == ["org/n@main"]


def test_limits_are_public(site):
    assert site.ask(None, "GET", "/v1/status").json()["limits"]["body"] == LIMITS.body
    assert Limits().public()["queued"] == 64


# --- engines --------------------------------------------------------------------------------------------------


def test_a_block_for_the_modules_of_an_engine_is_refused_by_name(site):
    refused = site.submit("ann", frame_of(engine="vllm"))
    assert refused.status_code == 409
    assert "LanguageModel('m')" in refused.json()["reason"]
    assert site.ask("ann", "GET", "/v1/jobs").json()["jobs"] == []


def test_completions_are_served_by_engines_alone(site):
    assert site.ask("ann", "POST", "/v1/completions", json={"model": "m", "prompt": "a"}).status_code == 404
    assert "/v1/completions" not in site.ask(None, "GET", "/openapi.json").json()["paths"]


def test_the_leases_of_many_jobs_are_renewed_together(site):
    first, second, third = (site.submit("ann").json()["id"] for _ in range(3))
    claims = [site.queue.claim("m") for _ in range(2)]
    site.ask("ann", "DELETE", f"/v1/jobs/{second}")
    before = time.time()
    lost = claims[0]._replace(id=third, turn=1)
    assert site.queue.beat_all([*claims, lost]) == {second, third}  # one that another runs by now, too
    with site.store.look() as db:
        leases = {row.id: row.lease for row in db.execute(select(jobs))}
    assert min(leases[first], leases[second]) >= before + LIMITS.lease
    assert leases[third] is None  # it waits, and has none
