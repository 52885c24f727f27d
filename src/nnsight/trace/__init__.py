"""Traces: the `with` blocks in which values are read and changed."""

from ._barrier import Barrier as Barrier
from ._cache import Cache as Cache
from ._cache_parts import cache_of as cache_of
from ._cache_parts import cache_parts as cache_parts
from ._dataflow import Dataflow as Dataflow
from ._dataflow import Deferred as Deferred
from ._edit import Begin as Begin
from ._edit import Edit as Edit
from ._edit import Editing as Editing
from ._edit import InterventionEdit as InterventionEdit
from ._given import Given as Given
from ._given import Prepared as Prepared
from ._gradient import IN_A_TRACE as IN_A_TRACE
from ._save import collecting_saves as collecting_saves
from ._save import save as save
from ._scan import ScanTracer as ScanTracer
from ._session import Session as Session
from ._tracer import Tracer as Tracer
