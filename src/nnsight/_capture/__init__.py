"""A with-block's source, taken out of the user's frame as a portable Block and run later."""

from ..errors import CaptureError as CaptureError
from ._block import Block as Block
from ._cache import IdentityCache as IdentityCache
from ._capture import capture as capture
from ._codes import is_same_code as is_same_code
from ._codes import nested_codes as nested_codes
from ._first import names_read_first as names_read_first
from ._names import names_of as names_of
from ._program import bind as bind
from ._scope import Scope as Scope
from ._skip import forget_skip as forget_skip
from ._skip import is_skip as is_skip
from ._skip import skip_body as skip_body
from ._text import dedent as dedent
from ._text import parse as parse

__all__ = [
    "Block",
    "CaptureError",
    "IdentityCache",
    "Scope",
    "bind",
    "capture",
    "dedent",
    "forget_skip",
    "is_same_code",
    "is_skip",
    "names_of",
    "names_read_first",
    "nested_codes",
    "parse",
    "skip_body",
]
