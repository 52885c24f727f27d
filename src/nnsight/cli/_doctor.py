"""`nnsight doctor`: what works here, what does not, and what to do about it."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nnsight
from nnsight import CONFIG
from nnsight.config import stored_login
from nnsight.errors import NNsightError
from nnsight.protocol import versions
from nnsight.sandbox import missing

_SERVER = ("fastapi", "uvicorn", "sqlalchemy", "jinja2", "prometheus_client", "pythonjsonlogger", "fsspec")
# What some options of `nnsight serve` need beside those.
_MORE = (
    ("ray", "--ray", "ray"),
    ("psycopg", "--database postgresql+psycopg://…", "postgresql"),
    ("s3fs", "--results s3://…", "s3"),
)
_LEAST_FREE = 2**30


class DoctorError(NNsightError):
    """Something that was looked at is not in order."""


def add_doctor(commands: Any) -> None:
    """Add the command to a parser's."""
    doctor = commands.add_parser("doctor", help="check this machine, and the server that is set")
    doctor.set_defaults(run=_run)
    doctor.add_argument("--host", help="the server's address; by default NDIF_HOST, or that of `nnsight login`")
    doctor.add_argument("--data", type=Path, metavar="FOLDER", help="the folder that `serve --data` is to use")


def _run(options: argparse.Namespace) -> None:
    CONFIG.API.HOST = options.host or CONFIG.API.HOST
    wrong = 0
    for good, text in _checks(options.data):
        wrong += good is False
        print(f"{ {True: 'ok  ', False: 'no  ', None: '-   '}[good] }{text}")
    if wrong:
        raise DoctorError(f"{wrong} of these {'is' if wrong == 1 else 'are'} not in order")


def _checks(data: Path | None) -> Iterator[tuple[bool | None, str]]:
    """Pairs of whether something is in order (None: it is not needed here) and what it is."""
    here = versions()
    yield True, f"nnsight {here.nnsight}, torch {here.torch}, transformers {here.transformers}, Python {here.python}"
    lacking = [name for name in _SERVER if importlib.util.find_spec(name) is None]
    yield (
        (not lacking) or None,
        (
            f'to serve models: pip install "nnsight[server]" (lacking: {", ".join(lacking)})'
            if lacking
            else "the libraries of a server are installed"
        ),
    )
    yield from map(_optional, _MORE)
    unconfined = missing()
    yield (
        (not unconfined) or None,
        (
            f"other people's blocks cannot be confined on this machine, which lacks {'; '.join(unconfined)}"
            if unconfined
            else "other people's blocks can be confined on this machine"
        ),
    )
    if data is not None:
        yield _room(data)
    yield from _server()


def _optional(more: tuple[str, str, str]) -> tuple[bool | None, str]:
    library, option, extra = more
    if importlib.util.find_spec(library) is None:
        return None, f'for `nnsight serve {option}`: pip install "nnsight[{extra}]" (lacking: {library})'
    return True, f"`nnsight serve {option}` has its library, {library}"


def _room(folder: Path) -> tuple[bool, str]:
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK):
        return False, f"{place} cannot be written"
    return free >= _LEAST_FREE, f"{free / 2**30:.1f} GiB free for {folder}"


def _server() -> Iterator[tuple[bool | None, str]]:
    host = CONFIG.API.HOST or stored_login().host
    if not host:
        yield None, "no server is set: `nnsight login --host …`, NDIF_HOST, or CONFIG.API.HOST"
        return
    try:
        info = nnsight.status()
    except NNsightError as error:
        yield False, f"{host}: {error}"
        return
    up = sum(model.running for model in info.models)
    yield True, f"{host} answers, and has {up} of {len(info.models)} models ready"
    here, there = versions(), info.versions
    yield here.protocol == there.protocol, f"protocol {here.protocol} here, {there.protocol} there"
    if here.torch.partition("+")[0] != there.torch.partition("+")[0]:
        yield None, f"torch {here.torch} here, {there.torch} there: numbers may differ in the last digits"
    try:
        yield True, f"the key is that of {nnsight.whoami()}"
    except NNsightError as error:
        yield False, str(error)
