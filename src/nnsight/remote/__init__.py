"""The client of remote execution."""

from ._apply import bind_names as bind_names
from ._apply import read_answer as read_answer
from ._ask import compare as compare
from ._ask import is_model_running as is_model_running
from ._ask import status as status
from ._ask import whoami as whoami
from ._code import register as register
from ._job import Order as Order
from ._manage import cancel_job as cancel_job
from ._manage import deploy as deploy
from ._manage import evict as evict
from ._manage import find_job as find_job
from ._manage import list_jobs as list_jobs
from ._manage import state_of as state_of
from ._open import open_remote as open_remote
from ._tracer import RemoteTracer as RemoteTracer
from ._tracer import show_failure as show_failure
