"""The engine: the model as a coroutine, served to workers place by place.

The rule of the game: a worker parks on one request at a time; when the model reaches a place, every worker
parked there is served, in the order the blocks were written, until nobody is parked there any more; then
the model goes on with the value as it was left.
"""

from ._aliases import Alias as Alias
from ._aliases import check_gradient as check_gradient
from ._aliases import own_part as own_part
from ._aliases import show_as as show_as
from ._aliases import source_of_gradient as source_of_gradient
from ._call import Call as Call
from ._coroutine import OTHER_THREAD as OTHER_THREAD
from ._coroutine import Coroutine as Coroutine
from ._coroutine import current_pass as current_pass
from ._coroutine import uncounted as uncounted
from ._fakes import Fakes as Fakes
from ._frames import Line as Line
from ._frames import describe_line as describe_line
from ._frames import trim as trim
from ._frames import user_frame as user_frame
from ._frames import user_line as user_line
from ._instrument import Instruments as Instruments
from ._instrument import StillInstruments as StillInstruments
from ._instrument import plain_forward as plain_forward
from ._layouts import Probe as Probe
from ._leaves import leaves_of as leaves_of
from ._leaves import map_leaves as map_leaves
from ._modes import capture_modes as capture_modes
from ._modes import plain_modes as plain_modes
from ._modes import switch_modes as switch_modes
from ._order import path_of as path_of
from ._pass import Override as Override
from ._pass import Pass as Pass
from ._preserve import Attributes as Attributes
from ._preserve import preserved_attributes as preserved_attributes
from ._preserve import preserved_buffers as preserved_buffers
from ._preserve import preserved_random_state as preserved_random_state
from ._rows import Rows as Rows
from ._rows import split_rows as split_rows
from ._run import Run as Run
from ._tensors import map_tensors as map_tensors
from ._tensors import tensors_in as tensors_in
from ._tuples import AssignableTuple as AssignableTuple
from ._tuples import as_assignable as as_assignable
from ._tuples import as_native as as_native
from ._visit import INPUT as INPUT
from ._visit import OUTPUT as OUTPUT
from ._visit import RESULT as RESULT
from ._visit import STEP as STEP
from ._visit import OperationPlace as OperationPlace
from ._visit import Place as Place
from ._visit import Request as Request
from ._visit import Visit as Visit
from ._worker import Worker as Worker
from ._worker import active as active
from ._worker import find_worker as find_worker
from ._worker import worker_of as worker_of
