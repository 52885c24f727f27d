"""Traces: the `with` blocks in which values are read and changed."""

from ._save import save as save
from ._tracer import Tracer as Tracer
