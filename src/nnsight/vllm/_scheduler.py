"""LaneScheduler: vLLM's scheduler, which gives a request with a block its whole prompt in one step, and never takes it back."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # pyright: ignore[reportMissingImports]

from ._messages import EXTRA
from ._parent import end_with_parent


class LaneScheduler(AsyncScheduler):
    """Prompts with a block wait for a step with room for all of their tokens, and for memory for all that they may generate.

    A request with a block cannot be computed again from its start, since its block has run: so it is let in only where the
    memory holds it to its end beside the others with blocks, and where memory runs out the requests without one make room.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        end_with_parent()  # here, because the engine's process runs nothing else of ours

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's own, with those hidden that would be cut or taken back, and whoever comes after them."""
        self.running.sort(key=lambda request: not _has_block(request))
        hidden = self._to_wait() if any(_has_block(request) for request in self.waiting) else []
        if not hidden:
            return super().schedule(*args, **kwargs)
        self.waiting.remove_requests(hidden)
        try:
            return super().schedule(*args, **kwargs)
        finally:
            for request in hidden:
                self.waiting.add_request(request)

    def _to_wait(self) -> list[Any]:
        tokens = self.max_num_scheduled_tokens
        for request in self.running:
            tokens -= min(max(request.num_tokens_with_spec - request.num_computed_tokens, 1), max(tokens, 0))
        blocks = self.kv_cache_manager.block_pool.num_gpu_blocks - 1  # the first is vLLM's own
        held = [self._blocks_to_its_end(request) for request in self.running if _has_block(request)]
        waiting = list(self.waiting)
        for number, request in enumerate(waiting):
            size = request.num_tokens
            if _has_block(request):
                need = self._blocks_to_its_end(request)
                if size > tokens or (held and need + sum(held) > blocks):
                    return waiting[number:]
                held.append(need)
            tokens -= min(size, tokens)
        return []

    def _blocks_to_its_end(self, request: Any) -> int:
        """The blocks of memory that this request can come to hold: an upper bound, over all groups of layers."""
        most = request.num_prompt_tokens + request.max_tokens + self.num_lookahead_tokens
        most = min(most, self.max_model_len)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        return sum(-(-most // manager.block_size) for manager in managers)


def _has_block(request: Any) -> bool:
    params = request.sampling_params
    return params is not None and EXTRA in (params.extra_args or ())
