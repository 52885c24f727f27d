"""The bytes of jobs and answers: files that only the server's user can read, or anything that fsspec has a URL for."""

from __future__ import annotations

import errno
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import fsspec.core

from ..errors import NNsightError


class FilesError(NNsightError):
    """A place for results that cannot be used."""


class Files(Protocol):
    """Bytes by name; they are there as a whole or not at all, and what goes wrong is an `OSError`."""

    place: str  # names it, without secrets

    def write(self, name: str, data: bytes) -> None: ...

    def read(self, name: str) -> bytes: ...

    def remove(self, name: str) -> None:
        """Nothing where there is none."""
        ...


class LocalFiles:
    """Files in a folder that is the server's alone."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        self.place = folder.absolute().as_uri()

    def write(self, name: str, data: bytes) -> None:
        part = self._folder / f"{name}.part"
        part.write_bytes(data)
        part.replace(self._folder / name)

    def read(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            (self._folder / name).unlink()


class RemoteFiles:
    """Objects below a URL of fsspec, whose credentials come from the environment as its library reads them."""

    def __init__(self, url: str) -> None:
        self.place = url
        self._system, self._root = _open(url)

    def write(self, name: str, data: bytes) -> None:
        with _as_os_error():
            self._system.pipe_file(self._path(name), data)

    def read(self, name: str) -> bytes:
        with _as_os_error():
            return self._system.cat_file(self._path(name))

    def remove(self, name: str) -> None:
        with _as_os_error(), suppress(FileNotFoundError):
            self._system.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


def open_files(url: str | None, folder: Path) -> Files:
    """The place at `url`, or the folder; tried, so that what is wrong with it is known at the start.

    Raises:
        FilesError: It cannot be used.
    """
    if url is None:
        return LocalFiles(folder)
    parts = urlsplit(url)
    if parts.username or parts.password:
        raise FilesError("Credentials do not belong into the URL of --results, but into the environment (AWS_…).")
    if parts.scheme == "file":
        return LocalFiles(Path(parts.path))
    files = RemoteFiles(url)
    probe = f"probe-{uuid.uuid4().hex}"
    try:
        files.write(probe, b"nnsight")
        if files.read(probe) != b"nnsight":
            raise OSError(errno.EIO, "what was written is not what is read")
        files.remove(probe)
    except OSError as error:
        raise FilesError(f"Results cannot be kept at {url}: {error}") from error
    return files


def _open(url: str) -> tuple[Any, str]:
    scheme = urlsplit(url).scheme
    if not scheme:
        raise FilesError(f"{url!r} is no URL: s3://bucket/folder is one; --data names a folder.")
    try:
        system, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        remedy = 'pip install "nnsight[s3]"' if scheme == "s3" else str(error)
        raise FilesError(f"Results at {scheme}:// need a library that is not installed: {remedy}") from error
    except ValueError as error:
        raise FilesError(f"Results cannot be kept at {url}: {error}") from error
    return system, root


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Libraries of object stores have exceptions of their own for a line that is cut."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error
