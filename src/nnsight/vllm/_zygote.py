"""The process that forks those of confined blocks: `python -m nnsight.vllm._zygote FD`; it has no weights and no vLLM."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import msgspec

from ..sandbox import JOB, PROBLEM, READY, Pipe, Zygote, missing, summary
from ._blocks import SkeletonModel, run_block
from ._skeleton import ModuleInfo, build


class Setup(msgspec.Struct, forbid_unknown_fields=True):
    """What a zygote is told of the worker: its model, and with how many threads it computes."""

    modules: list[ModuleInfo]
    tokenizer: str
    revision: str | None
    trust_remote_code: bool
    config: dict[str, Any] | None
    threads: int


_setup = msgspec.json.Decoder(Setup)


def main(descriptor: str) -> int:
    """Make the skeleton ready, and fork until the worker is gone."""
    end = socket.socket(fileno=int(descriptor))
    pipe = Pipe(end)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive a fork
    try:
        kind, data = pipe.receive()
    except EOFError:
        return 0
    assert kind == JOB
    try:
        lacking = missing()
        if lacking:
            raise RuntimeError(f"blocks cannot be confined here, where there is no {', no '.join(lacking)}")
        model = _model(_setup.decode(data))
    except Exception as error:
        pipe.send(PROBLEM, summary(error).encode())
        return 1
    pipe.send(READY)
    Zygote(end, model, run_block).serve()
    return 0


def _model(setup: Setup) -> SkeletonModel:
    from transformers import AutoTokenizer

    if setup.trust_remote_code:
        raise RuntimeError("a tokenizer with code of its own (trust_remote_code=) is not run for confined blocks")
    tokenizer = AutoTokenizer.from_pretrained(setup.tokenizer, revision=setup.revision)
    return SkeletonModel(build(setup.modules), tokenizer, _config(setup.config), setup.threads)


def _config(given: dict[str, Any] | None) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**given) if given else None
    except (ValueError, TypeError, KeyError):  # one that transformers does not know by its name
        return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
