"""The `nnsight` command line: its commands, their options, and errors as one line with exit code 2."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from nnsight import __version__
from nnsight.errors import NNsightError

from ._demo import run_demo
from ._doctor import add_doctor
from ._remote import add_remote
from ._serve import add_serve

FAILED = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit code.

    Example:
        >>> import contextlib, io
        >>> from nnsight.cli import main
        >>> with contextlib.redirect_stdout(io.StringIO()) as report:
        ...     code = main(["demo", "--out", "figures"])
        >>> code, "figures" in report.getvalue()
        (0, True)

    Args:
        argv: The arguments after the command's name; by default the process's own.

    Returns:
        0, or 2 after an error, which is one line on the standard error.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        _run(argv)
        sys.stdout.flush()
    except (NNsightError, OSError, ImportError, _UsageError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read has gone away
            return 1
        print(f"nnsight: {_one_line(error)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _run(argv: Sequence[str] | None) -> None:
    parser = _parser()
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help()
    else:
        options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="nnsight", description="Read and change what happens inside PyTorch models.")
    parser.add_argument("--version", action="version", version=f"nnsight {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command")
    demo = commands.add_parser(
        "demo",
        help="look inside a small language model",
        description="What a model predicts, layer by layer, and which of its hidden states carry the answer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--prompt", default="The Eiffel Tower is in the city of", help="the prompt to explain")
    demo.add_argument(
        "--corrupted",
        default="The Colosseum is in the city of",
        help="a prompt of as many tokens, to patch into",
    )
    demo.add_argument("--model", default="nnsight/landmarks", help="a hub name or a folder")
    demo.add_argument("--out", type=Path, default=Path("nnsight-demo"), help="the folder for the files")
    demo.set_defaults(run=lambda options: run_demo(options.prompt, options.corrupted, options.model, options.out))
    add_serve(commands)
    add_remote(commands)
    add_doctor(commands)
    return parser


class _UsageError(Exception):
    """Arguments that the command does not take."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message} (see `{self.prog} --help`)")


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename is not None else ""
        return f"{place}{error.strerror}"
    return " ".join(str(error).split())
