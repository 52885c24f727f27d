"""`nnsight serve` and `nnsight keys`: running a server, and who may use it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nnsight.errors import InputError


def add_serve(commands: Any) -> None:
    """Add the commands to a parser's."""
    serve = commands.add_parser("serve", help="serve models to other processes")
    serve.set_defaults(run=_serve)
    serve.add_argument("models", nargs="*", metavar="MODEL", help="a hub name, with @revision where one is meant")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--api-keys", type=Path, metavar="FILE", help="who may use it; see `nnsight keys`")
    serve.add_argument("--no-auth-on-loopback", action="store_true", help="everybody on this machine may")
    serve.add_argument("--trusted", action="store_true", help="run blocks in the process that holds the model")
    serve.add_argument("--data", type=Path, metavar="FOLDER", help="where the queue and answers are kept")
    serve.add_argument("--replicas", type=int, default=1, metavar="N", help="processes that hold each model")
    _add_places(serve)
    serve.add_argument(
        "--memory-budget", type=float, metavar="GIB", help="weights of all models together; they are loaded on demand"
    )
    serve.add_argument("--warm", type=int, default=1, metavar="N", help="unloaded models that keep their processes")
    limits = serve.add_argument_group("what one user may take")
    limits.add_argument("--job-seconds", type=int, metavar="N", help="how long a job may run")
    limits.add_argument("--job-memory", type=int, metavar="MIB", help="memory of a confined job, beyond the model")
    limits.add_argument("--user-jobs", type=int, metavar="N", help="jobs of one user that wait or run")
    limits.add_argument("--keep", type=int, metavar="SECONDS", help="how long answers are kept")
    serve.add_argument("--dtype", help="the models' dtype: bfloat16, float32, …")
    serve.add_argument("--device-map", help="as `from_pretrained` takes it: auto, cpu, cuda:0, …")
    engine = serve.add_argument_group("an engine, for many jobs at a time and completions beside them")
    engine.add_argument("--engine", choices=["vllm"], help="what computes the models; see docs/vllm.md")
    engine.add_argument("--max-model-len", type=int, metavar="N", help="tokens of prompt and continuation")
    engine.add_argument("--tensor-parallel-size", type=int, metavar="N", help="over how many devices a model is cut")
    engine.add_argument("--gpu-memory-utilization", type=float, metavar="PART", help="how much of a device is used")
    engine.add_argument(
        "--engine-option", action="append", default=[], metavar="NAME=VALUE", help="another argument of vLLM's engine"
    )
    _add_keys(commands)


def _add_places(serve: argparse.ArgumentParser) -> None:
    places = serve.add_argument_group("beyond this machine (each needs its extra: nnsight[ray], [postgresql], [s3])")
    places.add_argument("--ray", metavar="ADDRESS", help="replicas in a Ray cluster: local, auto, or its address")
    places.add_argument(
        "--replica-cpus", type=float, default=1.0, metavar="N", help="what Ray sets aside for a replica"
    )
    places.add_argument("--replica-gpus", type=float, default=0.0, metavar="N", help="the same; with --trusted")
    places.add_argument(
        "--database", metavar="URL", help="the queue, for several servers: postgresql+psycopg://user@host/name"
    )
    places.add_argument(
        "--results", metavar="URL", help="where the bytes of jobs and answers are kept: s3://bucket/folder"
    )


def _add_keys(commands: Any) -> None:
    keys = commands.add_parser("keys", help="who may use a server").add_subparsers(dest="action", required=True)
    create = keys.add_parser("create", help="make a key, and print it")
    create.set_defaults(run=_create)
    create.add_argument("name", help="whose key it is")
    create.add_argument("--admin", action="store_true", help="who has it may deploy and evict models")
    create.add_argument("--priority", type=int, default=0, metavar="N", help="jobs of the highest go first")
    revoke = keys.add_parser("revoke", help="take the keys of a user out")
    revoke.set_defaults(run=_revoke)
    revoke.add_argument("name", help="whose keys")
    shown = keys.add_parser("list", help="whose keys there are")
    shown.set_defaults(run=_list)
    for action in (create, revoke, shown):
        action.add_argument("--file", type=Path, required=True, help="the file that `serve --api-keys` reads")


def _serve(options: argparse.Namespace) -> None:
    from nnsight.server import Budget, Limits, serve

    memory = None if options.job_memory is None else options.job_memory * 2**20
    wanted = {"seconds": options.job_seconds, "memory": memory, "queued": options.user_jobs, "keep": options.keep}
    given = {"dtype": options.dtype, "device_map": options.device_map}
    given |= _engine_options(options)
    serve(
        options.models,
        host=options.host,
        port=options.port,
        keys=options.api_keys,
        no_auth_on_loopback=options.no_auth_on_loopback,
        trusted=options.trusted,
        data=options.data,
        options={name: value for name, value in given.items() if value is not None},
        replicas=options.replicas,
        ray=options.ray,
        resources={"CPU": options.replica_cpus} | ({"GPU": options.replica_gpus} if options.replica_gpus else {}),
        database=options.database,
        results=options.results,
        budget=None
        if options.memory_budget is None
        else Budget(int(options.memory_budget * 2**30), max(options.warm, 0)),
        engine=options.engine or "",
        limits=Limits(**{name: value for name, value in wanted.items() if value is not None}),
    )


_ENGINE = ("max_model_len", "tensor_parallel_size", "gpu_memory_utilization")


def _engine_options(options: argparse.Namespace) -> dict[str, Any]:
    found = {name: getattr(options, name) for name in _ENGINE if getattr(options, name) is not None}
    for text in options.engine_option:
        name, is_option, value = text.partition("=")
        if not is_option:
            raise InputError(f"--engine-option takes NAME=VALUE, as max_num_seqs=64, not {text!r}.")
        found[name.replace("-", "_")] = _value(value)
    if options.engine and options.device_map:
        raise InputError("--device-map is for models without --engine: vLLM has --tensor-parallel-size.")
    if found and not options.engine:
        raise InputError(f"{', '.join(found)}: an option of an engine, which --engine vllm asks for.")
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _create(options: argparse.Namespace) -> None:
    from nnsight.server import create_key

    print(create_key(options.file, options.name, admin=options.admin, priority=options.priority))


def _revoke(options: argparse.Namespace) -> None:
    from nnsight.server import revoke_keys

    count = revoke_keys(options.file, options.name)
    print(f"{count} key{'' if count == 1 else 's'} of {options.name} revoked")


def _list(options: argparse.Namespace) -> None:
    from nnsight.server import list_users

    for user in list_users(options.file):
        rights = ["administrator"] if user.admin else []
        rights += [f"priority {user.priority}"] if user.priority else []
        print("  ".join([user.name, ", ".join(rights)]).rstrip())
