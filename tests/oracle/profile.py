"""How many examples are drawn: the same ones in every run, or more and other ones in the long profile.

The long profile: `NNSIGHT_ORACLE=long pytest tests/oracle`.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

LONG = os.environ.get("NNSIGHT_ORACLE") == "long"


def profile(examples: int) -> settings:
    return settings(
        max_examples=examples * (25 if LONG else 1),
        derandomize=not LONG,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
