"""VLLM: a model in a vLLM engine, traced like any other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..errors import EngineError, InputError
from ..modeling import LanguageModel, open_elsewhere
from ..remote import Order
from ._client import RUNNER, Client
from ._requests import prompt_of, sampling_of
from ._runners import limits_of
from ._sent import EngineTracer

_EXTENSION = "nnsight.vllm._extension.WorkerExtension"
_SCHEDULER = "nnsight.vllm._scheduler.LaneScheduler"
_OURS = ("worker_extension_cls", "scheduler_cls")
_BOTH = ("revision", "trust_remote_code")  # what is asked of the hub here too
VERSIONS = ((0, 32), (0, 33))  # of vLLM: from, and before


class VLLM(LanguageModel):
    """A language model served by vLLM; blocks run in the engine's worker, on the tokens of their own request.

    A block sees values as `LanguageModel` shows them, `[1, pos, …]`: at the first step those of the whole prompt, at each
    later one those of one token.  There are the modules of vLLM's model, by its names, and the standard vocabulary:
    `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`, `logits`; and `samples`, the token that was sampled.
    What leaves a block is saved, as in a trace elsewhere; gradients there are none.

    Every invoke is a request of its own, computed in one batch with whatever else the engine has.

    Example:
        >>> from nnsight.modeling.vllm import VLLM                              # doctest: +SKIP
        >>> model = VLLM("gpt2", tensor_parallel_size=1, dispatch=True)         # doctest: +SKIP
        >>> with model.trace("Hello", temperature=0.0, max_tokens=5) as tracer:  # doctest: +SKIP
        ...     logits = list().save()
        ...     with tracer.iter[:]:
        ...         logits.append(model.logits.output)

    Args:
        model: A name on the hub, or a local folder.
        dispatch: Start the engine now; otherwise the first trace does.
        confined: Run blocks in confined processes, which reach nothing but the values of their own requests: for blocks of
            others. The weights and ad-hoc calls of modules are not there for them. A mapping sets limits: `reply` (seconds
            a block may take for one value, 5), `total` (60), `memory` (bytes, 4 GiB).
        **options: The engine's arguments: `dtype`, `max_model_len`, `gpu_memory_utilization`, `enforce_eager`, ….

    Raises:
        InputError: An option cannot be had.
        EngineError: vLLM is missing, or of a version that is not known.
    """

    _engine = "vllm"

    def __init__(
        self, model: str, *, dispatch: bool = False, confined: bool | Mapping[str, float] = False, **options: Any
    ) -> None:
        _check(model, options)
        if confined and options.get("tensor_parallel_size", 1) != 1:
            raise InputError(
                "confined= is for engines of one worker: tensor_parallel_size= other than 1 cannot be had."
            )
        self._limits = limits_of(confined) if confined else None
        self._confined: Any = None  # the running engine that is ready for it
        super().__init__(model, **{name: options[name] for name in _BOTH if name in options})
        extra = {"worker_extension_cls": _EXTENSION, "scheduler_cls": _SCHEDULER, "enforce_eager": True}
        assert self._source is not None
        self._client = Client(str(self._source.location), {**extra, **options})
        if dispatch:
            self.dispatch()

    def dispatch(self) -> VLLM:
        """Start the engine, if it does not run yet, or has died."""
        _check_version()
        self._client.start()
        running = self._client.running()
        if self._limits is not None and self._confined is not running:
            running.submit(running.ask("nnsight_confine", self._limits)).result()
            self._confined = running
        return self

    def close(self) -> None:
        """End the engine; traces that it still computes fail, and the next one starts it again."""
        self._client.close()

    def trace(
        self,
        *inputs: Any,
        trace: bool = True,
        blocking: bool = True,
        strict_order: bool = False,
        remote: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run prompts in the engine, with a block for each.

        Args:
            *inputs: One text, token ids or chat messages; or none, and invokes in the block.
            trace: False gives vLLM's own output.
            blocking: False makes the tracer of a `with` a handle of what was sent: `await tracer` gives the saved values by
                name, `async for piece in tracer.stream()` the tokens as they come, `tracer.cancel()` ends it.
            strict_order: As for `LanguageModel`; nothing is computed a second time here.
            remote: True sends the block to `nnsight serve MODEL --engine vllm`, as `LanguageModel` sends its own; no engine is
                started here. `timeout=` says how many seconds the job may take.
            **kwargs: Sampling parameters of vLLM: `temperature`, `max_tokens`, `top_p`, `seed`, …; by default greedy
                and one token, as a trace elsewhere.

        Returns:
            A tracer to use in a `with` or, in an event loop, an `async with` statement.

        Raises:
            InputError: The prompt or a sampling parameter cannot be had.
            EngineError: The engine has died; `dispatch()` starts it again.
        """
        if "backend" in kwargs:
            raise InputError("backend= is for LanguageModel: use remote=True, and the address of a server.")
        if remote:
            kwargs |= {"trace": trace, "blocking": blocking}
            return self._send("trace", inputs, kwargs, strict_order=strict_order)
        _check_version()
        self._client.running()
        if not trace:
            return self._run_plainly(inputs, kwargs)
        order = Order(self, "vllm", None, "trace", inputs, kwargs, strict_order, 0.0, solo=True)
        return EngineTracer(self, order, blocking=blocking)

    def generate(self, *inputs: Any, **kwargs: Any) -> Any:
        """As `trace`, of as many tokens as vLLM gives by default."""
        return self.trace(*inputs, **{"max_tokens": 16, **kwargs})

    def session(self, *, remote: bool = False, **options: Any) -> Any:
        """Traces that belong together; with `remote=True` the whole block runs on the server, as one job."""
        return self._send("session", (), options, strict_order=False) if remote else super().session(**options)

    def _send(self, method: str, inputs: tuple[Any, ...], kwargs: dict[str, Any], *, strict_order: bool) -> Any:
        if "solo" in kwargs:
            raise InputError("solo= is for LanguageModel: an engine always computes its requests together.")
        return open_elsewhere(self, method, inputs, {"remote": True, **kwargs}, strict_order)

    def _run_plainly(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(inputs) != 1:
            raise InputError("trace=False takes one prompt, or a list of them.")
        several = isinstance(inputs[0], list) and inputs[0] and isinstance(inputs[0][0], (str, list))
        prompts = inputs[0] if several else [inputs[0]]
        requests = [(prompt_of(prompt, self.tokenizer), sampling_of(kwargs)) for prompt in prompts]
        running = self._client.running()
        outputs = running.submit(running.complete(requests))
        try:
            return outputs.result()
        except BaseException:  # an interrupt, too, takes them out of the engine
            outputs.cancel()
            raise


def _check(model: str, options: Mapping[str, Any]) -> None:
    if not isinstance(model, str):
        raise InputError("VLLM takes the name of a model or a folder: vLLM has classes of its own for the modules.")
    for name in _OURS:
        if name in options:
            raise InputError(f"{name}= is what VLLM itself uses to reach the engine, and cannot be given.")
    if os.environ.get(RUNNER, "0") != "0":
        raise InputError(
            f"{RUNNER} asks for vLLM's second model runner, which is not supported: unset it, or set it to 0."
        )
    if options.get("pipeline_parallel_size", 1) != 1:
        raise InputError("pipeline_parallel_size= other than 1 is not supported: a block runs where all layers are.")
    if not options.get("enforce_eager", True):
        raise InputError("enforce_eager=False compiles the model, and blocks would see nothing of it.")
    if options.get("speculative_config"):
        raise InputError("speculative_config= is not supported: a block would see tokens that are thrown away.")


def _check_version() -> None:
    try:
        import vllm  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise EngineError('VLLM needs vLLM: pip install "nnsight[vllm]" (see docs/vllm.md).') from error
    numbers = tuple(int(part) for part in vllm.__version__.split("+")[0].split(".")[:2])
    if not VERSIONS[0] <= numbers < VERSIONS[1]:
        low, high = (".".join(map(str, version)) for version in VERSIONS)
        raise EngineError(f"vLLM {vllm.__version__} is not supported: install a release from {low} on, before {high}.")
