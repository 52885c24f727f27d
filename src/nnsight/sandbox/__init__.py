"""Where a job's block runs."""

from ._execute import execute as execute
from ._failure import describe_failure as describe_failure
from ._failure import summary as summary
