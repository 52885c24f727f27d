"""Where a job's block runs: in this process, or in one that can do nothing else."""

from ._execute import execute as execute
from ._failure import describe_failure as describe_failure
from ._failure import summary as summary
from ._jail import Allowance as Allowance
from ._jail import confine as confine
from ._jail import missing as missing
from ._pipe import ANSWER as ANSWER
from ._pipe import BEGUN as BEGUN
from ._pipe import EVENT as EVENT
from ._pipe import FORK as FORK
from ._pipe import JOB as JOB
from ._pipe import JOBS as JOBS
from ._pipe import KILL as KILL
from ._pipe import LOAD as LOAD
from ._pipe import PROBLEM as PROBLEM
from ._pipe import READY as READY
from ._pipe import STOPPED as STOPPED
from ._pipe import WARM as WARM
from ._pipe import Pipe as Pipe
from ._rebuild import Files as Files
from ._together import can_share as can_share
from ._together import execute_together as execute_together
from ._zygote import Zygote as Zygote
from ._zygote import environment as environment
from ._zygote import give_up as give_up
from ._zygote import warm as warm
