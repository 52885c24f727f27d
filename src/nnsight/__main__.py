"""`python -m nnsight`: the same as the `nnsight` command."""

import sys

from .cli import main

sys.exit(main())
