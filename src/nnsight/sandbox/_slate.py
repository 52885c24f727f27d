"""Whether a process that has run plain blocks is as it was before, so that it may run another one of the same user."""

from __future__ import annotations

from typing import Any

import torch

from ._together import state_of_model


class Slate:
    """A process that has run nobody's code so far; `is_soiled` once something came of a block that may come once only."""

    def __init__(self, model: Any) -> None:
        self.is_soiled = False
        self._model = model
        self._before = self._state()

    def _state(self) -> Any:
        defaults = torch.get_default_dtype(), torch.get_num_threads(), torch.get_default_device()
        return state_of_model(self._model), defaults, torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def is_clean(self) -> bool:
        """Whether nothing has changed that another job could notice."""
        return not self.is_soiled and self._before == self._state()
