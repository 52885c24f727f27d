"""A with-block's source, taken out of the user's frame as a portable Block and run later."""

from ._block import Block as Block
from ._capture import capture as capture
from ._errors import CaptureError as CaptureError
from ._names import names_of as names_of
from ._program import bind as bind
from ._scope import Scope as Scope
from ._skip import forget_skip as forget_skip
from ._skip import is_skip as is_skip
from ._skip import skip_body as skip_body

__all__ = ["Block", "CaptureError", "Scope", "bind", "capture", "forget_skip", "is_skip", "names_of", "skip_body"]
