"""The client of remote execution."""

from ._ask import compare as compare
from ._ask import is_model_running as is_model_running
from ._ask import status as status
from ._ask import whoami as whoami
from ._code import register as register
from ._open import open_remote as open_remote
from ._tracer import RemoteTracer as RemoteTracer
