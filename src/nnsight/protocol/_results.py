"""Fields for what a run leaves in an object: they do not go with a job, and come back with its answer."""

from __future__ import annotations

import dataclasses
from typing import Any


def results_of(value: Any) -> dict[str, Any]:
    """The values of a dataclass's fields that are marked with `metadata={"travels": "back"}`."""
    if not dataclasses.is_dataclass(value):
        return {}
    fields = [field.name for field in dataclasses.fields(value) if field.metadata.get("travels") == "back"]
    return {name: getattr(value, name, None) for name in fields}
