"""What is shown of each family, and the tests that show it: `@shows("trace")` runs a test once for every family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from . import FAMILIES, PIPELINES, Family

ROWS = {**FAMILIES, **PIPELINES}

CAPABILITIES = {
    "trace": "without edits the output is the plain model's, bit for bit, and every module's input and output are what "
    "hooks see",
    "edit": "edits in place and by assignment give what the same edits in hooks give, bit for bit",
    "batched": "prompts of 1 to 40 tokens in one batch: in each invoke, every module's input and output equal the single "
    "run's to 1e-5, as do the effects of edits",
    "generate": "greedy generation equals the plain `generate`, with a read and an edit at every step, alone and in a batch",
    "scan": "shapes and dtypes of every module, of a model without weights, are the real ones",
    "vocabulary": "the standard names (`layers`, `resid_pre`, `heads`, …) are there and add up",
    "gradients": "gradients at several places and of all parameters are plain autograd's",
    "edit_model": "`model.edit()` lasts over traces and generations, and leaves the model itself alone",
    "cache": "`tracer.cache()` holds what hooks see, of every call of every module",
    "source": "the operations of the attention's forward can be read and changed",
}


def shows(
    capability: str, only: Callable[[Family], bool] = lambda _: True, of: Mapping[str, Family] = FAMILIES
) -> Callable[[Any], Any]:
    """Run a test for each family that has the capability, and mark it as what shows it."""
    assert capability in CAPABILITIES
    families = [family for family in of.values() if capability not in family.reasons and only(family)]

    def decorate(test: Any) -> Any:
        each = pytest.mark.parametrize("family", families, ids=lambda family: family.name)
        return pytest.mark.capability(capability)(each(test))

    return decorate
