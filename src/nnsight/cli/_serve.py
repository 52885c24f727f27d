"""`nnsight serve`, `keys`, `status` and `whoami`: running a server, and asking one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import nnsight
from nnsight import CONFIG


def add_server_commands(commands: Any) -> None:
    """Add the commands to a parser's."""
    serve = commands.add_parser("serve", help="serve models to other processes")
    serve.add_argument("models", nargs="+", metavar="MODEL", help="a hub name, with @revision where one is meant")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--api-keys", type=Path, metavar="FILE", help="who may use it; see `nnsight keys`")
    serve.add_argument("--no-auth-on-loopback", action="store_true", help="everybody on this machine may")
    serve.add_argument("--trusted", action="store_true", help="run blocks in the process that holds the model")
    serve.add_argument("--data", type=Path, metavar="FOLDER", help="where the queue and answers are kept")
    serve.add_argument("--dtype", help="the models' dtype: bfloat16, float32, …")
    serve.add_argument("--device-map", help="as `from_pretrained` takes it: auto, cpu, cuda:0, …")
    keys = commands.add_parser("keys", help="make keys for a server")
    keys.add_argument("action", choices=["create"])
    keys.add_argument("name", help="whose key it is")
    keys.add_argument("--file", type=Path, required=True, help="the file that `serve --api-keys` reads")
    for name, text in (("status", "what a server serves"), ("whoami", "whose key this is")):
        asked = commands.add_parser(name, help=text)
        asked.add_argument("--host", help="the server's address; by default NDIF_HOST")


def run_server_command(options: argparse.Namespace) -> None:
    """Run one of the commands."""
    if options.command == "serve":
        _serve(options)
    elif options.command == "keys":
        from nnsight.server import create_key

        print(create_key(options.file, options.name))
    else:
        CONFIG.API.HOST = options.host or CONFIG.API.HOST
        print(nnsight.whoami() if options.command == "whoami" else _status())


def _serve(options: argparse.Namespace) -> None:
    from nnsight.server import serve

    given = {"dtype": options.dtype, "device_map": options.device_map}
    serve(
        options.models,
        host=options.host,
        port=options.port,
        keys=options.api_keys,
        no_auth_on_loopback=options.no_auth_on_loopback,
        trusted=options.trusted,
        data=options.data,
        options={name: value for name, value in given.items() if value is not None},
    )


def _status() -> str:
    info = nnsight.status()
    lines = [f"nnsight {info.versions.nnsight}, torch {info.versions.torch}, transformers {info.versions.transformers}"]
    for model in info.models:
        name = model.name if model.revision is None else f"{model.name}@{model.revision}"
        lines.append(f"{name}: {'running' if model.running else 'loading'}, {model.queued} waiting")
    return "\n".join(lines)
