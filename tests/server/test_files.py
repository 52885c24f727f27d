"""Results in other places: the same bytes, refusals and time to live, with a server of S3's protocol and fsspec's own."""

from __future__ import annotations

import stat
import sys
import time

import fsspec
import pytest

from nnsight.server._files import FilesError, LocalFiles, RemoteFiles, open_files
from nnsight.server._limits import Limits
from nnsight.server._news import News
from nnsight.server._queue import Queue, TooMuchStoredError, UnknownJobError
from nnsight.server._store import Store


@pytest.fixture(params=["local", "file", "memory", "s3"])
def url(request, tmp_path):
    if request.param == "s3":
        return request.getfixturevalue("s3")()
    return {"local": None, "file": f"file://{tmp_path}/there", "memory": f"memory://{tmp_path.name}"}[request.param]


def test_bytes_are_kept_read_and_removed(url, tmp_path):
    files = open_files(url, tmp_path / "jobs")
    large = bytes(range(256)) * 50_000
    files.write("a.job", b"")
    files.write("a.answer", large)
    assert files.read("a.job") == b""
    assert files.read("a.answer") == large
    files.write("a.answer", b"again")
    assert files.read("a.answer") == b"again"
    for _ in range(2):  # the second time there is nothing to remove
        files.remove("a.answer")
    with pytest.raises(FileNotFoundError):
        files.read("a.answer")
    assert files.read("a.job") == b""


def test_answers_are_the_owners_alone_and_for_a_time(url, tmp_path):
    store = Store(tmp_path, results=url)
    queue = Queue(store, Limits(keep=1, stored=100), News())
    job = queue.submit("ann", "key", "m", b"frame" * 10, 10)
    claim = queue.claim("m")
    assert claim.frame == b"frame" * 10
    queue.finish(job, b"answer", claim.turn)
    assert queue.answer("ann", job) == b"answer"
    with pytest.raises(UnknownJobError):
        queue.answer("bob", job)
    with pytest.raises(FileNotFoundError):
        store.read(job, "job")
    with pytest.raises(TooMuchStoredError):
        queue.submit("ann", "large", "m", bytes(95), 10)
    time.sleep(1.1)
    queue.sweep()
    with pytest.raises(UnknownJobError):
        queue.answer("ann", job)
    with pytest.raises(FileNotFoundError):
        store.read(job, "answer")
    store.close()


def test_local_files_are_the_servers_alone(tmp_path):
    files = open_files(f"file://{tmp_path}/there", tmp_path / "jobs")
    assert isinstance(files, LocalFiles)
    assert stat.S_IMODE((tmp_path / "there").stat().st_mode) == 0o700


def test_what_is_in_a_bucket_is_what_was_written(s3):
    url = s3()
    RemoteFiles(url).write("x.answer", b"bytes")
    system, root = fsspec.core.url_to_fs(url)
    assert system.cat_file(f"{root}/x.answer") == b"bytes"
    assert [entry.rpartition("/")[2] for entry in system.ls(root, refresh=True)] == ["x.answer"]  # the probe is gone


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ("bucket/folder", "is no URL"),
        ("nowhere://x", "nowhere"),
        ("s3://key:secret@bucket/x", "Credentials do not belong into the URL"),
    ],
)
def test_urls_that_do_not_do_are_named(wrong, text, tmp_path):
    with pytest.raises(FilesError, match=text) as caught:
        open_files(wrong, tmp_path)
    assert "secret" not in str(caught.value)


def test_a_bucket_that_is_not_there_is_named_at_the_start(s3, tmp_path):
    url = s3().replace("bucket-", "other-")
    with pytest.raises(FilesError, match=f"Results cannot be kept at {url}"):
        Store(tmp_path, results=url)


def test_a_library_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setattr(sys.modules["fsspec.registry"], "registry", {})
    with pytest.raises(FilesError, match=r'pip install "nnsight\[s3\]"'):
        open_files("s3://bucket/x", tmp_path)


def test_a_place_that_fails_while_a_job_runs_is_an_error_of_the_job(s3, tmp_path):
    """A line to the store that is cut is an `OSError`, which the service answers with 503 and a replica tells the job."""
    files = RemoteFiles(s3())
    files._root = "no-such-bucket-at-all"
    for act in (lambda: files.write("a", b"x"), lambda: files.read("a")):
        with pytest.raises(FileNotFoundError):
            act()
