"""The operations inside a function: named, printed, and routed through a dispatch.

An *operation* is a call that the function makes in its own body: the bodies of nested functions, lambdas and
classes are not part of it, comprehensions are. Nothing here changes the function or the module it belongs to.
"""

from ._callee import callee_of as callee_of
from ._function import FunctionSource as FunctionSource
from ._instrument import Dispatch as Dispatch
from ._instrument import analyse as analyse
from ._instrument import instrument as instrument
from ._intercept import Interception as Interception
from ._intercept import intercept as intercept
from ._operations import Operation as Operation

__all__ = [
    "Dispatch",
    "FunctionSource",
    "Interception",
    "Operation",
    "analyse",
    "callee_of",
    "instrument",
    "intercept",
]
