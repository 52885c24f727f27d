"""LaneScheduler: vLLM's scheduler, which gives a request with a block its whole prompt in one step."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # pyright: ignore[reportMissingImports]

from ._messages import EXTRA


class LaneScheduler(AsyncScheduler):
    """Prompts with a block wait for a step that has room for all of their tokens; others are cut as before."""

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's own, with those hidden that would be cut, and whoever comes after them."""
        hidden = self._that_would_be_cut() if any(_has_block(request) for request in self.waiting) else []
        if not hidden:
            return super().schedule(*args, **kwargs)
        self.waiting.remove_requests(hidden)
        try:
            return super().schedule(*args, **kwargs)
        finally:
            for request in hidden:
                self.waiting.add_request(request)

    def _that_would_be_cut(self) -> list[Any]:
        left = self.max_num_scheduled_tokens
        for request in self.running:
            left -= min(max(request.num_tokens_with_spec - request.num_computed_tokens, 1), max(left, 0))
        waiting = list(self.waiting)
        for number, request in enumerate(waiting):
            size = request.num_tokens
            if _has_block(request) and size > left:
                return waiting[number:]
            left -= min(size, left)
        return []


def _has_block(request: Any) -> bool:
    params = request.sampling_params
    return params is not None and EXTRA in (params.extra_args or ())
