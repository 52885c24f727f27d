"""How many examples are drawn: the same ones in every run, or more and other ones in the long profile.

The long profile draws 25 times as many, or as often as the variable says, from a seed of its own or a given one:

    NNSIGHT_ORACLE=long pytest tests/oracle
    NNSIGHT_ORACLE=5 pytest tests/oracle -k gradients --hypothesis-seed=7
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

ASKED = os.environ.get("NNSIGHT_ORACLE", "")
LONG = bool(ASKED)
TIMES = 25 if ASKED == "long" else int(ASKED or 1)


def profile(examples: int) -> settings:
    return settings(
        max_examples=examples * TIMES,
        derandomize=not LONG,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
