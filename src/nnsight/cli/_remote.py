"""`nnsight status`, `queue`, `logs`, `cancel`, `deploy`, `evict`, `whoami` and `login`: asking a server."""

from __future__ import annotations

import argparse
import getpass
import sys
import time
from typing import Any

import nnsight
from nnsight import CONFIG
from nnsight.config import Login, full_address, store_login
from nnsight.errors import RemoteError
from nnsight.protocol import ENDED
from nnsight.remote import cancel_job, deploy, evict, find_job, list_jobs, state_of

_SHORT = 12  # letters of an id that are shown


def add_remote(commands: Any) -> None:
    """Add the commands to a parser's."""
    for name, run, text in (
        ("status", _status, "what a server serves"),
        ("whoami", _whoami, "whose key this is"),
        ("queue", _queue, "your jobs on a server"),
    ):
        _add(commands, name, run, text)
    for name, run, text in (
        ("cancel", _cancel, "end a job of yours"),
        ("logs", _logs, "what a job of yours has printed, as it comes, and how it ended"),
    ):
        _add(commands, name, run, text).add_argument("job", help="its id, or how that begins")
    for name, run, text in (
        ("deploy", _deploy, "have a server serve another model (administrators)"),
        ("evict", _evict, "have a server serve a model no longer (administrators)"),
    ):
        _add(commands, name, run, text).add_argument("model", help="a hub name, with @revision where one is meant")
    login = _add(commands, "login", _login, "remember a server and your key on it")
    login.add_argument("--key", help="the key; asked for where it is not given")


def _add(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text)
    parser.set_defaults(run=lambda options: _at_host(run, options))
    parser.add_argument("--host", help="the server's address; by default NDIF_HOST, or that of `nnsight login`")
    return parser


def _at_host(run: Any, options: argparse.Namespace) -> None:
    CONFIG.API.HOST = options.host or CONFIG.API.HOST
    run(options)


def _status(_options: argparse.Namespace) -> None:
    info = nnsight.status()
    print(f"nnsight {info.versions.nnsight}, torch {info.versions.torch}, transformers {info.versions.transformers}")
    for model in info.models:
        name = model.name if model.revision is None else f"{model.name}@{model.revision}"
        state = "running" if model.running else f"failing ({model.failure})" if model.failure else "loading"
        state = state if model.tier == "hot" else model.tier
        print(f"{name}: {state}, {model.active} running, {model.queued} waiting")


def _whoami(_options: argparse.Namespace) -> None:
    print(nnsight.whoami())


def _queue(_options: argparse.Namespace) -> None:
    for job in list_jobs():
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.created))
        ahead = f", {job.position} ahead" if job.position else ""
        print(f"{job.id[:_SHORT]}  {when}  {job.model}  {job.status}{ahead}")


def _cancel(options: argparse.Namespace) -> None:
    job = find_job(options.job)
    cancel_job(job)
    state = state_of(job)
    print(f"{job[:_SHORT]} {'is to end' if state.status == 'running' else state.status}")


def _logs(options: argparse.Namespace) -> None:
    job = find_job(options.job)
    state = state_of(job)
    while True:
        for event in state.events:
            text = event.text if event.kind == "print" else f"{event.category.partition(':')[2]}: {event.text}\n"
            print(text, end="", flush=True)
        if state.status in ENDED:
            break
        state = state_of(job, state.next_event, known=state.status)
    if state.error is not None:
        raise RemoteError(f"the job {state.status}: {state.error.text}")
    print(f"[{state.status}]", file=sys.stderr)


def _deploy(options: argparse.Namespace) -> None:
    deploy(options.model)
    print(f"{options.model} is being loaded; `nnsight status` says when it takes jobs")


def _evict(options: argparse.Namespace) -> None:
    evict(options.model)
    print(f"{options.model} is served no longer")


def _login(options: argparse.Namespace) -> None:
    host = options.host or CONFIG.API.HOST or input("server: ").strip()
    given = options.key if options.key is not None else _ask_for_key()
    CONFIG.API.HOST, CONFIG.API_KEY = full_address(host), given or None
    name = nnsight.whoami()
    file = store_login(Login(full_address(host), given or None))
    print(f"{name} at {full_address(host)}, remembered in {file}")


def _ask_for_key() -> str:
    if sys.stdin.isatty():
        return getpass.getpass("key: ").strip()
    return sys.stdin.readline().strip()
