"""The `nnsight` command."""

from ._main import main as main
